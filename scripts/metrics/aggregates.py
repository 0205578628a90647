# SPDX-License-Identifier: Apache-2.0
"""Aggregate a case table over a cohort: counts, and means with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scripts.metrics.case_rows import (
    METRICS,
    STATUSES,
    Row,
    checked_rows,
    defined_value,
    filled_value,
    patient_of,
    region_of,
    row_key,
    seed_rows,
)
from scripts.metrics.surface import ASSD_DEFINITION, DICE_DEFINITION, HD95_DEFINITION

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

    A case with several regions has a row for each, and every row counts alike.

    Args:
        rows: dicts with ``case_id, dice, hd95_mm, assd_mm, status, diagonal_mm`` and optionally ``patient_id`` (by
            default each case is its own patient) and ``region``; distances and diagonal in mm, ``None`` where
            undefined. The mean over several seeds has the row of each in ``seeds``: the statuses of all are counted,
            and ``counted`` is their number.
        seed: seed of the bootstrap; the order of the rows does not matter.
        resamples: number of bootstrap samples.
        level: coverage of the intervals; their key is ``ci95`` for every level.

    Returns:
        ``{"n", "n_patients", "counts", "metrics": {metric: {"defined": S, "worst_filled": S}}, "bootstrap",
        "definitions"}`` with ``S = {"n", "n_patients", "mean", "median", "std", "ci95"}``. All values can be
        written as JSON; ``None`` is undefined (``ci95`` with fewer than 2 patients, ``std`` with fewer than 2 cases).

    Raises:
        ValueError: an unknown status, two rows of one case and region, a value that its status does not allow, a
            non-finite value, or a failure without ``diagonal_mm``. The message names the case.
    """
    bootstrap = _bootstrap(seed, resamples, level)
    cases = checked_rows(rows)
    statuses = [each["status"] for row in cases for each in seed_rows(row)]
    counts = Counter(statuses)
    metrics = {}
    for metric in METRICS:
        defined = [(patient_of(row), defined_value(row, metric)) for row in cases]
        filled = [(patient_of(row), filled_value(row, metric)) for row in cases]
        metrics[metric] = {
            "defined": _summary(defined, seed, resamples, level),
            "worst_filled": _summary(filled, seed, resamples, level),
        }
    return {
        "n": len(cases),
        "n_patients": len({patient_of(row) for row in cases}),
        "counts": {status: counts[status] for status in STATUSES},
        **({"counted": len(statuses)} if len(statuses) != len(cases) else {}),
        "metrics": metrics,
        "bootstrap": bootstrap,
        "definitions": {**_DEFINITIONS, "ci95": _interval_definition(bootstrap)},
    }


def aggregate_regions(
    rows: Sequence[Row], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> dict[str, dict[str, Any]]:
    """``aggregate`` of each region's rows, in the order in which the rows name them; arguments as there."""
    by_region: dict[str, list[Row]] = {}
    for row in rows:
        by_region.setdefault(region_of(row), []).append(row)
    return {region: aggregate(own, seed, resamples, level) for region, own in by_region.items()}


def case_count(summary: Mapping[str, Any], regions: int = 1) -> int:
    """The number of cases in an aggregate, which counts each of them once for each of its regions."""
    return int(summary["n"]) // max(1, regions)


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

    Rows are paired by case and region. With ``worst_filled`` (the default) a failure counts with its worst value.
    Without it a pair counts only where both values are defined, which ignores failures. A pair with a true_negative
    never has a difference; ``n_undefined`` is the number of pairs without a difference.

    Returns:
        ``{"metric", "n", "n_patients", "mean", "ci95", "n_cases", "worst_filled", "n_undefined", "n_unpaired",
        "bootstrap"}``; ``n_cases`` counts a case once, however many of its regions have a difference.

    Raises:
        ValueError: as `aggregate`; also an unknown metric, or a case with two different patients.
    """
    bootstrap = _bootstrap(seed, resamples, level)
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}, expected one of {METRICS}.")
    a, b = ({row_key(row): row for row in checked_rows(rows)} for rows in (rows_a, rows_b))
    value_of = filled_value if worst_filled else defined_value
    pairs: list[tuple[str, float | None]] = []
    compared = set()
    for key in sorted(a.keys() & b.keys()):
        patient, other = patient_of(a[key]), patient_of(b[key])
        if patient != other:
            raise ValueError(f"case {key[0]!r} belongs to patient {patient!r} and to patient {other!r}.")
        left, right = (value_of(rows[key], metric) for rows in (a, b))
        pairs.append((patient, None if left is None or right is None else left - right))
        compared |= {key[0]} if pairs[-1][1] is not None else set()
    summary = _summary(pairs, seed, resamples, level)
    return {
        "metric": metric,
        **{key: summary[key] for key in ("n", "n_patients", "mean", "ci95")},
        "n_cases": len(compared),
        "worst_filled": worst_filled,
        "n_undefined": len(pairs) - summary["n"],
        "n_unpaired": len(a.keys() ^ b.keys()),
        "bootstrap": bootstrap,
    }


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
