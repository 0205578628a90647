# SPDX-License-Identifier: Apache-2.0
"""Read a cohort from a table: ``.csv``, ``.tsv`` or ``.json`` with one row per case and one column per modality."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from scripts.data.table_files import read_rows
from scripts.image_io.suv_values import QUANTITIES, checked_suv_values
from scripts.utils.file_names import find_file, nfc

CASE_ID = re.compile(r"[^\W.][\w.+-]*")  # an id is used as a file name
INVALID_CHARACTER = re.compile("[\0\ud800-\udfff]")  # NUL and lone surrogates cannot be file names or be written
ID_COLUMNS = ("case_id", "patient_id", "centre")
NO_VALUE = re.compile(r"nan|none|null|n/?a|<na>|#n/a", re.IGNORECASE)  # how programs write an empty cell
OTHER_COLUMNS = (*ID_COLUMNS, "bbox_mm", *QUANTITIES)  # besides those that contain paths


def read_case_table(
    file: str | Path, root: str | Path, keys: Sequence[str], allow_outside: bool = False
) -> list[dict[str, Any]]:
    """Read a data list from a table.

    Args:
        file: ``.csv``, ``.tsv`` or ``.txt`` with a header, or ``.json``: a list of objects, or an object with such a
            list under ``training``. See ``read_rows``.
        root: folder that paths are relative to; if empty, the table's own folder.
        keys: columns with paths, the reference modality first: ``image``, modalities, ``label``. An empty cell, null or
            NaN means that there is no such file.
        allow_outside: accept paths that are absolute or lead out of ``root``.

    Returns:
        Items with ``case_id`` (by default the reference file's name), ``patient_id`` (by default the case's id),
        ``image`` and the paths. Ids are in NFC; a path is that of the file on disk, in whichever Unicode form, and
        with slashes where the table has backslashes. The columns of ``scripts.image_io.suv_values``, for PET in DICOM,
        are in ``suv``.

    Raises:
        FileNotFoundError: no such table.
        ValueError: the table cannot be parsed; a column is unknown or occurs twice; a case has no reference; an id is
            not a file name; a case or a file occurs twice; or a path leads out of ``root``.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data list at {path}.")
    folder = Path(root) if root else path.parent
    rows = enumerate(read_rows(path, (*OTHER_COLUMNS, *keys)), start=1)
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


def _make_item(
    row: dict[str, Any], number: int, path: Path, root: Path, keys: Sequence[str], allow_outside: bool
) -> dict[str, Any]:
    where = f"{path}, case {number}"
    columns = (*OTHER_COLUMNS, *keys)
    unknown = [str(key) for key in row if key not in columns]
    if unknown == ["fold"]:
        raise ValueError(
            f"{where}: the column fold is not read, because folds are made by patient. Remove it. To choose the folds, "
            "write them to a file, and name it with --set splits_file=FILE."
        )
    if unknown:
        raise ValueError(
            f"{where}: unknown column {', '.join(unknown)}. Use {', '.join(columns)}. For other modalities describe "
            "the data in a task file, for --data (docs/how_to/own_data.md)."
        )
    item = {
        key: value.strip() if isinstance(value, str) and key not in keys else value
        for key, value in row.items()
        if not _is_empty(value, key, where)
    }
    if "bbox_mm" in item:
        item["bbox_mm"] = _parse_box(item["bbox_mm"], where)
    suv = {key: item.pop(key) for key in QUANTITIES if key in item}
    if suv:
        item["suv"] = checked_suv_values(suv, {key: f"{where}: {key}" for key in suv})
    for key in keys:
        if key in item:
            item[key] = path_inside(_path_text(item[key], key, keys, where), root, allow_outside, f"{where}, {key}")
    reference = item.get("image", next((item[key] for key in keys if key in item and key != "label"), None))
    if reference is None:
        raise ValueError(f"{where} names no image. Fill in one of {', '.join(keys)}.")
    item["image"] = reference
    modalities = [key for key in keys if key not in ("image", "label")]
    others = [item[key] for key in modalities if key in item]
    if modalities and modalities[0] not in item and reference not in others and (others or len(modalities) == 1):
        item[modalities[0]] = reference  # else it is a 4D file of all modalities
    for key in ID_COLUMNS:
        if key in item:
            item[key] = _id_text(item[key], key, where)
    item.setdefault("case_id", nfc(Path(reference).name).split(".")[0])
    item.setdefault("patient_id", item["case_id"])
    if not CASE_ID.fullmatch(item["case_id"]):
        raise ValueError(f"{where}: {item['case_id']!r} cannot be a file name. Use letters, digits, _, - and +.")
    return item


def _is_empty(value: Any, key: str, where: str) -> bool:
    """Whether a cell has no value: empty, null, NaN or a word for it.

    Raises:
        ValueError: the cell contains an invalid character, or an id is such a word, which may be meant.
    """
    if isinstance(value, str):
        if INVALID_CHARACTER.search(value):
            raise ValueError(f"{where}: {key} contains an invalid character, such as NUL. Write the table again.")
        has_no_value = NO_VALUE.fullmatch(value.strip()) is not None
        if has_no_value and key in ID_COLUMNS[:2]:
            raise ValueError(f"{where}: {key} is {value!r}. Fill it in, or leave it empty.")
        return has_no_value or not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _path_text(value: Any, key: str, keys: Sequence[str], where: str) -> str:
    if isinstance(value, list):
        modalities = [name for name in keys if name not in ("image", "label")]
        example = ", ".join(f'"{name}": "FILE"' for name in modalities)
        raise ValueError(f"{where}: {key} is a list of {len(value)} files. Name each by its modality: {example}.")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {value!r}. Give the path of a file.")
    return value


def _id_text(value: Any, key: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {key} is {value!r}. Give text or a number.")
    return nfc(str(value))


def path_inside(text: str, root: Path, allow_outside: bool, where: str) -> str:
    """A path below the root, as it is on disk; links are resolved before the check.

    Spaces around a path, and backslashes instead of slashes (Windows), are only kept if there is such a file.
    """
    if not (root / text).exists():
        text = text.strip()
    if "\\" in text and not (root / text).exists():
        if PureWindowsPath(text).drive:
            raise ValueError(f"{where}: {text} is a path of Windows. Give a path relative to {root}.")
        text = text.replace("\\", "/")
    path = find_file(root / text) or root / text
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
