# SPDX-License-Identifier: Apache-2.0
"""Evaluations of one network trained with several seeds, as one: each case has the mean over the seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.evaluation.training_cases import NO, UNKNOWN, YES, training_summary
from scripts.metrics import METRICS, Row, aggregate, aggregate_regions, filled_value
from scripts.metrics.case_rows import region_of, row_key
from scripts.report.tables import network_name

Run = dict[str, Any]
NAMES_SHOWN = 5  # cases that a sentence names


def mean_over_seeds(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Average the rows of several seeds, case by case and region by region.

    A failure counts as Dice 0 and as the image's diagonal in mm. A seed whose reference and mask are both empty has
    neither, and is left out.

    Args:
        runs: one sequence of rows per seed, all of the same cases.

    Returns:
        One row per case and region; its status is ``true_negative`` where no seed has a value, else ``ok``. It was
        trained on if any seed was.

    Raises:
        ValueError: a case or region is in some of the runs only.
    """
    counts = Counter(row_key(row) for rows in runs for row in rows)
    absent = sorted({" ".join(key) for key, count in counts.items() if count != len(runs)})
    if absent:
        raise ValueError(
            f"These cases are not in each of the {len(runs)} evaluations once: {', '.join(absent[:NAMES_SHOWN])}"
            f"{' and more' if len(absent) > NAMES_SHOWN else ''}. Seeds are averaged over the same cases only: give "
            "evaluations of other cases another --name."
        )
    by_key: dict[tuple[str, str], list[Row]] = {}
    for rows in runs:
        for row in rows:
            by_key.setdefault(row_key(row), []).append(row)
    merged = []
    for rows in by_key.values():
        row = dict(rows[0])
        for metric in METRICS:
            values = [value for each in rows if (value := filled_value(each, metric)) is not None]
            row[metric] = statistics.fmean(values) if values else None
        volumes = [each["volume_ml"] for each in rows if each.get("volume_ml") is not None]
        row["volume_ml"] = statistics.fmean(volumes) if volumes else None
        row["status"] = "true_negative" if row["dice"] is None else "ok"
        row["findings"] = "; ".join(dict.fromkeys(text for each in rows if (text := each.get("findings"))))
        answers = {each.get("trained_on") for each in rows}
        row["trained_on"] = YES if YES in answers else NO if answers == {NO} else UNKNOWN
        merged.append(row)
    return merged


def group_seeds(runs: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Replace evaluations of one name by their mean over the seeds, in the order of the names.

    Args:
        runs: summaries of evaluations, each with its case table as ``rows``.

    Returns:
        The runs; a mean has ``seed_dice``, the mean Dice of each seed with failures as 0, and its name says how many
        these are; ``drawn`` is the run of the first seed. Its aggregates count the statuses of all seeds, of
        ``counted`` rows.
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
        "aggregate": _with_counts(aggregate(rows, seed=seed), [run["rows"] for run in runs]),
        "regions": {
            region: _with_counts(mean, [[row for row in run["rows"] if region_of(row) == region] for run in runs])
            for region, mean in aggregate_regions(rows, seed=seed).items()
        },
        "trained_on": training_summary(rows, seed),
        **{key: _united(key, runs) for key in ("missing", "unreadable")},
        "seconds_per_case": statistics.fmean(seconds) if seconds else None,
    }


def _name(run: Mapping[str, Any], what: str) -> str:
    """A run's name with an addition, before the modalities that ``evaluate --present`` appends."""
    network = network_name(run)
    return f"{network} ({what}){str(run['name']).removeprefix(network)}"


def _with_counts(mean: dict[str, Any], runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """The aggregate of the mean rows, with the counts by status of all runs: a mean hides the failures of one seed."""
    counts = Counter(row["status"] for rows in runs for row in rows)
    return {**mean, "counts": {status: counts[status] for status in mean["counts"]}, "counted": sum(map(len, runs))}


def _united(key: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names in a list of any summary."""
    return sorted({name for run in runs for name in run.get(key, ())})
