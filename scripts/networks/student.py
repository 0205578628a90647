# SPDX-License-Identifier: Apache-2.0
"""The compact student: a U-Net with a stride-2 stem and one attention block on the deepest grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks import Convolution
from torch import nn

from scripts.networks.modality_dropout import ModalityDropout
from scripts.networks.selective_fusion import SelectiveFusion


def _conv(dims: int, inputs: int, outputs: int, norm: str | tuple, strides: int | Sequence[int] = 1) -> Convolution:
    """3x3(x3) convolution, normalisation, ReLU."""
    return Convolution(dims, inputs, outputs, strides=strides, adn_ordering="NA", act="RELU", norm=norm, bias=False)


def _steps(strides: Sequence[int | Sequence[int]] | None, stages: int, dims: int) -> list[tuple[int, ...]]:
    """The stride of each stage along each axis."""
    given = [2] * stages if strides is None else list(strides)
    steps = [(each,) * dims if isinstance(each, int) else tuple(each) for each in given]
    if len(steps) != stages or any(len(step) != dims or min(step) < 1 for step in steps):
        raise ValueError(
            f"strides ({strides}) must name a whole number of at least 1, or {dims} of them, for each of the {stages} "
            "stages."
        )
    return steps


class GridAttention(nn.Module):
    """Pre-norm multi-head self-attention and MLP over the cells of a grid.

    Positions are not learned, because the convolutions before this block encode them. So any grid size works.

    Args:
        channels: number of channels; divisible by ``heads``.
        heads: number of attention heads.

    Raises:
        ValueError: ``channels`` is not divisible by ``heads``.
    """

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels ({channels}) must be divisible by heads ({heads}).")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.softmax = nn.Softmax(dim=-1)
        self.project = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over the grid.

        Args:
            x: features, ``B C H W [D]``.

        Returns:
            The features (``B C H W [D]``) and the attention map (``B heads N N`` for N cells; its rows sum to 1).
        """
        tokens = x.flatten(2).transpose(1, 2)
        batch, cells, channels = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(batch, cells, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.softmax(q @ k.transpose(-2, -1) * (channels // self.heads) ** -0.5)
        tokens = tokens + self.project((weights @ v).transpose(1, 2).reshape(batch, cells, channels))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(x.shape), weights


class Student(nn.Module):
    """U-Net for a CPU with two cores: all but one thin stage run at half resolution or below.

    By default the stem halves the resolution immediately. Every stage is two regular 3^3 convolutions, and one
    attention block works on the deepest grid. The last stage returns to full resolution: it concatenates
    ``full_features`` channels with the input image, so that borders follow the image and not the half-resolution grid.

    Layers that can be tapped (``scripts.distillation.feature_taps``): ``encoder.0`` .. ``encoder.3`` (stride 2 to 16),
    ``attention`` (features), ``attention.softmax`` (attention map), ``decoder.0`` .. ``decoder.2`` (stride 8 to 2) and
    ``full`` (stride 1); with ``selective_fusion`` also ``fusion.local`` and ``fusion.context`` (stride 4). The strides
    are those of the default.

    Args:
        in_channels: number of modalities, one channel each, in the order of the config's ``modalities``.
        out_channels: number of classes, including the background, or of regions.
        features: channels of each stage, from the stem to the deepest.
        full_features: channels of the full-resolution stage.
        heads: number of attention heads.
        norm: name of the normalisation in MONAI. The default is group normalisation: with batches of two patches, the
            running statistics of batch normalisation gave a lower Dice than the statistics of each window
            (docs/notes/training.md). With large batches ``"batch"`` is faster, because it folds into the convolutions.
        selective_fusion: insert a ``SelectiveFusion`` block after the decoder stage at stride 4, for dual distillation.
        modality_dropout: probability of dropping each modality in training, see ``ModalityDropout``. It has no weights
            and does nothing in eval().
        spatial_dims: 2 or 3.
        strides: of each stage, one number or one per axis; None: 2 everywhere. Thick slices should not be halved before
            the voxels are about as long along every axis: ``[[2, 2, 1], [2, 2, 1], 2, 2]``.

    Attributes:
        divisor: per axis the number that sizes of images must be multiples of.

    Raises:
        ValueError: the last number of ``features`` is not divisible by ``heads``, or ``strides`` does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (24, 48, 96, 192),
        full_features: int = 8,
        heads: int = 4,
        norm: str | tuple = ("group", {"num_groups": 8}),
        selective_fusion: bool = False,
        modality_dropout: float = 0.0,
        spatial_dims: int = 3,
        strides: Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        steps = _steps(strides, len(features), spatial_dims)
        self.divisor = [math.prod(along_axis) for along_axis in zip(*steps, strict=True)]
        self.modality_dropout = ModalityDropout(modality_dropout)
        widths = [in_channels, *features]
        self.encoder = nn.ModuleList(
            nn.Sequential(_conv(spatial_dims, i, o, norm, step), _conv(spatial_dims, o, o, norm))
            for (i, o), step in zip(pairwise(widths), steps, strict=True)
        )
        self.attention = GridAttention(features[-1], heads)
        upsample: Any = nn.ConvTranspose2d if spatial_dims == 2 else nn.ConvTranspose3d
        deep_to_shallow = list(zip(reversed(features[1:]), reversed(features[:-1]), strict=True))
        self.upsample = nn.ModuleList(
            upsample(i, o, step, stride=step) for (i, o), step in zip(deep_to_shallow, steps[:0:-1], strict=True)
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(_conv(spatial_dims, 2 * o, o, norm), _conv(spatial_dims, o, o, norm))
            for _, o in deep_to_shallow
        )
        # The second stage (stride 4) has enough cells for a dilated neighbourhood, and few enough to be cheap.
        self.fused_stage = len(features) - 3 if selective_fusion else -1
        self.fusion = SelectiveFusion(features[1], spatial_dims) if selective_fusion else nn.Identity()
        self.upsample_full = upsample(features[0], full_features, steps[0], stride=steps[0])
        self.full = _conv(spatial_dims, full_features + in_channels, full_features, norm)
        self.head = Convolution(spatial_dims, full_features, out_channels, kernel_size=1, conv_only=True)

    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Encode an image.

        Args:
            image: ``B C H W [D]``.

        Returns:
            The features from shallow to deep: first the image itself (in train() without its dropped modalities), then
            one map per stage. The deepest is the output of the attention block.

        Raises:
            ValueError: a spatial size is not divisible by the product of the strides along its axis.
        """
        for size, divisor in zip(image.shape[2:], self.divisor):  # noqa: B905 (TorchScript has no strict)
            if size % divisor != 0:
                raise ValueError(
                    f"Student needs spatial sizes divisible by {self.divisor}, got {list(image.shape[2:])}: pad the "
                    "image or choose another patch size."
                )
        features = [self.modality_dropout(image)]
        for stage in self.encoder:
            features.append(stage(features[-1]))
        features[-1] = self.attention(features[-1])[0]
        return features

    def decode(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Decode the result of ``encode``; returns logits ``B C H W [D]``, one channel per class or region."""
        x = features[-1]
        # TorchScript knows no strict=True.
        for i, (upsample, stage) in enumerate(zip(self.upsample, self.decoder)):  # noqa: B905
            x = stage(torch.cat([upsample(x), features[len(features) - 2 - i]], dim=1))
            if i == self.fused_stage:
                x = self.fusion(x)
        return self.head(self.full(torch.cat([self.upsample_full(x), features[0]], dim=1)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment an image ``B C H W [D]``; returns logits ``B C H W [D]``, see ``decode``."""
        return self.decode(self.encode(image))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights strictly, even if ``strict`` is False.

        MONAI Label passes False, and would otherwise silently run an untrained network if no name matched.
        """
        return super().load_state_dict(state_dict, strict=True, assign=assign)
