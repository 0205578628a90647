# SPDX-License-Identifier: Apache-2.0
"""Summaries of evaluations as one Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.metrics.aggregates import case_count, paired_difference
from scripts.metrics.case_rows import FAILURES
from scripts.report.tables import bootstrap_settings, seeds_text
from scripts.utils.markdown import interval_text, markdown_table

_HEAD = ("network", "Dice", "HD95 mm", "ASSD mm", "failures", "parameters", "GFLOPs", "s per case")
_DIGITS = {"dice": 3, "hd95_mm": 1, "assd_mm": 1}


def markdown_summary(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Summaries as a Markdown table, one row per network.

    A metric is shown as mean [95% interval] (number of cases) over the cases where it is defined. Where there are
    failures the mean with failures at their worst value follows, since a network that misses cases can look better
    without them. Where a network was trained on some of the cases its name says so, and a row of the others follows.
    Where there are several regions, the first row is over all of them, and a row for each follows. Networks that were
    trained with several seeds get a column with the mean Dice per seed, see ``group_seeds``.

    Args:
        summaries: contents of ``summary.json`` files.
    """
    rows: list[list[Any]] = []
    for summary in summaries:
        parameters = None if summary["parameters"] is None else f"{summary['parameters'] / 1e6:.2f} M"
        costs = [None if summary[key] is None else f"{summary[key]:.1f}" for key in ("gflops", "seconds_per_case")]
        training = summary.get("trained_on") or {}
        cases, unseen = training.get("cases"), training.get("unseen_aggregate")
        name = summary["name"]
        regions = summary.get("regions") or {}
        if cases:
            total = case_count(summary["aggregate"], len(regions))
            name = f"{name} (trained on {len(cases)} of {total} cases)"
        seeds = seeds_text(summary) or None
        rows.append([name, *_metric_cells(summary["aggregate"]), parameters, *costs, seeds])
        if len(regions) > 1:
            rows += [[f"{summary['name']}: {region}", *_metric_cells(each)] for region, each in regions.items()]
        if unseen:
            name = f"{summary['name']}, {case_count(unseen, len(regions))} unseen cases"
            rows.append([name, *_metric_cells(unseen), parameters, *costs])
    head = (*_HEAD, "Dice per seed") if any(map(seeds_text, summaries)) else _HEAD
    return markdown_table(head, [[*row, *[None] * len(head)][: len(head)] for row in rows])


def markdown_differences(runs: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> str:
    """The difference in Dice of every other network to one, as a Markdown table.

    It is the mean over the common cases [95% interval over patients], with failures as Dice 0.

    Args:
        runs: summaries, each with its case table as ``rows``.
        baseline: one of them.
    """
    rows = []
    for run in runs:
        if run is not baseline:
            difference = paired_difference(run["rows"], baseline["rows"], "dice", **bootstrap_settings(run))
            rows.append((run["name"], interval_text(difference, 3, "+"), difference["n_cases"]))
    return markdown_table(("network", f"Dice - that of {baseline['name']}", "cases"), rows)


def _metric_cells(aggregate: Mapping[str, Any]) -> list[Any]:
    counts, metrics = aggregate["counts"], aggregate["metrics"]
    failures = sum(counts[status] for status in FAILURES)
    cells = [_metric(metrics[name], digits, failures) for name, digits in _DIGITS.items()]
    return [*cells, f"{failures} of {aggregate['counted']}" if "counted" in aggregate else failures]


def _metric(metric: Mapping[str, Any], digits: int, failures: int) -> str:
    summary, worst = metric["defined"], metric["worst_filled"]["mean"]
    with_failures = f"; {worst:.{digits}f} with failures" if failures and worst is not None else ""
    if summary["mean"] is None:
        return f"undefined (0){with_failures}"
    return f"{interval_text(summary, digits)} ({summary['n']}){with_failures}"
