# SPDX-License-Identifier: Apache-2.0
"""Laplacian pyramid and directional filter bank of ContourletTextureLoss, as pure functions.

No function here uses a convolution or a matrix product, so neither autocast nor TF32 lowers the precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

# A shorter axis is not halved: it would leave a single coarse voxel, and reflection by two needs a third voxel.
MIN_AXIS_SIZE = 3
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
# Largest share of the energy of a plane wave that one band can hold: 1 / sum_k (n_k . u)^4, which is the same for every
# unit vector u. The sum is 3 * 3/8 in 2D and 6 * 1/5 in 3D.
PEAK_SHARE = {2: 8 / 9, 3: 5 / 6}


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Filter the last axis with [1, 4, 6, 4, 1] / 16, reflected at its ends.

    The filter is applied as four averages of neighbours: a constant passes through them without rounding errors.
    """
    size = x.shape[-1]
    x = torch.cat([x[..., 1:3].flip(-1), x, x[..., size - 3 : size - 1].flip(-1)], dim=-1)
    for _ in range(4):
        x = (x[..., 1:] + x[..., :-1]) / 2
    return x


def downsample(x: torch.Tensor) -> torch.Tensor:
    """Blur ``B C H W [D]`` and keep every second voxel: size n becomes ceil(n / 2).

    An axis with fewer than ``MIN_AXIS_SIZE`` voxels keeps its size.
    """
    for axis in range(2, x.dim()):
        if x.shape[axis] >= MIN_AXIS_SIZE:
            x = _blur(x.movedim(axis, -1))[..., ::2].movedim(-1, axis)
    return x


def upsample(x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Bring the result of ``downsample`` back to ``grid``.

    Along each axis that was halved, zeros are inserted between the voxels and the result is blurred and doubled.
    """
    for axis, size in enumerate(grid, start=2):
        if x.shape[axis] != size:
            coarse = x.movedim(axis, -1)
            fine = coarse.new_zeros(*coarse.shape[:-1], size)
            fine[..., ::2] = coarse
            x = (2 * _blur(fine)).movedim(-1, axis)
    return x


def laplacian_pyramid(
    x: torch.Tensor, levels: int, spacing: Sequence[float]
) -> tuple[list[tuple[torch.Tensor, tuple[float, ...]]], torch.Tensor]:
    """Split a map into details of decreasing resolution and a low-pass residual.

    A level is ``detail = x - upsample(downsample(x))``. Adding ``detail + upsample(residual)`` level by level gives x
    back. There are fewer levels than requested if no axis has ``MIN_AXIS_SIZE`` voxels left.

    Args:
        x: ``B C H W [D]``.
        levels: number of levels.
        spacing: voxel size along H, W[, D].

    Returns:
        The details, fine to coarse, each with the spacing of its grid; and the residual.
    """
    details = []
    for _ in range(levels):
        grid = x.shape[2:]
        if max(grid) < MIN_AXIS_SIZE:
            break
        residual = downsample(x)
        details.append((x - upsample(residual, grid), tuple(spacing)))
        halved = (n != m for n, m in zip(grid, residual.shape[2:], strict=True))
        spacing = [s * 2 if h else s for s, h in zip(spacing, halved, strict=True)]
        x = residual
    return details, x


def band_axes(dimension: int) -> torch.Tensor:
    """Unit vectors of the bands, ``K x dimension``: three at 60 degrees in 2D, the icosahedron's six axes in 3D."""
    if dimension == 2:
        angles = torch.arange(3, dtype=torch.float64) * math.pi / 3
        return torch.stack([angles.cos(), angles.sin()], dim=1)
    pair = torch.tensor([[0, 1, GOLDEN_RATIO], [0, -1, GOLDEN_RATIO]], dtype=torch.float64)
    return torch.cat([pair.roll(shift, dims=1) for shift in range(3)]) / math.hypot(1, GOLDEN_RATIO)


@lru_cache(maxsize=16)
def band_weights(
    grid: tuple[int, ...], spacing: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Compute the filters D_k at the frequencies w of ``torch.fft.rfftn``.

    ``D_k(w) = sqrt(peak share) * (n_k . w / |w|)^2`` and ``D_k(0) = 0``; the squares sum to 1 over k. The Nyquist
    frequency of an even axis has no sign, so the squares are averaged over both signs. Otherwise the responses would
    not be real and the frame would not be tight.

    Args:
        grid: size of the map along H, W[, D].
        spacing: voxel size along the same axes; w is in cycles per unit of it.
        device: of the result.
        dtype: of the result.

    Returns:
        ``K x`` the frequency grid of ``rfftn``.
    """
    # The result is cached. A tensor created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        frequencies = []
        for axis, (n, s) in enumerate(zip(grid, spacing, strict=True)):
            fftfreq = torch.fft.rfftfreq if axis == len(grid) - 1 else torch.fft.fftfreq
            w = fftfreq(n, d=s, dtype=torch.float64)
            mirrored = w.clone()
            mirrored[n // 2] *= -1
            frequencies.append((w, mirrored) if n % 2 == 0 else (w,))
        normals, energies = band_axes(len(grid)), []
        for signed in itertools.product(*frequencies):
            w = torch.stack(torch.meshgrid(*signed, indexing="ij"))
            squared = w.square().sum(dim=0).clamp_min(torch.finfo(w.dtype).tiny)
            energies.append((torch.tensordot(normals, w, dims=1).square() / squared).square())
        mean = torch.stack(energies).mean(dim=0)
        return (PEAK_SHARE[len(grid)] * mean).sqrt().to(device, dtype)


def directional_bands(detail: torch.Tensor, spacing: Sequence[float]) -> Iterator[torch.Tensor]:
    """Yield the response ``y_k`` of ``B C H W [D]`` for each band k, on the grid of the map.

    The bands are computed one after the other, so that only one is in memory at a time. They form a tight frame, which
    keeps the energy: sum_k |y_k|^2 = |detail - mean|^2. The filtering by FFT is periodic: structures at one face of the
    patch also affect the opposite face.
    """
    grid = tuple(detail.shape[2:])
    dims = tuple(range(2, detail.dim()))
    spectrum = torch.fft.rfftn(detail, dim=dims)
    for weight in band_weights(grid, tuple(spacing), detail.device, detail.dtype):
        yield torch.fft.irfftn(spectrum * weight, s=grid, dim=dims)
