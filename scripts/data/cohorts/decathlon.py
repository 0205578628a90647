# SPDX-License-Identifier: Apache-2.0
"""A data list of MONAI, as of the Medical Segmentation Decathlon: one JSON file in the data set's folder.

    {"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz", "fold": 0}, ...],
     "validation": [{"image": ..., "label": ...}, ...],
     "testing": ["imagesTs/b.nii.gz", ...]}

The file is dataset.json, or the only .json of the folder, or ``"layout": {"list": "NAME.json"}``. Paths are relative to
its folder. ``image`` is the file of a single modality, or a list of files in the order of the modalities. One file for
several modalities is a 4D file, which needs ``--set stacked=true``.

- `training`: a case with ``fold`` validates in that fold and trains in the others. One without it always trains, if
  others have it or there is a list `validation`.
- `validation`: validates in fold 0, the only one, so it never trains.
- `testing` or `test`: takes part in no training and no validation.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.case_list import TEST, Item, check_cases, refuse_unknown_keys, require_folder
from scripts.data.case_table import path_inside
from scripts.data.cohorts.nnunet_task import channel_modalities, modality_key
from scripts.image_io.checks import LABEL
from scripts.utils.file_names import nfc
from scripts.utils.json_files import read_object
from scripts.utils.values import is_list, is_whole

logger = logging.getLogger(__name__)

TRAINING, VALIDATION, TESTING = "training", "validation", ("testing", "test")
LISTS = (TRAINING, VALIDATION, *TESTING)
KEYS = ("image", LABEL, "fold", "case_id", "patient_id")  # of an entry
COUNTS = {"numTraining": (TRAINING,), "numTest": TESTING}
LAYOUT = 'dataset.json with "training": [{"image": FILE, "label": FILE}, ...]'
SEPARATORS = "_-. "


def datalist(root: Path, modalities: Sequence[str], layout: Mapping[str, str], allow_outside: bool) -> list[Item]:
    """List the cases of all lists. An entry may name its `case_id` and `patient_id`.

    By default the id is the image's file name, or the part that the names of several images have in common.

    Args:
        root: folder of the JSON file.
        modalities: the reference first.
        layout: ``list``, the name of the file, if it is not dataset.json.
        allow_outside: accept paths that are absolute or lead out of the file's folder.

    Raises:
        ValueError: the file is no such list, its channels are the modalities in another order, or entries are wrong;
            all of them are named.
        FileNotFoundError: no folder, no such file, or no case.
    """
    refuse_unknown_keys(layout, ("list",), "decathlon")
    root = require_folder(root, "decathlon", LAYOUT)
    path = Path(path_inside(layout["list"], root, allow_outside, "layout")) if layout else _list_file(root)
    content = read_object(path, "data list")
    _require_order(content, modalities, path)
    problems: list[str] = []
    entries = _entries(content, path, problems)
    other_keys = sorted({str(key) for _, entry, _ in entries if isinstance(entry, Mapping) for key in entry} - {*KEYS})
    if other_keys:
        logger.warning("%s: these keys of its entries are not read: %s", path, ", ".join(other_keys))
    cases: list[tuple[Item, dict[str, Path]]] = []
    for name, entry, where in entries:
        try:
            item = _item(entry, where, path.parent, modalities, allow_outside, name)
            images = {key: Path(item[key]) for key in ("image", *modalities) if key in item}
            # Missing files are named later, with those of other keys.
            cases.append((item, {key: file for key, file in images.items() if file.exists()}))
        except ValueError as error:
            problems.append(str(error))
    return check_cases(cases, path, "decathlon", LAYOUT, problems)


def _list_file(root: Path) -> Path:
    """dataset.json, or the only .json of the folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if (root / "dataset.json").is_file():
        return root / "dataset.json"
    files = sorted(path for path in root.glob("*.json") if not path.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"No cases found in {root}. Expected: {LAYOUT}.")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(
            f'{root} has several .json files ({names}). Name one: "layout": {{"list": "{files[0].name}"}}.'
        )
    return files[0]


