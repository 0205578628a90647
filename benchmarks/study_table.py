# SPDX-License-Identifier: Apache-2.0
"""The tables of the study, computed from its finished jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.missing_modalities import subsets
from benchmarks.study_compression import TEACHERS, Arms, compression_section
from benchmarks.study_costs import read_costs, write_costs
from benchmarks.study_figures import draw_hypotheses
from benchmarks.study_records import Run, diverged_runs, failed_cases, read_runs, run_name, same_length, write_cases
from benchmarks.study_statistics import (
    HYPOTHESES,
    MARGIN,
    UNTESTED,
    common_runs,
    compare_arms,
    hypothesis_results,
    mean_with_interval,
    patient_means,
)
from scripts.utils.atomic_files import write_json, write_text
from scripts.utils.markdown import interval_text, markdown_table

SUBSETS = ["+".join(subset) for subset in subsets(("ct", "pet", "mr"))]
_D_ARMS = ("alone_dropout@{}", "alone_{}", "kd_dropout@{}", "kd_experts_dropout@{}", "kd_{}", "expert@{}")
_D_CONTRASTS = {
    "alone_{}": ("alone_dropout@{}",),
    "kd_dropout@{}": ("alone_dropout@{}",),
    "kd_experts_dropout@{}": ("kd_dropout@{}", "alone_dropout@{}"),
    "kd_{}": ("alone_{}", "kd_dropout@{}"),
}
_SHIPPED_ARMS = tuple(f"cross_validated@{name}" for name in (*SUBSETS, "one_pass"))
_COMPARED = ("alone", "control", "kd_in_sample")
EXPERIMENTS: dict[str, tuple[str, tuple[str, ...]]] = {  # title, arms in the order of the table; others follow
    "recipe": ("the recipe of the student alone", ()),
    "A": ("the teachers", ("t1", "t2", "dynunet", "ensemble", "ensemble_widened")),
    "B1": ("another hospital", ("alone", "elsewhere", "control", "kd_unlabelled", "kd")),
    "B2": ("few labels", ("alone", "self_training", "kd", "t1", "t2", "ensemble")),
    "C": ("compression", ("alone", "alone_long", "control", "kd_in_sample", "kd_out_of_fold", TEACHERS)),
    "D": ("missing modalities", tuple(arm.format(subset) for subset in SUBSETS for arm in _D_ARMS)),
    "E": ("methods that use predictions only", _COMPARED),
    "F": ("methods that use features", _COMPARED),
    "shipped": ("the shipped weights, cross-validated", _SHIPPED_ARMS),
}
BORROWED = {"B2": ("B1", ("alone",)), "E": ("C", _COMPARED), "F": ("C", _COMPARED)}
CONTRASTS: dict[str, dict[str, tuple[str, ...]]] = {  # arm -> the arms that are subtracted
    "A": {},
    "B1": {
        "kd": ("control", "alone", "elsewhere"),
        "kd_unlabelled": ("alone", "elsewhere"),
        "control": ("alone",),
        "elsewhere": ("alone",),
    },
    "B2": {"kd": ("self_training", "alone"), "self_training": ("alone",)},
    "C": {
        "kd_out_of_fold": ("control", "alone", "alone_long", "kd_in_sample"),
        "kd_in_sample": ("control", "alone", "alone_long"),
        "control": ("alone",),
    },
    "D": {
        arm.format(subset): tuple(other.format(subset) for other in others)
        for subset in SUBSETS
        for arm, others in _D_CONTRASTS.items()
    },
    "shipped": {_SHIPPED_ARMS[-1]: _SHIPPED_ARMS[:1]},
}
REFERENCES = ("alone", "control")  # subtracted from every arm of the other experiments
_ARM_COLUMNS = (
    *("student", "arm", "steps", "seeds", "pairs", "runs", "n"),
    *("Dice", "HD95 mm", "failed cases", "diverged runs"),
)
_HYPOTHESIS_KEYS = ("id", "n", "mean", "ci95", "p", "p_holm", "verdict")
_INTRODUCTION = f"""# The study: does a teacher add anything, and how small may the student be?

