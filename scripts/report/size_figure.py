# SPDX-License-Identifier: Apache-2.0
"""The picture with which a report of several networks opens: Dice against the number of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.report.curves import CurveFigure, png_uri
from scripts.report.slice_figure import literal_text

_MARKERS = "osD^vP*X<>"
_TITLE = "Dice by parameters"


def size_figures(runs: Sequence[Mapping[str, Any]]) -> list[CurveFigure]:
    """Draw the mean Dice of each network, with its interval, against its parameters.

    A failure counts as Dice 0. Networks without parameters or Dice are left out.

    Args:
        runs: per network ``name``, ``parameters`` and ``aggregate``.

    Returns:
        One picture; none for fewer than two networks.
    """
    points = []
    for run in runs:
        dice = run["aggregate"]["metrics"]["dice"]["worst_filled"]
        if run.get("parameters") and dice["mean"] is not None:
            points.append((str(run["name"]), run["parameters"] / 1e6, dice["mean"], dice["ci95"]))
    if len(points) < 2:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot(xlabel="parameters (millions)", ylabel="Dice")
    for i, (name, millions, mean, interval) in enumerate(points):
        spread = 1.02 ** (i % 3 - 1)  # so that the intervals of networks of one size stand side by side
        if interval:
            axes.plot([millions * spread] * 2, interval, color="0.4", linewidth=1)
        marker = _MARKERS[i % len(_MARKERS)]
        fill = "white" if i % 2 else "black"
        axes.plot(
            millions * spread, mean, marker, color="black", markerfacecolor=fill, markersize=7, label=literal_text(name)
        )
    axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    values = ", ".join(f"{name} {millions:.2f} M {mean:.3f}" for name, millions, mean, _ in points)
    return [CurveFigure(_TITLE, f"{_TITLE}, mean and 95% interval: {values}", png_uri(figure))]
