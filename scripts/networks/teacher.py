# SPDX-License-Identifier: Apache-2.0
"""Teachers: an architecture, the modalities that it reads, and its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.nets import UNETR, SegResNet, SwinUNETR
from torch import nn

from scripts.networks import HDenseFormer, NNUNet, UXNet
from scripts.networks.weights import load_weights

logger = logging.getLogger(__name__)

ARCHITECTURES = ("unetr", "swinunetr", "hdenseformer", "uxnet", "dynunet", "segresnet")


def _build_network(
    architecture: str, in_channels: int, out_channels: int, patch: Sequence[int], options: Mapping[str, Any]
) -> nn.Module:
    height, width, depth = patch
    if architecture == "unetr":
        network = UNETR(in_channels, out_channels, img_size=(height, width, depth), **options)
        # MONAI adds a cross-attention norm to every block and never calls it. In a training with several processes,
        # DistributedDataParallel would wait for its gradient.
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("norm_cross_attn" not in name)
        return network
    if architecture == "swinunetr":
        return SwinUNETR(in_channels, out_channels, **options)
    if architecture == "hdenseformer":
        return HDenseFormer(in_channels, out_channels, img_size=(height, width, depth), **options)
    if architecture == "uxnet":
        return UXNet(in_channels, out_channels, **options)
    if architecture == "dynunet":
        return NNUNet(in_channels, out_channels, **options)
    if architecture == "segresnet":
        return SegResNet(in_channels=in_channels, out_channels=out_channels, **options)
    raise ValueError(f"Unknown architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}.")


class Teacher(nn.Module):
    """A network that selects its own modalities from the full image: ``B M H W D`` -> logits ``B classes H W D``.

    Args:
        architecture: one of ``ARCHITECTURES``.
        modalities: the modalities that this teacher reads, in the order of its input channels.
        all_modalities: the modalities of the image, in the order of its channels.
        out_channels: number of classes, including the background.
        patch: patch size in voxels. UNETR and H-DenseFormer learn one position per 16^3 cell of it.
        options: architecture -> further arguments of its class.
        weights: file of weights to load strictly, or None for random weights.
        sha256: checksum that the weights file must have. Default: the checksum in ``<weights>.sha256``, if it exists.

    Raises:
        ValueError: the architecture or a modality is unknown, or the weights do not fit.
        FileNotFoundError: the weights file does not exist.
    """

    def __init__(
        self,
        architecture: str,
        modalities: Sequence[str],
        all_modalities: Sequence[str],
        out_channels: int,
        patch: Sequence[int],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        if not modalities or not set(modalities) <= set(all_modalities):
            raise ValueError(
                f"The modalities of a teacher must be one or more of {list(all_modalities)}, got {list(modalities)}."
            )
        self.channels = [list(all_modalities).index(modality) for modality in modalities]
        architecture_options = (options or {}).get(architecture, {})
        self.network = _build_network(architecture, len(modalities), out_channels, patch, architecture_options)
        self.sha256 = load_weights(self, weights, sha256) if weights else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment an image ``B M H W D``; returns logits ``B classes H W D``."""
        return self.network(image[:, self.channels])  # type: ignore[no-any-return]

    def encode(self, image: torch.Tensor) -> Sequence[torch.Tensor]:
        """Encode an image ``B M H W D``; returns features from shallow to deep.

        Only for architectures with a separate encoder: hdenseformer, uxnet and dynunet.
        """
        return self.network.encode(image[:, self.channels])  # type: ignore[operator, no-any-return]

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode the result of ``encode``; returns logits ``B classes H W D``."""
        return self.network.decode(tuple(features))  # type: ignore[operator, no-any-return]


def load_teachers(specs: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, Teacher]:
    """Build the teachers of a distillation and log the checksums of their weights.

    Args:
        specs: name of a teacher -> arguments of ``Teacher`` for this teacher only.
        common: arguments of ``Teacher`` that are the same for all.

    Returns:
        Name of a teacher -> ``Teacher``.
    """
    teachers = {name: Teacher(**common, **spec) for name, spec in specs.items()}
    for name, teacher in teachers.items():
        origin = f"sha256 {teacher.sha256}" if teacher.sha256 else "random weights"
        logger.info("teacher %s: %s, %s", name, type(teacher.network).__name__, origin)
    return teachers
