# SPDX-License-Identifier: Apache-2.0
"""The statistics of the study, as they were fixed before its first run.

The unit is the patient. A patient's Dice is the mean over the seeds, the pairs of folds and the patient's cases; a
failure counts as Dice 0. Two arms are compared by the paired differences of the patients that both have: mean, BCa
bootstrap interval over patients (10,000 resamples, seed 0), two-sided Wilcoxon signed-rank test. Holm's correction is
over exactly three hypotheses. Everything else is exploratory and has intervals only.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.study_records import Run, select_runs
from scripts.metrics import filled_value

RESAMPLES, SEED = 10_000, 0
SIGNIFICANCE = 0.05
MARGIN = 0.02  # Dice: the smallest gain that counts, the bound of equivalence, and the loss that compression allows
COMPRESSION = 15  # how many times fewer parameters than the teachers
FOLDS, SEEDS = range(5), 2  # an arm is complete when every fold was tested with at least two seeds
UNTESTED = "not yet tested"
_DECIMALS = 12  # differences that are equal up to rounding errors are ties


@dataclass(frozen=True)
class Hypothesis:
    """``arm`` has a higher Dice than ``reference``, in one experiment and for one student."""

    name: str
    experiment: str
    student: str
    arm: str
    reference: str


HYPOTHESES = (
    Hypothesis("H1", "B1", "0.9M", "kd", "control"),
    Hypothesis("H2", "B2", "0.9M", "kd", "self_training"),
    Hypothesis("H3", "C", "0.2M", "kd_out_of_fold", "control"),
)


def patient_means(runs: Sequence[Run], metric: str = "dice") -> dict[str, float]:
    """Average a metric over all runs and cases of each patient.

    Args:
        runs: of one arm.
        metric: ``"dice"``, or a distance in mm. A failure counts as Dice 0 and as the image's diagonal. A case whose
            reference and mask are both empty (true_negative) is left out.

    Returns:
        Patient -> mean, sorted by patient.
    """
    values: dict[str, list[float]] = {}
    for run in runs:
        for row in run["cases"]:
            value = filled_value(row, metric)
            if value is not None:
                values.setdefault(str(row["patient_id"]), []).append(value)
    return {patient: statistics.fmean(values[patient]) for patient in sorted(values)}


def paired_differences(means: Mapping[str, float], reference: Mapping[str, float]) -> list[float]:
    """``means - reference`` for the patients that both have, sorted by patient."""
    return [round(means[patient] - reference[patient], _DECIMALS) for patient in sorted(means.keys() & reference)]


def bca_interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """The BCa bootstrap interval of a mean.

    Args:
        values: one per patient.
        level: coverage.

    Returns:
        Both bounds; the mean twice if all values are equal; None for fewer than two values.
    """
    if len(values) < 2:
        return None
    if min(values) == max(values):
        return [values[0], values[0]]
    rng = np.random.default_rng(SEED)
    result = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, confidence_level=level, method="BCa", rng=rng
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def mean_with_interval(means: Mapping[str, float]) -> dict[str, Any]:
    """``{"mean", "ci95"}`` of one value per patient, see ``bca_interval``."""
    values = list(means.values())
    return {"mean": statistics.fmean(values), "ci95": bca_interval(values)}


def wilcoxon_p(differences: Sequence[float]) -> float:
    """The p-value of the two-sided Wilcoxon signed-rank test; zeros are left out, and 1 if there is nothing else.

    It is exact up to 50 differences without zeros and ties, see ``scipy.stats.wilcoxon``.
    """
    if not any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="wilcox", alternative="two-sided").pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction.

    Args:
        p_values: one per hypothesis; None if it has not been tested. It then counts as p = 1, so that no other
            hypothesis gains by its absence.

    Returns:
        The corrected p-values; None where there was none.
    """
    known = [1.0 if p is None else p for p in p_values]
    corrected = [0.0] * len(known)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[index]))
        corrected[index] = largest
    return [None if p is None else value for p, value in zip(p_values, corrected, strict=True)]


def verdict(mean: float, ci95: Sequence[float] | None, ci90: Sequence[float] | None, p_holm: float | None) -> str:
    """``"helps"``, ``"equivalent"`` or ``"undecided"``, as the study defines them.

    Args:
        mean: of the differences in Dice.
        ci95: its 95% interval.
        ci90: its 90% interval.
        p_holm: the corrected p-value; None if the hypothesis has not been tested, which leaves it undecided.
    """
    if p_holm is None or ci95 is None or ci90 is None:
        return "undecided"
    if p_holm < SIGNIFICANCE and ci95[0] > 0 and mean >= MARGIN:
        return "helps"
    if ci90[0] >= -MARGIN and ci90[1] <= MARGIN:
        return "equivalent"
    return "undecided"


