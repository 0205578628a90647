# SPDX-License-Identifier: Apache-2.0
"""Summaries of evaluations as one Markdown table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.metrics.aggregate import FAILURES


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The summaries as a Markdown table: mean [95% interval] and n of every metric, and the mean with failures."""
    head = ["network", "Dice", "HD95 mm", "ASSD mm", "failures", "parameters", "GFLOPs", "s per case"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for each in summaries:
        measured = each["aggregate"]["metrics"]
        counts = each["aggregate"]["counts"]
        failures = sum(counts[status] for status in FAILURES)
        metrics = [_cell(measured[m], d, failures) for m, d in (("dice", 3), ("hd95_mm", 1), ("assd_mm", 1))]
        parameters = "" if each["parameters"] is None else f"{each['parameters'] / 1e6:.2f} M"
        cost = ["" if each[k] is None else f"{each[k]:.1f}" for k in ("gflops", "seconds_per_case")]
        lines.append("| " + " | ".join([_escaped(each["name"]), *metrics, str(failures), parameters, *cost]) + " |")
    return "\n".join(lines)


def _escaped(name: str) -> str:
    """A name as one cell of a Markdown table, without markup of its own."""
    return re.sub(r"([\\|<])", r"\\\1", " ".join(name.split()))


def _cell(metric: Mapping[str, Any], digits: int, failures: int) -> str:
    """Where it is defined; a network that misses cases can look better there, so with failures at their worst, too."""
    summary, worst = metric["defined"], metric["worst_filled"]["mean"]
    filled = f"; {worst:.{digits}f} with failures" if failures and worst is not None else ""
    if summary["mean"] is None:
        return f"undefined (0){filled}"
    interval = "" if summary["ci95"] is None else " [" + ", ".join(f"{x:.{digits}f}" for x in summary["ci95"]) + "]"
    return f"{summary['mean']:.{digits}f}{interval} ({summary['n']}){filled}"
