# SPDX-License-Identifier: Apache-2.0
"""3D UX-Net: a hierarchical encoder with large depthwise convolutions, and a UNETR-style decoder.

Source: H. H. Lee et al., "3D UX-Net: A Large Kernel Volumetric ConvNet Modernizing Hierarchical Transformer for
Medical Image Segmentation", ICLR 2023, arXiv 2209.15076. Written from a description of the network, with MONAI's
UNETR blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

LAYER_SCALE = 1e-6
EXPANSION = 4


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each voxel: ``B C h w d`` -> ``B C h w d``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 4, 1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 4, 1, 2, 3)


class UXBlock(nn.Module):
    """Residual block: depthwise 7^3, LayerNorm, depthwise 1^3 x4, GELU, depthwise 1^3, layer scale.

    "Depthwise 1^3" is the paper's volumetric depthwise scaling: each channel is expanded separately, so channels are
    mixed only by the normalisation and between the stages.

    Shape: ``B C h w d`` -> ``B C h w d``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = ChannelLayerNorm(channels)
        self.expand = nn.Conv3d(channels, EXPANSION * channels, kernel_size=1, groups=channels)
        self.activation = nn.GELU()
        self.reduce = nn.Conv3d(EXPANSION * channels, channels, kernel_size=1, groups=channels)
        # The small initial scale makes each block nearly the identity at the start of training.
        self.scale = nn.Parameter(torch.full((channels,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.activation(self.expand(self.norm(self.depthwise(x)))))
        return x + self.scale.view(-1, 1, 1, 1) * y


class UXStage(nn.Module):
    """Halve the grid, then apply ``depth`` blocks: ``B in 2h 2w 2d`` -> ``B out h w d``."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, stem: bool = False) -> None:
        super().__init__()
        if stem:
            conv = nn.Conv3d(in_channels, out_channels, kernel_size=7, stride=2, padding=3)
            self.downsample = nn.Sequential(conv, ChannelLayerNorm(out_channels))
        else:
            conv = nn.Conv3d(in_channels, out_channels, kernel_size=2, stride=2)
            self.downsample = nn.Sequential(ChannelLayerNorm(in_channels), conv)
        self.blocks = nn.Sequential(*(UXBlock(out_channels) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


def _skip(in_channels: int, out_channels: int) -> UnetrBasicBlock:
    return UnetrBasicBlock(3, in_channels, out_channels, kernel_size=3, stride=1, norm_name="instance", res_block=True)


def _up(channels: int) -> UnetrUpBlock:
    return UnetrUpBlock(3, 2 * channels, channels, 3, upsample_kernel_size=2, norm_name="instance", res_block=True)


class UXNet(nn.Module):
    """3D UX-Net (Lee et al., arXiv 2209.15076): large-kernel ConvNet encoder, residual convolutional decoder.

    ``features`` = 48 is the published width (53.0 M parameters); 24 (the default) has 13.4 M and 16 has 6.0 M.

    Layers that can be tapped, with f = ``features``:

    ============== ====== ======== ============================
    layer          stride channels
    ============== ====== ======== ============================
    ``stages.0``   2      f        before the skip convolutions
    ``stages.1``   4      2f
    ``stages.2``   8      4f
    ``stages.3``   16     8f
    ``encoder1``   1      f
    ``encoder2``   2      2f
    ``encoder3``   4      4f
    ``encoder4``   8      8f
    ``encoder5``   16     16f      deepest
    ``decoder5``   8      8f
    ``decoder4``   4      4f
    ``decoder3``   2      2f
    ``decoder2``   1      f
    ``decoder1``   1      f        last before the head ``out``
    ============== ====== ======== ============================

    Args:
        in_channels: number of image channels.
        out_channels: number of classes.
        features: f, the channels of the first stage.
        depths: number of blocks in each of the four stages.

    Raises:
        ValueError: ``depths`` is not four positive numbers. ``forward`` and ``encode`` raise it for an input that is
            not ``B C H W D``, has a size that is not divisible by 16, or is 16^3.

    Example::

        {"_target_": "scripts.networks.UXNet", "in_channels": 3, "out_channels": 2, "features": 24}
    """

    def __init__(
        self, in_channels: int, out_channels: int, features: int = 24, depths: Sequence[int] = (2, 2, 2, 2)
    ) -> None:
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths must be four positive numbers, got {tuple(depths)}.")
        f = features
        self.stride = 16
        self.stages = nn.ModuleList([UXStage(in_channels, f, depths[0], stem=True)])
        self.stages.extend(UXStage(f * 2 ** (i - 1), f * 2**i, depths[i]) for i in range(1, 4))
        self.encoder1 = _skip(in_channels, f)
        self.encoder2 = nn.Sequential(ChannelLayerNorm(f), _skip(f, 2 * f))
        self.encoder3 = nn.Sequential(ChannelLayerNorm(2 * f), _skip(2 * f, 4 * f))
        self.encoder4 = nn.Sequential(ChannelLayerNorm(4 * f), _skip(4 * f, 8 * f))
        self.encoder5 = nn.Sequential(ChannelLayerNorm(8 * f), _skip(8 * f, 16 * f))
        self.decoder5 = _up(8 * f)
        self.decoder4 = _up(4 * f)
        self.decoder3 = _up(2 * f)
        self.decoder2 = _up(f)
        self.decoder1 = _skip(f, f)
        self.out = UnetOutBlock(3, f, out_channels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Encode an image ``B C H W D``; returns the outputs of encoder1 to encoder5, at 1/1 to 1/16."""
        self._check_size(x)
        stage1 = self.stages[0](x)
        stage2 = self.stages[1](stage1)
        stage3 = self.stages[2](stage2)
        stage4 = self.stages[3](stage3)
        skip2, skip3, skip4 = self.encoder2(stage1), self.encoder3(stage2), self.encoder4(stage3)
        return self.encoder1(x), skip2, skip3, skip4, self.encoder5(stage4)

    def decode(self, features: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Decode the result of ``encode``; returns logits ``B classes H W D``."""
        x = self.decoder5(features[4], features[3])
        x = self.decoder4(x, features[2])
        x = self.decoder3(x, features[1])
        x = self.decoder2(x, features[0])
        return self.out(self.decoder1(x))

    def forward(self, x: Tensor) -> Tensor:
        """Segment an image ``B C H W D``; returns logits ``B classes H W D``."""
        return self.decode(self.encode(x))

    def _check_size(self, x: Tensor) -> None:
        if x.dim() != 5:
            raise ValueError(f"UXNet needs (B, C, H, W, D), got shape {list(x.shape)}.")
        height, width, depth = x.shape[2], x.shape[3], x.shape[4]
        if height % self.stride or width % self.stride or depth % self.stride:
            raise ValueError(
                f"UXNet needs spatial sizes divisible by {self.stride}, got {[height, width, depth]}: crop or pad "
                "the image."
            )
        if height * width * depth == self.stride**3:
            raise ValueError(
                f"UXNet needs an axis of at least {2 * self.stride} voxels, got {[height, width, depth]}: instance "
                "normalisation of a single voxel is undefined."
            )
