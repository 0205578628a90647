# SPDX-License-Identifier: Apache-2.0
"""Adapters that reduce the redundancy of a student's features in space and channels before the loss compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

EPS = 1e-12


def _conv(dims: int, inputs: int, outputs: int, kernel: int = 1, groups: int = 1, bias: bool = False) -> nn.Module:
    conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if dims == 2 else nn.Conv3d
    return conv(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)


def _norm_groups(channels: int, max_groups: int = 16) -> int:
    """Largest divisor of ``channels``, at most ``max_groups``, that leaves at least two channels per group."""
    return max(n for n in range(1, max_groups + 1) if channels % n == 0 and (n == 1 or channels // n > 1))


class SpatialUnit(nn.Module):
    """Keep the informative voxels of each channel, and add the others to a channel of the other half as well.

    With the scales gamma of a group normalisation GN: ``w = gamma / sum(gamma)`` and ``R = sigmoid(w * GN(x))``. A
    voxel with R > 0.5 is kept unchanged. Any other voxel is multiplied by R, and is also added to the channel C // 2
    positions further on (cyclically). This exchanges the two halves, and works for odd C too. Gamma gets its gradient
    through the voxels that are not kept.

    Args:
        channels: number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_norm_groups(channels), channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of the same shape as ``x``, ``B C H W [D]``."""
        gamma = self.norm.weight
        total = gamma.sum()
        share = gamma / torch.where(total.abs() > EPS, total, EPS)
        gate = (share.view(1, -1, *[1] * (x.dim() - 2)) * self.norm(x)).sigmoid()
        kept = gate > 0.5
        rest = torch.where(kept, 0.0, gate * x)
        return torch.where(kept, x, rest) + rest.roll(x.shape[1] // 2, dims=1)


class ChannelUnit(nn.Module):
    """Split the channels in two halves, transform one, reuse the other, and weight both per channel.

    The halves have C // 2 and C - C // 2 channels. A 1x1 convolution halves the channels of each. Upper branch: sum of
    a grouped 3^n and a 1x1 convolution, both to C channels. Lower branch: the squeezed half itself, concatenated with a
    1x1 convolution of it, C channels in total. The output is b_1 * upper + b_2 * lower, where (b_1, b_2) is the softmax
    per channel of the two branches' spatial means.

    Args:
        channels: number of channels C, at least 2.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.halves = [channels // 2, channels - channels // 2]
        upper, lower = (max(1, half // 2) for half in self.halves)
        self.squeeze_upper = _conv(spatial_dims, self.halves[0], upper)
        self.squeeze_lower = _conv(spatial_dims, self.halves[1], lower)
        groups = math.gcd(2, upper, channels)
        self.grouped = _conv(spatial_dims, upper, channels, kernel=3, groups=groups, bias=True)
        self.pointwise = _conv(spatial_dims, upper, channels)
        self.added = _conv(spatial_dims, lower, channels - lower)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of the same shape as ``x``, ``B C H W [D]``."""
        upper, lower = x.split(self.halves, dim=1)
        upper, lower = self.squeeze_upper(upper), self.squeeze_lower(lower)
        rich = self.grouped(upper) + self.pointwise(upper)
        reused = torch.cat([self.added(lower), lower], dim=1)
        space = tuple(range(2, x.dim()))
        shares = torch.stack([branch.mean(space, keepdim=True) for branch in (rich, reused)]).softmax(dim=0)
        return shares[0] * rich + shares[1] * reused


class SpaceChannelCascade(nn.Module):
    """Apply a spatial unit, a channel unit and a projection: ``B C H W [D]`` -> ``B out H W [D]``.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) refines spatial and channel information together, with less
    redundancy; [ours] the choice of the two units of SCConv (Li et al., CVPR 2023) for this, and the 3D form.

    Args:
        channels: number of channels of the student, at least 2.
        out_channels: number of channels of the teacher, reached by a 1x1 convolution; None: no projection.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: ``channels`` is less than 2.
    """

    def __init__(self, channels: int, out_channels: int | None = None, spatial_dims: int = 3) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"SpaceChannelCascade needs at least 2 channels, got {channels}.")
        self.space, self.channel = SpatialUnit(channels), ChannelUnit(channels, spatial_dims)
        self.project = nn.Identity() if out_channels is None else _conv(spatial_dims, channels, out_channels, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refine and project features ``B C H W [D]``; returns ``B out H W [D]``."""
        return self.project(self.channel(self.space(x)))


class CascadeFusion(nn.Module):
    """Fuse several stages of a student from deep to shallow: ``h_i = cascade_i(f_i) + up(h_(i+1))``.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) fuses several stages; [ours] the sum. cascade_i is a
    ``SpaceChannelCascade`` of the stage to ``out_channels``. up is linear interpolation to the grid of f_i.

    Args:
        channels: number of channels of each stage, from shallow to deep.
        out_channels: number of channels of the teacher.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.cascades = nn.ModuleList(SpaceChannelCascade(c, out_channels, spatial_dims) for c in channels)
        self.mode = "bilinear" if spatial_dims == 2 else "trilinear"

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse the stages.

        Args:
            features: one map per stage, from shallow to deep: ``B C_i H_i W_i [D_i]``.

        Returns:
            h_0 on the grid of the shallowest stage, ``B out H_0 W_0 [D_0]``.

        Raises:
            ValueError: the number of maps differs from the number of stages.
        """
        if len(features) != len(self.cascades):
            raise ValueError(
                f"CascadeFusion was built for {len(self.cascades)} stages, got {len(features)} feature maps."
            )
        maps = [cascade(f) for cascade, f in zip(self.cascades, features, strict=True)]
        fused = maps.pop()
        while maps:
            stage = maps.pop()
            fused = stage + functional.interpolate(fused, size=stage.shape[2:], mode=self.mode)
        return fused
