# SPDX-License-Identifier: Apache-2.0
"""Read the images of a case onto the grid of its masks, for the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.reader import read_itk
from scripts.report.overlay import Overlay

logger = logging.getLogger(__name__)

NO_IMAGE = "no image"


def resample_to_grid(image: sitk.Image, grid: sitk.Image, interpolator: int, outside: float = 0) -> sitk.Image:
    """Resample an image onto the grid of another one; an image that is on that grid already is returned as it is.

    Args:
        image: the image.
        grid: any image on the target grid.
        interpolator: of SimpleITK, such as ``sitk.sitkLinear``.
        outside: value of the voxels of the grid that lie outside of the image.
    """
    same_grid = image.GetSize() == grid.GetSize() and all(
        np.allclose(getattr(image, get)(), getattr(grid, get)(), atol=1e-3)
        for get in ("GetOrigin", "GetSpacing", "GetDirection")
    )
    if same_grid:
        return image
    return sitk.Resample(image, grid, sitk.Transform(), interpolator, outside, image.GetPixelID())


def load_overlay(
    title: str,
    images: Mapping[str, tuple[str, int]],
    grid: sitk.Image,
    prediction: np.ndarray,
    reference: np.ndarray | None = None,
    intensity: Mapping[str, Any] | None = None,
    rules: Rules | None = None,
    source: str = "",
    given: Sequence[str] | None = None,
    regions: Mapping[str, Sequence[float]] | None = None,
) -> Overlay:
    """Read the images of a case onto the grid of its masks.

    An image that cannot be read is left out, with a warning in the log.

    Args:
        title: caption: the case id.
        images: path and channel per modality.
        grid: any image on the grid of the masks.
        prediction: predicted mask, as z y x.
        reference: reference mask, as z y x.
        intensity: per modality the ends of the range that is shown; by default percentiles of the image.
        rules: which files are accepted; by default all.
        source: what made the prediction.
        given: modalities that the network was given; by default all.
        regions: name -> values of the masks; by default one region of all that is not 0.
    """
    volumes = {}
    for modality, (path, channel) in images.items():
        try:
            image = sitk.Cast(read_itk(path, rules or Rules(), channel), sitk.sitkFloat32)
        except (ValueError, OSError, RuntimeError) as error:
            logger.warning("%s is not shown in the report: %s", modality, error)
            continue
        volumes[modality.upper()] = sitk.GetArrayFromImage(resample_to_grid(image, grid, sitk.sitkLinear)).T
    volumes = volumes or {NO_IMAGE: np.zeros_like(prediction.T, dtype=np.float32)}
    axcodes = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(grid.GetDirection())
    # A modality that is normalised by its own statistics has a name instead of a range, such as "zscore".
    windows = {key.upper(): value for key, value in (intensity or {}).items() if not isinstance(value, str)}
    reference = None if reference is None else reference.T
    shown = {NO_IMAGE, *(key.upper() for key in given or ())}
    unused = [] if given is None else [name for name in volumes if name not in shown]
    return Overlay(
        title,
        volumes,
        reference,
        prediction.T,
        grid.GetSpacing(),
        axcodes,
        windows,
        source=source,
        unused=unused,
        regions=regions or {},
        case_id=title,
        affine=dicom_affine(grid),
    )


def dicom_affine(grid: sitk.Image) -> np.ndarray:
    """4 x 4, from indices x y z to mm in the axes of DICOM, which are those of SimpleITK."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(grid.GetDirection(), (3, 3)) * np.asarray(grid.GetSpacing())
    affine[:3, 3] = grid.GetOrigin()
    return affine
