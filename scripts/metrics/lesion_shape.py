# SPDX-License-Identifier: Apache-2.0
"""Lesions of a mask and their shape: connected components, longest diameters, centroid.

The surface of a lesion lies half-way between a voxel inside and its face neighbour outside. Diameters are the longest
distances between two points of that surface, as pyradiomics measures them on its mesh: a sphere of voxels has the
diameter of the sphere, and a single voxel has its own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from scripts.metrics.boundary import bounding_box

Floats = NDArray[np.float64]

NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)  # 26: voxels that share a face, an edge or a corner are connected
CHUNK = 1024  # points whose distances to all others are computed at a time


class Volume(NamedTuple):
    """A 3D image.

    Attributes:
        voxels: ``H W D``.
        affine: voxel to world in mm, 4 x 4. The measures take the world as RAS, as in NIfTI.
    """

    voxels: NDArray
    affine: Floats

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    def to_world(self, indices: Floats) -> Floats:
        """World coordinates in mm of points in voxels, ``n x 3``; voxel centres are integers."""
        return np.asarray(indices @ self.affine[:3, :3].T + self.affine[:3, 3])


class Lesion(NamedTuple):
    """A connected component.

    Attributes:
        start: index of the first voxel of ``inside`` in the mask.
        inside: its voxels, in a box with a margin of one voxel of background.
    """

    start: NDArray[np.intp]
    inside: NDArray[np.bool_]

    @property
    def voxel_count(self) -> int:
        """Number of its voxels."""
        return int(np.count_nonzero(self.inside))

    def within(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """Its voxels in a mask of this shape."""
        mask = np.zeros(tuple(shape), dtype=bool)
        core = self.inside[1:-1, 1:-1, 1:-1]
        mask[tuple(slice(s + 1, s + 1 + n) for s, n in zip(self.start, core.shape, strict=True))] = core
        return mask


def find_lesions(inside: NDArray[np.bool_]) -> list[Lesion]:
    """The connected components of a mask (26-neighbourhood), the largest first; equal ones in the order of the voxels.

    Args:
        inside: ``H W D``.
    """
    box = bounding_box(inside)
    if box is None:
        return []
    components, _ = ndimage.label(inside[box], structure=NEIGHBOURS)
    offset = np.array([part.start for part in box])
    lesions = []
    for number, part in enumerate(ndimage.find_objects(components), start=1):
        start = offset + [each.start for each in part] - 1
        lesions.append(Lesion(start, np.pad(components[part] == number, 1)))
    return sorted(lesions, key=lambda lesion: -lesion.voxel_count)


def centroid(lesion: Lesion, volume: Volume) -> Floats:
    """The mean of the voxel centres in mm."""
    count, mean = lesion.voxel_count, []
    for axis in range(3):
        per_slab = lesion.inside.sum(axis=tuple(other for other in range(3) if other != axis))
        mean.append(float(per_slab @ np.arange(len(per_slab))) / count)
    return volume.to_world(np.array([mean]) + lesion.start)[0]


def longest_diameter(lesion: Lesion, volume: Volume) -> float:
    """The longest diameter of a lesion in three dimensions, in mm."""
    surface = np.concatenate([_outermost(lesion.inside, axis) for axis in range(3)])
    return _longest_distance(surface, volume)


def longest_axial_diameter(lesion: Lesion, volume: Volume) -> float:
    """The longest diameter of a lesion within one axial slice, in mm.

    The slices are those of the mask's grid, across the axis that is nearest to the direction from the feet to the head.
    """
    across = axial_axis(volume.affine)
    planes = (_plane_surface(plane, across, index) for index, plane in _planes(lesion.inside, across))
    return max(_longest_distance(surface, volume, across) for surface in planes)


def axial_axis(affine: Floats) -> int:
    """The array axis that is nearest to the direction from the feet to the head (RAS)."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return int(np.abs(axes[2]).argmax())


def _planes(inside: NDArray[np.bool_], across: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The slices with voxels, each with its index."""
    for index, plane in enumerate(np.moveaxis(inside, across, 0)):
        if plane.any():
            yield index, plane


def _plane_surface(plane: NDArray[np.bool_], across: int, index: int) -> Floats:
    """The surface points of a slice as points of the volume."""
    return np.insert(np.concatenate([_outermost(plane, axis) for axis in range(2)]), across, index, axis=1)


def _outermost(inside: NDArray[np.bool_], axis: int) -> Floats:
    """The first and the last surface point on every line along an axis: all others lie between them."""
    lines = np.moveaxis(inside, axis, -1)
    hit = np.argwhere(lines.any(axis=-1))
    chosen = lines[tuple(hit.T)]
    first = chosen.argmax(axis=1) - 0.5
    last = chosen.shape[1] - 0.5 - chosen[:, ::-1].argmax(axis=1)
    return np.concatenate([np.insert(hit.astype(float), axis, each, axis=1) for each in (first, last)])


def _longest_distance(surface: Floats, volume: Volume, across: int | None = None) -> float:
    """The longest distance between two points in mm; both are corners of the convex hull.

    Args:
        surface: points in voxels.
        volume: the grid.
        across: the axis along which the points do not differ, if they lie in one slice.
    """
    varying: Sequence[int] = [axis for axis in range(3) if axis != across]
    points = volume.to_world(surface[ConvexHull(surface[:, varying]).vertices])
    chunks = (points[start : start + CHUNK] for start in range(0, len(points), CHUNK))
    return max(float(cdist(chunk, points).max()) for chunk in chunks)