def compare_arms(runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Any]:
    """The paired difference in Dice between two arms.

    Returns:
        ``{"n", "mean", "ci95", "ci90", "differences"}``: number of patients, mean, intervals and the difference of each
        patient; ``mean`` is None without a common patient, an interval also with a single one.
    """
    differences = paired_differences(patient_means(runs), patient_means(reference))
    return {
        "n": len(differences),
        "mean": statistics.fmean(differences) if differences else None,
        "ci95": bca_interval(differences, 0.95),
        "ci90": bca_interval(differences, 0.90),
        "differences": differences,
    }


def missing_runs(runs: Sequence[Run], seeds: int = SEEDS) -> str:
    """Which folds of an arm were tested with too few seeds, in words; empty if the arm is complete."""
    tested = {fold: len({run["seed"] for run in runs if run["fold"] == fold}) for fold in FOLDS}
    return ", ".join(f"fold {fold}: {count} of {seeds} seeds" for fold, count in tested.items() if count < seeds)


def _untested_reason(hypothesis: Hypothesis, runs: Sequence[Run], reference: Sequence[Run]) -> str:
    """Why a hypothesis cannot be tested yet; empty if it can."""
    if not runs or not reference:
        return "an arm has no run"
    for arm, arm_runs in ((hypothesis.arm, runs), (hypothesis.reference, reference)):
        for distance in sorted({_distance(run) or 0 for run in arm_runs}):
            if gap := missing_runs([run for run in arm_runs if (_distance(run) or 0) == distance]):
                return f"{arm} is not complete ({gap})"
    same = {_place(run) for run in runs} == {_place(run) for run in reference}
    return "" if same else "the two arms differ in their pairs of folds or seeds"


def common_runs(runs: Sequence[Run], reference: Sequence[Run]) -> list[list[Run]]:
    """The runs of two arms whose folds and seeds both arms have, so that an unfinished arm is compared fairly."""
    arms = [list(runs), list(reference)]
    common = {_place(run) for run in runs} & {_place(run) for run in reference}
    return [[run for run in arm if _place(run) in common] for arm in arms]


def _place(run: Run) -> tuple[Any, ...]:
    return run["fold"], run["source_fold"], run["seed"]


def complete_rounds(runs: Sequence[Run], reference: Sequence[Run]) -> list[list[Run]]:
    """The runs of two arms in the rounds of five pairs that are complete in both; all runs if there is none.

    A round has one pair of folds per tested fold: all of its source folds lie equally far behind the tested ones.
    """
    arms = [list(runs), list(reference)]
    distances = {_distance(run) for run in runs}
    complete = [
        distance
        for distance in distances
        if not any(missing_runs([run for run in arm if _distance(run) == distance]) for arm in arms)
    ]
    return [[run for run in arm if _distance(run) in complete] for arm in arms] if complete else arms


def _distance(run: Run) -> int | None:
    return None if run["source_fold"] is None else (run["source_fold"] - run["fold"]) % len(FOLDS)


def hypothesis_results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The results of the three hypotheses.

    A hypothesis is tested once both arms are complete (every fold, at least two seeds) and have the same pairs and
    seeds. Until then it has neither an estimate nor a p-value, and its verdict is ``UNTESTED``. B1 has two rounds of
    five pairs; the second counts once it is complete.

    Args:
        runs: all runs of the study.

    Returns:
        One entry per hypothesis, in the order of ``HYPOTHESES``: that of ``compare_arms`` and
        ``{"id", "p", "p_holm", "verdict", "untested"}``; ``untested`` says why there is no p-value.
    """
    results = []
    for each in HYPOTHESES:
        arms = complete_rounds(
            *(select_runs(runs, each.experiment, arm, each.student) for arm in (each.arm, each.reference))
        )
        result = {"id": each.name, **compare_arms(*arms), "untested": _untested_reason(each, *arms)}
        if result["untested"]:
            result |= dict.fromkeys(("mean", "ci95", "ci90"))
        result["p"] = None if result["untested"] else wilcoxon_p(result["differences"])
        results.append(result)
    for result, p_holm in zip(results, holm([result["p"] for result in results]), strict=True):
        result["p_holm"] = p_holm
        tested = not result["untested"]
        result["verdict"] = verdict(result["mean"], result["ci95"], result["ci90"], p_holm) if tested else UNTESTED
    return results


def allows_compression(ci95: Sequence[float] | None, parameters: int, teacher_parameters: int) -> bool:
    """Whether compression may be claimed for a student.

    Args:
        ci95: 95% interval of the student's Dice minus that of the teachers' ensemble.
        parameters: of the student.
        teacher_parameters: of all teachers together.
    """
    return ci95 is not None and ci95[0] > -MARGIN and teacher_parameters >= COMPRESSION * parameters
