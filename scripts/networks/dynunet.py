# SPDX-License-Identifier: Apache-2.0
"""MONAI's version of nnU-Net's 3D network, with a separate encoder and decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks import nets

LEAST_STAGES = 3  # of MONAI's DynUNet


def _stages(patch: Sequence[int]) -> int:
    """The number of stages that a patch allows."""
    stages = 1
    while all(n % 2**stages == 0 for n in patch) and math.prod(n // 2**stages for n in patch) > 1:
        stages += 1
    return stages


class DynUNet(nets.DynUNet):
    """MONAI's ``DynUNet`` configured as nnU-Net's 3D network.

    It has 3^3 kernels, instance normalisation, leaky ReLU and the strides 1, 2, 2, ...

    Source: Isensee et al., Nature Methods 2021;18:203. nnU-Net's deep supervision is left out, so that all networks of
    a comparison are trained with the same loss.

    Layers that can be tapped: ``bottleneck`` (deepest stage) and ``skip_layers`` (last decoder stage). Each
    ``.next_layer`` appended to ``skip_layers`` halves the grid.

    Args:
        in_channels: number of image channels.
        out_channels: number of classes, including the background.
        filters: channels of each stage, from full resolution to the deepest stage.
        patch: size of a patch in voxels. As in nnU-Net, the network has only as many of the stages as it allows: each
            stage halves it, and the deepest grid has more than one cell. At least three are kept.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filters: Sequence[int] = (32, 64, 128, 256, 320, 320),
        patch: Sequence[int] | None = None,
    ) -> None:
        filters = list(filters)[: None if patch is None else max(LEAST_STAGES, _stages(patch))]
        strides = [1] + [2] * (len(filters) - 1)
        kernels = [3] * len(filters)
        super().__init__(3, in_channels, out_channels, kernels, strides, strides[1:], filters=list(filters))

    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Encode an image ``B C H W D``; returns the features of every stage, from shallow to deep."""
        features = [self.input_block(image)]
        for stage in self.downsamples:
            features.append(stage(features[-1]))
        features.append(self.bottleneck(features[-1]))
        return features

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode the result of ``encode``; returns logits ``B classes H W D``."""
        x = features[-1]
        for stage, skip in zip(self.upsamples, reversed(features[:-1]), strict=True):
            x = stage(x, skip)
        return self.output_block(x)  # type: ignore[no-any-return]
