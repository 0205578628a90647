# SPDX-License-Identifier: Apache-2.0
"""Alignment headers: encode features as short codes that can be compared and exchanged between networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from torch import nn
from torch.nn import functional


class AlignmentHeader(nn.Module):
    """Auto-encoder of a feature map. Its code has the same shape for every network and every grid.

    Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995, and its released networks: one header per network, an
    encoder that maps each channel's flattened map to a short code by Linear, GELU, Linear, and a mirrored decoder;
    [ours] the 3D form, the pooled grid and the 1x1 convolutions before and after the MLPs. With n = spatial_dims and
    N = grid^n::

        encode: 1x1 conv to code_channels, adaptive average pooling to grid^n, per channel N -> hidden -> code
        decode: per channel code -> hidden -> N, linear interpolation from grid^n to the features' grid, 1x1 conv back

    All channels share one MLP. A map with fewer than ``grid`` cells along an axis is accepted: adaptive pooling then
    repeats cells, and ``decode`` averages them again.

    Args:
        channels: number of channels of the features.
        code_channels: channels of the code; must be the same for all networks that exchange codes.
        grid: cells per axis of the MLP's input.
        code: numbers per code channel. 1 is the published size; it loses the spatial layout.
        spatial_dims: 2 or 3.
        hidden: width of the MLP.

    Raises:
        ValueError: a size is less than 1, or ``spatial_dims`` is not 2 or 3.
    """

    def __init__(
        self,
        channels: int,
        code_channels: int = 256,
        grid: int = 4,
        code: int = 4,
        spatial_dims: int = 3,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if min(channels, code_channels, grid, code, hidden) < 1:
            raise ValueError(
                f"AlignmentHeader needs sizes of at least 1, got channels {channels}, code_channels {code_channels}, "
                f"grid {grid}, code {code}, hidden {hidden}."
            )
        self.channels, self.code_shape, self.grid = channels, (code_channels, code), (grid,) * spatial_dims
        cells = grid**spatial_dims
        self.project = Convolution(spatial_dims, channels, code_channels, kernel_size=1, conv_only=True)
        self.pool = nn.AdaptiveAvgPool2d(grid) if spatial_dims == 2 else nn.AdaptiveAvgPool3d(grid)
        self.encoder = nn.Sequential(nn.Linear(cells, hidden), nn.GELU(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.GELU(), nn.Linear(hidden, cells))
        self.restore = Convolution(spatial_dims, code_channels, channels, kernel_size=1, conv_only=True)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encode features.

        Args:
            features: ``B channels h w [d]``.

        Returns:
            The code, ``B code_channels code``.

        Raises:
            ValueError: the features have another number of channels or axes.
        """
        if features.dim() != 2 + len(self.grid) or features.shape[1] != self.channels:
            raise ValueError(
                f"AlignmentHeader needs features B {self.channels} {'h w d'[: 2 * len(self.grid) - 1]}, "
                f"got {tuple(features.shape)}."
            )
        return self.encoder(self.pool(self.project(features)).flatten(2))

    def decode(self, code: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Decode a code of this or another header.

        Args:
            code: ``B code_channels code``.
            size: spatial size of the features to return.

        Returns:
            Features, ``B channels *size``.

        Raises:
            ValueError: the code has another shape, or ``size`` has another number of axes.
        """
        if code.dim() != 3 or tuple(code.shape[1:]) != self.code_shape:
            raise ValueError(
                f"AlignmentHeader needs a code (B, {self.code_shape[0]}, {self.code_shape[1]}), got "
                f"{tuple(code.shape)}: all headers must have the same code_channels and code."
            )
        if len(size) != len(self.grid):
            raise ValueError(f"size must have {len(self.grid)} axes, got {tuple(size)}.")
        cells = self.decoder(code).unflatten(2, self.grid)
        mode = "bilinear" if len(self.grid) == 2 else "trilinear"
        return self.restore(functional.interpolate(cells, size=tuple(size), mode=mode, align_corners=False))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode features ``B channels h w [d]`` and return their code and their reconstruction at the same size."""
        code = self.encode(features)
        return code, self.decode(code, features.shape[2:])
