# SPDX-License-Identifier: Apache-2.0
"""The uptake of lesions in a PET: SUVmax, SUVmean, SUVpeak, metabolic volume and total lesion glycolysis.

The PET is taken as it is, without interpolation: a PET voxel belongs to the lesion in which its centre lies. A lesion
that contains no centre of a PET voxel, because it is smaller than these, gets the voxels in which its own centres lie.
A centre on the border of two voxels of the mask counts as that of the higher index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from scripts.metrics.lesion_shape import Floats, Lesion, Volume

Indices = NDArray[np.intp]

PEAK_ML = 1.0
PEAK_RADIUS_MM = (PEAK_ML * 1000 * 3 / (4 * math.pi)) ** (1 / 3)  # 6.2
TIE = 1e-6  # voxels of the mask: more than the error of rounding
BLOCK_VOXELS = 2**18  # of the PET, whose spheres are computed at a time
SUBDIVISION_MM = 0.5  # the part of a voxel in the sphere is counted on points that lie at most so far apart


class Uptake(NamedTuple):
    """The uptake of a lesion or of several.

    Attributes:
        suvmax, suvmean, suvpeak: g/ml. SUVpeak is the largest mean over a sphere of 1 ml around the centre of any of
            the voxels (EANM, QIBA); the sphere may extend beyond the lesion. A voxel at the border of the sphere counts
            by the part of its volume within. None where there is no lesion.
        mtv_ml: volume of the PET voxels.
        tlg_g: their volume times their mean SUV.
    """

    suvmax: float | None
    suvmean: float | None
    suvpeak: float | None
    mtv_ml: float
    tlg_g: float


NO_UPTAKE = Uptake(None, None, None, 0.0, 0.0)


def lesion_uptakes(lesions: Sequence[Lesion], mask: Volume, pet: Volume) -> list[Uptake | None]:
    """The uptake of all lesions together, then that of each; None where no voxel of the PET belongs to a lesion.

    Args:
        lesions: of one region of a mask.
        mask: their grid.
        pet: SUV by body weight in g/ml, on any grid.
    """
    if not lesions:
        return [NO_UPTAKE]
    sphere = sphere_weights(pet.affine)
    voxels = [lesion_voxels(lesion, mask, pet) for lesion in lesions]
    by_lesion = [_uptake(pet, each, sphere_means(pet, each, sphere)) if each.size else None for each in voxels]
    if len(lesions) == 1:
        return by_lesion * 2
    peak = max((each.suvpeak for each in by_lesion if each and each.suvpeak is not None), default=None)
    union = np.unique(np.concatenate(voxels))  # two lesions that are smaller than a voxel may share it
    return [None if peak is None else _uptake(pet, union, np.array([peak])), *by_lesion]


def _uptake(pet: Volume, voxels: Indices, peaks: Floats) -> Uptake:
    """The uptake of at least one voxel; ``peaks`` are the means over spheres around them."""
    values = np.asarray(pet.voxels[np.unravel_index(voxels, pet.voxels.shape)], dtype=float)
    mean, volume_ml = float(values.mean()), voxels.size * pet.voxel_ml
    return Uptake(float(values.max()), mean, float(peaks.max()), volume_ml, mean * volume_ml)


def lesion_voxels(lesion: Lesion, mask: Volume, pet: Volume) -> Indices:
    """Flat indices (sorted, in C order) of the PET voxels of a lesion; none where it lies outside of the PET."""
    to_pet = np.linalg.inv(pet.affine) @ mask.affine
    to_pet[:3, 3] += to_pet[:3, :3] @ lesion.start
    limits = np.array(lesion.inside.shape) - 1
    corners = np.array(np.meshgrid(*([0, limit] for limit in limits))).reshape(3, -1)
    ends = to_pet[:3, :3] @ corners + to_pet[:3, 3:]
    first = np.maximum(np.floor(ends.min(axis=1)).astype(int), 0)
    last = np.minimum(np.ceil(ends.max(axis=1)).astype(int) + 1, pet.voxels.shape)
    if (first >= last).any():
        return np.empty(0, dtype=np.intp)
    to_lesion = np.linalg.inv(to_pet)
    offset = to_lesion[:3, :3] @ first + to_lesion[:3, 3] + TIE
    inside = ndimage.affine_transform(
        lesion.inside.astype(np.uint8), to_lesion[:3, :3], offset, output_shape=tuple(last - first), order=0
    )
    indices = np.argwhere(inside) + first
    if not len(indices):  # smaller than the voxels of the PET
        indices = np.rint(np.argwhere(lesion.inside) @ to_pet[:3, :3].T + to_pet[:3, 3]).astype(int)
        indices = np.unique(indices[((indices >= 0) & (indices < pet.voxels.shape)).all(axis=1)], axis=0)
    return np.asarray(np.ravel_multi_index(tuple(indices.T), pet.voxels.shape), dtype=np.intp)


def sphere_means(pet: Volume, voxels: Indices, sphere: Floats) -> Floats:
    """The mean over a sphere around each of some voxels. At the edge of the image it is over the part within.

    Args:
        pet: the image.
        voxels: flat indices, sorted, at least one.
        sphere: from ``sphere_weights``.
    """
    indices = np.array(np.unravel_index(voxels, pet.voxels.shape))
    area = int(np.prod(np.ptp(indices[1:], axis=1) + sphere.shape[1:]))
    planes = max(1, BLOCK_VOXELS // area)  # a block at a time, because the transforms need 60 bytes a voxel
    starts = range(int(indices[0, 0]), int(indices[0, -1]) + 1, planes)
    blocks = np.split(indices, np.searchsorted(indices[0], starts[1:]), axis=1)
    return np.concatenate([_block_means(pet, block, sphere) for block in blocks if block.size])


def _block_means(pet: Volume, indices: Indices, sphere: Floats) -> Floats:
    """``sphere_means`` of voxels by their indices, ``3 x n``."""
    radius = np.array(sphere.shape) // 2
    first = np.maximum(indices.min(axis=1) - radius, 0)
    last = np.minimum(indices.max(axis=1) + radius + 1, pet.voxels.shape)
    values = pet.voxels[tuple(slice(*ends) for ends in zip(first, last, strict=True))].astype(float)
    sums, weights = (_convolved(each, sphere) for each in (values, np.ones_like(values)))
    chosen = tuple(indices - first[:, None])
    return np.asarray(sums[chosen] / weights[chosen])


def _convolved(values: Floats, kernel: Floats) -> Floats:
    """The sum of the values around each voxel, weighted by a symmetric kernel; zeros outside.

    By Fourier transforms. `scipy.signal` would do the same, but takes a second to import.
    """
    shape = [fft.next_fast_len(n + k - 1, real=True) for n, k in zip(values.shape, kernel.shape, strict=True)]
    product = fft.rfftn(values, shape) * fft.rfftn(kernel, shape)
    same = tuple(slice(k // 2, k // 2 + n) for n, k in zip(values.shape, kernel.shape, strict=True))
    return np.asarray(fft.irfftn(product, shape)[same])


def sphere_weights(affine: Floats, radius_mm: float = PEAK_RADIUS_MM) -> Floats:
    """The part of each voxel's volume that lies in a sphere around the centre of the middle voxel.

    Args:
        affine: of the image.
        radius_mm: of the sphere.

    Returns:
        An odd number of voxels per axis.
    """
    axes = affine[:3, :3]
    reach = np.linalg.norm(np.linalg.inv(axes), axis=1) * radius_mm  # of the sphere along each axis, in voxels
    half = np.ceil(reach - 0.5).astype(int).clip(0)
    parts = np.ceil(np.linalg.norm(axes, axis=0) / SUBDIVISION_MM).astype(int)
    points = [
        (np.arange((2 * h + 1) * n) + 0.5) / n - 0.5 - h  # in voxels from the centre of the middle one
        for h, n in zip(half, parts, strict=True)
    ]
    grid = np.stack(np.meshgrid(*points, indexing="ij"), axis=-1) @ axes.T
    within = (grid**2).sum(axis=-1) <= radius_mm**2
    shape = [size for h, n in zip(half, parts, strict=True) for size in (2 * h + 1, n)]
    return np.asarray(within.reshape(shape).mean(axis=(1, 3, 5)))
