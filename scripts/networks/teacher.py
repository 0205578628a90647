# SPDX-License-Identifier: Apache-2.0
"""Teachers: a network, the modalities that it reads, and its weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from scripts.networks.architecture import architecture_names, changes_of, read_architecture
from scripts.networks.deep_supervision import first_output
from scripts.networks.ensemble import Ensemble
from scripts.networks.label_teacher import LabelTeacher
from scripts.networks.network_check import check_network
from scripts.networks.own_intensity import Rescale, Rule, can_rescale, differing_rules
from scripts.networks.region_logits import Regions, region_logits
from scripts.networks.teacher_spec import (
    CACHED_ONLY,
    Spec,
    check_spec,
    join_checksums,
    spec_files,
    teacher_head,
    weight_files,
)
from scripts.networks.weights import load_weights
from scripts.networks.zoo_bundle import bundle_network

logger = logging.getLogger(__name__)


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
        """Segment an image ``B M H W D`` with all modalities of the task; returns logits ``B classes H W D``."""


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

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment an image ``B M H W D``; returns logits ``B C H W D``, one channel per class or region of the task."""
        image = self._own_input(image)
        return self._task_logits(first_output(self.network(image), image))

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


def load_teachers(
    specs: Mapping[str, Spec],
    out_channels: int,
    all_modalities: Sequence[str],
    patch: Sequence[int],
    scale: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    intensity: Mapping[str, Rule] | None = None,
    spacing: Sequence[float] | None = None,
    cached: bool = False,
    regions: Regions | None = None,
    classes: int | None = None,
) -> dict[str, Teacher | LabelTeacher]:
    """Build the teachers of a distillation and log the checksums of their weights.

    Args:
        specs: name of a teacher -> its specification (``teacher_spec.SPEC_KEYS``), or ``{"label": true}`` for the label
            in a teacher's place.
        out_channels: number of output channels of the task: classes, including the background, or regions.
        all_modalities: the modalities of the image, in the order of its channels.
        patch: patch size in voxels.
        scale: name of a scale, see ``Teacher``.
        options: architecture -> arguments that replace those of its file.
        intensity: modality -> rule by which the image was normalised; needed by teachers with an own intensity.
        spacing: of the image in mm, for teachers with an own one.
        cached: the teachers answer for whole cases, so that they may have an input of their own
            (``scripts.distillation.own_grid``).
        regions: the classes of each channel of a task with a sigmoid head.
        classes: number of classes of such a task, which a teacher with a softmax has.

    Returns:
        Name of a teacher -> ``Teacher`` or ``LabelTeacher``.

    Raises:
        ValueError: a specification is wrong (``check_spec``), or a teacher cannot be built or cannot answer for a patch
            of the task; the teacher is named.
    """
    classes = classes or out_channels
    heads, outputs = {}, {}
    for name, spec in specs.items():
        check_spec(name, spec)
        heads[name] = teacher_head(name, spec, "softmax" if regions is None else "sigmoid")
        outputs[name] = classes if heads[name] == "softmax" else out_channels
        _require_usable(name, spec, outputs[name], own_input(spec, patch, intensity or {}, spacing), cached)
    teachers: dict[str, Teacher | LabelTeacher] = {}
    for name, spec in specs.items():
        if spec.get("label"):
            teachers[name] = LabelTeacher(classes, regions)
            logger.info("teacher %s: the label itself", name)
            continue
        own_patch = spec.get("patch") or patch
        rescale = _own_windows(spec, patch, intensity or {}, spacing)
        try:
            teacher = _build(
                spec, outputs[name], all_modalities, own_patch, scale, options, rescale, heads[name], regions
            )
            if spec.get("architecture") in architecture_names():
                _require_patch(teacher, len(spec["modalities"]), spec.get("out_channels") or outputs[name], own_patch)
            else:  # only its answer shows whether it fits
                advice = (
                    f"Its network needs {len(spec['modalities'])} input channels, and {outputs[name]} outputs or "
                    'the key "classes".'
                )
                check_network(teacher, len(all_modalities), out_channels, own_patch, advice=advice)
        except ValueError as error:
            raise ValueError(f"The teacher {name} cannot be used: {error}") from error
        teachers[name] = teacher
        origin = f"sha256 {teacher.sha256}" if teacher.sha256 else "random weights"
        logger.info("teacher %s: %s, %s", name, type(teacher.network).__name__, origin)
    return teachers


