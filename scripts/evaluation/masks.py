# SPDX-License-Identifier: Apache-2.0
"""Foreground of masks on disk, with reference and prediction on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.reader import read_itk
from scripts.report.case_images import resample_to_grid


def foreground_mask(image: sitk.Image, labels: Sequence[Sequence[float]], source: str) -> np.ndarray:
    """Foreground of a mask: every class but the first.

    Args:
        image: the mask.
        labels: per class the values that mean it.
        source: path of the mask, for the error.

    Returns:
        Booleans, as z y x.

    Raises:
        ValueError: the mask holds values that ``labels`` does not list.
    """
    values = sitk.GetArrayFromImage(image)
    listed = {value for class_values in labels for value in class_values}
    unlisted = sorted(set(np.unique(values).tolist()) - listed)
    if unlisted:
        shown = ", ".join(f"{value:.7g}" for value in unlisted[:5])
        raise ValueError(
            f"{source} contains the values {shown}, which are not in the data set's mapping {list(labels)}. Correct "
            "the file or the config's `labels`."
        )
    return np.isin(values, [value for class_values in labels[1:] for value in class_values])


def read_on_grid(path: Path, grid: sitk.Image, rules: Rules) -> sitk.Image:
    """A predicted mask on the grid of its reference, by nearest neighbour.

    Raises:
        ValueError: the file cannot be read.
        OSError: likewise.
    """
    return resample_to_grid(read_itk(path, rules), grid, sitk.sitkNearestNeighbor)
