# SPDX-License-Identifier: Apache-2.0
"""What the dataset.json of nnU-Net says about a task: its modalities, classes and regions.

Version 2 has ``channel_names`` and ``labels`` {name: value or list of values}; version 1 has ``modality`` and
``labels`` {value: name}. With lists, nnU-Net's labels are regions; the classes are then sets of values that no region
divides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.utils.json_files import read_object
from scripts.utils.values import is_list, is_whole

DATASET_JSON = "dataset.json"
BACKGROUND, IGNORE = "background", "ignore"  # names of labels that nnU-Net reserves


def nnunet_task(root: Path) -> dict[str, Any]:
    """The settings of a task that a data set of nnU-Net states itself.

    Returns:
        ``modalities``, ``labels``, ``classes``, ``regions`` (None if each class is one), ``ignore`` (None if no value
        is) and ``head``, by their ids in the configs.

    Raises:
        FileNotFoundError: there is no dataset.json.
        ValueError: it names no channels or labels, or labels that contradict each other.
    """
    path = root / DATASET_JSON
    content = read_object(path, DATASET_JSON)
    members = _label_values(content, path)
    ignored = members.pop(IGNORE, [None])
    background = members.pop(BACKGROUND)
    values = sorted({value for each in members.values() for value in each})
    by_region: dict[tuple[str, ...], list[int]] = {}  # values that are in the same regions are one class
    for value in values:
        by_region.setdefault(tuple(name for name, each in members.items() if value in each), []).append(value)
    classes = [list(each) for each in by_region.values()]
    names = [next((name for name, each in members.items() if each == own), _label(own)) for own in classes]
    return {
        "modalities": channel_modalities(content, path),
        "labels": [background, *classes],
        "classes": [BACKGROUND, *names],
        "regions": None if len(classes) == len(members) and list(members) == names else members,
        "ignore": ignored[0],
        "head": "softmax",
    }


def label_contradiction(root: Path, labels: Sequence[Sequence[float]], ignore: float | None = None) -> str:
    """The sentence about values that only the task or only dataset.json knows; empty if they agree.

    Args:
        root: folder of dataset.json.
        labels: the task's values of each class, the background first.
        ignore: the task's value of voxels that do not count.

    Raises:
        FileNotFoundError, ValueError: as for ``nnunet_task``.
    """
    path = root / DATASET_JSON
    members = _label_values(read_object(path, DATASET_JSON), path)
    (ignored,) = members.pop(IGNORE, [None])
    if ignored != ignore:
        stated, own = ("no value" if value is None else f"{value:g}" for value in (ignored, ignore))
        return f"{path} ignores {stated}, but the task ignores {own}. Set the task's ignore to that of {DATASET_JSON}."
    known = {float(value) for each in members.values() for value in each}
    used = {float(value) for each in labels for value in each}
    differences = [
        f"{owner} the value(s) {', '.join(f'{value:g}' for value in sorted(values))}"
        for owner, values in (("only the task has", used - known), ("only dataset.json has", known - used))
        if values
    ]
    return (
        f"{path} contradicts the task's labels: {'; '.join(differences)}. Correct one of them." if differences else ""
    )


def channel_modalities(content: Mapping[str, Any], path: Path) -> list[str]:
    """A name for each channel that can be a modality of a task: lower case, with underscores, different from others.

    Args:
        content: of dataset.json.
        path: of dataset.json, for errors.

    Raises:
        ValueError: it names no channels, or not those from 0 on.
    """
    stated = content.get("channel_names", content.get("modality"))
    if not isinstance(stated, Mapping) or not stated:
        raise ValueError(f'{path} names no channels. Add them, such as "channel_names": {{"0": "CT", "1": "PET"}}.')
    numbered = {str(key): str(name) for key, name in stated.items()}
    if set(numbered) != {str(index) for index in range(len(numbered))}:
        raise ValueError(f"{path} numbers its channels {', '.join(numbered)}. Number them from 0, without a gap.")
    names = [modality_key(numbered[str(index)]) for index in range(len(numbered))]
    return [f"{name}_{index}" if names.count(name) > 1 else name for index, name in enumerate(names)]


def modality_key(name: str) -> str:
    """A name as it is compared: ``T1-Gd`` is ``t1_gd``."""
    return re.sub(r"\W+", "_", name).strip("_").lower() or "channel"


def _label_values(content: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    """The values of each label by its name, of either version.

    Raises:
        ValueError: there are no labels, no background, or values that are no whole numbers.
    """
    stated = content.get("labels")
    if not isinstance(stated, Mapping) or not stated:
        raise ValueError(f'{path} names no labels. Add them, such as "labels": {{"background": 0, "tumour": 1}}.')
    if all(str(key).isdigit() for key in stated):  # version 1
        stated = {str(name): int(key) for key, name in stated.items()}
    members: dict[str, list[int]] = {}
    for name, value in stated.items():
        values = sorted(value) if is_list(value) and all(map(is_whole, value)) else [value]
        if not values or not all(map(is_whole, values)):
            raise ValueError(f"{path}: the label {name} has the value {value!r}. Give whole numbers.")
        members[BACKGROUND if str(name).lower() == BACKGROUND else str(name)] = values
    if BACKGROUND not in members:
        raise ValueError(f'{path} has no label named background. Add it: "background": 0.')
    if len(members) < 2 or set(members) == {BACKGROUND, IGNORE}:
        raise ValueError(f"{path} has no label besides the background. Add the classes.")
    if len(members.get(IGNORE, [0])) > 1:
        raise ValueError(f"{path}: the label {IGNORE} has several values. Give one.")
    reserved = {name: members[name] for name in (BACKGROUND, IGNORE) if name in members}
    for special, values in reserved.items():
        for name, others in members.items():
            if name != special and set(values) & set(others):
                raise ValueError(
                    f"{path}: the labels {special} and {name} have a value in common. Correct one of them."
                )
    return members


def _label(values: Sequence[int]) -> str:
    """The name of a class that is no region by itself."""
    return f"label {'+'.join(map(str, values))}"
