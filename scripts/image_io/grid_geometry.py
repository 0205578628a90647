# SPDX-License-Identifier: Apache-2.0
"""Where the grids of two images lie: whether they overlap, are the same, or cover each other."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from scripts.image_io.headers import Affine, Header

MAX_SHIFT = 0.5  # distance in voxels up to which two grids of one shape count as the same


def axes_and_spacing(affine: Affine) -> tuple[Affine, Affine]:
    """Unit vectors along the voxel axes (columns) and the spacing in mm."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return affine[:3, :3] / spacing, spacing


def _corners(header: Header) -> Affine:
    """World coordinates of a grid's outer corners, 8 x 3."""
    ends = [[-0.5, size - 0.5] for size in header.shape[:3]]
    points = np.array(np.meshgrid(*ends)).reshape(3, -1).T
    return points @ header.affine[:3, :3].T + header.affine[:3, 3]


def centre(header: Header) -> Affine:
    """World coordinates of a grid's centre in mm."""
    return _corners(header).mean(0)


def grids_overlap(first: Header, second: Header) -> bool:
    """Whether two grids share space: no axis separates their boxes (separating axis theorem)."""
    corners = _corners(first), _corners(second)
    edges = [header.affine[:3, :3].T for header in (first, second)]
    faces = [np.cross(e[[0, 0, 1]], e[[1, 2, 2]]) for e in edges]
    normals = np.concatenate([*faces, np.cross(edges[0][:, None], edges[1]).reshape(9, 3)])
    normals = normals[np.linalg.norm(normals, axis=1) > 1e-9]
    spans = [points @ normals.T for points in corners]
    separated = (spans[0].max(0) <= spans[1].min(0)) | (spans[1].max(0) <= spans[0].min(0))
    return not separated.any()


def same_grid(first: Header, second: Header) -> bool:
    """Whether the voxels of two images lie at the same places, in whatever order, within ``MAX_SHIFT`` voxels."""
    volumes = (header._replace(shape=header.shape[:3]) for header in (first, second))
    shift = largest_shift(*map(canonical_grid, volumes))
    return shift is not None and shift[0] <= MAX_SHIFT


def largest_shift(reference: Header, other: Header) -> tuple[float, float] | None:
    """The largest distance between the same voxel of two grids, in voxels and in mm; None if their shapes differ."""
    if reference.shape != other.shape:
        return None
    corners = np.array(np.meshgrid(*([0, size - 1] for size in reference.shape[:3]), [1])).reshape(4, -1)
    distances = (other.affine - reference.affine) @ corners
    voxels = (np.linalg.inv(reference.affine) @ distances)[:3]
    return float(np.abs(voxels).max()), float(np.linalg.norm(distances[:3], axis=0).max())


def canonical_grid(header: Header) -> Header:
    """The same grid with axes that run to the right, to anterior and to superior, as far as it can be."""
    orientation = nib.orientations.io_orientation(header.affine)
    shape = header.shape[:3]
    affine = header.affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    return header._replace(affine=affine, shape=tuple(shape[int(axis)] for axis in np.argsort(orientation[:, 0])))


def covered_fraction(reference: Header, mask: Header) -> float:
    """Fraction of a reference's voxels that lie on the grid of a mask; half a voxel of the mask is tolerated.

    The fraction is counted on at most 64 evenly spaced voxels per axis, which include the first and the last one.
    """
    axes = [np.linspace(0, size - 1, min(size, 64)) for size in reference.shape[:3]]
    to_mask = np.linalg.inv(mask.affine) @ reference.affine
    size = np.array(mask.shape[:3])[:, None]

    def inside(points: Affine, margin: float) -> Any:
        index = to_mask[:3, :3] @ points + to_mask[:3, 3:]
        return ((index >= -0.5 - margin) & (index <= size - 0.5 + margin)).all(0)

    corners = np.array(np.meshgrid(*([axis[0], axis[-1]] for axis in axes))).reshape(3, -1)
    if inside(corners, 0.5).all():  # a grid is convex
        return 1.0
    points = np.array(np.meshgrid(*axes)).reshape(3, -1)
    return min(float(inside(points, 1e-3).mean()), 1 - 1e-9)
