# SPDX-License-Identifier: Apache-2.0
"""Semantic auto-encoder: codes of segmentation masks, to which the codes of the networks are aligned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks import one_hot
from monai.networks.blocks import Convolution
from torch import nn
from torch.nn import functional

from scripts.networks.alignment_header import AlignmentHeader

GROUPS = 4


def _conv(dims: int, inputs: int, outputs: int, strides: int = 1) -> Convolution:
    """3x3(x3) convolution, group normalisation, ReLU."""
    # The deepest grid of a small patch may be a single voxel. Neither instance normalisation nor a group of a single
    # channel can normalise that.
    norm = ("group", {"num_groups": GROUPS})
    return Convolution(dims, inputs, outputs, strides=strides, adn_ordering="NA", act="RELU", norm=norm, bias=False)


class SemanticAutoEncoder(nn.Module):
    """Auto-encoder of masks without skip connections: the logits depend on the code only.

    Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995: a pre-trained semantic auto-encoder (P-SAE) defines
    the space to which the networks' codes are aligned; [ours] its architecture: stride-2 convolutions, an
    ``AlignmentHeader`` on the deepest grid, then interpolation and convolutions back to full resolution. With the same
    ``code_channels`` and ``code``, its codes have the shape of the headers' codes. Train it on the masks of the
    training set only.

    Args:
        classes: number of classes, including the background.
        features: channels of the stages, from stride 2 to stride ``2 ** len(features)``; each divisible by 8.
        code_channels, grid, code: see ``AlignmentHeader``.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: ``classes`` is less than 2, or ``features`` is empty or not divisible by 8.
    """

    def __init__(
        self,
        classes: int,
        features: Sequence[int] = (16, 32, 64, 128),
        code_channels: int = 256,
        grid: int = 4,
        code: int = 4,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"SemanticAutoEncoder needs at least 2 classes (including the background), got {classes}.")
        if not features or any(width < 1 or width % (2 * GROUPS) for width in features):
            raise ValueError(f"features must be one or more numbers divisible by {2 * GROUPS}, got {list(features)}.")
        self.classes, self.spatial_dims = classes, spatial_dims
        self.encoder = nn.ModuleList(_conv(spatial_dims, i, o, strides=2) for i, o in pairwise([classes, *features]))
        self.header = AlignmentHeader(features[-1], code_channels, grid, code, spatial_dims)
        widths = [*reversed(features), features[0]]
        self.decoder = nn.ModuleList(_conv(spatial_dims, i, o) for i, o in pairwise(widths))
        self.head = Convolution(spatial_dims, features[0], classes, kernel_size=1, conv_only=True)

    def encode(self, mask: torch.Tensor) -> torch.Tensor:
        """Encode a mask.

        Args:
            mask: class indices, ``B 1 H W [D]``, integer or float, of any size.

        Returns:
            The code, ``B code_channels code``.

        Raises:
            ValueError: the mask has another shape, or a class index is not in ``0 .. classes - 1``.
        """
        if mask.dim() != 2 + self.spatial_dims or mask.shape[1] != 1:
            raise ValueError(
                f"SemanticAutoEncoder needs class indices B 1 {'H W D'[: 2 * self.spatial_dims - 1]}, "
                f"got {tuple(mask.shape)}."
            )
        if mask.min() < 0 or mask.max() >= self.classes:
            raise ValueError(
                f"The mask {tuple(mask.shape)} contains class indices {mask.min().item():g} to {mask.max().item():g}: "
                f"they must be 0 to {self.classes - 1}."
            )
        x = one_hot(mask, self.classes)
        for stage in self.encoder:
            x = stage(x)
        return self.header.encode(x)

    def decode(self, code: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Decode a code.

        Args:
            code: ``B code_channels code``.
            size: spatial size of the mask, H W [D].

        Returns:
            Logits, ``B classes *size``.

        Raises:
            ValueError: the code has another shape, or ``size`` has another number of axes.
        """
        # The grids of the encoder's stages, so that the logits of any mask have exactly the size of that mask.
        grids = [tuple(-(-s // 2**level) for s in size) for level in range(len(self.decoder) + 1)]
        mode = "bilinear" if self.spatial_dims == 2 else "trilinear"
        x = self.header.decode(code, grids[-1])
        for stage, grid in zip(self.decoder, reversed(grids[:-1]), strict=True):
            x = stage(functional.interpolate(x, size=grid, mode=mode, align_corners=False))
        return self.head(x)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """Encode and decode class indices ``B 1 H W [D]``; returns logits ``B classes H W [D]``."""
        return self.decode(self.encode(mask), mask.shape[2:])
