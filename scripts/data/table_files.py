# SPDX-License-Identifier: Apache-2.0
"""Read the rows of a table as spreadsheets, pandas and MONAI write it: .csv, .tsv, .txt or .json, in any Unicode form.

Delimiter, encoding and line ends are found by what the file itself says: its byte order mark and its header.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Row = dict[str, Any]

TEXT_TABLES, SPREADSHEETS = (".csv", ".tsv", ".txt"), (".xlsx", ".xls", ".ods", ".numbers")
DELIMITERS = ",;\t|"
BYTE_ORDER_MARKS = {  # the longest first, because that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CASES = "training"  # the key under which a JSON object lists its cases, as in MONAI's data lists


def column_key(name: str) -> str:
    """A column's name in lower case, with underscores instead of spaces and hyphens: ``Case ID`` is ``case_id``."""
    return re.sub(r"[\s-]+", "_", name.strip()).lower()


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read a table: one dictionary per case, by column.

    A column that is in ``columns`` is known in any spelling, see ``column_key``. Blank rows, and columns without name
    and content, are left out.

    Args:
        path: the table.
        columns: the known columns. The delimiter of a text table is the one by which most of them are in its header.

    Raises:
        ValueError: the file is no such table, or a column occurs twice.
    """
    try:
        text = _decode(path.read_bytes(), path)
        rows = (
            _text_rows(text, path, columns) if path.suffix.lower() in TEXT_TABLES else _json_rows(text, columns, path)
        )
    except (RecursionError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable table ({error}). Give a .csv with a header, or a .json.") from error
    return rows


def _decode(data: bytes, path: Path) -> str:
    """The text of a file in UTF-8, or in the encoding that its byte order mark names."""
    if path.suffix.lower() in SPREADSHEETS:
        raise ValueError(f"{path} is not a readable table, but a spreadsheet. Save it as .csv (UTF-8).")
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    start = data[:1000]
    if encoding == "utf-8" and len(start) > 3 and start.count(0) > len(start) // 4:
        raise ValueError(f"{path} is not a readable table: it is not UTF-8 (every other byte is 0). Save it as UTF-8.")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not a readable table: it is not {encoding.upper().removesuffix('-SIG')} (line {line}, byte "
            f"0x{data[error.start]:02x}). Save it as UTF-8."
        ) from error


def _names(header: Sequence[str], columns: Sequence[str], path: Path) -> list[str]:
    """The columns of a header, known ones as in ``columns``.

    Raises:
        ValueError: a column occurs twice.
    """
    known = {column_key(column): column for column in columns}
    names = [known.get(column_key(name), name.strip()) for name in header]
    repeated = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if repeated:
        raise ValueError(
            f"{path} is not a readable table (the column {repeated[0]!r} occurs twice). Rename or remove one."
        )
    return names


def _text_rows(text: str, path: Path, columns: Sequence[str]) -> list[Row]:
    lines = list(io.StringIO(text, newline=""))  # split at \n, \r\n and \r
    comments = 0
    while lines and (not lines[0].strip() or lines[0].lstrip().startswith("#")):
        comments += bool(lines.pop(0).strip())
    if comments:
        logger.info("%s: %d comment line(s) before the header are not read", path, comments)
    announced = re.fullmatch(r"sep=(.)", lines[0].strip("\r\n")) if lines else None  # Excel's way to name a delimiter
    if announced:
        lines.pop(0)
    delimiter = announced[1] if announced else _delimiter(lines, columns)
    table = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)
    names = _names(next(table, []), columns, path)
    rows: list[Row] = []
    for cells in table:
        if any(cell.strip() for cell in cells):
            rows.append(_text_row(cells, names, f"{path}, case {len(rows) + 1}"))
    return rows


def _delimiter(lines: Sequence[str], columns: Sequence[str]) -> str:
    """The delimiter by which a header has most known columns; a comma where several do."""
    known = {column_key(column) for column in columns}

    def count(delimiter: str) -> int:
        header = next(csv.reader(lines[:1], delimiter=delimiter, skipinitialspace=True), [])
        return len(known & {column_key(name) for name in header})

    return max(DELIMITERS, key=count)


def _text_row(cells: Sequence[str], names: Sequence[str], where: str) -> Row:
    if cells[0].startswith("#") and not any(cell.strip() for cell in cells[1:]):
        raise ValueError(f"{where}: {cells[0][:40]!r} is a comment. Write comments before the header, or remove it.")
    if any(cell.strip() for cell in cells[len(names) :]):
        raise ValueError(f"{where} has more cells than the table has columns. Correct the row.")
    if len(cells) < len(names):
        absent = ", ".join(name for name in names[len(cells) :] if name)
        if absent:
            logger.warning("%s has fewer cells than the table has columns: %s is read as empty", where, absent)
    row = dict(zip(names, cells, strict=False))
    unnamed = [cell for name, cell in zip(names, cells, strict=False) if not name and cell.strip()]
    if unnamed:
        raise ValueError(f"{where}: {unnamed[0][:40]!r} stands in a column without a name. Name or remove the column.")
    row.pop("", None)
    return row


def _json_rows(text: str, columns: Sequence[str], path: Path) -> list[Row]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> Row:
        names = _names([name for name, _ in pairs], columns, path)
        return dict(zip(names, (value for _, value in pairs), strict=True))

    content = rows = json.loads(text, object_pairs_hook=unique)
    if isinstance(content, dict):
        others = {
            key: len(value) for key, value in content.items() if key != CASES and isinstance(value, list) and value
        }
        listed = ", ".join(f"{key} ({count})" for key, count in others.items())
        rows = content.get(CASES)
        if not rows and others:
            raise ValueError(
                f"{path} contains no list of cases under {CASES!r}, but others: {listed}. Only {CASES!r} is read: "
                "folds are made from it, by patient. Move the cases there."
            )
        if others:
            logger.warning(
                "%s: only the cases under %r are read, and divided into folds by patient. Not read: %s",
                path,
                CASES,
                listed,
            )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} contains no list of cases. Give a list of objects, one per case.")
    return rows
