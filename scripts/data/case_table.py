# SPDX-License-Identifier: Apache-2.0
"""A cohort as a table: ``.csv`` or ``.json`` with one row per case and a column per modality."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAIN = re.compile(r"[^\W.][\w.+-]*")  # a case's id becomes a file name
BROKEN = re.compile("[\0\ud800-\udfff]")  # no file's name, and no text that can be written
OTHERS = ("case_id", "patient_id", "centre", "bbox_mm")


def read_list(
    file: str | Path, root: str | Path, keys: Sequence[str], allow_outside: bool = False
) -> list[dict[str, Any]]:
    """Read a data list, whose paths are relative to a folder and stay in it.

    Args:
        file: ``.csv`` with a header, or ``.json``: a list of objects, or an object that holds one under ``training``.
        root: folder that paths are relative to; empty is the list's own.
        keys: columns that hold paths, the reference modality first: ``image``, modalities, ``label``. An empty cell is
            an absent file.
        allow_outside: accept paths that are absolute or lead out of ``root``.

    Returns:
        Items with ``case_id`` (by default the reference file's name), ``patient_id`` (by default the case's id),
        ``image`` and the paths.

    Raises:
        FileNotFoundError: no such list.
        ValueError: no such table, an unknown column or one that occurs twice, a case without its reference, an id that
            is no file name, a case or a file that occurs twice, or a path that leads outside.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data list at {path}.")
    folder = Path(root) if root else path.parent
    items = [_item(row, number, path, folder, keys, allow_outside) for number, row in enumerate(_rows(path), start=1)]
    if not items:
        raise ValueError(f"{path} lists no case.")
    _refuse_cases_twice(items, path)
    _refuse_files_twice(items, keys, path)
    return items


def _refuse_cases_twice(items: Sequence[dict[str, Any]], path: Path) -> None:
    seen: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        first = seen.setdefault(item["case_id"], number)
        if first != number:
            case = item["case_id"]
            raise ValueError(f"{path} lists the case {case} twice, as cases {first} and {number}: keep one.")


def _refuse_files_twice(items: Sequence[dict[str, Any]], keys: Sequence[str], path: Path) -> None:
    """Files are compared by where they really lie, whatever their spelling; two crops of one may be two cases."""
    seen: dict[str, list[tuple[int, str, Any]]] = {}
    for number, item in enumerate(items, start=1):
        for key, file in _files(item, keys).items():
            own = (number, key, item.get("bbox_mm"))
            for first, as_key, box in seen.setdefault(file, []):
                if first == number or as_key != key or box == own[2]:
                    which = f"as {as_key} of case {first} ({items[first - 1]['case_id']}) and as {key} of case {number}"
                    advice = "keep one; a 4D file of all modalities is named once, as image"
                    raise ValueError(f"{path} lists {file} twice, {which} ({item['case_id']}): {advice}.")
            seen[file].append(own)


def _files(item: dict[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """A case's files by what they are; ``image`` is the reference, or repeats a modality."""
    files = {key: os.path.realpath(item[key]) for key in keys if key in item and key != "image"}
    image = os.path.realpath(item["image"])
    repeats = image in (file for key, file in files.items() if key != "label")
    return files if repeats else {("image" if keys[0] in files else keys[0]): image, **files}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                table = csv.DictReader(stream, skipinitialspace=True)
                _once([(name, None) for name in table.fieldnames or ()])
                return list(table)
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError, too
        raise ValueError(f"{path} is no readable table ({error}): give a .csv with a header, or a .json.") from error
    rows = found.get("training") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of cases: give a list of objects, one per case.")
    return rows


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """As a dictionary, which would silently keep the last of a name's values."""
    names = [name for name, _ in pairs]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"the column {twice[0]!r} occurs twice")
    return dict(pairs)


def _item(
    row: dict[str, Any], number: int, path: Path, root: Path, keys: Sequence[str], allow_outside: bool
) -> dict[str, Any]:
    where = f"{path}, case {number}"
    if None in row:
        raise ValueError(f"{where} has more cells than the table has columns: correct the row.")
    strange = [str(key) for key in row if key not in (*keys, *OTHERS)]
    if strange:
        raise ValueError(f"{where}: unknown column {', '.join(strange)}: use {', '.join((*OTHERS, *keys))}.")
    for key, value in row.items():
        if isinstance(value, str) and BROKEN.search(value):
            raise ValueError(f"{where}, {key} holds a character that no text has (NUL): write the table again.")
    item: dict[str, Any] = {key: value for key, value in row.items() if value not in (None, "")}
    if "bbox_mm" in item:
        item["bbox_mm"] = _box(item["bbox_mm"], where)
    for key in keys:
        if key in item:
            item[key] = _inside(str(item[key]), root, allow_outside, f"{where}, {key}")
    reference = item.get("image", next((item[key] for key in keys if key in item and key != "label"), None))
    if reference is None:
        raise ValueError(f"{where} names no image: fill in one of {', '.join(keys)}.")
    item["image"] = reference
    item["case_id"] = str(item.get("case_id", Path(reference).name.split(".")[0]))
    item["patient_id"] = str(item.get("patient_id", item["case_id"]))
    if not PLAIN.fullmatch(item["case_id"]):
        raise ValueError(f"{where}: {item['case_id']!r} cannot be a file's name: use letters, digits, _, - and +.")
    return item


def _inside(text: str, root: Path, allow_outside: bool, where: str) -> str:
    """A path under the root; links are followed before they are judged."""
    path = root / text
    if allow_outside:
        return str(path)
    if Path(text).is_absolute():
        raise ValueError(
            f"{where}: {text} is absolute: give a path relative to {root}, or allow it by --allow-outside."
        )
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{where}: {text} leads out of {root}: give a path inside, or allow it by --allow-outside.")
    return str(path)


def _box(value: Any, where: str) -> list[float]:
    """Six numbers; in a cell, with spaces between them."""
    try:
        box = [float(each) for each in (value.split() if isinstance(value, str) else value)]
    except (TypeError, ValueError):
        box = []
    if len(box) != 6 or not all(map(math.isfinite, box)):
        raise ValueError(f"{where}: bbox_mm is {value!r}: give x1 y1 z1 x2 y2 z2 in mm, with spaces between them.")
    return box
