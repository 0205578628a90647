# SPDX-License-Identifier: Apache-2.0
"""Import the optional DICOM packages, without log messages that quote patient data."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

PIP_NAMES = {  # by module
    **{"pydicom": "pydicom", "highdicom": "highdicom"},
    **{"dicomweb_client": "dicomweb-client", "requests": "dicomweb-client"},
}


def dicom_package(module: str) -> Any:
    """Import a module of one of the packages in ``PIP_NAMES``.

    The package's log is limited to errors, because its warnings quote names and ids of patients.

    Raises:
        ValueError: the package, or a system library that it needs, is not installed.
    """
    package = module.partition(".")[0]
    try:
        imported = import_module(module)
    except ImportError as error:
        if error.name != package:  # a dependency of the package, or one of its libraries
            raise ValueError(f"{PIP_NAMES[package]} cannot be loaded ({error}). Install what is missing.") from error
        raise ValueError(f'{PIP_NAMES[package]} is not installed. Run: pip install -e ".[dicom]".') from error
    logging.getLogger(package).setLevel(logging.ERROR)
    return imported
