# SPDX-License-Identifier: Apache-2.0
"""Propose the settings of a task from the fingerprint of its cases, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scripts.data.fingerprint import CaseFingerprint
from scripts.data.patch_plan import MIN_BATCH, PatchPlan, StudentSize, divisor, median_shape, plan_patch
from scripts.image_io.intensity_checks import CT_MAX_AIR_HU, PET_MAX_SUV, PET_MIN_SUV
from scripts.runtime.regions import region_values
from scripts.utils.values import is_whole

AXES = ("left-right", "front-back", "foot-head")
THICK = 3  # ratio of the coarsest spacing to the others
THICK_PERCENTILE = 10  # of the spacings of the coarsest axis
LOW, HIGH = 0.5, 99.5  # percentiles of an intensity range
CT_AIR_HU = -900.0  # the smallest value of a CT in HU lies below
CT_NAMES = {"ct", "cta", "cect", "ncct", "cbct", "hu"}
PET_NAMES = {"pet", "pt", "suv", "fdg"}
SIDES = {"left", "right", "l", "r", "lh", "rh", "lt", "rt"}
ROTATION = 15  # degrees
DIGITS = 6  # of a spacing: fewer would interpolate data that already have it


class Proposal(NamedTuple):
    """A setting by its id in the configs, and why it has this value."""

    name: str
    value: Any
    reason: str


def plan_task(
    cases: Sequence[CaseFingerprint],
    task: Mapping[str, Any],
    features: Sequence[int],
    full_features: int,
    gib: float,
    training: int | None = None,
) -> list[Proposal]:
    """Propose every setting, in an order in which each depends on earlier ones only.

    Args:
        cases: the fingerprint, without cases that could not be read.
        task: settings that are fixed: ``modalities``, and any other. What depends on a fixed setting follows it.
        features, full_features: of the student.
        gib: memory of a training step in GiB.
        training: number of training cases; by default those of one of five folds.

    Raises:
        ValueError: the task has no labels, and no case has a label file with a foreground.
    """
    spacings = np.array([case.spacing for case in cases])
    proposals = [] if "labels" in task else [plan_labels(cases, task.get("ignore"))]
    labels = task["labels"] if "labels" in task else proposals[0].value
    proposals += [
        plan_intensity(cases, task["modalities"], task.get("intensity", {})),
        plan_spacing(spacings, np.array([case.shape for case in cases])),
    ]
    spacing = task.get("spacing", proposals[-1].value)
    shapes = grid_shapes(cases, spacing)
    channels = len(region_values(labels, None, task.get("regions"))) if task.get("head") == "sigmoid" else len(labels)
    student = StudentSize(len(task["modalities"]), channels, features, full_features)
    proposals += plan_training(spacing, shapes, student, gib, task, training)
    names = [*(task.get("classes") or ()), *(task.get("regions") or ())]
    return [*proposals, plan_flips(names), plan_rotation(spacing), plan_mask_values(labels)]


def plan_labels(cases: Sequence[CaseFingerprint], ignore: float | None = None) -> Proposal:
    """One class for each value of the label files, the background (0) first.

    Raises:
        ValueError: there is no value but the background.
    """
    found = {value for case in cases for value in (case.volumes or ()) if value != ignore}
    if not found - {0.0}:
        raise ValueError("The task has no labels, and no label file has a foreground. Add labels, such as [[0], [1]].")
    values = [int(value) if value.is_integer() else value for value in sorted(found - {0.0})]
    reason = f"the values in the label files, one class each ({len(values)} besides the background)"
    return Proposal("labels", [[0], *([value] for value in values)], reason)


def plan_spacing(spacings: np.ndarray, shapes: np.ndarray) -> Proposal:
    """The median spacing; of thick slices a low percentile where slices are few.

    Args:
        spacings: of the cases (cases x 3), in mm.
        shapes: of the cases (cases x 3), in voxels.
    """
    median, size = np.median(spacings, 0), np.median(shapes, 0)
    reason = f"the median of {len(spacings)} case(s) along each axis"
    thick = thick_axis(median)
    if thick is not None:
        others = [axis for axis in range(3) if axis != thick]
        longest = median[others].max()
        ratio = f"{AXES[thick]} voxels are {median[thick] / longest:.1f} times as long as the others"
        reason += f"; {ratio}, and thick slices are kept"
        if size[thick] * THICK < size[others].min():
            median[thick] = max(np.percentile(spacings[:, thick], THICK_PERCENTILE), longest)
            reason += f"; slices are few, so that axis has the {THICK_PERCENTILE}th percentile of its spacings"
    return Proposal("spacing", [_short(round(float(length), DIGITS)) for length in median], reason)


def thick_axis(spacing: Sequence[float] | np.ndarray) -> int | None:
    """The axis across which slices are thick: its spacing is at least ``THICK`` times every other one."""
    *_, second, first = np.argsort(spacing)
    return int(first) if spacing[first] >= THICK * spacing[second] else None


def grid_shapes(cases: Sequence[CaseFingerprint], spacing: Sequence[float]) -> list[list[int]]:
    """The shape of each case at a spacing, in voxels."""
    return [
        [max(1, round(n * own / new)) for n, own, new in zip(case.shape, case.spacing, spacing, strict=True)]
        for case in cases
    ]


def plan_training(
    spacing: Sequence[float],
    shapes: Sequence[Sequence[int]],
    student: StudentSize,
    gib: float,
    task: Mapping[str, Any],
    training: int | None = None,
) -> list[Proposal]:
    """Patch, strides of the student and batch size.

    Args:
        spacing: of the network's grid in mm.
        shapes: of the cases on that grid, in voxels.
        student: its size.
        gib: memory of a step in GiB.
        task: settings that are fixed.
        training: see ``plan_task``.
    """
    patch, batch = task.get("patch"), task.get("batch_size")
    given = task.get("student_strides")
    strides = given and [[step] * 3 if is_whole(step) else list(step) for step in given]
    free = plan_patch(spacing, shapes, student, gib, None, strides, batch, training)
    plan = plan_patch(spacing, shapes, student, gib, patch, strides, batch, training)
    uniform = all(step == [2, 2, 2] for step in plan.strides)
    steps = [2 if step == [2, 2, 2] else step for step in plan.strides]
    halved = (
        "an axis is halved while its voxels are less than twice as long as the shortest, and enough cells are left; "
        f"the patch must be divisible by {_sizes(divisor(plan.strides))}"
    )
    return [
        Proposal(
            "patch",
            free.patch,
            f"the median case has {_sizes(median_shape(shapes))} voxels at this spacing; a batch of {free.batch} such "
            f"patches needs about {free.gib:.2g} of {gib:.2g} GiB in training",
        ),
        Proposal("student_strides", None if uniform else steps, "every stage halves all axes" if uniform else halved),
        Proposal("batch_size", plan.batch, _batch_reason(plan, gib)),
    ]


def _batch_reason(plan: PatchPlan, gib: float) -> str:
    needed = f"about {plan.gib:.2g} of {gib:.2g} GiB"
    if plan.gib > gib:
        return f"{needed}: more than planned, lower the patch or the batch if training runs out of memory"
    if plan.batch < MIN_BATCH:
        return f"{needed}; there are few cases"
    return f"{needed}, and at most 5% of the voxels of all cases" if plan.batch > MIN_BATCH else f"{needed}"


def plan_intensity(cases: Sequence[CaseFingerprint], modalities: Sequence[str], fixed: Mapping[str, Any]) -> Proposal:
    """The range or rule of each modality; those that the task fixes stay."""
    value, reasons = {}, []
    for key in modalities:
        value[key], reason = (fixed[key], "given") if key in fixed else modality_intensity(key, cases)
        reasons.append(f"{key}: {reason}")
    return Proposal("intensity", value, "; ".join(reasons))


def modality_intensity(key: str, cases: Sequence[CaseFingerprint]) -> tuple[list[float] | str, str]:
    """The range or rule of one modality, and the reason.

    Args:
        key: name of the modality.
        cases: the fingerprint.
    """
    images = [case.values[key] for case in cases if key in case.values]
    if not images:
        return "zscore", "no case has it"
    # Cases without a foreground tell nothing about it, unless no case has one.
    of_foreground = [image for image in images if image.of_foreground]
    sample = np.concatenate([image.sample for image in of_foreground or images])
    low = float(np.median([image.low for image in images]))
    kinds, words = {image.kind for image in images}, set(_words(key))
    named_pet = bool(words & PET_NAMES) or kinds == {"PT"}
    named_ct = not named_pet and (bool(words & CT_NAMES) or kinds == {"CT"})
    if not sample.size or sample.min() == sample.max():
        return "zscore", "its foreground is constant"
    where = "the foreground" if of_foreground else "voxels that are not 0 (no foreground)"
    start, end = (float(n) for n in np.percentile(sample, [LOW, HIGH]))
    if named_ct or (not named_pet and low <= CT_AIR_HU):
        why = "its name or header says CT" if named_ct else f"values from {low:.0f} on are HU"
        if low > CT_MAX_AIR_HU:
            why += f", although no value is that of air (the smallest is {low:.0f})"
        return [round(start), max(round(end), round(start) + 1)], f"{why}: percentiles {LOW:g} to {HIGH:g} of {where}"
    if named_pet and low >= PET_MIN_SUV:
        top = round(end) if end >= 2 else max(0.1, round(end, 1))
        why = f"SUV from 0 to percentile {HIGH:g} of {where}"
        if end > PET_MAX_SUV:
            why += ", but that is above any plausible SUV: convert Bq/ml to SUV"
        return [0, top], why
    return "zscore", "no unit: mean 0 and variance 1 in each case"


def plan_flips(names: Sequence[str]) -> Proposal:
    """The axes that may be flipped: not left-right (axis 0) where classes or regions have sides."""
    sided = [name for name in names if SIDES & set(_words(name))]
    if sided:
        return Proposal("flips", [1, 2], f"{', '.join(sided)}: sides matter, so left and right are not exchanged")
    return Proposal("flips", [0, 1, 2], "no class or region is named after a side")


def plan_rotation(spacing: Sequence[float]) -> Proposal:
    """The largest angle about each axis in degrees: within the slices only if they are thick."""
    thick = thick_axis(spacing)
    if thick is not None:
        angles = [ROTATION if axis == thick else 0 for axis in range(3)]
        return Proposal("rotation", angles, "thick slices: only within the slices")
    return Proposal("rotation", [ROTATION] * 3, "voxels are about as long along all axes")


def plan_mask_values(labels: Sequence[Sequence[float]]) -> Proposal:
    """Written masks have the values of the label files, where these are whole numbers."""
    if not all(float(value).is_integer() for values in labels for value in values):
        return Proposal("mask_values", "index", "the label files have values that a mask of integers cannot hold")
    return Proposal("mask_values", "file", "written masks then have the values of the label files")


def _words(name: str) -> list[str]:
    """The words of a name in lower case: ``leftKidney_L`` has ``left``, ``kidney`` and ``l``."""
    return re.findall(r"[a-z]+\d*|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _short(number: float) -> float:
    return int(number) if number.is_integer() else number


def _sizes(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
