# SPDX-License-Identifier: Apache-2.0
"""Experiment C of the study: how small may the student be?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study_costs import COST_COLUMNS, ENSEMBLE, Cost
from benchmarks.study_figures import draw_dice_by_size
from benchmarks.study_records import Run
from benchmarks.study_statistics import (
    COMPRESSION,
    MARGIN,
    SEEDS,
    allows_compression,
    compare_arms,
    mean_with_interval,
    missing_runs,
    patient_means,
)
from scripts.utils.markdown import interval_text, markdown_table

Arms = Mapping[tuple[str, str], Sequence[Run]]  # (student, arm) -> runs

TEACHERS = "teachers"  # the arm with the teachers' ensemble


def compression_section(arms: Arms, costs: Sequence[Cost], folder: Path) -> str:
    """Compare the students of experiment C with the teachers, and draw ``dice_by_size.png`` if costs are measured.

    The figure shows the arms that are complete.

    Args:
        arms: (student, arm) -> runs of experiment C.
        costs: of ``costs.json``.
        folder: of the study.

    Returns:
        The section of the page, as Markdown.
    """
    matched, notes = matching_costs(arms, costs)
    rule = (
        f"Compression is claimed where the lower bound of student - ensemble is above -{MARGIN:g}, with at least "
        f"{COMPRESSION} times\nfewer parameters and measured CPU seconds."
    )
    parts = ["## Students against the teachers' ensemble", rule, *notes]
    parts.append(_compression_table(arms, matched) or "The teachers' ensemble of experiment C is not yet scored.")
    if costs:
        conditions = f"CPU seconds of a sliding-window pass over 64 x 64 x 64 voxels on {costs[0]['processor']}."
        parts += [markdown_table(COST_COLUMNS, [[cost[key] for key in COST_COLUMNS] for cost in costs]), conditions]
    else:
        parts.append("The costs are not yet measured.")
    entries = [
        {"student": student, "arm": arm, "dice": mean_with_interval(patient_means(runs))}
        for (student, arm), runs in arms.items()
        if not missing_runs(runs, seeds=1 if arm == TEACHERS else SEEDS)  # other arms have other patients
    ]
    ensemble = next((entry for entry in entries if entry["arm"] == TEACHERS), None)
    if draw_dice_by_size(entries, matched, ensemble, folder / "dice_by_size.png"):
        parts.append("![Dice by parameters, operations and seconds](dice_by_size.png)")
    return "\n\n".join(parts)


def _compression_table(arms: Arms, costs: Mapping[str, Cost]) -> str:
    """The students of experiment C against the teachers' ensemble; empty without the ensemble."""
    teachers = arms.get((ENSEMBLE, TEACHERS), ())
    if not patient_means(teachers):
        return ""
    head = ("student", "arm", "n", "Dice - ensemble", "share of its Dice", "fewer parameters", "CPU seconds", "claim")
    teacher_means = patient_means(teachers)
    rows = []
    for (student, arm), runs in arms.items():
        difference = compare_arms(runs, teachers)
        if arm == TEACHERS or not difference["n"]:
            continue
        means = patient_means(runs)
        student_dice, teacher_dice = (
            statistics.fmean(part[patient] for patient in means.keys() & teacher_means.keys())
            for part in (means, teacher_means)
        )
        share = 100 * student_dice / teacher_dice if teacher_dice else 0.0
        cells = [student, arm, difference["n"], interval_text(difference, 3, "+"), f"{share:.1f}%"]
        if student not in costs or ENSEMBLE not in costs:
            rows.append([*cells, "", "", "costs not measured"])
            continue
        small, large = costs[student], costs[ENSEMBLE]
        ratio = large["parameters"] / small["parameters"]
        seconds = 100 * (small["cpu_seconds_per_case"] / large["cpu_seconds_per_case"] - 1)
        allowed = allows_compression(difference["ci95"], small["parameters"], large["parameters"])
        claim = "yes" if allowed else "no"
        if missing_runs(runs) or missing_runs(teachers, seeds=1):
            claim = "not complete"
        rows.append([*cells, f"{ratio:.1f} times", f"{seconds:+.1f}%", claim])
    return markdown_table(head, rows)


def matching_costs(arms: Arms, costs: Sequence[Cost]) -> tuple[dict[str, Cost], list[str]]:
    """The costs of the networks whose runs have the same number of parameters, where the runs name one.

    Returns:
        Student -> its costs, and one sentence for each student that is left out.
    """
    matched = {str(cost["network"]): cost for cost in costs}
    notes = []
    for (student, _), runs in arms.items():
        counts = {run["parameters"] for run in runs if run["parameters"]}
        cost = matched.get(student)
        if cost and counts - {cost["parameters"]}:
            notes.append(
                f"The costs of {student} are left out: costs.json has {cost['parameters']} parameters, its runs have "
                f"{', '.join(str(count) for count in sorted(counts))}."
            )
            del matched[student]
    return matched, notes
