# SPDX-License-Identifier: Apache-2.0
"""Learning curves as pictures."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .overlay import plain

# Okabe and Ito's palette: told apart with every common colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Rows = Sequence[Mapping[str, Any]]


def curve_figures(curves: Mapping[str, Rows]) -> list[str]:
    """Training loss and validation Dice of all runs, then the loss terms of each run that has several."""
    quantities = {"Training loss": "loss", "Validation Dice": "val_dice"}
    panels = {title: {run: _series(rows, key) for run, rows in curves.items()} for title, key in quantities.items()}
    for run, rows in curves.items():
        terms = list(dict.fromkeys(key for row in rows for key in row if key.startswith("loss/")))
        if len(terms) > 1:
            panels[f"Loss terms of {run}"] = {term.removeprefix("loss/"): _series(rows, term) for term in terms}
    shown = {title: {name: points for name, points in lines.items() if points} for title, lines in panels.items()}
    return ['<div class="grid">', *(_curve_panel(title, lines) for title, lines in shown.items() if lines), "</div>"]


def _series(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def _curve_panel(title: str, lines: Mapping[str, list[tuple[float, float]]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=plain(title.split(" of ")[0]))
    for i, (name, points) in enumerate(lines.items()):
        style = ("-", "--", ":")[i // len(_COLOURS) % 3]
        axes.plot(*np.transpose(points), style, color=_COLOURS[i % len(_COLOURS)], marker=".", label=plain(name))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    last = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in lines.items())
    image = _image(figure, f"{title} by epoch; last values: {last}")
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>"


def _image(figure: Any, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


Row = dict[str, float | int | None]


def read_curves(path: str | Path) -> list[Row]:
    """Rows of a curves file; an empty cell is None."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"] or 0)} for row in rows]
