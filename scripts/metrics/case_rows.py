# SPDX-License-Identifier: Apache-2.0
"""The rows of a case table, one per case and region: their columns, their checks, and the table on disk."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.utils.atomic_files import write_text

Row = dict[str, Any]

FOREGROUND = "foreground"  # the region of a row that names none
METRICS = ("dice", "hd95_mm", "assd_mm")
FAILURES = ("missed", "false_positive", "error")
STATUSES = ("ok", "missed", "false_positive", "true_negative", "error")
_NUMBERS = (*METRICS, "volume_ml", "reference_volume_ml", "diagonal_mm")
_TEXTS = ("findings", "trained_on")
COLUMNS = ("case_id", "patient_id", "region", "status", *_NUMBERS, *_TEXTS)
_FIRST_COLUMNS = ("case_id", "patient_id", *_NUMBERS[:5], "status", "diagonal_mm")  # of tables up to version 0.6
_OLD_COLUMNS = (_FIRST_COLUMNS, (*_FIRST_COLUMNS, *_TEXTS))  # of tables without regions


def write_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Write the case table as CSV with the columns `COLUMNS`; ``None`` is an empty cell.

    An earlier file is replaced only when the new one is complete.

    Raises:
        ValueError: a column that is not in `COLUMNS`, or a non-finite number; nothing is written then.
    """
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        unknown = sorted(set(row) - set(COLUMNS))
        if unknown:
            raise ValueError(f"{_described(row)}: unknown columns {unknown}, expected some of {COLUMNS}.")
        numbers = {name: _finite(row, name) for name in _NUMBERS}
        texts = {name: row.get(name, "") for name in ("case_id", "status", *_TEXTS)}
        writer.writerow({**texts, "patient_id": patient_of(row), "region": region_of(row), **numbers})
    write_text(buffer.getvalue(), path)


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of `write_rows`: numbers as float, or ``None`` for an empty cell; all other columns as text.

    Tables of versions up to 0.9 have no column ``region``: their rows are of the region `FOREGROUND`. Those up to 0.6
    also lack the last two columns, which are empty then.

    Raises:
        ValueError: the columns are not `COLUMNS`, a row has too few or too many cells, or a number is not finite.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        if columns not in (COLUMNS, *_OLD_COLUMNS):
            raise ValueError(f"{path}: columns {reader.fieldnames}, expected {list(COLUMNS)}.")
        rows: list[Row] = [dict(row) for row in reader]
    for line, row in enumerate(rows, start=2):
        if len(row) != len(columns) or None in row.values():
            raise ValueError(f"{path}: row {line} does not have {len(columns)} cells. The file may be truncated.")
        row.update({"region": FOREGROUND} | dict.fromkeys(_TEXTS, "") | row)
        row.update({name: _finite({**row, name: row[name] or None}, name) for name in _NUMBERS})
    return rows


def patient_of(row: Row) -> str:
    """The patient of a row; by default each case is its own patient."""
    patient = row.get("patient_id")
    return str(row["case_id"] if patient in (None, "") else patient)


def region_of(row: Row) -> str:
    """The region of a row, by default `FOREGROUND`."""
    return str(row.get("region") or FOREGROUND)


def row_key(row: Row) -> tuple[str, str]:
    """Case and region, which no two rows of a table share."""
    return str(row["case_id"]), region_of(row)


def _described(row: Row) -> str:
    case, region = f"case {row.get('case_id')!r}", region_of(row)
    return case if region == FOREGROUND else f"{case}, region {region!r}"


def _finite(row: Row, name: str) -> float | None:
    if row.get(name) is None:
        return None
    value = float(row[name])
    if not math.isfinite(value):
        raise ValueError(f"{_described(row)}: {name} is {value}. Use None where it is undefined.")
    return value


def seed_rows(row: Row) -> list[Row]:
    """The rows that an average over seeds was made of, its key ``seeds``; of any other row the row itself."""
    return row.get("seeds") or [row]


def checked_rows(rows: Sequence[Row]) -> list[Row]:
    """Check that the values of every row agree with its status; return the rows sorted by case and region.

    Raises:
        ValueError: see ``aggregate``.
    """
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if row_key(row) in seen:
            raise ValueError(f"{_described(row)} is listed twice.")
        seen.add(row_key(row))
        for each in seed_rows(row):
            _check_values(each)
    return sorted(rows, key=row_key)


def _check_values(row: Row) -> None:
    name, status = _described(row), row["status"]
    if status not in STATUSES:
        raise ValueError(f"{name}: unknown status {status!r}, expected one of {STATUSES}.")
    values = {metric: _finite(row, metric) for metric in METRICS}
    if status == "ok" and None in values.values():
        raise ValueError(f"{name}: status ok needs dice, hd95_mm and assd_mm, got {values}.")
    if status != "ok" and (values["hd95_mm"], values["assd_mm"]) != (None, None):
        raise ValueError(f"{name}: status {status} has no distances, got {values}.")
    if status in ("missed", "false_positive") and values["dice"] != 0:
        raise ValueError(f"{name}: status {status} means dice 0, got {values['dice']}.")
    if status == "true_negative" and values["dice"] is not None:
        raise ValueError(f"{name}: status true_negative has no dice, got {values['dice']}.")
    if status in FAILURES and not (_finite(row, "diagonal_mm") or 0) > 0:
        raise ValueError(f"{name}: status {status} needs a positive diagonal_mm, its worst value.")


def defined_value(row: Row, metric: str) -> float | None:
    """The value of a checked row where the metric is defined, else None; see ``filled_value`` for averages."""
    return _mean(None if each["status"] == "error" else each[metric] for each in seed_rows(row))


def filled_value(row: Row, metric: str) -> float | None:
    """The value of a checked row, where a failure counts as Dice 0 and as the image diagonal in mm.

    None for a true_negative, which has neither Dice nor distances. The value of an average over seeds is the mean of
    the seeds that have one.
    """
    return _mean(_worst_value(each, metric) if each["status"] in FAILURES else each[metric] for each in seed_rows(row))


def _worst_value(row: Row, metric: str) -> float:
    return 0.0 if metric == "dice" else float(row["diagonal_mm"])


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
