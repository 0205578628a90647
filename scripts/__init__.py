# SPDX-License-Identifier: Apache-2.0
"""Multi-teacher knowledge distillation for 3D multimodal medical image segmentation, as a MONAI bundle."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# No statistics leave this machine. OpenVINO and NNCF send theirs as soon as they are imported, unless this package of
# theirs is missing; Python takes a module that is None for missing. MLflow asks for the variable.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
os.environ.setdefault("DO_NOT_TRACK", "true")


def bundle_root() -> str:
    """The bundle's folder, wherever the working directory is: the configs' default for ``bundle_root``."""
    return str(Path(__file__).resolve().parent.parent)
