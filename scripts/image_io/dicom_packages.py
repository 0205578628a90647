# SPDX-License-Identifier: Apache-2.0
"""The optional packages for DICOM, which keep to themselves what they read."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

PACKAGES = {"pydicom": "pydicom", "highdicom": "highdicom", "rt_utils": "rt-utils"}  # module -> name for pip


def dicom_package(module: str) -> Any:
    """A module of one of ``PACKAGES``, whose log stays silent below errors: warnings quote names and ids of patients.

    Raises:
        ValueError: it is not installed, or a library that it wants is not on the system.
    """
    top = module.partition(".")[0]
    try:
        found = import_module(module)
    except ImportError as error:
        if error.name != top:  # as OpenCV, which rt-utils brings, where there is no libGL
            raise ValueError(
                f"{PACKAGES[top]} does not load ({error}): install the library that is named, such as libgl1 by apt."
            ) from error
        raise ValueError(f'{PACKAGES[top]} is not installed: pip install ".[dicom]".') from error
    logging.getLogger(top).setLevel(logging.ERROR)
    return found
