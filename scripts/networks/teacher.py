# SPDX-License-Identifier: Apache-2.0
"""Teachers: a network, the modalities that it reads, and its weights."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from monai.networks.nets import UNETR, SegResNet, SwinUNETR
from torch import nn

from scripts.networks import Ensemble, HDenseFormer, NNUNet, UXNet
from scripts.networks.deep_supervision import first_output
from scripts.networks.weights import load_weights

logger = logging.getLogger(__name__)

ORIGINS = ("architecture", "network", "label", "predictions")  # exactly one of them says what answers
CACHED_ONLY = ("predictions",)  # origins that answer from a cache only
LABEL_LOGIT = 20.0  # of the label's class; with two classes its probability is 1 - 2e-9
SPEC_KEYS = (*ORIGINS, "modalities", "weights", "sha256")
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
        modalities: the modalities that this teacher reads, in the order of its input channels.
        all_modalities: the modalities of the image, in the order of its channels.
        out_channels: number of classes, including the background.
        patch: patch size in voxels. UNETR and H-DenseFormer learn one position per 16^3 cell of it.
        architecture: one of ``ARCHITECTURES``.
        network: any network ``B m H W D`` -> logits, or a list of logits whose first has full resolution (deep
            supervision), with one input channel per modality of this teacher. Give either this or ``architecture``.
        options: architecture -> further arguments of its class.
        weights: file of weights to load strictly; several files are an ensemble that answers as one teacher; None for
            random weights.
        sha256: checksum that the weights file must have. Default: the checksum in ``<weights>.sha256``, if it exists.

    Raises:
        ValueError: the architecture or a modality is unknown, not exactly one of ``architecture`` and ``network`` is
            given, or the weights do not fit.
        FileNotFoundError: a weights file does not exist.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        all_modalities: Sequence[str],
        out_channels: int,
        patch: Sequence[int],
        architecture: str | None = None,
        network: nn.Module | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        weights: str | Sequence[str] | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        if not modalities or not set(modalities) <= set(all_modalities):
            raise ValueError(
                f"The modalities of a teacher must be one or more of {list(all_modalities)}, got {list(modalities)}."
            )
        if (architecture is None) == (network is None):
            raise ValueError("A teacher needs exactly one of architecture and network.")
        self.channels = [list(all_modalities).index(modality) for modality in modalities]
        if architecture is not None:
            architecture_options = (options or {}).get(architecture, {})
            network = _build_network(architecture, len(modalities), out_channels, patch, architecture_options)
        assert network is not None
        self.network: nn.Module = network
        files = weight_files(weights)
        if len(files) > 1 and sha256:
            raise ValueError("sha256 is the checksum of one weights file. Write FILE.sha256 beside each file instead.")
        digests = []
        members = []
        for file in files:
            self.network = copy.deepcopy(network) if len(files) > 1 else network
            digests.append(load_weights(self, file, sha256))
            members.append(self.network)
        if len(members) > 1:
            self.network = Ensemble(members)
        self.sha256 = join_checksums(digests)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment an image ``B M H W D``; returns logits ``B classes H W D``."""
        seen = image[:, self.channels]
        return first_output(self.network(seen), seen)

    def encode(self, image: torch.Tensor) -> Sequence[torch.Tensor]:
        """Encode an image ``B M H W D``; returns features from shallow to deep.

        Only for architectures with a separate encoder: hdenseformer, uxnet and dynunet.
        """
        return self.network.encode(image[:, self.channels])  # type: ignore[operator, no-any-return]

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode the result of ``encode``; returns logits ``B classes H W D``."""
        return self.network.decode(tuple(features))  # type: ignore[operator, no-any-return]


class LabelTeacher(nn.Module):
    """The label in a teacher's place: the control that every claim of transferred knowledge needs.

    It answers with ``LABEL_LOGIT`` for the label's class and 0 for the others; with a single output channel (a sigmoid
    head) with plus or minus half of it. It has no layers to tap, and is there for every sample.

    Args:
        out_channels: number of classes, including the background.
    """

    uses_label = True

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels, self.sha256 = out_channels, None
        self.channels: list[int] = []

    def forward(self, label: torch.Tensor) -> torch.Tensor:
        """Class indices ``B 1 H W [D]`` to logits ``B classes H W [D]``."""
        if self.out_channels == 1:
            return LABEL_LOGIT * (label.float() - 0.5)
        classes = torch.arange(self.out_channels, device=label.device).view(1, -1, *[1] * (label.dim() - 2))
        return LABEL_LOGIT * (label.long() == classes).float()


def weight_files(weights: str | Sequence[str] | None) -> list[str]:
    """The weights of a teacher as a list of files: none (random weights), one, or the members of an ensemble."""
    if not weights:
        return []
    return [weights] if isinstance(weights, str) else list(weights)


def join_checksums(digests: Sequence[str]) -> str | None:
    """The checksum of a teacher: that of its file, or the sha256 of the checksums of an ensemble's files in order."""
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def check_spec(name: str, spec: Mapping[str, Any]) -> None:
    """Check the keys of a teacher's specification.

    Raises:
        ValueError: an unknown key, a missing one, or not exactly one of ``ORIGINS``.
    """
    for key in spec:
        if key not in SPEC_KEYS:
            nearest = get_close_matches(key, SPEC_KEYS, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"The teacher {name} has the unknown key {key!r}.{hint} Keys: {', '.join(SPEC_KEYS)}.")
    origins = [key for key in ORIGINS if spec.get(key)]
    if len(origins) != 1:
        given = " and ".join(origins) or "none"
        raise ValueError(f"The teacher {name} needs exactly one of {', '.join(ORIGINS)}; it has {given}.")
    if spec.get("label"):
        others = sorted(set(spec) - {"label"})
        if others:
            raise ValueError(f"The teacher {name} is the label, which takes no {', '.join(others)}. Remove them.")
        return
    for origin in CACHED_ONLY:
        if spec.get(origin) and spec.get("weights"):
            raise ValueError(f"The teacher {name} is described by {origin}, which takes no weights. Remove them.")
    if not spec.get("modalities"):
        raise ValueError(f'The teacher {name} names no modalities. Add for example "modalities": ["ct", "pet"].')


