# SPDX-License-Identifier: Apache-2.0
"""Distil the texture of a feature map: the directions of its fine structures and their strength."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scripts.losses._common import (
    EPS,
    check_at_least,
    check_choice,
    check_maps,
    kl_divergence,
    pool,
    shapes_text,
    to_common_grid,
)
from scripts.losses._directional_filters import MIN_AXIS_SIZE, directional_bands, laplacian_pyramid

# Added to every band energy, as a share of the root mean square of the features. Weaker texture has no meaningful
# direction: in float32 it may be nothing but rounding errors.
ENERGY_OFFSET = 1e-4


class ContourletTextureLoss(nn.Module):
    """Divergence of the direction and strength of texture, by a steerable surrogate of the contourlet transform.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) distils structural texture by a contourlet decomposition; [ours]
    the 3D construction and the loss. The 2D contourlet transform is a Laplacian pyramid followed by a directional
    filter bank (Do and Vetterli 2005). This loss uses a non-subsampled steerable surrogate of the contourlet transform:
    the same pyramid, but smooth, overlapping bands instead of wedge-shaped filters. Each level of the pyramid halves
    the resolution (downsample: blur [1, 4, 6, 4, 1] / 16 per axis, reflected at the border, then every second voxel)::

        d = x - upsample(downsample(x)),  y_k = D_k d
        D_k(w) = sqrt(5/6) (n_k . w / |w|)^2,  D_k(0) = 0,  sum over k of D_k^2 = 1
        E_k = mean over channels of |y_k|, adaptive average pooling to at most grid cells per axis,  + offset
        p = E / sum over k of E,  r = sum over k of E / (mean over cells of sum over k of E)
        L = sum over levels of mean over cells of [KL(p_teacher || p_student) + |r_teacher - r_student|]

    L is averaged over the batch. The n_k are the six axes of the icosahedron in 3D; in 2D they are three directions at
    60 degrees, with sqrt(8/9) instead of sqrt(5/6). The frequency w is in cycles per mm, by ``spacing``. The low-pass
    residual is not compared. The offset is 1e-4 of the root mean square of a sample's channels: a map without texture
    has p = 1/K and r = 1. Scaling a map does not change L.

    Only |y_k| is compared, so the texture may be shifted. With ``statistic="subband_mse"``, an ablation, L is the mean
    squared difference of all y_k, summed over levels. It is independent of direction: the bands are a tight frame, so
    it equals 1/K of the mean squared difference of d without its mean.

    Both maps are pooled to their common (smaller) grid first. An axis is halved while it has at least three voxels;
    there are no further levels once no axis has three. If a map has more than ``max_channels`` channels, a fixed random
    orthogonal projection reduces them. For the gradient, up to 6 * ``max_channels`` single-channel maps are kept in
    memory. The filtering is periodic. The numbers of channels may differ, except for ``"subband_mse"``.

    Config::

        "loss#terms#texture": {
          "tap": "fine",
          "weight": 0.5,
          "loss": {"_target_": "scripts.losses.ContourletTextureLoss", "spacing": "@spacing"}
        }

    Args:
        levels: levels of the pyramid.
        grid: maximum number of cells per axis.
        spacing: voxel size of the common grid along H, W[, D]. Only ratios matter, so a stride that is the same along
            all axes can be ignored. A 2D map uses the first two numbers.
        statistic: ``"orientation"`` or ``"subband_mse"``.
        max_channels: maximum number of channels that are filtered.
        seed: of the random projection.

    Raises:
        ValueError: ``statistic`` is unknown; ``levels``, ``grid`` or ``max_channels`` is less than 1; ``spacing`` is
            not two or three positive numbers.
    """

    def __init__(
        self,
        levels: int = 2,
        grid: int = 6,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        statistic: str = "orientation",
        max_channels: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("statistic", statistic, ("orientation", "subband_mse"))
        for name, value in {"levels": levels, "grid": grid, "max_channels": max_channels}.items():
            check_at_least(name, value, 1)
        if len(spacing) not in (2, 3) or min(spacing) <= 0:
            raise ValueError(f"spacing must be two or three positive numbers, got {tuple(spacing)}.")
        self.levels, self.grid, self.statistic = levels, grid, statistic
        self.spacing = tuple(float(s) for s in spacing)
        self.max_channels, self.seed = max_channels, seed

    def projection(self, channels: int) -> torch.Tensor:
        """Orthonormal rows, ``max_channels x channels``; the same at every call with the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(channels, self.max_channels, generator=generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(normal).Q.T.float()

    def _reduce_channels(self, features: torch.Tensor) -> torch.Tensor:
        channels = features.shape[1]
        if channels <= self.max_channels:
            return features
        rows = self.projection(channels).to(features.device)
        return torch.einsum("mc,bc...->bm...", rows, features)

    def _energies(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Compute E of each level, ``B K cells``."""
        offset = ENERGY_OFFSET * features.detach().square().flatten(1).mean(dim=1).sqrt() + EPS
        details, _ = laplacian_pyramid(features, self.levels, self.spacing[: features.dim() - 2])
        energies = []
        for detail, spacing in details:
            cells = [min(self.grid, n) for n in detail.shape[2:]]
            bands = [
                pool(y.abs().mean(dim=1, keepdim=True), cells).flatten(2) for y in directional_bands(detail, spacing)
            ]
            energies.append(torch.cat(bands, dim=1) + offset.view(-1, 1, 1))
        return energies

    def _orientation(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        loss = student.new_zeros(())
        for energies in zip(self._energies(student), self._energies(teacher), strict=True):
            totals = [e.sum(dim=1, keepdim=True) for e in energies]
            log_s, log_t = ((e / total).log() for e, total in zip(energies, totals, strict=True))
            r_s, r_t = (total / total.mean(dim=2, keepdim=True) for total in totals)
            loss = loss + kl_divergence(log_t, log_s, dim=1).mean() + (r_t - r_s).abs().mean()
        return loss

    def _subband_mse(self, difference: torch.Tensor) -> torch.Tensor:
        details, _ = laplacian_pyramid(difference, self.levels, self.spacing[: difference.dim() - 2])
        levels = [[y.square().mean() for y in directional_bands(d, spacing)] for d, spacing in details]
        return torch.stack([torch.stack(bands).mean() for bands in levels]).sum()

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the texture of two feature maps.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; C and the grid may differ from the student's.

        Returns:
            Scalar, 0 if the texture agrees.

        Raises:
            ValueError: the batch sizes or numbers of dimensions differ; no axis of the common grid has three voxels;
                the numbers of channels differ with ``"subband_mse"``; or ``spacing`` has too few numbers. The message
                contains both shapes.
        """
        check_maps(student, teacher)
        shapes = shapes_text(student, teacher)
        if self.statistic == "subband_mse" and student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"{shapes} must have the same number of channels for subband_mse: add a ChannelAdapter for this tap."
            )
        if max(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)) < MIN_AXIS_SIZE:
            raise ValueError(
                f"{shapes} need an axis of at least {MIN_AXIS_SIZE} voxels on their common grid: choose layers with a "
                "larger grid."
            )
        if len(self.spacing) < student.dim() - 2:
            raise ValueError(f"{shapes} need a spacing of three numbers, got {self.spacing}.")
        with torch.autocast(student.device.type, enabled=False):
            maps = to_common_grid(
                self._reduce_channels(student.float()), self._reduce_channels(teacher.detach().float())
            )
            if self.statistic == "subband_mse":
                return self._subband_mse(maps[0] - maps[1])
            return self._orientation(*maps)
