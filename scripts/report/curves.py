# SPDX-License-Identifier: Apache-2.0
"""Learning curves: read the CSV file of a training, draw the curves of several trainings."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.report.slice_figure import literal_text

# Okabe and Ito's palette, which every common colour blindness can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", ":")

Row = dict[str, float | int | None]
Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]


class CurveFigure(NamedTuple):
    """A picture of the page; ``image`` is a data URI."""

    title: str
    alt: str
    image: str


def curve_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each file of curves: that of its folder, or its path as far as it tells files of one name apart."""
    folders = [Path(path).absolute().parent for path in paths]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(Path(path).parent) if names.count(n) > 1 else n for path, n in zip(paths, names, strict=True)]
    return {path if names.count(name) > 1 else name: path for path, name in zip(paths, names, strict=True)}


def read_curves(path: str | Path) -> list[Row]:
    """Read a ``curves.csv``: one row per epoch; an empty cell is None.

    Raises:
        ValueError: the file is no such table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{key: float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(file)]
        return [{**row, "epoch": int(row["epoch"] or 0)} for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} holds no learning curves. Name the curves.csv of a training.") from None


def curve_figures(curves: Mapping[str, Rows]) -> list[CurveFigure]:
    """Draw training loss and validation Dice of all runs, then the loss terms and the regions of runs with several.

    Args:
        curves: run name -> rows with ``epoch``, ``loss``, ``loss/<term>``, ``val_dice`` and ``val_dice/<region>``.
            Missing values, None, NaN and infinity are left out.
    """
    quantities = {"Training loss": "loss", "Validation Dice": "val_dice"}
    panels = {title: {run: _points(rows, key) for run, rows in curves.items()} for title, key in quantities.items()}
    for run, rows in curves.items():
        for title, start in {"Loss terms": "loss/", "Validation Dice": "val_dice/"}.items():
            names = list(dict.fromkeys(key for row in rows for key in row if key.startswith(start)))
            if len(names) > 1:
                panels[f"{title} of {run}"] = {name.removeprefix(start): _points(rows, name) for name in names}
    drawable = {title: {name: points for name, points in lines.items() if points} for title, lines in panels.items()}
    return [_curve_figure(title, lines) for title, lines in drawable.items() if lines]


def _points(rows: Rows, key: str) -> Points:
    return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def _curve_figure(title: str, lines: Mapping[str, Points]) -> CurveFigure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=literal_text(title.split(" of ")[0]))
    for i, (name, points) in enumerate(lines.items()):
        style, colour = _LINE_STYLES[i // len(_COLOURS) % len(_LINE_STYLES)], _COLOURS[i % len(_COLOURS)]
        axes.plot(*np.transpose(points), style, color=colour, marker=".", label=literal_text(name))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    last_values = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in lines.items())
    return CurveFigure(title, f"{title} by epoch; last values: {last_values}", png_uri(figure))


def png_uri(figure: Any) -> str:
    """A matplotlib figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
