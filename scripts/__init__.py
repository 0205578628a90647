# SPDX-License-Identifier: Apache-2.0
"""Multi-teacher knowledge distillation for 3D multimodal medical image segmentation, as a MONAI bundle."""

from __future__ import annotations

from pathlib import Path


def bundle_root() -> str:
    """The bundle's folder, wherever the working directory is: the configs' default for ``bundle_root``."""
    return str(Path(__file__).resolve().parent.parent)
