# SPDX-License-Identifier: Apache-2.0
"""H-DenseFormer: a small 3D U-Net with one densely connected Transformer path per modality.

Source: J. Shi et al., "H-DenseFormer: An Efficient Hybrid Densely Connected Transformer for Multimodal Tumor
Segmentation", MICCAI 2023, arXiv 2307.01486. Written from a description of the network, with MONAI's blocks.
"""

from __future__ import annotations

import math

import torch
from monai.networks.blocks import Convolution, MLPBlock, PatchEmbeddingBlock, SABlock
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

PATCH_SIZE = 16
LAYERS_PER_BLOCK = 4


def _conv_norm_relu(in_channels: int, out_channels: int) -> Convolution:
    act, norm = ("relu", {"inplace": True}), ("instance", {"affine": True})
    # No bias: instance normalisation would subtract it, so it would never receive a gradient.
    return Convolution(3, in_channels, out_channels, kernel_size=3, act=act, norm=norm, bias=False)


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_conv_norm_relu(in_channels, out_channels), _conv_norm_relu(out_channels, out_channels))


def _up_projection(in_channels: int, out_channels: int) -> nn.Sequential:
    upsample = nn.Upsample(scale_factor=2.0, mode="trilinear", align_corners=False)
    return nn.Sequential(_conv_norm_relu(in_channels, out_channels), upsample)