def load_teachers(
    specs: Mapping[str, Mapping[str, Any]], out_channels: int, **common: Any
) -> dict[str, Teacher | LabelTeacher]:
    """Build the teachers of a distillation and log the checksums of their weights.

    Args:
        specs: name of a teacher -> arguments of ``Teacher`` for this teacher only, see ``SPEC_KEYS``, or
            ``{"label": true}`` for the label in a teacher's place.
        out_channels: number of classes, including the background.
        common: further arguments of ``Teacher`` that are the same for all.

    Returns:
        Name of a teacher -> ``Teacher`` or ``LabelTeacher``.

    Raises:
        ValueError: a specification is wrong (``check_spec``), or a teacher cannot be built; the teacher is named.
    """
    for name, spec in specs.items():
        check_spec(name, spec)
        if any(spec.get(origin) for origin in CACHED_ONLY):
            raise ValueError(
                f"The teacher {name} answers from a cache only: store its predictions with cache-teachers, then distil "
                "with --cache-dir."
            )
    teachers: dict[str, Teacher | LabelTeacher] = {}
    for name, spec in specs.items():
        if spec.get("label"):
            teachers[name] = LabelTeacher(out_channels)
            logger.info("teacher %s: the label itself", name)
            continue
        teacher = teachers[name] = Teacher(out_channels=out_channels, **common, **spec)
        origin = f"sha256 {teacher.sha256}" if teacher.sha256 else "random weights"
        logger.info("teacher %s: %s, %s", name, type(teacher.network).__name__, origin)
    return teachers
