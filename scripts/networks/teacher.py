# SPDX-License-Identifier: Apache-2.0
"""Teachers: a network, the modalities that it reads, and its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from scripts.networks.architecture import changes_of, read_architecture
from scripts.networks.deep_supervision import output_heads
from scripts.networks.ensemble import Ensemble
from scripts.networks.region_logits import Regions, region_logits
from scripts.networks.teacher_spec import join_checksums, weight_files
from scripts.networks.weights import load_weights


@runtime_checkable
class TeacherLike(Protocol):
    """What a distillation needs of a teacher: any ``torch.nn.Module`` with these attributes is one.

    The distiller freezes it, puts it into ``eval()``, moves it to the student's device, and calls it with the whole
    image. ``Teacher`` is one; put another into the config id ``teachers``.

    Attributes:
        channels: indices of the image's modalities that it reads. A sample that lacks one of them has no such teacher.
        network: holds the tapped layers.
        layers: ``deep``, ``middle``, ``fine`` -> dotted path of a layer in ``network`` whose output is ``B C H W D``;
            empty where methods that compare features cannot use it.
        kind: ``"cnn"``, ``"transformer"`` or None, for taps of one kind.
        sha256: checksum of its weights for the manifest; None where it has none.

    The method ``gkd`` also calls ``encode(image)``, which returns features from shallow to deep, and
    ``decode(features)``, which returns logits.
    """

    channels: Sequence[int]
    network: nn.Module
    layers: Mapping[str, str]
    kind: str | None
    sha256: str | None

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Segment an image ``B M H W D`` with all modalities of the task; returns logits ``B classes H W D``.

        With a sigmoid head the logits are those of the task's regions, ``B regions H W D``.
        """


class Teacher(nn.Module):
    """A network that selects its own modalities from the full image: ``B M H W D`` -> logits ``B C H W D``.

    Args:
        modalities: the modalities that this teacher reads, in the order of its input channels.
        all_modalities: the modalities of the image, in the order of its channels.
        out_channels: number of outputs of the network: classes, including the background, or regions.
        patch: patch size in voxels. UNETR and H-DenseFormer learn one position per 16^3 cell of it.
        architecture: name of a file in configs/teachers, or the path of one.
        network: any network ``B m H W D`` -> logits, or a list of logits whose first has full resolution (deep
            supervision), with one input channel per modality of this teacher. Give either this or ``architecture``.
        scale: name of a scale, which sets the size of an ``architecture``; None for the defaults of its class.
        options: architecture -> arguments that replace those of its file.
        weights: file of weights to load strictly; several files are an ensemble that answers as one teacher; None for
            random weights.
        sha256: checksum that the weights file must have. Default: the checksum in ``<weights>.sha256``, if it exists.
        layers: ``deep``, ``middle``, ``fine`` -> layer to tap; the others are those of the architecture's file. An
            ensemble has none.
        kind: ``"cnn"`` or ``"transformer"``; by default that of the architecture's file.
        classes: for each class of the task the network's output, or with a softmax several that count as one (their
            probabilities are added). Outputs that are not named are left out: the rest add up to 1. By default the
            outputs are the classes.
        rescale: from the task's input to the network's, ``B m H W D`` -> the same.
        head: of the network, ``"softmax"`` over the classes or ``"sigmoid"``, one channel per region.
        regions: the classes of each channel of a task with a sigmoid head; a network with a softmax then answers with
            the logits of regions (``region_logits``).

    Raises:
        ValueError: the architecture or a modality is unknown, not exactly one of ``architecture`` and ``network`` is
            given, the weights do not fit, or several files of weights have ``layers``.
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
        scale: str | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        weights: str | Sequence[str] | None = None,
        sha256: str | None = None,
        layers: Mapping[str, str] | None = None,
        kind: str | None = None,
        classes: Sequence[int | Sequence[int]] | None = None,
        rescale: nn.Module | None = None,
        head: str = "softmax",
        regions: Regions | None = None,
    ) -> None:
        super().__init__()
        if not modalities or not set(modalities) <= set(all_modalities):
            raise ValueError(
                f"The modalities of a teacher must be one or more of {list(all_modalities)}, got {list(modalities)}."
            )
        if (architecture is None) == (network is None):
            raise ValueError("A teacher needs exactly one of architecture and network.")
        self.channels = [list(all_modalities).index(modality) for modality in modalities]
        self.layers, self.kind = dict(layers or {}), kind
        self.classes = [[each] if isinstance(each, int) else list(each) for each in classes or ()]
        if head == "sigmoid" and any(len(outputs) > 1 for outputs in self.classes):
            raise ValueError(
                f"several outputs of a sigmoid head count as one region in its classes {list(classes or ())}, and "
                "their probabilities do not add up. Name one output for each region."
            )
        self.rescale = rescale or nn.Identity()
        self.regions = regions if head == "softmax" else None  # to convert classes to
        if architecture is not None:
            definition = read_architecture(architecture)
            changes = changes_of(architecture, options)
            network = definition.build(len(modalities), out_channels, patch, scale, changes)
            self.layers, self.kind = {**definition.layers, **self.layers}, kind or definition.kind
        assert network is not None
        self.network: nn.Module = network
        files = weight_files(weights)
        if len(files) > 1 and sha256:
            raise ValueError("sha256 is the checksum of one weights file. Write FILE.sha256 beside each file instead.")
        if len(files) > 1 and layers:
            raise ValueError("An ensemble has no layers to tap. Name one weights file, or remove layers.")
        digests = []
        members = []
        for file in files:
            self.network = copy.deepcopy(network) if len(files) > 1 else network
            digests.append(load_weights(self, file, sha256))
            members.append(self.network)
        if len(members) > 1:
            self.network, self.layers = Ensemble(members, head == "sigmoid"), {}  # their mean has no features
        self.sha256 = join_checksums(digests)

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment an image ``B M H W D``; returns logits ``B C H W D``, one channel per class or region of the task.

        In train() a network with several heads (deep supervision) gives a list of logits, the full resolution first.
        """
        image = self._own_input(image)
        heads = output_heads(self.network(image), image)
        if self.training and len(heads) > 1:
            return [self._task_logits(head) for head in heads]
        return self._task_logits(heads[0])

    def encode(self, image: torch.Tensor) -> Sequence[torch.Tensor]:
        """Encode an image ``B M H W D``; returns features from shallow to deep.

        Only for architectures with a separate encoder: hdenseformer, uxnet and dynunet.
        """
        return self.network.encode(self._own_input(image))  # type: ignore[operator, no-any-return]

    def decode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode the result of ``encode``; returns logits ``B C H W D``, see ``forward``."""
        return self._task_logits(self.network.decode(tuple(features)))  # type: ignore[operator]

    def _own_input(self, image: torch.Tensor) -> torch.Tensor:
        return self.rescale(image[:, self.channels])  # type: ignore[no-any-return]

    def _task_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the task's classes or regions; those of several outputs add up their probabilities."""
        logits = self._class_logits(logits)
        return logits if self.regions is None else region_logits(logits, self.regions)

    def _class_logits(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.classes:
            return logits
        last = max(output for outputs in self.classes for output in outputs)
        if last >= logits.shape[1]:
            raise ValueError(
                f"its classes name the output {last}, but its network has outputs 0 to {logits.shape[1] - 1}"
            )
        return torch.cat([logits[:, outputs].logsumexp(dim=1, keepdim=True) for outputs in self.classes], dim=1)