def _require_patch(teacher: Teacher, in_channels: int, out_channels: int, patch: Sequence[int]) -> None:
    """Refuse a patch that an included architecture does not take; its layers see sizes only, so that it costs little.

    Raises:
        ValueError: it is refused.
    """
    advice = "Choose another patch for the task (--set patch=[X,Y,Z]), or another teacher."
    network = copy.deepcopy(teacher.network).to("meta")
    check_network(network, in_channels, out_channels, patch, batch_size=2, advice=advice)  # norms may need two values


def _require_usable(name: str, spec: Spec, outputs: int, other_input: str | None, cached: bool) -> None:
    """Refuse a teacher that fits its keys but not the task.

    Args:
        name, spec: of the teacher.
        outputs: classes of the task, or regions for a teacher with a sigmoid head.
        other_input: see ``own_input``.
        cached: see ``load_teachers``.
    """
    if spec.get("classes") and len(spec["classes"]) != outputs:
        raise ValueError(
            f"The teacher {name} names {len(spec['classes'])} classes, the task has {outputs}. Name the teacher's "
            "outputs for each class of the task, the background first."
        )
    if any(spec.get(origin) for origin in CACHED_ONLY):
        raise ValueError(
            f"The teacher {name} answers from a cache only: store its predictions with cache-teachers, then distil "
            "with --cache-dir."
        )
    if other_input and not cached:
        raise ValueError(
            f"The teacher {name} {other_input}. Only cached predictions can have that: run cache-teachers, then "
            "distill with --cache-dir."
        )


def _build(
    spec: Spec,
    out_channels: int,
    all_modalities: Sequence[str],
    patch: Sequence[int],
    scale: str | None,
    options: Mapping[str, Mapping[str, Any]] | None,
    rescale: nn.Module | None,
    head: str,
    regions: Regions | None,
) -> Teacher:
    return Teacher(
        spec["modalities"],
        all_modalities,
        spec.get("out_channels") or out_channels,
        patch,
        architecture=spec.get("architecture"),
        network=bundle_network(spec["bundle"]) if spec.get("bundle") else spec.get("network"),
        scale=scale,
        options=options,
        weights=spec_files(spec),
        sha256=spec.get("sha256"),
        layers=spec.get("layers"),
        kind=spec.get("kind"),
        classes=spec.get("classes"),
        rescale=rescale,
        head=head,
        regions=regions,
    )


def _own_windows(
    spec: Spec, patch: Sequence[int], intensity: Mapping[str, Rule], spacing: Sequence[float] | None
) -> Rescale | None:
    """The way from the task's input to the teacher's, where they differ and it has no input of its own."""
    differing = differing_rules(spec.get("intensity") or {}, intensity)
    if not differing or own_input(spec, patch, intensity, spacing):
        return None
    return Rescale(spec["modalities"], {key: rule for key, (rule, _) in differing.items()}, intensity)


def own_input(
    spec: Spec, patch: Sequence[int], intensity: Mapping[str, Rule], spacing: Sequence[float] | None
) -> str | None:
    """Why a teacher cannot use the normalised input of the task, as a clause; None if it can.

    Args:
        spec: of the teacher.
        patch: of the task in voxels.
        intensity: of the task; a linear window within the task's is computed from the task's input.
        spacing: of the task in mm.
    """
    for key, own, task in (("spacing", spec.get("spacing"), spacing), ("patch", spec.get("patch"), patch)):
        if own is not None and [float(x) for x in own] != [float(x) for x in task or ()]:
            return f"has the {key} {list(own)}, the task {list(task or ())}"
    for key, (one, two) in differing_rules(spec.get("intensity") or {}, intensity).items():
        if not can_rescale(one, two):
            return f"reads {key} by {one}, which the task's {two} does not hold"
    return None
