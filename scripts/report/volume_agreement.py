# SPDX-License-Identifier: Apache-2.0
"""Predicted against reference volume: a scatter and a Bland-Altman plot, as shapes for ``templates/agreement.html``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scripts.metrics.case_rows import FOREGROUND, Row, region_of
from scripts.utils.colours import region_colour

Values = NDArray[np.floating]

WIDTH, HEIGHT = 400, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 46  # margins
_SMALLEST_ML = 1e-3  # length of an axis


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


def bland_altman(predicted: ArrayLike, reference: ArrayLike) -> tuple[float, float | None]:
    """The mean of predicted minus reference, and 1.96 standard deviations of it; None for fewer than two cases."""
    difference = np.subtract(predicted, reference)
    return float(difference.mean()), float(1.96 * difference.std(ddof=1)) if difference.size > 1 else None


def _agreement(name: str, rows: Sequence[Row]) -> Agreement | None:
    rows = [row for row in rows if row.get("volume_ml") is not None and row.get("reference_volume_ml") is not None]
    if not rows:
        return None
    regions = list(dict.fromkeys(region_of(row) for row in rows))
    predicted = np.array([row["volume_ml"] for row in rows], dtype=float)
    reference = np.array([row["reference_volume_ml"] for row in rows], dtype=float)
    bias, spread = bland_altman(predicted, reference)
    text = f"Predicted minus reference volume: mean {bias:,.2f} ml"
    text += f", 95% limits of agreement {bias - spread:,.2f} to {bias + spread:,.2f} ml" if spread is not None else ""
    text += f" ({len(rows)} {'volumes' if len(rows) > 1 else 'volume'})."
    colours = [region_colour(i) for i in range(len(regions))] if len(regions) > 1 else [""]
    marks = [_mark(row, colours[regions.index(region_of(row))]) for row in rows]
    plots = [_scatter(predicted, reference, marks, text), _differences(predicted, reference, marks, text)]
    return Agreement(name, text, plots, list(zip(regions, colours, strict=True)) if len(regions) > 1 else [])


def _mark(row: Row, colour: str) -> Mark:
    """A case, not yet in its place."""
    region = "" if region_of(row) == FOREGROUND else f" {region_of(row)}"
    title = f"{row['case_id']}{region}: predicted {row['volume_ml']:,.2f} ml"
    return Mark(0, 0, str(row["case_id"]), f"{title}, reference {row['reference_volume_ml']:,.2f} ml", colour)


def _scatter(predicted: Values, reference: Values, marks: Sequence[Mark], text: str) -> Plot:
    top = max(float(predicted.max()), float(reference.max()), _SMALLEST_ML)
    place = _Place((0, top), (0, top))
    return place.plot(
        "Predicted against reference volume",
        text,
        ("reference volume, ml", "predicted volume, ml"),
        [place.line((0, 0), (top, top), "equal", "equal")],
        [place.mark(mark, x, y) for mark, x, y in zip(marks, reference, predicted, strict=True)],
    )


def _differences(predicted: Values, reference: Values, marks: Sequence[Mark], text: str) -> Plot:
    means, differences = (predicted + reference) / 2, predicted - reference
    bias, spread = bland_altman(predicted, reference)
    levels = [(0.0, "zero", ""), (bias, "mean", "mean")]
    levels += [] if spread is None else [(bias + sign * spread, "limit", "95% limit") for sign in (1, -1)]
    heights = [*differences, *(y for y, *_ in levels)]
    low, high, right = min(heights), max(heights), max(float(means.max()), _SMALLEST_ML)
    place = _Place((0, right), (low, max(high, low + _SMALLEST_ML)))
    return place.plot(
        "Difference by volume (Bland-Altman)",
        text,
        ("mean of both volumes, ml", "predicted - reference, ml"),
        [place.line((0, y), (right, y), css_class, label) for y, css_class, label in levels],
        [place.mark(mark, x, y) for mark, x, y in zip(marks, means, differences, strict=True)],
    )


class _Place:
    """From values to places in the picture.

    Args:
        x_range: values that the picture holds from left to right.
        y_range: values from bottom to top.
    """

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_ticks, self.y_ticks = _ticks(*x_range), _ticks(*y_range)

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, start: tuple[float, float], end: tuple[float, float], css_class: str, label: str) -> Line:
        return Line(self.x(start[0]), self.y(start[1]), self.x(end[0]), self.y(end[1]), css_class, label)

    def mark(self, mark: Mark, x: float, y: float) -> Mark:
        return replace(mark, x=self.x(x), y=self.y(y))

    def plot(self, title: str, alt: str, labels: tuple[str, str], lines: Sequence[Line], marks: Sequence[Mark]) -> Plot:
        x_ticks = [Tick(self.x(value), f"{value:,g}") for value in self.x_ticks]
        y_ticks = [Tick(self.y(value), f"{value:,g}") for value in self.y_ticks]
        return Plot(title, alt, *labels, x_ticks, y_ticks, lines, marks)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below ``low`` to above ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * n, 10) for n in range(first, last + 1)]
