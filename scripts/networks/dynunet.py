# SPDX-License-Identifier: Apache-2.0
"""nnU-Net's 3D network, as MONAI has it, with an encoder and a decoder that can be called apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import DynUNet


class NNUNet(DynUNet):
    """MONAI's ``DynUNet`` in nnU-Net's 3D form: 3^3 kernels, instance norm, leaky ReLU, strides 1, 2, 2, ...

    Without nnU-Net's deep supervision, so that every network of a comparison is trained by the same loss.

    Source: Isensee et al., Nature Methods 2021;18:203.

    Layers that a forward hook can tap: ``bottleneck`` (deepest), ``skip_layers`` (last decoder stage), and one
    ``.next_layer`` behind it for every halving of the grid.

    Args:
        in_channels: image channels.
        out_channels: classes, background included.
        filters: widths from full resolution to the deepest stage.
    """

    def __init__(
        self, in_channels: int, out_channels: int, filters: Sequence[int] = (32, 64, 128, 256, 320, 320)
    ) -> None:
        strides = [1] + [2] * (len(filters) - 1)
        kernels = [3] * len(filters)
        super().__init__(3, in_channels, out_channels, kernels, strides, strides[1:], filters=list(filters))

    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """``B C H W D`` to the features of every stage, shallow to deep."""
        features = [self.input_block(image)]
        for stage in self.downsamples:
            features.append(stage(features[-1]))
        features.append(self.bottleneck(features[-1]))
        return features

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """What ``encode`` returned, to logits ``B classes H W D``."""
        x = features[-1]
        for stage, skip in zip(self.upsamples, reversed(features[:-1]), strict=True):
            x = stage(x, skip)
        return self.output_block(x)  # type: ignore[no-any-return]
