# SPDX-License-Identifier: Apache-2.0
"""The semantic auto-encoder: codes of segmentation masks, which anchor the codes of the networks."""

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
    # Not instance normalisation, and no group of one channel: the deepest grid of a small patch may be one voxel.
    norm = ("group", {"num_groups": GROUPS})
    return Convolution(dims, inputs, outputs, strides=strides, adn_ordering="NA", act="RELU", norm=norm, bias=False)


class SemanticAutoEncoder(nn.Module):
    """Auto-encoder of masks without skips: everything that reaches the logits went through the code.

    Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995: a pre-trained semantic auto-encoder (P-SAE) gives the
    space to which the networks' codes are aligned; [ours] its architecture: stride-2 convolutions, an
    ``AlignmentHeader`` on the deepest grid, interpolations and convolutions back. With equal ``code_channels`` and
    ``code`` its codes have the shape of the headers' codes. Train it on the masks of the training set only.

    Args:
        classes: background included.
        features: widths from stride 2 to the deepest stride ``2 ** len(features)``; divisible by 8.
        code_channels, grid, code: see ``AlignmentHeader``.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: fewer than 2 classes, no widths, or widths not divisible by 8.
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
            raise ValueError(f"SemanticAutoEncoder needs at least 2 classes (background included), got {classes}.")
        if not features or any(width < 1 or width % (2 * GROUPS) for width in features):
            raise ValueError(f"features must be widths divisible by {2 * GROUPS}, got {list(features)}.")
        self.classes, self.spatial_dims = classes, spatial_dims
        self.encoder = nn.ModuleList(_conv(spatial_dims, i, o, strides=2) for i, o in pairwise([classes, *features]))
        self.header = AlignmentHeader(features[-1], code_channels, grid, code, spatial_dims)
        widths = [*reversed(features), features[0]]
        self.decoder = nn.ModuleList(_conv(spatial_dims, i, o) for i, o in pairwise(widths))
        self.head = Convolution(spatial_dims, features[0], classes, kernel_size=1, conv_only=True)

    def encode(self, mask: torch.Tensor) -> torch.Tensor:
        """Class indices ``B 1 H W [D]`` (integer or float, any size) to their code, ``B code_channels code``.

        Raises:
            ValueError: another shape, or a class index outside of ``0 .. classes - 1``.
        """
        if mask.dim() != 2 + self.spatial_dims or mask.shape[1] != 1:
            raise ValueError(
                f"SemanticAutoEncoder needs class indices B 1 {'H W D'[: 2 * self.spatial_dims - 1]}, "
                f"got {tuple(mask.shape)}."
            )
        if mask.min() < 0 or mask.max() >= self.classes:
            raise ValueError(
                f"The mask {tuple(mask.shape)} holds class indices {mask.min().item():g} to {mask.max().item():g}: "
                f"allowed are 0 to {self.classes - 1}."
            )
        x = one_hot(mask, self.classes)
        for stage in self.encoder:
            x = stage(x)
        return self.header.encode(x)

    def decode(self, code: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """A code ``B code_channels code`` to logits ``B classes *size``; ``size`` is the mask's, H W [D].

        Raises:
            ValueError: another shape of the code, or a ``size`` of another number of axes.
        """
        # The sizes that the encoder's convolutions leave: any mask returns at its own size.
        grids = [tuple(-(-s // 2**level) for s in size) for level in range(len(self.decoder) + 1)]
        mode = "bilinear" if self.spatial_dims == 2 else "trilinear"
        x = self.header.decode(code, grids[-1])
        for stage, grid in zip(self.decoder, reversed(grids[:-1]), strict=True):
            x = stage(functional.interpolate(x, size=grid, mode=mode, align_corners=False))
        return self.head(x)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """Class indices ``B 1 H W [D]`` to logits ``B classes H W [D]``."""
        return self.decode(self.encode(mask), mask.shape[2:])
