# SPDX-License-Identifier: Apache-2.0
"""Evaluations of one network trained with several seeds, as one: each case has the mean over the seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.evaluation.training_cases import NO, UNKNOWN, YES, training_summary
from scripts.metrics import METRICS, Row, aggregate, aggregate_regions, filled_value
from scripts.metrics.case_rows import row_key
from scripts.report.tables import network_name

Run = dict[str, Any]
NAMES_SHOWN = 5  # cases that a sentence names
_FAILED = {"error": "not scored", "missed": "missed", "false_positive": "false positive"}
_WORST_FIRST = (*_FAILED, "ok", "true_negative")


def mean_over_seeds(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Average the rows of several seeds, case by case and region by region.

    A failure counts as Dice 0 and as the image's diagonal in mm. A seed whose reference and mask are both empty has
    neither, and is left out.

    Args:
        runs: one sequence of rows per seed, all of the same cases.

    Returns:
        One row per case and region, with those of the seeds in ``seeds``. Its status is the worst of them, and
        ``findings`` counts the failures. It was trained on if any seed was.

    Raises:
        ValueError: a case or region is in some of the runs only.
    """
    counts = Counter(row_key(row) for rows in runs for row in rows)
    absent = sorted({" ".join(key) for key, count in counts.items() if count != len(runs)})
    if absent:
        raise ValueError(
            f"Seeds are averaged over the same cases only. Missing or repeated in one of the {len(runs)} evaluations, "
            f"by case and region: {', '.join(absent[:NAMES_SHOWN])}{' and more' if len(absent) > NAMES_SHOWN else ''}. "
            "Give evaluations of other cases another --name."
        )
    by_key: dict[tuple[str, str], list[Row]] = {}
    for rows in runs:
        for row in rows:
            by_key.setdefault(row_key(row), []).append(row)
    return [_mean_row(rows) for rows in by_key.values()]


def _mean_row(rows: Sequence[Row]) -> Row:
    row: Row = {**rows[0], "seeds": [*rows]}
    row |= {metric: filled_value(row, metric) for metric in METRICS}
    volumes = [each["volume_ml"] for each in rows if each.get("volume_ml") is not None]
    row["volume_ml"] = statistics.fmean(volumes) if volumes else None
    counts = Counter(each["status"] for each in rows)
    row["status"] = next(status for status in _WORST_FIRST if counts[status])
    failures = [f"{_FAILED[status]} in {counts[status]} of {len(rows)} seeds" for status in _FAILED if counts[status]]
    findings = [text for each in rows if (text := each.get("findings"))]
    row["findings"] = "; ".join(dict.fromkeys([*failures, *findings]))
    answers = {each.get("trained_on") for each in rows}
    row["trained_on"] = YES if YES in answers else NO if answers == {NO} else UNKNOWN
    return row


def group_seeds(runs: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Replace evaluations of one name by their mean over the seeds, in the order of the names.

    Args:
        runs: summaries of evaluations, each with its case table as ``rows``.

    Returns:
        The runs; a mean has ``seed_dice``, the mean Dice of each seed with failures as 0, and its name says how many
        these are; ``drawn`` is the run of the first seed.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(str(run["name"]), []).append(run)
    return [dict(same[0]) if len(same) == 1 else _mean(same) for same in by_name.values()]


def _mean(runs: Sequence[Mapping[str, Any]]) -> Run:
    rows = mean_over_seeds([run["rows"] for run in runs])
    seed = int(runs[0]["aggregate"]["bootstrap"]["seed"])
    seconds = [run["seconds_per_case"] for run in runs if run.get("seconds_per_case") is not None]
    return {
        **runs[0],
        "name": _name(runs[0], f"{len(runs)} seeds"),
        "drawn": {**runs[0], "name": _name(runs[0], f"the first of {len(runs)} seeds")},
        "seed_dice": [run["aggregate"]["metrics"]["dice"]["worst_filled"]["mean"] for run in runs],
        "rows": rows,
        "aggregate": aggregate(rows, seed=seed),
        "regions": aggregate_regions(rows, seed=seed),
        "trained_on": training_summary(rows, seed),
        **{key: _united(key, runs) for key in ("missing", "unreadable")},
        "seconds_per_case": statistics.fmean(seconds) if seconds else None,
    }


def _name(run: Mapping[str, Any], what: str) -> str:
    """A run's name with an addition, before the modalities that ``evaluate --present`` appends."""
    network = network_name(run)
    return f"{network} ({what}){str(run['name']).removeprefix(network)}"


def _united(key: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names in a list of any summary."""
    return sorted({name for run in runs for name in run.get(key, ())})
