# SPDX-License-Identifier: Apache-2.0
"""Read a cohort from a table: ``.csv`` or ``.json`` with one row per case and one column per modality."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CASE_ID = re.compile(r"[^\W.][\w.+-]*")  # an id is used as a file name
INVALID_CHARACTER = re.compile("[\0\ud800-\udfff]")  # NUL and lone surrogates cannot be file names or be written
ID_COLUMNS = ("case_id", "patient_id", "centre")
OTHER_COLUMNS = (*ID_COLUMNS, "bbox_mm")  # besides those that contain paths


def read_case_table(
    file: str | Path, root: str | Path, keys: Sequence[str], allow_outside: bool = False
) -> list[dict[str, Any]]:
    """Read a data list from a table.

    Args:
        file: ``.csv`` with a header, or ``.json``: a list of objects, or an object with such a list under ``training``.
        root: folder that paths are relative to; if empty, the table's own folder.
        keys: columns with paths, the reference modality first: ``image``, modalities, ``label``. An empty cell means
            that there is no such file.
        allow_outside: accept paths that are absolute or lead out of ``root``.

    Returns:
        Items with ``case_id`` (by default the reference file's name), ``patient_id`` (by default the case's id),
        ``image`` and the paths.

    Raises:
        FileNotFoundError: no such table.
        ValueError: the table cannot be parsed; a column is unknown or occurs twice; a case has no reference; an id is
            not a file name; a case or a file occurs twice; or a path leads out of ``root``.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data list at {path}.")
    folder = Path(root) if root else path.parent
    rows = enumerate(_read_rows(path), start=1)
    items = [_make_item(row, number, path, folder, keys, allow_outside) for number, row in rows]
    if not items:
        raise ValueError(f"{path} lists no cases.")
    _refuse_duplicate_cases(items, path)
    _refuse_duplicate_files(items, keys, path)
    return items


def _refuse_duplicate_cases(items: Sequence[dict[str, Any]], path: Path) -> None:
    numbers: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        case_id = item["case_id"]
        first = numbers.setdefault(case_id, number)
        if first != number:
            raise ValueError(f"{path} lists case {case_id} twice, as cases {first} and {number}. Keep one.")


def _refuse_duplicate_files(items: Sequence[dict[str, Any]], keys: Sequence[str], path: Path) -> None:
    """Refuse a file that occurs twice, compared by its resolved path. Two crops of one image may be two cases."""
    uses: dict[str, list[tuple[int, str, Any]]] = {}
    for number, item in enumerate(items, start=1):
        for key, file in _resolved_files(item, keys).items():
            box = item.get("bbox_mm")
            for first, first_key, first_box in uses.setdefault(file, []):
                if first == number or first_key != key or first_box == box:
                    first_id = items[first - 1]["case_id"]
                    raise ValueError(
                        f"{path} lists {file} twice, as {first_key} of case {first} ({first_id}) and as {key} of case "
                        f"{number} ({item['case_id']}). Keep one. Name a 4D file of all modalities once, as image."
                    )
            uses[file].append((number, key, box))


def _resolved_files(item: dict[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """A case's resolved paths by key. ``image`` names the reference, or repeats a modality and is left out then."""
    files = {key: os.path.realpath(item[key]) for key in keys if key in item and key != "image"}
    image = os.path.realpath(item["image"])
    repeats_modality = image in (file for key, file in files.items() if key != "label")
    return files if repeats_modality else {("image" if keys[0] in files else keys[0]): image, **files}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                table = csv.DictReader(stream, skipinitialspace=True)
                _unique_columns([(name, None) for name in table.fieldnames or ()])
                return list(table)
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_columns)
    except (ValueError, RecursionError, csv.Error) as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path} is not a readable table ({error}). Give a .csv with a header, or a .json.") from error
    rows = content.get("training") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} contains no list of cases. Give a list of objects, one per case.")
    return rows


def _unique_columns(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of the pairs; ValueError on a repeated name, of which ``dict`` would silently keep the last."""
    names = [name for name, _ in pairs]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise ValueError(f"the column {repeated[0]!r} occurs twice")
    return dict(pairs)


def _make_item(
    row: dict[str, Any], number: int, path: Path, root: Path, keys: Sequence[str], allow_outside: bool
) -> dict[str, Any]:
    where = f"{path}, case {number}"
    if None in row:
        raise ValueError(f"{where} has more cells than the table has columns. Correct the row.")
    columns = (*OTHER_COLUMNS, *keys)
    unknown = [str(key) for key in row if key not in columns]
    if unknown:
        raise ValueError(f"{where}: unknown column {', '.join(unknown)}. Use {', '.join(columns)}.")
    for key, value in row.items():
        if isinstance(value, str) and INVALID_CHARACTER.search(value):
            raise ValueError(f"{where}: {key} contains an invalid character, such as NUL. Write the table again.")
    item: dict[str, Any] = {key: value for key, value in row.items() if value not in (None, "")}
    if "bbox_mm" in item:
        item["bbox_mm"] = _parse_box(item["bbox_mm"], where)
    for key in keys:
        if key in item:
            item[key] = _path_inside(str(item[key]), root, allow_outside, f"{where}, {key}")
    reference = item.get("image", next((item[key] for key in keys if key in item and key != "label"), None))
    if reference is None:
        raise ValueError(f"{where} names no image. Fill in one of {', '.join(keys)}.")
    item["image"] = reference
    item["case_id"] = str(item.get("case_id", Path(reference).name.split(".")[0]))
    item["patient_id"] = str(item.get("patient_id", item["case_id"]))
    if not CASE_ID.fullmatch(item["case_id"]):
        raise ValueError(f"{where}: {item['case_id']!r} cannot be a file name. Use letters, digits, _, - and +.")
    return item


def _path_inside(text: str, root: Path, allow_outside: bool, where: str) -> str:
    """A path below the root; links are resolved before the check."""
    path = root / text
    if allow_outside:
        return str(path)
    if Path(text).is_absolute():
        raise ValueError(
            f"{where}: {text} is absolute. Give a path relative to {root}, or allow it with --allow-outside."
        )
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{where}: {text} leads out of {root}. Give a path inside, or allow it with --allow-outside.")
    return str(path)


def _parse_box(value: Any, where: str) -> list[float]:
    """Six numbers; in a text cell, separated by spaces."""
    try:
        box = [float(number) for number in (value.split() if isinstance(value, str) else value)]
    except (TypeError, ValueError):
        box = []
    if len(box) != 6 or not all(map(math.isfinite, box)):
        raise ValueError(f"{where}: bbox_mm is {value!r}. Give x1 y1 z1 x2 y2 z2 in mm, separated by spaces.")
    return box
