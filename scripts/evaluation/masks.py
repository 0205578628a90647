# SPDX-License-Identifier: Apache-2.0
"""Classes of masks on disk, with reference and prediction on one grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.reader import read_itk
from scripts.report.case_images import resample_to_grid
from scripts.runtime.label_values import Labels, class_indices
from scripts.runtime.regions import IGNORED, mask_values, region_classes, region_values


class MaskCoding(NamedTuple):
    """What the values of masks mean.

    Attributes:
        labels: per class the values of reference masks, the background first.
        regions: name -> values of reference masks; by default one region for each foreground class.
        ignore: value of reference masks whose voxels count as background in both masks; None if there is none.
        mask_values: what predictions hold: ``"file"``, values in ``labels``, or ``"index"``, class indices.
    """

    labels: Labels
    regions: Mapping[str, Sequence[float]] | None = None
    ignore: float | None = None
    mask_values: str = "file"

    @property
    def region_classes(self) -> dict[str, list[int]]:
        """The classes of each region."""
        return region_classes(self.labels, None, self.regions)

    @property
    def predicted_regions(self) -> dict[str, list[float]]:
        """The values of each region in predictions."""
        if self.mask_values == "index":
            return {name: [*map(float, members)] for name, members in self.region_classes.items()}
        return region_values(self.labels, None, self.regions)

    @property
    def predicted_background(self) -> float:
        """A value of predictions that means background."""
        return mask_values(self.labels, self.mask_values)[0]


def reference_classes(image: sitk.Image, coding: MaskCoding, source: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The classes of a reference mask.

    Args:
        image: the mask.
        coding: what its values mean.
        source: path of the mask, for the error.

    Returns:
        Class indices (uint8) as z y x, and where the mask holds ``ignore``; None where nothing is ignored.

    Raises:
        ValueError: the mask holds values that ``coding`` does not list.
    """
    classes = class_indices(sitk.GetArrayViewFromImage(image), coding.labels, source, coding.ignore)
    if coding.ignore is None:
        return classes, None
    ignored = classes == IGNORED
    classes[ignored] = 0
    return classes, ignored


def predicted_classes(
    image: sitk.Image, coding: MaskCoding, source: str, ignored: np.ndarray | None = None
) -> np.ndarray:
    """The classes of a predicted mask on the grid of its reference.

    Args:
        image: the mask.
        coding: what its values mean.
        source: path of the mask, for the error.
        ignored: voxels that become background, from ``reference_classes``.

    Returns:
        Class indices (uint8), as z y x.

    Raises:
        ValueError: the mask holds values that ``coding`` does not list.
    """
    values = sitk.GetArrayViewFromImage(image)
    if ignored is not None:  # a mask may hold anything there, such as the value of the label
        values = np.where(ignored, coding.predicted_background, values)
    indices = [[index] for index in range(len(coding.labels))]
    if coding.mask_values == "file":
        hint = 'These are class indices: set "mask_values": "index".'
        return class_indices(values, coding.labels, source, others=indices, hint=hint)
    hint = 'These are values of the label files: set "mask_values": "file".'
    return class_indices(values, indices, source, others=coding.labels, hint=hint)


def read_on_grid(path: Path, grid: sitk.Image, rules: Rules, background: float = 0) -> sitk.Image:
    """A predicted mask on the grid of its reference, by nearest neighbour.

    Args:
        path: of the mask.
        grid: the reference.
        rules: which files are accepted.
        background: value of voxels of the grid that lie outside of the mask.

    Raises:
        ValueError: the file cannot be read.
        OSError: likewise.
    """
    return resample_to_grid(read_itk(path, rules), grid, sitk.sitkNearestNeighbor, background)
