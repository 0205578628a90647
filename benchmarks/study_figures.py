# SPDX-License-Identifier: Apache-2.0
"""The figures of the study, in black and white: Dice against the cost of the student, and the three hypotheses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study_costs import Cost
from benchmarks.study_statistics import HYPOTHESES, MARGIN
from scripts.utils.atomic_files import atomic_file

Entry = Mapping[str, Any]

_STYLES = {  # arm -> label, marker, fill, line
    "alone": ("alone", "o", "white", ":"),
    "control": ("label as teacher", "s", "white", "--"),
    "kd_in_sample": ("distilled, in sample", "^", "0.6", "-."),
    "kd_out_of_fold": ("distilled, out of fold", "D", "black", "-"),
    "alone_long": ("alone, longer", "x", "black", ""),
}
_PANELS = (  # key of a cost, its unit, title
    ("parameters", 1e6, "parameters (millions)"),
    ("gflops", 1, "GFLOPs per window of 48 x 48 x 48"),
    ("cpu_seconds_per_case", 1, "CPU seconds per volume of 64 x 64 x 64"),
)


def draw_dice_by_size(entries: Sequence[Entry], costs: Mapping[str, Cost], ensemble: Entry | None, path: Path) -> bool:
    """Draw the Dice of each arm of experiment C against the size, the operations and the seconds of its student.

    Args:
        entries: ``{"arm", "student", "dice": {"mean", "ci95"}}``; arms without a style are left out.
        costs: student -> its costs; other students are left out.
        ensemble: entry of the teachers' ensemble, drawn as a line.
        path: PNG to write.

    Returns:
        False if there is nothing to draw.
    """
    drawn = [entry for entry in entries if entry["arm"] in _STYLES and entry["student"] in costs]
    if not drawn:
        return False
    figure, axes = plt.subplots(1, len(_PANELS), sharey=True, figsize=(10, 4.2), layout="constrained")
    for axis, (key, unit, title) in zip(axes, _PANELS, strict=True):
        sizes = {entry["student"]: costs[entry["student"]][key] / unit for entry in drawn}
        step = (max(sizes.values()) / min(sizes.values())) ** 0.02  # so that the arms stand side by side
        for i, arm in enumerate(_STYLES):
            points = [
                (sizes[entry["student"]] * step ** (i - 2), entry["dice"]) for entry in drawn if entry["arm"] == arm
            ]
            _draw_arm(axis, arm, sorted(points, key=lambda point: point[0]))
        if ensemble:
            axis.axhline(ensemble["dice"]["mean"], color="black", linewidth=1.5, label="teachers' ensemble")
        ticks = sorted(sizes.values())
        ticks = [tick for i, tick in enumerate(ticks) if i == 0 or tick > 1.15 * ticks[i - 1]]  # no label on another
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlabel(title)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("Dice, 95% interval over patients")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)
    return True


def _draw_arm(axis: Axes, arm: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> None:
    label, marker, fill, line = _STYLES[arm]
    for x, dice in points:
        if dice["ci95"]:
            axis.plot([x, x], dice["ci95"], color="0.4", linewidth=0.8)
    if points:
        x_values, means = [x for x, _ in points], [dice["mean"] for _, dice in points]
        axis.plot(x_values, means, line, color="black", linewidth=1, marker=marker, markerfacecolor=fill, label=label)


def draw_hypotheses(results: Sequence[Entry], path: Path) -> None:
    """Draw each hypothesis: the difference of each patient, their mean with its intervals, and the verdict.

    Args:
        results: of ``hypothesis_results``.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(9, 1.1 * len(results) + 1.2), layout="constrained")
    names = [f"{h.name} ({h.experiment}, {h.student})\n{h.arm} - {h.reference}" for h in HYPOTHESES]
    for row, result in enumerate(results):
        differences = [] if result["untested"] else result["differences"]
        axis.plot(differences, [row + 0.22] * len(differences), "|", color="0.5", markersize=9)
        if result["ci95"]:
            axis.plot(result["ci95"], [row, row], color="black", linewidth=1)
            axis.plot(result["ci90"], [row, row], color="black", linewidth=4, solid_capstyle="butt")
        if result["mean"] is not None:
            axis.plot(result["mean"], row, "o", color="black", markerfacecolor="white", markersize=8)
        axis.text(1.01, row, _outcome(result), transform=axis.get_yaxis_transform(), va="center")
    axis.axvline(0, color="black", linewidth=1)
    for bound in (-MARGIN, MARGIN):
        axis.axvline(bound, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(results)), names)
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.set_xlabel(
        "difference in Dice: mean, 95% (thin) and 90% (thick) interval; one stroke per patient; dotted: "
        f"-{MARGIN:g} and +{MARGIN:g}"
    )
    axis.grid(axis="x", alpha=0.2)
    _save(figure, path)


def _outcome(result: Entry) -> str:
    if result["p_holm"] is None:
        return "not yet tested"
    return f"{result['verdict']}\nHolm p = {result['p_holm']:.2g}, n = {result['n']}"


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
