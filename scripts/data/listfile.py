# SPDX-License-Identifier: Apache-2.0
"""A cohort as a table: ``.csv`` or ``.json`` with one row per case and a column per modality."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
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
    seen: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        if item["case_id"] in seen:
            first = seen[item["case_id"]]
            raise ValueError(f"{path} lists the case {item['case_id']} twice, as cases {first} and {number}: keep one.")
        seen[item["case_id"]] = number
    return items


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
    strange = [str(key) for key in row if key not in (*keys, *OTHERS)]
    if strange:
        raise ValueError(f"{where}: unknown column {', '.join(strange)}: use {', '.join((*OTHERS, *keys))}.")
    item: dict[str, Any] = {key: value for key, value in row.items() if value not in (None, "")}
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
    if not allow_outside and (Path(text).is_absolute() or not path.resolve().is_relative_to(root.resolve())):
        raise ValueError(f"{where}: {text} leads out of {root}: give a path inside, or allow it by --allow-outside.")
    return str(path)
