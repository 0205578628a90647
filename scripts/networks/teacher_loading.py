# SPDX-License-Identifier: Apache-2.0
"""Build the teachers of a distillation from their specifications, and refuse those that do not fit the task."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from scripts.networks.architecture import architecture_names, read_architecture
from scripts.networks.label_teacher import LabelTeacher
from scripts.networks.network_check import check_network
from scripts.networks.own_intensity import Rescale, Rule, can_rescale, differing_rules
from scripts.networks.region_logits import Regions
from scripts.networks.teacher import Teacher
from scripts.networks.teacher_spec import CACHED_ONLY, Spec, check_spec, spec_files, teacher_head
from scripts.networks.zoo_bundle import bundle_network
from scripts.utils.task_file import read_task

logger = logging.getLogger(__name__)


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
        built_patch = spec.get("patch") or trained_patch(spec) or patch
        rescale = _own_windows(spec, patch, intensity or {}, spacing)
        try:
            teacher = _build(
                spec, outputs[name], all_modalities, built_patch, scale, options, rescale, heads[name], regions
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


def trained_patch(spec: Spec) -> Sequence[int] | None:
    """The patch that decided how deep a trained network is, where its architecture takes other patches, too."""
    architecture, files = spec.get("architecture"), spec_files(spec)
    if not architecture or not files:
        return None
    definition = read_architecture(architecture)
    if "patch" not in definition.network or definition.fixed_patch:
        return None
    trained: Sequence[int] | None = (read_task(files[0]) or {}).get("patch")
    return trained


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
        # A copy: the teachers of the folds are made of one specification, each with its own weights.
        network=bundle_network(spec["bundle"]) if spec.get("bundle") else copy.deepcopy(spec.get("network")),
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
