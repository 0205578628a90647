# SPDX-License-Identifier: Apache-2.0
"""What in a data set's fingerprint a user should look at before training: one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.data.fingerprint import CaseFingerprint
from scripts.data.planner import AXES, thick_axis
from scripts.runtime.regions import class_names

FEW_VOXELS = 8  # a smaller part of a class may vanish when it is resampled
MUCH_LARGER = 2  # ratio of a case's spacing to the planned one
SHOWN = 5  # cases that a sentence names


def plan_warnings(cases: Sequence[CaseFingerprint], task: Mapping[str, Any]) -> list[str]:
    """Sentences about cases that could not be read, absent modalities, classes and spacings.

    Args:
        cases: the fingerprint, with cases that could not be read.
        task: ``modalities``, ``labels`` and ``spacing``, with ``classes`` and ``ignore`` where there are any.
    """
    unreadable = [case.problem for case in cases if case.problem]
    texts = [f"{len(unreadable)} case(s) could not be read: {_some(unreadable, ' ')}"] if unreadable else []
    cases = [case for case in cases if not case.problem]
    for key in task["modalities"]:
        absent = [case.case_id for case in cases if key not in case.values]
        if absent:
            texts.append(
                f"{key} is absent in {len(absent)} of {len(cases)} cases ({_some(absent)}). Add the files, or train "
                "with --allow-missing."
            )
    return [*texts, *_class_warnings(cases, task), *_spacing_warnings(cases, task["spacing"])]


def _class_warnings(cases: Sequence[CaseFingerprint], task: Mapping[str, Any]) -> list[str]:
    labelled = [(case.case_id, case.volumes) for case in cases if case.volumes is not None]
    if not labelled:
        return ["No case has a label. Add labels, or train by distillation with --unlabelled."]
    texts = []
    if len(labelled) < len(cases):
        texts.append(f"{len(cases) - len(labelled)} of {len(cases)} cases have no label.")
    labels, voxel = task["labels"], math.prod(task["spacing"])
    known = {float(value) for values in labels for value in values} | {task.get("ignore")}
    unknown = sorted({value for _, volumes in labelled for value in volumes} - known)
    if unknown:
        values = ", ".join(f"{value:g}" for value in unknown)
        texts.append(
            f"Label files have the values {values}, which labels does not list. Add them to labels, or ignore."
        )
    names = [name.removeprefix("class ") for name in class_names(labels, task.get("classes"))]
    for name, values in list(zip(names, labels, strict=True))[1:]:
        sizes = {case_id: sum(volumes.get(float(value), 0.0) for value in values) for case_id, volumes in labelled}
        small = [case_id for case_id, size in sizes.items() if 0 < size < FEW_VOXELS * voxel]
        if not any(sizes.values()):
            texts.append(f"No case has the class {name}. Remove it from labels, or add cases.")
        elif small:
            texts.append(
                f"The class {name} has fewer than {FEW_VOXELS} voxels at the planned spacing in {len(small)} of "
                f"{len(labelled)} cases ({_some(small)}). It may vanish there: choose a finer spacing, or run check, "
                "which says where it does."
            )
    return texts


def _spacing_warnings(cases: Sequence[CaseFingerprint], spacing: Sequence[float]) -> list[str]:
    texts = []
    for axis, name in enumerate(AXES):
        larger = [case for case in cases if case.spacing[axis] > MUCH_LARGER * spacing[axis]]
        if larger:
            most, names = max(case.spacing[axis] for case in larger), _some([case.case_id for case in larger])
            texts.append(
                f"{len(larger)} of {len(cases)} cases ({names}) have {name} voxels more than {MUCH_LARGER} times as "
                f"long as planned, up to {most:.3g} mm. Check that they belong to this task."
            )
    across = sorted({AXES[thick] for case in cases if (thick := thick_axis(case.spacing)) is not None})
    if len(across) > 1:
        texts.append(
            f"Thick slices lie across different axes in different cases ({', '.join(across)}). Train on cases of one "
            "direction, or set an isotropic spacing."
        )
    return texts


def _some(names: Sequence[str], separator: str = ", ") -> str:
    rest = len(names) - SHOWN
    return separator.join([*names[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])])
