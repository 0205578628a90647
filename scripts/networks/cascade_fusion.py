# SPDX-License-Identifier: Apache-2.0
"""Adapters that take redundancy out of a student's features, in space and in channels, before they are compared."""

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


def _norm_groups(channels: int, most: int = 16) -> int:
    """Largest divisor of ``channels`` up to ``most`` that leaves two channels or more in a group."""
    return max(n for n in range(1, most + 1) if channels % n == 0 and (n == 1 or channels // n > 1))


class SpatialUnit(nn.Module):
    """Keep the informative voxels of every channel and hand the rest to the channels of the other half.

    ``w = gamma / sum(gamma)`` of a group normalisation GN, ``R = sigmoid(w * GN(x))``; where R > 0.5 a voxel is kept
    whole, elsewhere it counts R. What is not kept is added, weighted by R, to the channel half of the channels
    further on, cyclically: the exchange of the two halves, which odd counts allow too. Gamma learns through the
    voxels that are not kept.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_norm_groups(channels), channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features ``B C H W [D]`` to features of the same shape."""
        gamma = self.norm.weight
        total = gamma.sum()
        share = gamma / torch.where(total.abs() > EPS, total, EPS)
        gate = (share.view(1, -1, *[1] * (x.dim() - 2)) * self.norm(x)).sigmoid()
        kept = gate > 0.5
        rest = torch.where(kept, 0.0, gate * x)
        return torch.where(kept, x, rest) + rest.roll(x.shape[1] // 2, dims=1)


class ChannelUnit(nn.Module):
    """Split the channels in two, enrich one half, re-use the other, and weigh both per channel.

    Halves of C // 2 and the rest, each squeezed by 2 (1x1 convolution). Upper: grouped 3^n + 1x1 convolution to C.
    Lower: what a 1x1 convolution adds, beside the squeezed half itself, C together. Out = b_1 * upper + b_2 * lower,
    (b_1, b_2) = softmax per channel of the two branches' means over space.

    Args:
        channels: C, at least 2.
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
        """Features ``B C H W [D]`` to features of the same shape."""
        upper, lower = x.split(self.halves, dim=1)
        upper, lower = self.squeeze_upper(upper), self.squeeze_lower(lower)
        rich = self.grouped(upper) + self.pointwise(upper)
        reused = torch.cat([self.added(lower), lower], dim=1)
        space = tuple(range(2, x.dim()))
        shares = torch.stack([branch.mean(space, keepdim=True) for branch in (rich, reused)]).softmax(dim=0)
        return shares[0] * rich + shares[1] * reused


class SpaceChannelCascade(nn.Module):
    """Spatial unit, then channel unit, then a projection: ``B C H W [D]`` -> ``B out H W [D]``.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) refines spatial and channel information together, with less
    redundancy; [ours] that this is done as in the two units of SCConv (Li et al., CVPR 2023), in 3D too.

    Args:
        channels: the student's, at least 2.
        out_channels: the teacher's, reached by a 1x1 convolution; None: no projection, the shape is kept.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: fewer than 2 channels, which have no halves.
    """

    def __init__(self, channels: int, out_channels: int | None = None, spatial_dims: int = 3) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"SpaceChannelCascade needs at least 2 channels, got {channels}.")
        self.space, self.channel = SpatialUnit(channels), ChannelUnit(channels, spatial_dims)
        self.project = nn.Identity() if out_channels is None else _conv(spatial_dims, channels, out_channels, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features ``B C H W [D]`` to ``B out H W [D]``."""
        return self.project(self.channel(self.space(x)))


class CascadeFusion(nn.Module):
    """Several stages of a student fused from deep to shallow: ``h_i = cascade_i(f_i) + up(h_(i+1))``.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) fuses several stages; [ours] the sum. cascade_i is the stage's
    own ``SpaceChannelCascade`` to ``out_channels``, up is linear interpolation to the grid of f_i.

    Args:
        channels: of each stage, from shallow to deep.
        out_channels: the teacher's.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.cascades = nn.ModuleList(SpaceChannelCascade(c, out_channels, spatial_dims) for c in channels)
        self.mode = "bilinear" if spatial_dims == 2 else "trilinear"

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stages ``B C_i H_i W_i [D_i]``, shallow to deep, to the fused shallowest h_0, ``B out H_0 W_0 [D_0]``.

        Raises:
            ValueError: another number of stages than of channel counts.
        """
        if len(features) != len(self.cascades):
            raise ValueError(f"CascadeFusion is built for {len(self.cascades)} stages, got {len(features)}.")
        maps = [cascade(f) for cascade, f in zip(self.cascades, features, strict=True)]
        fused = maps.pop()
        while maps:
            stage = maps.pop()
            fused = stage + functional.interpolate(fused, size=stage.shape[2:], mode=self.mode)
        return fused
