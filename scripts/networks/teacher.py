# SPDX-License-Identifier: Apache-2.0
"""Teachers: a named architecture, the modalities that it sees, and its weights."""

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


def _network(
    architecture: str, inputs: int, outputs: int, patch: Sequence[int], options: Mapping[str, Any]
) -> nn.Module:
    height, width, depth = patch
    if architecture == "unetr":
        network = UNETR(inputs, outputs, img_size=(height, width, depth), **options)
        # MONAI builds a norm for cross-attention into every block and never calls it: several processes would wait
        # for its gradient.
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("norm_cross_attn" not in name)
        return network
    if architecture == "swinunetr":
        return SwinUNETR(inputs, outputs, **options)
    if architecture == "hdenseformer":
        return HDenseFormer(inputs, outputs, img_size=(height, width, depth), **options)
    if architecture == "uxnet":
        return UXNet(inputs, outputs, **options)
    if architecture == "dynunet":
        return NNUNet(inputs, outputs, **options)
    if architecture == "segresnet":
        return SegResNet(in_channels=inputs, out_channels=outputs, **options)
    raise ValueError(f"Unknown architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}.")


class Teacher(nn.Module):
    """A network that picks its own modalities from the full image, ``B M H W D`` -> ``B classes H W D``.

    Args:
        architecture: one of ``ARCHITECTURES``.
        modalities: the ones that it sees, in its own channel order.
        all_modalities: the channel order of the image.
        out_channels: classes, background included.
        patch: size of its window in voxels (UNETR and H-DenseFormer learn one position per cell of it).
        options: further arguments of the architecture's class, by architecture.
        weights: file to load strictly, or None for random weights.
        sha256: checksum that the file must have; by default the one in ``<weights>.sha256``, where there is one.

    Raises:
        ValueError: an unknown architecture or modality, or weights that do not fit.
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
        unknown = [m for m in modalities if m not in all_modalities]
        if unknown or not modalities:
            raise ValueError(f"A teacher of {list(modalities)} cannot read images of {list(all_modalities)}.")
        self.channels = [list(all_modalities).index(m) for m in modalities]
        chosen = (options or {}).get(architecture, {})
        self.network = _network(architecture, len(modalities), out_channels, patch, chosen)
        self.sha256 = load_weights(self, weights, sha256) if weights else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits from the modalities that this teacher sees."""
        return self.network(image[:, self.channels])  # type: ignore[no-any-return]

    def encode(self, image: torch.Tensor) -> Sequence[torch.Tensor]:
        """Features from its modalities, shallow to deep, where the architecture has an encoder of its own."""
        return self.network.encode(image[:, self.channels])  # type: ignore[operator, no-any-return]

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """What ``encode`` returned, to logits."""
        return self.network.decode(tuple(features))  # type: ignore[operator, no-any-return]


def load_teachers(specs: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, Teacher]:
    """Build the teachers of a distillation.

    Args:
        specs: teacher name -> the arguments of ``Teacher`` that are its own.
        common: the arguments that all share.
    """
    teachers = {name: Teacher(**common, **spec) for name, spec in specs.items()}
    for name, teacher in teachers.items():
        origin = f"sha256 {teacher.sha256}" if teacher.sha256 else "random weights"
        logger.info("teacher %s: %s, %s", name, type(teacher.network).__name__, origin)
    return teachers
