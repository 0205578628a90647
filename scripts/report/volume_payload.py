# SPDX-License-Identifier: Apache-2.0
"""Images and masks of a case as the volumes of the page's viewer (NiiVue): gzip and base64."""

from __future__ import annotations

import base64
import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.report.overlay import Volumes

MAX_VOXELS = 6_000_000  # per volume; a larger grid is thinned out, every 2nd voxel, or 3rd ..., of the longest axes
LIBRARY = Path(__file__).parents[2] / "build" / "viewer" / "niivue.js"  # `make viewer` writes it
LIBRARY_VARIABLE = "REPORT_VIEWER"
_DICOM_TO_NIFTI = np.diag([-1.0, -1.0, 1.0, 1.0])  # left and posterior against right and anterior


def viewer_library() -> str | None:
    """The text of NiiVue, from ``make viewer`` or the file that ``REPORT_VIEWER`` names; None where there is none.

    An empty ``REPORT_VIEWER`` means none.

    Raises:
        FileNotFoundError: ``REPORT_VIEWER`` names no file.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named == "":
        return None
    path = Path(named) if named else LIBRARY
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if named:
        raise FileNotFoundError(
            f"{LIBRARY_VARIABLE} names {named}, which does not exist. Run `make viewer`, or unset it."
        )
    return None


def thinning(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Steps per axis that leave at most ``MAX_VOXELS`` voxels; the longest axis is thinned first."""
    steps = [1] * len(shape)
    while np.prod([-(-n // step) for n, step in zip(shape, steps, strict=True)]) > MAX_VOXELS:
        steps[int(np.argmax([n / step for n, step in zip(shape, steps, strict=True)]))] += 1
    return tuple(steps)


def volume_payload(images: Volumes, masks: Volumes, affine: NDArray[Any]) -> dict[str, Any]:
    """What the viewer loads of a case.

    Args:
        images: in the view grid.
        masks: masks of values in the view grid.
        affine: from indices of the view grid to mm in the axes of DICOM.

    Returns:
        ``images``: NIfTI files with 16 bits per voxel; ``masks``: bytes, the first axis fastest; both with gzip and
        base64. ``steps``: of the view grid per axis.
    """
    steps = thinning(next(iter(masks.values())).shape)
    thin = tuple(slice(None, None, step) for step in steps)
    scaled = affine @ np.diag([*steps, 1.0])
    return {
        "steps": list(steps),
        "images": {name: _nifti(image[thin], scaled) for name, image in images.items()},
        "masks": {name: _packed(np.asarray(mask[thin], np.uint8).tobytes("F")) for name, mask in masks.items()},
    }


def _nifti(image: NDArray[Any], affine: NDArray[Any]) -> str:
    import nibabel as nib

    finite = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    file = nib.Nifti1Image(finite, _DICOM_TO_NIFTI @ affine)
    file.header.set_data_dtype(np.int16)
    file.header.set_xyzt_units("mm")
    return _packed(file.to_bytes())


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 5, mtime=0)).decode()
