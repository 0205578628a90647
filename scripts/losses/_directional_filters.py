# SPDX-License-Identifier: Apache-2.0
"""Laplacian pyramid and directional bank: the parts of a contourlet-like analysis, as pure functions.

Nothing here is a convolution or a matrix product, so neither autocast nor the TF32 of a GPU lowers the precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

# With fewer voxels an axis has no two coarse voxels to tell apart, and reflection by two needs a third.
SMALLEST = 3
GOLDEN = (1 + math.sqrt(5)) / 2
# 1 / sum_k (n_k . u)^4, the same for every unit vector u: 3 * 3/8 in 2D, 6 * 1/5 in 3D.
LARGEST_SHARE = {2: 8 / 9, 3: 5 / 6}


def _blur(x: torch.Tensor) -> torch.Tensor:
    """[1, 4, 6, 4, 1] / 16 along the last axis, reflected at its ends.

    Four means of neighbours are this kernel, and a constant passes through them without any rounding.
    """
    size = x.shape[-1]
    x = torch.cat([x[..., 1:3].flip(-1), x, x[..., size - 3 : size - 1].flip(-1)], dim=-1)
    for _ in range(4):
        x = (x[..., 1:] + x[..., :-1]) / 2
    return x


def down(x: torch.Tensor) -> torch.Tensor:
    """Blur ``B C H W [D]`` and keep every second voxel, n to ceil(n / 2); an axis of one or two voxels stays."""
    for axis in range(2, x.dim()):
        if x.shape[axis] >= SMALLEST:
            x = _blur(x.movedim(axis, -1))[..., ::2].movedim(-1, axis)
    return x


def up(x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Bring what ``down`` left back to ``grid``: zeros between the voxels, twice the blur, where an axis was halved."""
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
    """Details of ``B C H W [D]``, fine to coarse, each with its grid's spacing, and the low-pass residual.

    A level is ``detail = x - up(down(x))``, so ``detail + up(residual)`` level by level is x again. The levels end
    early where no axis has three voxels left to be halved.
    """
    details = []
    for _ in range(levels):
        grid = x.shape[2:]
        if max(grid) < SMALLEST:
            break
        residual = down(x)
        details.append((x - up(residual, grid), tuple(spacing)))
        halved = (n != m for n, m in zip(grid, residual.shape[2:], strict=True))
        spacing = [s * 2 if h else s for s, h in zip(spacing, halved, strict=True)]
        x = residual
    return details, x


def axes(dimension: int) -> torch.Tensor:
    """Unit vectors of the bands, ``K dimension``: three at 60 degrees in 2D, the icosahedron's six axes in 3D."""
    if dimension == 2:
        angles = torch.arange(3, dtype=torch.float64) * math.pi / 3
        return torch.stack([angles.cos(), angles.sin()], dim=1)
    pair = torch.tensor([[0, 1, GOLDEN], [0, -1, GOLDEN]], dtype=torch.float64)
    return torch.cat([pair.roll(shift, dims=1) for shift in range(3)]) / math.hypot(1, GOLDEN)


@lru_cache(maxsize=16)
def band_weights(
    grid: tuple[int, ...], spacing: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """D_k at the frequencies of ``rfftn``, ``K`` x its grid: ``sqrt(share) * (n_k . w / |w|)^2``, 0 at w = 0.

    w is in cycles per unit of ``spacing``. Squares sum to 1 over k. The Nyquist frequency of an even axis has no sign:
    the squares are averaged over both, or the responses would not be real and the frame not tight.
    """
    # A tensor made in inference mode could not be used in training later, and this one is kept.
    with torch.inference_mode(False):
        signed = []
        for axis, (n, s) in enumerate(zip(grid, spacing, strict=True)):
            frequencies = torch.fft.rfftfreq if axis == len(grid) - 1 else torch.fft.fftfreq
            w = frequencies(n, d=s, dtype=torch.float64)
            mirrored = w.clone()
            mirrored[n // 2] *= -1
            signed.append((w, mirrored) if n % 2 == 0 else (w,))
        normals, energies = axes(len(grid)), []
        for choice in itertools.product(*signed):
            w = torch.stack(torch.meshgrid(*choice, indexing="ij"))
            squared = w.square().sum(dim=0).clamp_min(torch.finfo(w.dtype).tiny)
            energies.append((torch.tensordot(normals, w, dims=1).square() / squared).square())
        mean = torch.stack(energies).mean(dim=0)
        return (LARGEST_SHARE[len(grid)] * mean).sqrt().to(device, dtype)


def directional_bands(detail: torch.Tensor, spacing: Sequence[float]) -> Iterator[torch.Tensor]:
    """Responses ``y_k`` of ``B C H W [D]`` on its own grid, one after the other, so that memory holds one at a time.

    The tight frame keeps the energy: sum_k |y_k|^2 = |detail - mean|^2. Filtered by FFT, hence periodic: what touches
    one face of the patch reaches over to the opposite one.
    """
    grid = tuple(detail.shape[2:])
    dims = tuple(range(2, detail.dim()))
    spectrum = torch.fft.rfftn(detail, dim=dims)
    for weight in band_weights(grid, tuple(spacing), detail.device, detail.dtype):
        yield torch.fft.irfftn(spectrum * weight, s=grid, dim=dims)