class DenseLayer(nn.Module):
    """Project the concatenated tokens to ``growth`` channels, then apply one pre-norm Transformer layer.

    Shape: ``B N in`` -> ``B N growth``. MONAI's ``TransformerBlock`` is not used, because it has a cross-attention norm
    that never receives a gradient and it applies dropout to the attention weights.
    """

    def __init__(self, in_features: int, growth: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_features, growth)
        self.norm1 = nn.LayerNorm(growth)
        # dropout_rate must stay 0 here: MONAI 1.6.1 applies it in eval() too when use_flash_attention is set.
        self.attention = SABlock(growth, num_heads, dropout_rate=0.0, use_flash_attention=True)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(growth)
        self.mlp = MLPBlock(growth, 2 * growth, dropout_rate=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class DenseTransformerBlock(nn.Module):
    """Four dense layers, each with all previous outputs as input, then a projection back: ``B N c`` -> ``B N c``."""

    def __init__(self, channels: int, growth: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        widths = [channels + i * growth for i in range(LAYERS_PER_BLOCK + 1)]
        self.layers = nn.ModuleList(DenseLayer(width, growth, num_heads, dropout) for width in widths[:-1])
        self.project = nn.Sequential(
            nn.Linear(widths[-1], 2 * growth),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * growth, channels),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=-1)
        return self.project(x)


class ModalityPath(nn.Module):
    """Embed a SINGLE modality at 1/16 resolution: ``B 1 H W D`` -> ``B c H/16 W/16 D/16``."""

    def __init__(
        self, img_size: tuple[int, ...], channels: int, depth: int, growth: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.grid = [size // PATCH_SIZE for size in img_size]
        # MONAI uses num_heads only to check that it divides the channels. Here it divides growth instead, so pass 1.
        self.embedding = PatchEmbeddingBlock(1, img_size, PATCH_SIZE, channels, num_heads=1, dropout_rate=dropout)
        self.blocks = nn.ModuleList(
            DenseTransformerBlock(channels, growth, num_heads, dropout) for _ in range(depth // LAYERS_PER_BLOCK)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.transpose(1, 2).unflatten(2, self.grid)


class EncoderStage(nn.Module):
    """Max pooling and two conv-IN-ReLU, then add the embedding.

    Shape: ``B in 2h 2w 2d``, embedding ``B c h w d`` -> ``B c h w d``. The embedding is added inside the stage, so that
    a forward hook on the stage gets the sum of both branches.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: bool = True) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d(2) if pool else nn.Identity()
        self.convs = _double_conv(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.convs(self.pool(x)) + embedding


class DecoderStage(nn.Module):
    """Transposed convolution, concatenation with the skip connection, two conv-IN-ReLU.

    Shape: ``B 2c h w d``, skip ``B c 2h 2w 2d`` -> ``B c 2h 2w 2d``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = Convolution(3, 2 * channels, channels, strides=2, kernel_size=3, is_transposed=True, conv_only=True)
        self.convs = _double_conv(2 * channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([self.up(x), skip], dim=1))


class HDenseFormer(nn.Module):
    """Hybrid densely connected Transformer for multimodal segmentation (Shi et al., arXiv 2307.01486).

    Every input channel is a modality with its own Transformer path. The concatenated paths (the paper's multi-path
    parallel embedding) are added to all four scales of a U-Net encoder. One difference to the authors' released code:
    their code applies each MLP once more before it appends a layer's output to the dense concatenation; here the
    residual output of the layer is appended.

    Layers that can be tapped, with n = ``features``:

    ================ ====== ======== ===========================
    layer            stride channels
    ================ ====== ======== ===========================
    ``encoder1``     1      n
    ``encoder2``     2      2n
    ``encoder3``     4      4n
    ``encoder4``     8      8n       deepest; embedding included
    ``decoder3``     4      4n
    ``decoder2``     2      2n
    ``decoder1``     1      n        last before the head
    ``paths.<i>``    16     4n
    ================ ====== ======== ===========================

    Args:
        in_channels: number of modalities.
        out_channels: number of classes.
        img_size: spatial size of the input, divisible by 16. ``forward`` accepts no other size, because one position is
            learned per 16^3 patch.
        features: n, the channels at full resolution.
        depth: Transformer layers per path, a multiple of 4.
        growth: channels that each dense layer adds.
        num_heads: number of attention heads, a divisor of ``growth``.
        dropout: rate for positions, attention outputs and MLPs.
        deep_supervision: add heads at 1/2, 1/4 and 1/8 resolution; in train() ``forward`` then returns a list.

    Raises:
        ValueError: ``img_size`` is not divisible by 16 or is a single patch, ``depth`` is not divisible by 4, or
            ``growth`` is not divisible by ``num_heads``. ``forward`` and ``encode`` raise it for any other input shape.

    Example::

        {"_target_": "scripts.networks.HDenseFormer", "in_channels": 2, "out_channels": 2, "img_size": [96, 96, 96]}
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: int | tuple[int, int, int],
        features: int = 16,
        depth: int = 24,
        growth: int = 32,
        num_heads: int = 8,
        dropout: float = 0.5,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        size = ensure_tuple_rep(img_size, 3)
        if any(s < PATCH_SIZE or s % PATCH_SIZE for s in size) or math.prod(size) == PATCH_SIZE**3:
            # With a single patch, instance normalisation would get a single voxel.
            raise ValueError(
                f"img_size must be divisible by {PATCH_SIZE} and contain at least two patches, got {size}."
            )
        if depth < LAYERS_PER_BLOCK or depth % LAYERS_PER_BLOCK:
            raise ValueError(f"depth must be a positive multiple of {LAYERS_PER_BLOCK}, got {depth}.")
        if growth % num_heads:
            raise ValueError(f"growth must be divisible by num_heads, got {growth} and {num_heads}.")
        n = features
        self.input_shape = [in_channels, *size]
        self.deep_supervision = deep_supervision
        self.paths = nn.ModuleList(
            ModalityPath(size, 4 * n, depth, growth, num_heads, dropout) for _ in range(in_channels)
        )
        self.embed4 = _up_projection(4 * n * in_channels, 8 * n)
        self.embed3 = _up_projection(8 * n, 4 * n)
        self.embed2 = _up_projection(4 * n, 2 * n)
        self.embed1 = _up_projection(2 * n, n)
        self.encoder1 = EncoderStage(in_channels, n, pool=False)
        self.encoder2 = EncoderStage(n, 2 * n)
        self.encoder3 = EncoderStage(2 * n, 4 * n)
        self.encoder4 = EncoderStage(4 * n, 8 * n)
        self.decoder3 = DecoderStage(4 * n)
        self.decoder2 = DecoderStage(2 * n)
        self.decoder1 = DecoderStage(n)
        self.head = nn.Conv3d(n, out_channels, 1)
        # A head without a loss gets no gradient, and DistributedDataParallel refuses that.
        widths = (2 * n, 4 * n, 8 * n) if deep_supervision else ()
        self.auxiliary_heads = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for width in widths)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode an image ``B M H W D``; returns the outputs of encoder1 to encoder4, at 1/1, 1/2, 1/4 and 1/8."""
        if list(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"HDenseFormer needs (B, C, H, W, D) with C, H, W, D = {self.input_shape}, got {list(x.shape)}: crop "
                "or pad the image, or train with another img_size."
            )
        embedding4 = self.embed4(torch.cat([path(x[:, i : i + 1]) for i, path in enumerate(self.paths)], dim=1))
        embedding3 = self.embed3(embedding4)
        embedding2 = self.embed2(embedding3)
        stage1 = self.encoder1(x, self.embed1(embedding2))
        stage2 = self.encoder2(stage1, embedding2)
        stage3 = self.encoder3(stage2, embedding3)
        return stage1, stage2, stage3, self.encoder4(stage3, embedding4)

    def decode(self, features: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Decode the result of ``encode``; returns logits ``B classes H W D``."""
        return self.head(self._decode_stages(features)[0])

    def _decode_stages(self, features: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
        stage3 = self.decoder3(features[3], features[2])
        stage2 = self.decoder2(stage3, features[1])
        return [self.decoder1(stage2, features[0]), stage2, stage3, features[3]]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment an image ``B M H W D``; returns logits ``B classes H W D``.

        In train() with deep supervision, returns the logits of all scales in a list, finest first.
        """
        features = self.encode(x)
        if not (self.deep_supervision and self.training):
            return self.decode(features)
        stages = self._decode_stages(features)
        logits = [self.head(stages[0])]
        for i, head in enumerate(self.auxiliary_heads):
            logits.append(head(stages[i + 1]))
        return logits
