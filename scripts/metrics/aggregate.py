# SPDX-License-Identifier: Apache-2.0
"""Aggregate a case table over a cohort: counts, means with bootstrap intervals, tables on disk."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.metrics.surface import ASSD_DEFINITION, DICE_DEFINITION, HD95_DEFINITION
from scripts.utils.atomic_files import write_text

Row = dict[str, Any]

METRICS = ("dice", "hd95_mm", "assd_mm")
FAILURES = ("missed", "false_positive", "error")
STATUSES = ("ok", "missed", "false_positive", "true_negative", "error")
_NUMBERS = ("dice", "hd95_mm", "assd_mm", "volume_ml", "reference_volume_ml", "diagonal_mm")
_FIRST_COLUMNS = ("case_id", "patient_id", *_NUMBERS[:5], "status", "diagonal_mm")  # of tables up to version 0.6
_TEXTS = ("findings", "trained_on")
COLUMNS = (*_FIRST_COLUMNS, *_TEXTS)

_DEFINITIONS = {
    "dice": DICE_DEFINITION,
    "hd95_mm": HD95_DEFINITION,
    "assd_mm": ASSD_DEFINITION,
    "defined": (
        "Only cases where the metric is defined. Dice: ok, missed (0) and false_positive (0). Distances: ok only, so a "
        "network that misses cases can look better here: read it together with its n and with worst_filled."
    ),
    "worst_filled": (
        "missed, false_positive and error count as Dice 0 and as the image diagonal in mm for the distances. "
        "Cases with empty reference and empty prediction (true_negative) are left out of both and counted."
    ),
    "std": "Sample standard deviation over cases (n - 1).",
}


def aggregate(rows: Sequence[Row], seed: int = 0, resamples: int = 2000, level: float = 0.95) -> dict[str, Any]:
    """Summarise a cohort: counts by status and, per metric, two means with intervals.

    ``defined`` averages the cases where the metric is defined (Dice: ok, and 0 for missed and false_positive;
    distances: ok). ``worst_filled`` also counts every failure (missed, false_positive, error): Dice 0, and the
    distances at the case's ``diagonal_mm``, so that a network cannot gain by missing cases. A true_negative has neither
    Dice nor distances and is in neither mean. Intervals are percentile bootstraps of the mean over cases. Patients are
    resampled with replacement, each with all of its cases, from the patients that have a case in that mean.

    Args:
        rows: dicts with ``case_id, dice, hd95_mm, assd_mm, status, diagonal_mm`` and optionally ``patient_id`` (by
            default each case is its own patient); distances and diagonal in mm, ``None`` where undefined.
        seed: seed of the bootstrap; the order of the rows does not matter.
        resamples: number of bootstrap samples.
        level: coverage of the intervals; their key is ``ci95`` for every level.

    Returns:
        ``{"n", "n_patients", "counts", "metrics": {metric: {"defined": S, "worst_filled": S}}, "bootstrap",
        "definitions"}`` with ``S = {"n", "n_patients", "mean", "median", "std", "ci95"}``. All values can be
        written as JSON; ``None`` is undefined (``ci95`` with fewer than 2 patients, ``std`` with fewer than 2 cases).

    Raises:
        ValueError: an unknown status, a duplicate case, a value that its status does not allow, a non-finite value, or
            a failure without ``diagonal_mm``. The message names the case.
    """
    bootstrap = _bootstrap(seed, resamples, level)
    cases = checked_rows(rows)
    counts = Counter(row["status"] for row in cases)
    metrics = {}
    for metric in METRICS:
        defined = [(_patient(row), _defined(row, metric)) for row in cases]
        filled = [(_patient(row), filled_value(row, metric)) for row in cases]
        metrics[metric] = {
            "defined": _summary(defined, seed, resamples, level),
            "worst_filled": _summary(filled, seed, resamples, level),
        }
    return {
        "n": len(cases),
        "n_patients": len({_patient(row) for row in cases}),
        "counts": {status: counts[status] for status in STATUSES},
        "metrics": metrics,
        "bootstrap": bootstrap,
        "definitions": {**_DEFINITIONS, "ci95": _interval_definition(bootstrap)},
    }


def paired_difference(
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    metric: str,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    worst_filled: bool = True,
) -> dict[str, Any]:
    """Mean over cases of ``a - b`` for one metric, with a bootstrap interval over the common patients.

    Cases are paired by ``case_id``. With ``worst_filled`` (the default) a failure counts with its worst value. Without
    it a pair counts only where both values are defined, which ignores failures. A pair with a true_negative never has a
    difference; ``n_undefined`` is the number of pairs without a difference.

    Returns:
        ``{"metric", "n", "n_patients", "mean", "ci95", "worst_filled", "n_undefined", "n_unpaired", "bootstrap"}``.

    Raises:
        ValueError: as `aggregate`; also an unknown metric, or a case with two different patients.
    """
    bootstrap = _bootstrap(seed, resamples, level)
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}, expected one of {METRICS}.")
    a, b = ({str(row["case_id"]): row for row in checked_rows(rows)} for rows in (rows_a, rows_b))
    pairs: list[tuple[str, float | None]] = []
    for case in sorted(a.keys() & b.keys()):
        patient = _patient(a[case])
        if patient != _patient(b[case]):
            raise ValueError(f"case {case!r} belongs to patient {patient!r} and to patient {_patient(b[case])!r}.")
        left, right = (filled_value(x[case], metric) if worst_filled else _defined(x[case], metric) for x in (a, b))
        pairs.append((patient, None if left is None or right is None else left - right))
    summary = _summary(pairs, seed, resamples, level)
    return {
        "metric": metric,
        **{key: summary[key] for key in ("n", "n_patients", "mean", "ci95")},
        "worst_filled": worst_filled,
        "n_undefined": len(pairs) - summary["n"],
        "n_unpaired": len(a.keys() ^ b.keys()),
        "bootstrap": bootstrap,
    }


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
            raise ValueError(f"case {row.get('case_id')!r}: unknown columns {unknown}, expected some of {COLUMNS}.")
        numbers = {name: _finite(row, name) for name in _NUMBERS}
        texts = {name: row.get(name, "") for name in ("case_id", "status", *_TEXTS)}
        writer.writerow({**texts, "patient_id": _patient(row), **numbers})
    write_text(buffer.getvalue(), path)


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of `write_rows`: numbers as float, or ``None`` for an empty cell; all other columns as text.

    Tables of versions up to 0.6 lack the last two columns, which are empty then.

    Raises:
        ValueError: the columns are not `COLUMNS`, a row has too few or too many cells, or a number is not finite.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        if columns not in (COLUMNS, _FIRST_COLUMNS):
            raise ValueError(f"{path}: columns {reader.fieldnames}, expected {list(COLUMNS)}.")
        rows: list[Row] = [dict(row) for row in reader]
    for line, row in enumerate(rows, start=2):
        if len(row) != len(columns) or None in row.values():
            raise ValueError(f"{path}: row {line} does not have {len(columns)} cells. The file may be truncated.")
        row.update(dict.fromkeys(_TEXTS, "") | row)
        row.update({name: _finite({**row, name: row[name] or None}, name) for name in _NUMBERS})
    return rows


def _patient(row: Row) -> str:
    patient = row.get("patient_id")
    return str(row["case_id"] if patient in (None, "") else patient)


def _finite(row: Row, name: str) -> float | None:
    if row.get(name) is None:
        return None
    value = float(row[name])
    if not math.isfinite(value):
        raise ValueError(f"case {row.get('case_id')!r}: {name} is {value}. Use None where it is undefined.")
    return value


def checked_rows(rows: Sequence[Row]) -> list[Row]:
    """Check that the values of every row agree with its status; return the rows sorted by case.

    Raises:
        ValueError: see ``aggregate``.
    """
    seen: set[str] = set()
    for row in rows:
        case, status = str(row["case_id"]), row["status"]
        if case in seen:
            raise ValueError(f"case {case!r} is listed twice.")
        seen.add(case)
        if status not in STATUSES:
            raise ValueError(f"case {case!r}: unknown status {status!r}, expected one of {STATUSES}.")
        values = {name: _finite(row, name) for name in METRICS}
        if status == "ok" and None in values.values():
            raise ValueError(f"case {case!r}: status ok needs dice, hd95_mm and assd_mm, got {values}.")
        if status != "ok" and (values["hd95_mm"], values["assd_mm"]) != (None, None):
            raise ValueError(f"case {case!r}: status {status} has no distances, got {values}.")
        if status in ("missed", "false_positive") and values["dice"] != 0:
            raise ValueError(f"case {case!r}: status {status} means dice 0, got {values['dice']}.")
        if status == "true_negative" and values["dice"] is not None:
            raise ValueError(f"case {case!r}: status true_negative has no dice, got {values['dice']}.")
        if status in FAILURES and not (_finite(row, "diagonal_mm") or 0) > 0:
            raise ValueError(f"case {case!r}: status {status} needs a positive diagonal_mm, its worst value.")
    return sorted(rows, key=lambda row: str(row["case_id"]))


def _defined(row: Row, metric: str) -> float | None:
    return None if row["status"] == "error" else row[metric]


def filled_value(row: Row, metric: str) -> float | None:
    """The value of a checked row, where a failure counts as Dice 0 and as the image diagonal in mm.

    None for a true_negative, which has neither Dice nor distances.
    """
    if row["status"] in FAILURES:
        return 0.0 if metric == "dice" else float(row["diagonal_mm"])
    return _defined(row, metric)


def _bootstrap(seed: int, resamples: int, level: float) -> dict[str, Any]:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be positive and level between 0 and 1, got {resamples} and {level}.")
    return {"unit": "patient", "method": "percentile", "seed": seed, "resamples": resamples, "level": level}


def _interval_definition(bootstrap: dict[str, Any]) -> str:
    return (
        f"{100 * bootstrap['level']:g}% percentile bootstrap interval of the mean over cases: {bootstrap['resamples']} "
        f"resamples of the patients with replacement, all cases of a patient together, seed {bootstrap['seed']}."
    )


def _summary(pairs: Sequence[tuple[str, float | None]], seed: int, resamples: int, level: float) -> dict[str, Any]:
    """Statistics of ``(patient, value)`` pairs; ``None`` values are left out."""
    defined = [(patient, float(value)) for patient, value in pairs if value is not None]
    values = np.array([value for _, value in defined])
    patients = sorted({patient for patient, _ in defined})
    return {
        "n": len(defined),
        "n_patients": len(patients),
        "mean": float(values.mean()) if defined else None,
        "median": float(np.median(values)) if defined else None,
        "std": float(values.std(ddof=1)) if len(defined) > 1 else None,
        "ci95": _interval(defined, patients, seed, resamples, level) if len(patients) > 1 else None,
    }


def _interval(
    pairs: Sequence[tuple[str, float]], patients: Sequence[str], seed: int, resamples: int, level: float
) -> list[float]:
    """Percentile bootstrap interval of the mean over cases, resampling patients with replacement."""
    index = {patient: i for i, patient in enumerate(patients)}
    owner = np.array([index[patient] for patient, _ in pairs])
    sums = np.bincount(owner, weights=[value for _, value in pairs])
    sizes = np.bincount(owner)
    # How often each patient is drawn in each resample. This equals drawing ids, but needs one matrix product only.
    draws = np.random.default_rng(seed).multinomial(len(patients), [1 / len(patients)] * len(patients), size=resamples)
    means = (draws @ sums) / (draws @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
