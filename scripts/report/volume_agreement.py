# SPDX-License-Identifier: Apache-2.0
"""Predicted against reference volume: a scatter plot and a Bland-Altman plot, as shapes for ``templates/agreement.html``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.metrics.case_rows import FOREGROUND, region_of
from scripts.utils.colours import region_colour

WIDTH, HEIGHT = 400, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 46  # margins


@dataclass(frozen=True)
class Tick:
    """A tick: where it is in the picture, and its number."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A case in the picture; ``colour`` tells its region, and is empty where there is one only."""

    x: float
    y: float
    case_id: str
    title: str
    colour: str


@dataclass(frozen=True)
class Line:
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    css_class: str
    label: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture of ``WIDTH`` by ``HEIGHT``."""

    title: str
    alt: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Agreement:
    """The plots of one network, with a sentence on the differences and the names and colours of the regions."""

    name: str
    text: str
    plots: Sequence[Plot]
    regions: Sequence[tuple[str, str]]


def agreements(runs: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """The volume agreement of every network with at least one case that has both volumes.

    Args:
        runs: per network ``name`` and ``rows`` with ``volume_ml`` and ``reference_volume_ml``.
    """
    found = (_agreement(str(run["name"]), run["rows"]) for run in runs)
    return [each for each in found if each]


def bland_altman(predicted: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None]:
    """The mean of predicted minus reference, and 1.96 standard deviations of it; None for fewer than two cases."""
    difference = np.subtract(predicted, reference)
    return float(difference.mean()), float(1.96 * difference.std(ddof=1)) if difference.size > 1 else None


def _agreement(name: str, rows: Sequence[Mapping[str, Any]]) -> Agreement | None:
    rows = [row for row in rows if row.get("volume_ml") is not None and row.get("reference_volume_ml") is not None]
    if not rows:
        return None
    regions = list(dict.fromkeys(region_of(row) for row in rows))
    predicted = [float(row["volume_ml"]) for row in rows]
    reference = [float(row["reference_volume_ml"]) for row in rows]
    bias, spread = bland_altman(predicted, reference)
    text = f"Predicted minus reference volume: mean {bias:,.2f} ml"
    text += f", 95% limits of agreement {bias - spread:,.2f} to {bias + spread:,.2f} ml" if spread is not None else ""
    text += f" ({len(rows)} {'volumes' if len(rows) > 1 else 'volume'})."
    titles = [
        f"{row['case_id']}{'' if region_of(row) == FOREGROUND else ' ' + region_of(row)}: predicted {p:,.2f} ml, "
        f"reference {r:,.2f} ml"
        for row, p, r in zip(rows, predicted, reference, strict=True)
    ]
    colours = [region_colour(regions.index(region_of(row))) if len(regions) > 1 else "" for row in rows]
    cases = [str(row["case_id"]) for row in rows]
    means, differences = np.add(predicted, reference) / 2, np.subtract(predicted, reference)
    top = max(*predicted, *reference, 1e-3)
    scatter = _plot(
        "Predicted against reference volume", f"{name}: {text}", ("reference volume, ml", "predicted volume, ml"),
        (reference, predicted), ((0, top), (0, top)), (cases, titles, colours), [((0, 0), (top, top), "equal", "equal")],
    )  # fmt: skip
    level = [(bias, "mean", "mean")]
    level += [] if spread is None else [(bias + sign * spread, "limit", "95% limit") for sign in (1, -1)]
    low, high = min(0.0, *differences, *(y for y, *_ in level)), max(0.0, *differences, *(y for y, *_ in level))
    right = float(means.max()) or 1e-3
    lines = [((0, 0), (right, 0), "zero", ""), *(((0, y), (right, y), kind, label) for y, kind, label in level)]
    difference = _plot(
        "Difference by volume (Bland-Altman)", f"{name}: {text}", ("mean of both volumes, ml", "predicted - reference, ml"),
        (means, differences), ((0, right), (low, high if high > low else low + 1e-3)), (cases, titles, colours), lines,
    )  # fmt: skip
    names = [(region, region_colour(i)) for i, region in enumerate(regions)] if len(regions) > 1 else []
    return Agreement(name, text, [scatter, difference], names)


def _plot(
    title: str,
    alt: str,
    labels: tuple[str, str],
    values: tuple[Any, Any],
    ranges: tuple[tuple[float, float], tuple[float, float]],
    marks: tuple[Sequence[str], Sequence[str], Sequence[str]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float], str, str]],
) -> Plot:
    x_ticks, y_ticks = (_ticks(*ends) for ends in ranges)
    x_ends, y_ends = (min(x_ticks[0], ranges[0][0]), x_ticks[-1]), (min(y_ticks[0], ranges[1][0]), y_ticks[-1])

    def across(x: float) -> float:
        return round(LEFT + (x - x_ends[0]) / (x_ends[1] - x_ends[0]) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_ends[0]) / (y_ends[1] - y_ends[0]) * (HEIGHT - TOP - BOTTOM), 1)

    return Plot(
        title,
        alt,
        *labels,
        [Tick(across(x), f"{x:,g}") for x in x_ticks],
        [Tick(down(y), f"{y:,g}") for y in y_ticks],
        [Line(across(a[0]), down(a[1]), across(b[0]), down(b[1]), kind, label) for a, b, kind, label in lines],
        [
            Mark(across(x), down(y), case_id, text, colour)
            for x, y, case_id, text, colour in zip(*values, *marks, strict=True)
        ],
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below ``low`` to above ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * n, 10) for n in range(first, last + 1)]
