# SPDX-License-Identifier: Apache-2.0
"""Distillation of texture: which directions the fine structure of a feature map has, and how strong it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scripts.losses._common import EPS, check_maps, check_option, pool, to_common_grid
from scripts.losses._directional_filters import SMALLEST, directional_bands, laplacian_pyramid

# Texture weaker than this share of the features' size has no direction: in float32 it may be rounding alone.
FLAT = 1e-4


class ContourletTextureLoss(nn.Module):
    """Divergence of the orientation and strength of texture, by a steerable surrogate of the contourlet transform.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) distils structural texture by a contourlet decomposition; [ours]
    the 3D construction and the loss. The 2D contourlet is a Laplacian pyramid followed by a directional filter bank (Do
    and Vetterli 2005). This is a non-subsampled steerable surrogate of the contourlet transform: the same pyramid, but
    six smooth, overlapping bands in place of a bank of wedges. Per level of the pyramid (down: blur [1, 4, 6, 4, 1] /
    16 per axis, reflected at the border, every second voxel)::

        d = x - up(down(x)),  y_k = D_k d,  D_k(w) = sqrt(5/6) (n_k . w / |w|)^2,  D_k(0) = 0,  sum over k of D_k^2 = 1
        E_k = mean over channels of adaptive average pooling to at most grid cells per axis of |y_k|,  + floor
        p = E / sum over k of E,  r = sum over k of E / (mean over cells of sum over k of E)
        L = sum over levels of mean over cells of [KL(p_teacher || p_student) + |r_teacher - r_student|]

    averaged over the batch. n_k are the six axes of the icosahedron; in 2D three at 60 degrees, with sqrt(8/9). w is
    the frequency per mm, by ``spacing``. The low-pass residual is not compared. floor = 1e-4 of the root mean square of
    a sample's channels: a map without texture has p = 1/K and r = 1. Gain (> 0) of a map changes nothing.

    Only |y_k| is compared, so texture may be shifted; all bands of a tight frame together know no direction: the mean
    squared difference of every y_k (``statistic="subband_mse"``, the ablation) is 1/K that of d without its mean.

    Both maps come to the smaller grid first. An axis is halved while it has three voxels, and the levels end where none
    has. At most ``max_channels`` channels enter the bank, by a fixed random orthogonal projection of those that are
    more; the responses then take ``max_channels`` * 6 maps of memory for the gradient. Their filtering is periodic.

    Config::

        "taps#texture": "@layers#fine",
        "loss#terms#texture": {
          "tap": "texture",
          "weight": 0.5,
          "loss": {"_target_": "scripts.losses.ContourletTextureLoss", "spacing": "@spacing"}
        }

    Args:
        levels: levels of the pyramid.
        grid: most cells per axis.
        spacing: voxel size of the common grid along H, W[, D]; only ratios matter, so a stride that is the same on all
            axes may be left out. A 2D map takes the first two.
        statistic: ``"orientation"`` or ``"subband_mse"``.
        max_channels: most channels that enter the bank.
        seed: of the projection.

    Raises:
        ValueError: an unknown ``statistic``; ``levels``, ``grid`` or ``max_channels`` below 1; ``spacing`` that is not
            two or three positive numbers.
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
        check_option("statistic", statistic, ("orientation", "subband_mse"))
        for name, value in {"levels": levels, "grid": grid, "max_channels": max_channels}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if len(spacing) not in (2, 3) or min(spacing) <= 0:
            raise ValueError(f"spacing must be two or three positive numbers, got {tuple(spacing)}.")
        self.levels, self.grid, self.statistic = levels, grid, statistic
        self.spacing = tuple(float(s) for s in spacing)
        self.max_channels, self.seed = max_channels, seed

    def projection(self, channels: int) -> torch.Tensor:
        """Orthonormal rows, ``max_channels`` x ``channels``, the same at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(channels, self.max_channels, generator=generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(normal).Q.T.float()

    def _reduce(self, features: torch.Tensor) -> torch.Tensor:
        channels = features.shape[1]
        if channels <= self.max_channels:
            return features
        rows = self.projection(channels).to(features.device)
        return torch.einsum("mc,bc...->bm...", rows, features)

    def _energies(self, features: torch.Tensor) -> list[torch.Tensor]:
        """E of each level, ``B K cells``."""
        floor = FLAT * features.detach().square().flatten(1).mean(dim=1).sqrt() + EPS
        details, _ = laplacian_pyramid(features, self.levels, self.spacing[: features.dim() - 2])
        energies = []
        for detail, spacing in details:
            cells = [min(self.grid, n) for n in detail.shape[2:]]
            bands = [
                pool(y.abs().mean(dim=1, keepdim=True), cells).flatten(2) for y in directional_bands(detail, spacing)
            ]
            energies.append(torch.cat(bands, dim=1) + floor.view(-1, 1, 1))
        return energies

    def _orientation(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        loss = student.new_zeros(())
        for levels in zip(self._energies(student), self._energies(teacher), strict=True):
            totals = [e.sum(dim=1, keepdim=True) for e in levels]
            log_s, log_t = ((e / total).log() for e, total in zip(levels, totals, strict=True))
            r_s, r_t = (total / total.mean(dim=2, keepdim=True) for total in totals)
            divergence = (log_t.exp() * (log_t - log_s)).sum(dim=1)
            loss = loss + divergence.mean() + (r_t - r_s).abs().mean()
        return loss

    def _subband_mse(self, difference: torch.Tensor) -> torch.Tensor:
        details, _ = laplacian_pyramid(difference, self.levels, self.spacing[: difference.dim() - 2])
        levels = [[y.square().mean() for y in directional_bands(d, spacing)] for d, spacing in details]
        return torch.stack([torch.stack(bands).mean() for bands in levels]).sum()

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (C and the grid may differ), to a scalar, 0 where the maps agree.

        Raises:
            ValueError: the maps are not two batches of one size and dimension; no axis of the common grid has three
                voxels; ``"subband_mse"`` and the channels differ; all name both shapes. ``spacing`` is too short.
        """
        check_maps(student, teacher)
        shapes = f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        if self.statistic == "subband_mse" and student.shape[1] != teacher.shape[1]:
            raise ValueError(f"{shapes} must have one C for subband_mse: put an adapter before the loss.")
        if max(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)) < SMALLEST:
            raise ValueError(f"{shapes} have no axis of {SMALLEST} voxels on their common grid: no texture.")
        if len(self.spacing) < student.dim() - 2:
            raise ValueError(f"{shapes} need a spacing of three numbers, got {self.spacing}.")
        with torch.autocast(student.device.type, enabled=False):
            maps = to_common_grid(self._reduce(student.float()), self._reduce(teacher.detach().float()))
            if self.statistic == "subband_mse":
                return self._subband_mse(maps[0] - maps[1])
            return self._orientation(*maps)