Written by `python -m benchmarks study --table` from the files in `jobs/`. Do not edit this page. Each job holds its
commands, its manifest and its scores. [cases.csv](cases.csv) holds all scores.

- The unit is the patient. A patient's Dice is the mean over seeds, pairs of folds and the patient's cases.
- A failure (missed, false positive or unreadable mask) counts as Dice 0 and as the image's diagonal. A case whose
  reference and mask are both empty is left out. Diverged runs, in which every case failed, stay in: a training that
  ends with NaN counts as one.
- Brackets hold 95% BCa bootstrap intervals over patients (10,000 resamples, seed 0). Differences are paired by patient.
- p is from the two-sided Wilcoxon signed-rank test. Holm's correction is over exactly three hypotheses; one that is not
  yet tested counts as p = 1. A hypothesis is tested once both of its arms have at least two seeds on each of the five
  folds, and the same pairs and seeds. All other differences are exploratory. They are those of the runs whose folds
  and seeds both arms have.
- *Helps*: Holm p < 0.05, lower bound > 0 and mean >= +{MARGIN:g}. *Equivalent*: the 90% interval lies within
  +-{MARGIN:g}. Everything else is *undecided*."""


def group_arms(runs: Sequence[Run], experiment: str) -> dict[tuple[str, str], list[Run]]:
    """The runs of an experiment by student and arm, in the order of its table.

    They include the arms of another experiment that it is compared with (``BORROWED``), for the same students and
    numbers of steps.
    """
    own = [run for run in runs if run["experiment"] == experiment]
    own_arms = {(run["student"], run["arm"]) for run in own}
    lender, arms = BORROWED.get(experiment, ("", ()))
    borrowed = [
        run
        for run in runs
        if run["experiment"] == lender
        and run["arm"] in arms
        and (run["student"], run["arm"]) not in own_arms
        and any(run["student"] == other["student"] and same_length(run["steps"], other["steps"]) for other in own)
    ]
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in [*own, *borrowed]:
        grouped.setdefault((run["student"], run["arm"]), []).append(run)
    order = [*EXPERIMENTS.get(experiment, ("", ()))[1], *sorted({arm for _, arm in grouped})]
    return {name: grouped[name] for name in sorted(grouped, key=lambda name: (name[0], order.index(name[1])))}


def _subtracted_arms(experiment: str, arm: str) -> tuple[str, ...]:
    """The arms with which an arm is compared."""
    if experiment in CONTRASTS:
        return CONTRASTS[experiment].get(arm, ())
    return REFERENCES[: REFERENCES.index(arm)] if arm in REFERENCES else REFERENCES


def _arm_table(experiment: str, arms: Arms) -> str:
    rows = []
    for (student, arm), runs in arms.items():
        means = {metric: patient_means(runs, metric) for metric in ("dice", "hd95_mm")}
        dice, hd95 = (
            interval_text(mean_with_interval(means[metric]), digits) if means[metric] else ""
            for metric, digits in (("dice", 3), ("hd95_mm", 1))
        )
        seeds = len({run["seed"] for run in runs})
        pairs = len({(run["fold"], run["source_fold"]) for run in runs})
        failed = f"{failed_cases(runs)} of {sum(len(run['cases']) for run in runs)}"
        lengths = sorted({run["steps"] for run in runs})
        steps = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        counts = (steps, seeds, pairs, len(runs), len(means["dice"]))
        origin = "" if runs[0]["experiment"] == experiment else f" (of {runs[0]['experiment']})"
        rows.append((student, arm + origin, *counts, dice, hd95, failed, diverged_runs(runs)))
    return markdown_table(_ARM_COLUMNS, rows)


def _contrast_table(experiment: str, arms: Arms) -> str:
    """The differences that the question of an experiment needs; empty if there are none."""
    hypotheses = {(h.experiment, h.student, h.arm, h.reference) for h in HYPOTHESES}
    rows = []
    for (student, arm), runs in arms.items():
        for reference in _subtracted_arms(experiment, arm):
            if (experiment, student, arm, reference) in hypotheses:
                continue  # see their table, which gives no estimate before the test
            compared = common_runs(runs, arms.get((student, reference), ()))
            difference = compare_arms(*compared)
            if difference["n"]:
                run_counts = " and ".join(str(len(each)) for each in compared)
                rows.append(
                    (student, f"{arm} - {reference}", run_counts, difference["n"], interval_text(difference, 3, "+"))
                )
    return markdown_table(("student", "arms", "runs", "n", "difference in Dice"), rows) if rows else ""


def _hypothesis_table(results: Sequence[Mapping[str, Any]]) -> str:
    head = ("", "experiment", "student", "arms", "n", "difference in Dice", "90% interval", "p", "Holm p", "verdict")
    rows = []
    for hypothesis, result in zip(HYPOTHESES, results, strict=True):
        difference = interval_text(result, 3, "+") if result["mean"] is not None else ""
        ci90 = "[{:+.3f}, {:+.3f}]".format(*result["ci90"]) if result["ci90"] else ""
        p_values = ["" if result[key] is None else f"{result[key]:.2g}" for key in ("p", "p_holm")]
        outcome = f"{UNTESTED}: {result['untested']}" if result["untested"] else result["verdict"]
        question = (hypothesis.experiment, hypothesis.student, f"{hypothesis.arm} - {hypothesis.reference}")
        rows.append((hypothesis.name, *question, result["n"], difference, ci90, *p_values, outcome))
    return markdown_table(head, rows)


def _origin_table(runs: Sequence[Run]) -> str:
    """Where the runs of each experiment were made."""
    rows = []
    for experiment in _order_experiments(runs):
        own = [run for run in runs if run["experiment"] == experiment]
        if not own:
            continue
        texts = [", ".join(sorted({str(run[key]) for run in own})) for key in ("commit", "device", "processor")]
        # One training may leave several runs: of both folds of a pair, or of every subset of modalities.
        trainings = {"".join(run.get("commands", [])[:1]) or run_name(run): run["seconds"] or 0 for run in own}
        rows.append((experiment, len(own), *texts, f"{sum(trainings.values()) / 3600:.1f}"))
    return markdown_table(("experiment", "runs", "commits", "devices", "processors", "training hours"), rows)


def _order_experiments(runs: Sequence[Run]) -> list[str]:
    """The known experiments in their order, then any other that has runs."""
    return [*EXPERIMENTS, *sorted({str(run["experiment"]) for run in runs} - set(EXPERIMENTS))]


def _experiment_section(experiment: str, runs: Sequence[Run]) -> str:
    title = EXPERIMENTS.get(experiment, ("", ()))[0]
    heading = f"## {experiment}: {title}" if title else f"## {experiment}"
    if not any(run["experiment"] == experiment for run in runs):
        return f"{heading}\n\nNo finished run."
    arms = group_arms(runs, experiment)
    return "\n\n".join(
        part for part in (heading, _arm_table(experiment, arms), _contrast_table(experiment, arms)) if part
    )


def write_study(folder: Path) -> str:
    """Compute every table and figure of the study from its finished jobs.

    Args:
        folder: of the study. It holds ``jobs/*.json`` and, once measured, ``costs.json``. ``table.md``, ``cases.csv``,
            ``hypotheses.json``, ``costs.csv``, ``dice_by_size.png`` and ``hypotheses.png`` are written there.

    Returns:
        The page, as Markdown.

    Raises:
        FileNotFoundError: no job is finished.
        ValueError: a file is damaged.
    """
    runs, refusals = read_runs(folder)
    costs = read_costs(folder)
    results = hypothesis_results(runs)
    write_cases(runs, folder / "cases.csv")
    write_json([{key: result[key] for key in _HYPOTHESIS_KEYS} for result in results], folder / "hypotheses.json")
    if costs:
        write_costs(costs, folder / "costs.csv")
    draw_hypotheses(results, folder / "hypotheses.png")
    page = "\n\n".join(
        [
            _INTRODUCTION,
            *refusals,
            "## Hypotheses",
            _hypothesis_table(results),
            "![The three hypotheses](hypotheses.png)",
            *(_experiment_section(experiment, runs) for experiment in _order_experiments(runs)),
            compression_section(group_arms(runs, "C"), costs, folder),
            "## Where the runs were made",
            _origin_table(runs),
        ]
    )
    write_text(page + "\n", folder / "table.md")
    return page
