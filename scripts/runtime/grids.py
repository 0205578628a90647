# SPDX-License-Identifier: Apache-2.0
"""Grids of voxels in space: the network's grid, boxes, and grids that differ only in the order of their voxels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from scripts.image_io.headers import LPS_TO_RAS, Affine

TOLERANCE = 1e-3  # voxels; grids closer than this are equal


class OwnGrid(NamedTuple):
    """The grid of a case's reference image, on which the mask is written.

    Attributes:
        affine, shape: of the whole image, voxel to world in mm.
        start: first voxel of the part that is segmented.
        part: shape of that part.
        part_affine: affine of that part.
    """

    affine: Affine
    shape: tuple[int, ...]
    start: tuple[int, ...]
    part: tuple[int, ...]
    part_affine: Affine


def network_grid(affine: Affine, shape: Sequence[int], spacing: Sequence[float]) -> tuple[Affine, tuple[int, ...]]:
    """The RAS grid that covers a volume at a spacing, by the rule of MONAI's ``Spacing``.

    Its axes are those of the volume without shear. It starts at the volume's first corner; a sheared volume has no
    such corner, and there the centres coincide.

    Args:
        affine: of the volume, voxel to world in mm.
        shape: of the volume.
        spacing: of the grid, in mm per axis.

    Returns:
        The grid's affine and shape.
    """
    axes = nib.orientations.io_orientation(affine)
    ras_affine = affine @ nib.orientations.inv_ornt_aff(axes, shape)
    size = np.array([shape[int(np.flatnonzero(axes[:, 0] == axis)[0])] for axis in range(3)], dtype=float)
    scale_and_shear = np.linalg.cholesky(ras_affine[:3, :3].T @ ras_affine[:3, :3]).T
    rotation = ras_affine[:3, :3] @ np.linalg.inv(scale_and_shear)
    grid = np.eye(4)
    grid[:3, :3] = rotation @ np.diag(np.sign(np.diag(scale_and_shear)) * np.asarray(spacing, dtype=float))
    ends = np.array(np.meshgrid(*([0.0, length - 1.0] for length in size), indexing="ij")).reshape(3, -1)
    corners = np.concatenate([ends, np.ones_like(ends[:1])])
    on_grid = (np.linalg.solve(grid, ras_affine) @ corners)[:3]
    new_size = np.round(np.ptp(on_grid, axis=1) + 1.0)
    lies_first = np.abs((on_grid[:, None, :] - on_grid[:, :, None]).min(axis=2)).max(axis=0) <= 1e-8
    if lies_first.any():
        grid[:3, 3] = (ras_affine @ corners)[:3, int(lies_first.argmax())]
    else:
        grid[:3, 3] = ras_affine[:3, :3] @ (size / 2) + ras_affine[:3, 3] - grid[:3, :3] @ (new_size / 2)
    return grid, tuple(int(n) for n in new_size)


def axis_moves(matrix: Affine, source: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """The axes to permute and then to flip, if that maps one grid onto the other; else None.

    Args:
        matrix: voxels of the new grid to voxels of the source, 4 x 4.
        source: shape of the source.
        shape: of the new grid.
    """
    rotation = np.rint(matrix[:3, :3])
    deviation = np.abs(matrix[:3, :3] - rotation) @ np.array(shape)
    is_permutation = (np.abs(rotation).sum(0) == 1).all() and (np.abs(rotation).sum(1) == 1).all()
    if not is_permutation or (deviation > TOLERANCE).any():
        return None
    order = [int(axis) for axis in np.abs(rotation).argmax(0)]  # source axis of each target axis
    flipped = [axis for axis in range(3) if rotation[order[axis], axis] < 0]
    start = np.zeros(3)
    for axis in flipped:
        start[order[axis]] = source[order[axis]] - 1
    if (np.abs(matrix[:3, 3] - start) > TOLERANCE).any() or [source[axis] for axis in order] != list(shape):
        return None
    return order, flipped


def box_bounds(affine: Affine, shape: Sequence[int], box: Sequence[float]) -> tuple[Affine, Affine]:
    """The first voxels inside a box and the first ones behind it.

    Args:
        affine, shape: of the image.
        box: ``x1 y1 z1 x2 y2 z2`` in mm, LPS.
    """
    lps = np.asarray(box, dtype=float).reshape(2, 3)
    corners = np.stack(np.meshgrid(*(lps @ LPS_TO_RAS[:3, :3]).T, indexing="ij"), -1).reshape(-1, 3)
    voxels = (corners - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    low = np.clip(np.floor(voxels.min(0)), 0, shape).astype(int)
    return low, np.clip(np.ceil(voxels.max(0)) + 1, 0, shape).astype(int)


def own_grid(item: Mapping[Hashable, Any], affine: Affine, shape: Sequence[int]) -> OwnGrid:
    """The grid of an item's reference image, and the part of it that the item's ``bbox_mm`` keeps.

    Args:
        item: of a data list; without ``bbox_mm`` the part is the whole image.
        affine, shape: of the image.

    Raises:
        ValueError: the box lies outside the image.
    """
    affine, shape = np.asarray(affine, dtype=np.float64), tuple(int(n) for n in shape[:3])
    if "bbox_mm" not in item:
        return OwnGrid(affine, shape, (0, 0, 0), shape, affine)
    low, high = box_bounds(affine, shape, item["bbox_mm"])
    if (high <= low).any():
        raise ValueError(
            f"Case {item.get('case_id')}: its bounding box lies outside {item['image']}. Correct bbox_mm (mm, LPS)."
        )
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ low
    return OwnGrid(affine, shape, tuple(int(n) for n in low), tuple(int(n) for n in high - low), moved)
