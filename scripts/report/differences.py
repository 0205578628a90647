# SPDX-License-Identifier: Apache-2.0
"""Why a prediction differs from its reference: a missed part, an extra part, the border, or a wrong region.

The page states the rule, which is ``RULE``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE_MM = 3.0
MISSED, EXTRA, BORDER, WRONG_REGION = "missed part", "extra part", "border", "wrong region"
RULE = (
    "A voxel that only one mask holds counts as border if it lies within {tolerance} of the other mask; else as a "
    "missed part (only in the reference) or as an extra part (only in the prediction). A voxel that both masks hold "
    "in different regions is in a wrong region. The reason is the kind with the largest volume."
)


@dataclass(frozen=True)
class Differences:
    """How two masks differ.

    Args:
        volumes_ml: per kind the volume of the differing voxels; kinds without one are left out.
        centre: array index in the thickest place of the kind with the largest volume; None where the masks agree.
        tolerance_mm: distance up to which a voxel belongs to the border.
    """

    volumes_ml: dict[str, float]
    centre: tuple[int, ...] | None
    tolerance_mm: float

    @property
    def reason(self) -> str:
        """The kind with the largest volume; empty where the masks agree."""
        return max(self.volumes_ml, key=self.volumes_ml.__getitem__, default="")

    @property
    def text(self) -> str:
        """All kinds with their volumes, the largest first."""
        order = sorted(self.volumes_ml, key=self.volumes_ml.__getitem__, reverse=True)
        return ", ".join(f"{kind} {self.volumes_ml[kind]:,.2f} ml" for kind in order) or "no difference"


def tolerance_mm(spacing: Sequence[float]) -> float:
    """Distance up to which a voxel belongs to the border: 3 mm, or the longest side of a voxel if that is larger."""
    return max(TOLERANCE_MM, *map(float, spacing))


def mask_differences(
    prediction: NDArray[Any], reference: NDArray[Any], spacing: Sequence[float], values_matter: bool = False
) -> Differences:
    """Sort the voxels that differ between two masks into kinds.

    Args:
        prediction: predicted mask; what is not 0 is foreground.
        reference: reference mask of the same shape.
        spacing: voxel size in mm, one value per array axis.
        values_matter: whether foreground voxels of different values differ.
    """
    from scipy.ndimage import distance_transform_edt

    near = tolerance_mm(spacing)
    inside = [np.asarray(mask) != 0 for mask in (prediction, reference)]
    corner, box = _bounding_box(inside[0] | inside[1])
    predicted, true = (mask[box] for mask in inside)
    missed, extra = true & ~predicted, predicted & ~true
    far = np.ones(missed.shape, dtype=bool)
    for only, other in ((missed, predicted), (extra, true)):
        if only.any() and other.any():
            far[only] = distance_transform_edt(~other, sampling=spacing)[only] > near
    different = (np.asarray(prediction)[box] != np.asarray(reference)[box]) & predicted & true
    kinds = {
        MISSED: missed & far,
        EXTRA: extra & far,
        BORDER: (missed | extra) & ~far,
        WRONG_REGION: different & bool(values_matter),
    }
    voxel_ml = float(np.prod(spacing)) / 1000
    volumes = {kind: float(voxels.sum() * voxel_ml) for kind, voxels in kinds.items() if voxels.any()}
    if not volumes:
        return Differences({}, None, near)
    largest = np.pad(kinds[max(volumes, key=volumes.__getitem__)], 1)
    depth = distance_transform_edt(largest, sampling=spacing)
    deepest = np.argwhere(depth > depth.max() - 1e-6)
    index = deepest[np.square(deepest - deepest.mean(axis=0)).sum(axis=1).argmin()] - 1
    return Differences(volumes, tuple(int(i) for i in index + corner), near)


def region_sets(mask: NDArray[Any], regions: Mapping[str, Sequence[float]]) -> NDArray[np.int32]:
    """Number the sets of regions to which voxels belong: values of the same regions are no difference.

    Args:
        mask: with the values of the regions.
        regions: name -> values.

    Returns:
        Equal numbers for equal sets; 0 where no region is.
    """
    numbers: dict[tuple[int, ...], int] = {}
    found = np.zeros(np.shape(mask), dtype=np.int32)
    for value in dict.fromkeys(value for values in regions.values() for value in values):
        members = tuple(index for index, values in enumerate(regions.values()) if value in values)
        found[mask == value] = numbers.setdefault(members, len(numbers) + 1)
    return found


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """First corner and slices of the box around a mask; an empty box where there is nothing."""
    slices = []
    for axis in range(mask.ndim):
        covered = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        slices.append(slice(int(covered[0]), int(covered[-1]) + 1) if covered.size else slice(0, 0))
    return tuple(each.start for each in slices), tuple(slices)
