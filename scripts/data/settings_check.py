# SPDX-License-Identifier: Apache-2.0
"""Check a config's settings before anything is read or written: one sentence per wrong value."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from scripts.image_io.checks import MAX_VOXEL_MM, MIN_VOXEL_MM
from scripts.image_io.dicom_codes import check_codes
from scripts.image_io.dicom_rules import check_rules
from scripts.runtime.regions import check_classes, region_values
from scripts.utils.values import HEADS, is_list, is_number, is_range, is_three, is_whole

MODALITY = re.compile(r"[\w-]+")
RESERVED = {"image", "label", "case_id", "patient_id", "bbox_mm", "fold", "partition", "suv"}  # columns of a data list


class _Rule(NamedTuple):
    """What a setting must be: a test, and the words for it."""

    accepts: Callable[[Any], bool]
    expected: str


def _at_least(least: int) -> _Rule:
    return _Rule(lambda value: is_whole(value) and value >= least, f"a whole number of at least {least}")


def _are_modalities(value: Any) -> bool:
    names = list(value) if is_list(value) else []
    are_names = bool(names) and all(isinstance(name, str) and MODALITY.fullmatch(name) for name in names)
    return are_names and len(set(names)) == len(names) and not RESERVED & set(names)


def _are_classes(value: Any) -> bool:
    return is_list(value) and len(value) >= 2 and all(is_list(each) and each for each in value)


def _are_names(value: Any) -> bool:
    return is_list(value) and bool(value) and all(isinstance(each, str) and each.strip() for each in value)


def _are_regions(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(str(name).strip() for name in value)


def _are_axes(value: Any) -> bool:
    return (
        is_list(value) and all(is_whole(axis) and axis in range(3) for axis in value) and len(set(value)) == len(value)
    )


def _are_angles(value: Any) -> bool:
    return is_list(value) and len(value) == 3 and all(is_number(angle) and 0 <= angle <= 180 for angle in value)


def _are_widths(value: Any) -> bool:
    return is_list(value) and bool(value) and all(is_whole(each) and each >= 1 for each in value)


_FLAG = _Rule(lambda value: isinstance(value, bool), "true or false")
_NOT_NEGATIVE = _Rule(lambda value: is_number(value) and value >= 0, "a number of at least 0")
PRECISIONS = ("float32", "bfloat16", "float16")  # of a training
RULES: dict[str, _Rule] = {
    "spacing": _Rule(
        lambda value: is_three(value, is_number) and all(MIN_VOXEL_MM <= each <= MAX_VOXEL_MM for each in value),
        f"three numbers in mm, from {MIN_VOXEL_MM:g} to {MAX_VOXEL_MM:g}, such as [3, 3, 3]",
    ),
    "patch": _Rule(
        lambda value: is_three(value, is_whole),
        "three positive whole numbers, such as [64, 64, 64]: patches are volumes, not slices",
    ),
    "overlap": _Rule(lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1, such as 0.25"),
    "modalities": _Rule(
        _are_modalities,
        'a list of different names of letters, digits, _ and -, such as ["ct", "pet"]; none of them '
        f"{', '.join(sorted(RESERVED))}",
    ),
    "labels": _Rule(_are_classes, "a list of the label's values for each class, the background first: [[0], [1, 2]]"),
    "classes": _Rule(
        lambda value: value is None or _are_names(value), 'the name of each class, such as ["background", "tumour"]'
    ),
    "regions": _Rule(
        lambda value: value is None or _are_regions(value),
        'the label\'s values of each region, such as {"WT": [1, 2, 4], "ET": [4]}',
    ),
    "codes": _Rule(
        lambda value: isinstance(value, Mapping),
        'the code of each region: {"tumour": ["108369006", "SCT", "Neoplasm"]}',
    ),
    "dicom": _Rule(lambda value: isinstance(value, Mapping), 'a rule per modality: {"t1": {"Modality": "MR"}}'),
    "ignore": _Rule(lambda value: value is None or is_number(value), "one value of the label, or null"),
    "head": _Rule(HEADS.__contains__, " or ".join(HEADS)),
    "mask_values": _Rule(("file", "index").__contains__, '"file" or "index"'),
    "flips": _Rule(_are_axes, "the axes that may be flipped, such as [0, 1, 2], or []"),
    "rotation": _Rule(_are_angles, "the largest angle about each axis in degrees, such as [15, 15, 15]"),
    "memory_gib": _Rule(lambda value: is_number(value) and value > 0, "a positive number of GiB"),
    "ema": _Rule(lambda value: is_number(value) and 0 <= value < 1, "the decay of the average, from 0 to below 1"),
    "modality_dropout": _Rule(lambda value: is_number(value) and 0 <= value < 1, "a probability from 0 to below 1"),
    "precision": _Rule(
        lambda value: isinstance(value, str) and (value in PRECISIONS or value.startswith("$")), " or ".join(PRECISIONS)
    ),
    "fold": _Rule(
        lambda value: value is None or (is_whole(value) and value >= 0), "the number of a fold, from 0, or null"
    ),
    **{
        name: _at_least(1)
        for name in (
            "batch_size",
            "max_epochs",
            "val_interval",
            "save_interval",
            "accumulation",
            "student_full_features",
        )
    },
    **{name: _at_least(0) for name in ("num_workers", "threads", "seed")},
    **{name: _NOT_NEGATIVE for name in ("learning_rate", "weight_decay", "gradient_clip")},
    **{
        name: _FLAG
        for name in (
            *("allow_missing", "allow_outside", "stacked", "resume", "overwrite", "compile", "whole_volume"),
            "unlabelled",
        )
    },
}


def check_settings(
    intensity: Mapping[str, Any] | None = None,
    student_norm: Any = None,
    student_features: Sequence[int] | None = None,
    student_strides: Any = None,
    **settings: Any,
) -> None:
    """Refuse settings that no run can work with. Settings that are not given are not checked.

    Args:
        intensity: per modality ``[low, high]`` or ``"zscore"``.
        student_norm: the student's normalisation, by name or as ``[name, options]``.
        student_features: channels of the student's stages.
        student_strides: by how much each stage shrinks the patch, one number or one per axis; None: 2 everywhere.
        settings: by their ids in the configs, see ``RULES``.

    Raises:
        ValueError: a setting is wrong; the message names it and says what to give.
    """
    for name, value in settings.items():
        if not RULES[name].accepts(value):
            raise ValueError(f"{name} is {_shown(value)}. Give {RULES[name].expected}.")
    if "labels" in settings:
        names = ("classes", "regions", "ignore", "head")
        check_classes(settings["labels"], **{name: settings[name] for name in names if name in settings})
        if "codes" in settings:
            regions = region_values(settings["labels"], settings.get("classes"), settings.get("regions"))
            check_codes(regions, settings["codes"])
    if "dicom" in settings and "modalities" in settings:
        check_rules(settings["modalities"], settings["dicom"])
    if intensity is not None:
        _check_intensity(intensity, settings.get("modalities", ()))
    if student_features is not None and not _are_widths(student_features):
        raise ValueError(
            f"student_features is {_shown(student_features)}. Give the channels of each stage, such as [24, 48, 96]."
        )
    if student_strides is not None:
        _check_strides(student_strides, student_features)
    if student_norm is not None:
        steps = [2] * len(student_features or ()) if student_strides is None else student_strides
        axes = zip(*([each] * 3 if is_whole(each) else each for each in steps), strict=True)
        divisor = [math.prod(along_axis) for along_axis in axes]
        _check_norm(student_norm, settings.get("batch_size"), settings.get("patch"), divisor)


def _shown(value: Any) -> str:
    """A value as it is written in a config."""
    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)


def _check_intensity(intensity: Any, modalities: Sequence[str]) -> None:
    if not isinstance(intensity, Mapping):
        raise ValueError(f'intensity is {_shown(intensity)}. Give a range per modality, such as {{"ct": [-200, 300]}}.')
    missing = [key for key in modalities if key not in intensity]
    if missing:
        raise ValueError(f"intensity has no entry for {missing}. Every modality needs one.")
    for key, value in intensity.items():
        if not is_range(value):
            raise ValueError(
                f'intensity["{key}"] is {_shown(value)}. Give [low, high] in the modality\'s units, low below high, '
                'or "zscore".'
            )


def _check_strides(strides: Any, features: Sequence[int] | None) -> None:
    stages = len(features or (strides if is_list(strides) else ()))
    fits = is_list(strides) and len(strides) == stages
    if not fits or not all((is_whole(each) and each >= 1) or is_three(each, is_whole) for each in strides):
        raise ValueError(
            f"student_strides is {_shown(strides)}. Give a whole number of at least 1, or three of them, for each of "
            f"the {stages} stages, such as {_shown([[2, 2, 1]] + [2] * (stages - 1))}."
        )


def _check_norm(norm: Any, batch_size: int | None, patch: Sequence[int] | None, divisor: Sequence[int]) -> None:
    """Refuse a normalisation whose statistics would come from too few values."""
    advice = 'student_norm=["group", {"num_groups": 8}]'
    kind = norm[0] if is_list(norm) and norm else norm
    if not isinstance(kind, str):
        raise ValueError(f"student_norm is {_shown(norm)}. Give a name, or a name and its options, such as {advice}.")
    name = kind.lower()
    if name == "batch" and batch_size == 1:
        raise ValueError(
            "student_norm is batch normalisation, and batch_size is 1: statistics of one patch are not those of the "
            f"data. Give a batch_size of at least 2, or {advice}."
        )
    if name == "instance" and patch and divisor and math.prod(n / d for n, d in zip(patch, divisor, strict=True)) <= 1:
        raise ValueError(
            f"student_norm is instance normalisation, but a patch of {_shown(list(patch))} is a single voxel on the "
            f"student's deepest grid. Give a larger patch, or {advice}."
        )
