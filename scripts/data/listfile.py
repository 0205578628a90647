# SPDX-License-Identifier: Apache-2.0
"""A cohort as a table: ``.csv`` or ``.json`` with one row per case and a column per modality."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

PLAIN = re.compile(r"[^\W.][\w.+-]*")  # a case's id becomes a file name
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
        ValueError: no such table, an unknown column, a case without its reference, an id that is no file name, a case
            that occurs twice, or a path that leads outside.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data list at {path}.")
    folder = Path(root) if root else path.parent
    items = [_item(row, number, path, folder, keys, allow_outside) for number, row in enumerate(_rows(path), start=1)]
    if not items:
        raise ValueError(f"{path} lists no case.")
    for name, value in (("case", itemgetter("case_id")), ("image", itemgetter("image", "bbox_mm"))):
        _refuse_twice([value({"bbox_mm": None, **item}) for item in items], name, path)
    return items


def _refuse_twice(values: Sequence[Any], name: str, path: Path) -> None:
    """Two crops of one image may be two cases; all else that occurs twice is one case too many."""
    seen: dict[str, int] = {}
    for number, value in enumerate(values, start=1):
        first = seen.setdefault(str(value), number)
        if first != number:
            told = value if isinstance(value, str) else value[0]
            raise ValueError(f"{path} lists the {name} {told} twice, as cases {first} and {number}: keep one.")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                return list(csv.DictReader(stream, skipinitialspace=True))
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no readable table ({error}): give a .csv with a header, or a .json.") from error
    rows = found.get("training") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of cases: give a list of objects, one per case.")
    return rows


def _item(
    row: dict[str, Any], number: int, path: Path, root: Path, keys: Sequence[str], allow_outside: bool
) -> dict[str, Any]:
    where = f"{path}, case {number}"
    if None in row:
        raise ValueError(f"{where} has more cells than the table has columns: correct the row.")
    strange = [str(key) for key in row if key not in (*keys, *OTHERS)]
    if strange:
        raise ValueError(f"{where}: unknown column {', '.join(strange)}: use {', '.join((*OTHERS, *keys))}.")
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
    if len(box) != 6:
        raise ValueError(f"{where}: bbox_mm is {value!r}: give x1 y1 z1 x2 y2 z2 in mm, with spaces between them.")
    return box
