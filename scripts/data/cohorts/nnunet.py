# SPDX-License-Identifier: Apache-2.0
"""A data set of nnU-Net (nnUNet_raw/Dataset001_NAME), of version 2 or 1.

    dataset.json                      channel_names (version 1: modality), labels, file_ending, numTraining
    imagesTr/CASE_0000.nii.gz ...     one file per channel
    labelsTr/CASE.nii.gz              absent for cases without a label
    imagesTs/, labelsTs/              cases that take part in no training and no validation
    splits_final.json                 [{"train": [...], "val": [...]}, ...], the folds, if there is such a file

nnU-Net requires that all files of a case have one grid. Here other grids are accepted: every file is resampled by its
affine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.case_list import TEST, Item, check_cases, make_item, missing_file, refuse_unknown_keys, require_folder
from scripts.data.case_table import path_inside
from scripts.data.cohorts.nnunet_task import DATASET_JSON, channel_modalities, modality_key
from scripts.utils.file_names import nfc
from scripts.utils.json_files import read_json, read_object
from scripts.utils.values import is_list

LAYOUT = "dataset.json, imagesTr/<case>_0000{ending} and labelsTr/<case>{ending}"
SPLITS = "splits_final.json"
CASE_AND_CHANNEL = r"([^.].*)_(\d{4})"

Files = dict[int, Path]  # by channel


def datalist(root: Path, modalities: Sequence[str], layout: Mapping[str, str], allow_outside: bool) -> list[Item]:
    """List the cases. Modalities are channels of the same name, or, where no name fits, of the same position.

    Cases of imagesTs have the `partition` `TEST`. With splits_final.json, a case has the `fold` that it validates.

    Args:
        root: folder of dataset.json.
        modalities: the reference first.
        layout: must be empty.
        allow_outside: accept paths in dataset.json that lead out of ``root``.

    Raises:
        ValueError: dataset.json or the splits cannot be read, the modalities are not the channels, or the files
            contradict dataset.json; all contradictions are named.
        FileNotFoundError: no folder, no dataset.json, no case, or a case without its reference.
    """
    refuse_unknown_keys(layout, (), "nnunet")
    root = require_folder(root, "nnunet", LAYOUT.format(ending=".nii.gz"))
    path = root / DATASET_JSON
    content = read_object(path, DATASET_JSON)
    channels = _channel_of(modalities, channel_modalities(content, path), path)
    ending = str(content.get("file_ending", ".nii.gz"))
    problems: list[str] = []
    if "dataset" in content:
        training, labels = _listed(content["dataset"], root, allow_outside, path)
        problems += [missing_file(label) for _, label in sorted(labels.items()) if not label.exists()]
    else:
        training, labels = _found(root, "Tr", ending, len(channels), problems)
    test, test_labels = _found(root, "Ts", ending, len(channels), problems)
    stated = content.get("numTraining")
    if stated is not None and stated != len(training):
        problems.append(f"{path} says numTraining {stated}, but there are {len(training)} cases. Correct one of them.")
    folds: dict[str, int] = {}
    try:
        folds = _read_folds(root / SPLITS, set(training))
    except ValueError as error:
        problems.append(str(error))
    cases = []
    for case, own in sorted(training.items()):
        more = {"fold": folds[case]} if folds else {}
        cases.append(_case(case, own, channels, labels.get(case), root, ending, more))
    for case, own in sorted(test.items()):
        cases.append(_case(case, own, channels, test_labels.get(case), root, ending, {"partition": TEST}))
    return check_cases(cases, root, "nnunet", LAYOUT.format(ending=ending), problems)


def _case(
    case: str, own: Files, channels: Mapping[str, int], label: Path | None, root: Path, ending: str, more: Item
) -> tuple[Item, dict[str, Path]]:
    """An item, and the files that it should have."""
    folder = next(iter(own.values())).parent if own else root
    files = {key: own.get(channel, folder / f"{case}_{channel:04d}{ending}") for key, channel in channels.items()}
    return {**make_item(case, case, files, label), **more}, files


def _channel_of(modalities: Sequence[str], names: Sequence[str], path: Path) -> dict[str, int]:
    """The channel of each modality: by name if all names fit, by position if none does.

    Raises:
        ValueError: the numbers differ, or a modality has the name of another channel than that at its position.
    """
    listed = ", ".join(names)
    if len(modalities) != len(names):
        raise ValueError(
            f"The task has {len(modalities)} modalities ({', '.join(modalities)}), but {path} has {len(names)} "
            f"channels ({listed}). Correct the task's modalities."
        )
    keys = [modality_key(name) for name in modalities]
    if set(keys) == set(names):
        return {name: names.index(key) for name, key in zip(modalities, keys, strict=True)}
    for index, key in enumerate(keys):
        if key in names and names.index(key) != index:
            raise ValueError(
                f"The modality {modalities[index]} is number {index} of the task, but channel {names.index(key)} of "
                f"{path} ({listed}). Give the modalities the names of the channels, or their order."
            )
    return {name: index for index, name in enumerate(modalities)}


def _found(
    root: Path, part: str, ending: str, channels: int, problems: list[str]
) -> tuple[dict[str, Files], dict[str, Path]]:
    """The files of each case in imagesTr or imagesTs by channel, and the labels beside them."""
    images: dict[str, Files] = {}
    for path in _files(root / f"images{part}", ending):
        name = re.fullmatch(CASE_AND_CHANNEL, path.name.removesuffix(ending))
        if not name:
            problems.append(f"The name of {path} has no channel. Rename it as CASE_0000{ending}.")
        elif int(name[2]) >= channels:
            problems.append(
                f"{path} is channel {int(name[2])}, but {DATASET_JSON} names {channels}. Correct one of them."
            )
        else:
            of_case, channel = images.setdefault(nfc(name[1]), {}), int(name[2])
            if channel in of_case:  # the names differ in their form of Unicode only
                problems.append(f"{of_case[channel]} and {path} have the same name. Remove one of them.")
            of_case[channel] = path
    labels = {nfc(path.name.removesuffix(ending)): path for path in _files(root / f"labels{part}", ending)}
    problems += [f"{labels[case]} has no image. Add it, or remove the label." for case in labels if case not in images]
    return images, labels


def _files(folder: Path, ending: str) -> list[Path]:
    """The files of a folder with an ending; none without the folder. macOS creates "._" files."""
    return sorted(path for path in folder.glob(f"*{ending}") if not path.name.startswith("."))


def _listed(stated: Any, root: Path, allow_outside: bool, path: Path) -> tuple[dict[str, Files], dict[str, Path]]:
    """The files that dataset.json lists itself: {case: {"images": [...], "label": ...}}.

    Raises:
        ValueError: an entry is different, or leads out of ``root``.
    """
    images: dict[str, Files] = {}
    labels: dict[str, Path] = {}
    for case, entry in stated.items() if isinstance(stated, Mapping) else [("dataset", None)]:
        where = f"{path}, {case}"
        texts = entry.get("images") if isinstance(entry, Mapping) else None
        label = entry.get("label") if isinstance(entry, Mapping) else None
        if not is_list(texts) or not all(isinstance(text, str) for text in (*texts, label or "")):  # type: ignore[misc]
            raise ValueError(f'{where}: expected {{"images": ["FILE", ...], "label": "FILE"}}. Correct the entry.')
        images[nfc(str(case))] = {
            index: Path(path_inside(text, root, allow_outside, where)) for index, text in enumerate(texts or ())
        }
        if label:
            labels[nfc(str(case))] = Path(path_inside(label, root, allow_outside, where))
    return images, labels


def _read_folds(path: Path, cases: set[str]) -> dict[str, int]:
    """The fold that each case validates; {} if there is no file.

    Raises:
        ValueError: it cannot be read, or the validation cases of its folds are not a partition of the cases.
    """
    if not path.is_file():
        return {}
    expected = 'Expected [{"train": [cases], "val": [cases]}, ...], every case in the val of one fold'
    content = read_json(path, SPLITS)
    is_valid = isinstance(content, list) and all(
        isinstance(fold, Mapping) and is_list(fold.get("train")) and is_list(fold.get("val")) for fold in content
    )
    if not is_valid or not content:
        raise ValueError(f"{path} is no list of folds. {expected}.")
    folds: dict[str, int] = {}
    for number, fold in enumerate(content):
        validation, training = ({nfc(str(case)) for case in fold[part]} for part in ("val", "train"))
        unknown = sorted((validation | training) - cases)
        if unknown:
            raise ValueError(f"{path}: fold {number} has the case {unknown[0]}, which has no image. {expected}.")
        twice = sorted(validation & training) or sorted(validation & set(folds))
        if twice:
            raise ValueError(f"{path}: the case {twice[0]} of fold {number} occurs twice. {expected}.")
        absent = sorted(cases - validation - training)
        if absent:
            raise ValueError(f"{path}: fold {number} does not have the case {absent[0]}. {expected}.")
        folds |= dict.fromkeys(validation, number)
    never = sorted(cases - set(folds))
    if never:
        raise ValueError(f"{path}: the case {never[0]} is in the val of no fold. {expected}.")
    return folds