def _entries(content: Mapping[str, Any], path: Path, problems: list[str]) -> list[tuple[str, Any, str]]:
    """The entries of all lists, each with the list's name and where it stands."""
    entries = []
    for name in LISTS:
        listed = content.get(name, [])
        if not is_list(listed):
            problems.append(f"{path}: {name} is no list. Give a list of objects, one per case.")
            continue
        entries += [(name, entry, f"{path}, {name} {number}") for number, entry in enumerate(listed)]
    for key, value in content.items():
        if key not in LISTS and is_list(value) and any(isinstance(each, Mapping) and "image" in each for each in value):
            problems.append(
                f"{path} lists cases under {key}, which is not read. Move them to one of {', '.join(LISTS)}."
            )
    for key, names in COUNTS.items():
        count = sum(name in names for name, _, _ in entries)
        if key in content and content[key] != count:
            problems.append(f"{path} says {key} {content[key]}, but lists {count} cases. Correct one of them.")
    has_folds = any(isinstance(entry, Mapping) and entry.get("fold") is not None for _, entry, _ in entries)
    if has_folds and content.get(VALIDATION):
        problems.append(f"{path} has both folds and a list {VALIDATION}. Remove one of them.")
    return entries


def _item(entry: Any, where: str, folder: Path, modalities: Sequence[str], allow_outside: bool, name: str) -> Item:
    """The item of one entry.

    Raises:
        ValueError: it is no such entry.
    """
    entry = {"image": entry} if isinstance(entry, str) or is_list(entry) else entry
    if not isinstance(entry, Mapping) or not entry.get("image"):
        raise ValueError(f"{where} names no image. Give {{\"image\": FILE}}; for a column per modality, use 'table'.")
    images = list(entry["image"]) if is_list(entry["image"]) else [entry["image"]]
    label = entry.get(LABEL)
    if not all(isinstance(text, str) for text in (*images, label or "")):
        raise ValueError(f"{where}: give the image as a file or a list of files, and the label as one file.")
    if len(images) > 1 and len(images) != len(modalities):
        raise ValueError(
            f"{where} has {len(images)} images, but the task has {len(modalities)} modalities "
            f"({', '.join(modalities)}). Give one file for each, in this order."
        )
    paths = [path_inside(text, folder, allow_outside, where) for text in images]
    item: Item = {"case_id": _id(entry, "case_id", _common_name(images))}
    item |= {"patient_id": _id(entry, "patient_id", item["case_id"]), "image": paths[0]}
    if len(paths) == len(modalities):
        item |= dict(zip(modalities, paths, strict=True))
    if label:
        item[LABEL] = path_inside(label, folder, allow_outside, where)
    fold = 0 if name == VALIDATION else entry.get("fold")
    if name in TESTING:
        item["partition"] = TEST
    elif fold is not None:
        if not is_whole(fold) or fold < 0:
            raise ValueError(f"{where}: fold is {fold!r}. Give a whole number from 0.")
        item["fold"] = fold
    return item


def _id(entry: Mapping[str, Any], key: str, default: str) -> str:
    """An id of an entry, which may be the number 0; the default where there is none."""
    return nfc(str(default if entry.get(key) in (None, "") else entry[key]))


def _require_order(content: Mapping[str, Any], modalities: Sequence[str], path: Path) -> None:
    """Refuse modalities in another order than the file states: images are taken by their position.

    Raises:
        ValueError: the file names channels that are modalities of the task, at other positions.
    """
    if not isinstance(content.get("channel_names", content.get("modality")), Mapping):
        return
    names, keys = channel_modalities(content, path), [modality_key(name) for name in modalities]
    moved = [name for name, key in zip(modalities, keys, strict=True) if key in names]
    if any(names.index(modality_key(name)) != modalities.index(name) for name in moved):
        raise ValueError(
            f"The channels of {path} are {', '.join(names)}, the modalities of the task {', '.join(modalities)}. Name "
            "them in the same order: images are taken by their position."
        )


def _common_name(images: Sequence[str]) -> str:
    """The name that files have in common, up to a separator: ``a_0000.nii.gz`` and ``a_0001.nii.gz`` give ``a``."""
    paths = [Path(text.replace("\\", "/")) for text in images]
    stems = [re.sub(r"\.nii(\.gz)?$|\.[^.]+$", "", path.name) for path in paths]
    common = os.path.commonprefix(stems)  # noqa: RUF071, characters are meant
    if any(stem != common for stem in stems) and common and common[-1] not in SEPARATORS:
        common = common[: max(map(common.rfind, SEPARATORS)) + 1]
    return common.rstrip(SEPARATORS) or paths[0].parent.name or stems[0]
