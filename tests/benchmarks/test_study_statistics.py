# SPDX-License-Identifier: Apache-2.0
"""The statistics of the study against arithmetic and independent implementations."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.study_statistics import (
    HYPOTHESES,
    allows_compression,
    bca_interval,
    compare_arms,
    holm,
    hypothesis_results,
    paired_differences,
    patient_means,
    verdict,
    wilcoxon_p,
)


def case(patient: str, dice: float | None, status: str = "ok", name: str = "") -> dict[str, Any]:
    distance = 5.0 if status == "ok" else None
    return {
        "case_id": name or patient, "patient_id": patient, "dice": dice, "hd95_mm": distance, "assd_mm": distance,
        "status": status, "diagonal_mm": 100.0,
    }  # fmt: skip


def run(cases: Sequence[dict[str, Any]], arm: str = "kd", fold: int = 0, seed: int = 0, **keys: Any) -> dict[str, Any]:
    run_keys = {"experiment": "B1", "student": "0.9M", "source_fold": None, **keys}
    return {**run_keys, "arm": arm, "fold": fold, "seed": seed, "cases": list(cases)}


def arm_runs(arm: str, gain: Sequence[float], experiment: str = "B1", student: str = "0.9M") -> list[dict[str, Any]]:
    """Ten runs, five folds and two seeds; patient p of the fold p % 5 has a Dice of 0.5 + gain[p]."""
    return [
        run(
            [case(f"p{p:02}", 0.5 + gain[p]) for p in range(fold, len(gain), 5)],
            *(arm, fold, seed),
            experiment=experiment,
            student=student,
        )
        for fold in range(5)
        for seed in range(2)
    ]


def reference_bca(values: Sequence[float], level: float) -> list[float]:
    """Efron's BCa interval written out: bias from the share below the mean, acceleration from the jackknife."""
    x = np.asarray(values)
    n = len(x)
    draws = np.random.default_rng(1).integers(0, n, (200_000, n))
    means = np.sort(x[draws].mean(axis=1))
    normal = statistics.NormalDist()
    z0 = normal.inv_cdf(float((means < x.mean()).mean() + (means == x.mean()).mean() / 2))
    jackknife = (x.sum() - x) / (n - 1)
    offsets = jackknife.mean() - jackknife
    acceleration = (offsets**3).sum() / (6 * (offsets**2).sum() ** 1.5)
    bounds = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + normal.inv_cdf(share)
        bounds.append(float(np.quantile(means, normal.cdf(z0 + z / (1 - acceleration * z)))))
    return bounds


def exact_wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p by all signs of the ranks; for distinct absolute values without zero."""
    order = sorted(differences, key=abs)
    ranks = range(1, len(order) + 1)
    total = sum(ranks)
    positive = sum(rank for rank, value in zip(ranks, order, strict=True) if value > 0)
    observed = min(positive, total - positive)
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in
            itertools.product((0, 1), repeat=len(order))]  # fmt: skip
    return min(1.0, sum(min(s, total - s) <= observed for s in sums) / len(sums))


def test_a_patient_is_the_mean_over_seeds_pairs_and_cases_and_a_failure_counts_as_zero() -> None:
    runs = [
        run([case("a", 0.8, name="a1"), case("a", 0.6, name="a2"), case("b", 0.9)], seed=0),
        run([case("a", 0.7, name="a1"), case("a", 0.0, "missed", "a2"), case("b", None, "error")], seed=1),
        run([case("c", None, "true_negative")], fold=1),
    ]
    dice = patient_means(runs)
    assert list(dice) == ["a", "b"]
    assert dice["a"] == pytest.approx((0.8 + 0.6 + 0.7 + 0) / 4)
    assert dice["b"] == pytest.approx(0.45)
    distances = patient_means(runs, "hd95_mm")
    assert distances == pytest.approx({"a": (5 + 5 + 5 + 100) / 4, "b": (5 + 100) / 2})


def test_only_patients_of_both_arms_are_compared() -> None:
    assert paired_differences({"a": 0.5, "c": 0.7, "b": 0.6}, {"c": 0.4, "a": 0.6, "d": 1.0}) == [-0.1, 0.3]
    assert compare_arms([run([case("a", 0.5)])], [run([case("b", 0.5)])]) == {
        "n": 0, "mean": None, "ci95": None, "ci90": None, "differences": []
    }  # fmt: skip


@pytest.mark.parametrize("level", [0.95, 0.9])
def test_bca_intervals_agree_with_the_formulas_written_out(level: float) -> None:
    values = [0.31, 0.02, 0.05, -0.01, 0.04, 0.12, 0.01, 0.07, 0.03, 0.22, 0.06, -0.02]  # skewed: BCa is not percentile
    expected = reference_bca(values, level)
    assert bca_interval(values, level) == pytest.approx(expected, abs=2e-3)
    assert bca_interval(values, level) == bca_interval(values, level)
    percentile = np.quantile(np.asarray(values)[np.random.default_rng(1).integers(0, 12, (20_000, 12))].mean(1), 0.025)
    assert abs(reference_bca(values, 0.95)[0] - percentile) > 4e-3


def test_bca_of_equal_values_is_their_value_and_of_one_value_undefined() -> None:
    assert bca_interval([0.3, 0.3, 0.3]) == [0.3, 0.3]
    assert bca_interval([0.3]) is None
    control = [0.01 * p for p in range(10)]
    equal_gains = compare_arms(arm_runs("kd", [gain + 0.1 for gain in control]), arm_runs("control", control))
    assert equal_gains["ci95"] == pytest.approx([0.1, 0.1])


def test_wilcoxon_agrees_with_the_enumeration_of_all_signs() -> None:
    differences = [0.05, -0.01, 0.08, 0.02, -0.03, 0.11, 0.04, 0.13]
    assert wilcoxon_p(differences) == pytest.approx(exact_wilcoxon(differences))
    assert wilcoxon_p([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]) == pytest.approx(2 / 2**8)
    assert wilcoxon_p([0.0, 0.0]) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.001, 0.9, 0.02]) == pytest.approx([0.003, 0.9, 0.04])
    assert holm([0.6, 0.6, 0.6]) == [1.0, 1.0, 1.0]


def test_holm_counts_an_untested_hypothesis_as_one() -> None:
    assert holm([None, 0.02, None]) == [None, pytest.approx(0.06), None]
    assert holm([0.01, None, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06)]


@pytest.mark.parametrize(
    ("mean", "ci95", "ci90", "p_holm", "expected"),
    [
        (0.02, [0.001, 0.04], [0.003, 0.037], 0.049, "helps"),
        (0.02, [0.001, 0.04], [0.003, 0.037], 0.05, "undecided"),
        (0.02, [0.0, 0.04], [0.003, 0.037], 0.01, "undecided"),
        (0.0199, [0.001, 0.04], [0.003, 0.037], 0.01, "undecided"),
        (0.005, [-0.025, 0.02], [-0.02, 0.02], 0.5, "equivalent"),
        (0.015, [0.011, 0.019], [0.012, 0.018], 0.001, "equivalent"),  # significant, but too small to help
        (0.005, [-0.025, 0.02], [-0.021, 0.018], 0.5, "undecided"),
        (-0.1, [-0.2, -0.05], [-0.18, -0.06], 0.001, "undecided"),  # the study has no word for harm
        (0.0, [0.0, 0.0], [0.0, 0.0], None, "undecided"),  # not tested
    ],
)
def test_verdicts(mean: float, ci95: list[float], ci90: list[float], p_holm: float | None, expected: str) -> None:
    assert verdict(mean, ci95, ci90, p_holm) == expected


def test_the_three_hypotheses() -> None:
    level = [0.0] * 20
    gain = [0.05 + 0.001 * p for p in range(20)]
    runs = [*arm_runs("kd", gain), *arm_runs("control", level)]
    runs += [*arm_runs("kd", level, "B2"), *arm_runs("self_training", level, "B2")]
    h1, h2, h3 = hypothesis_results(runs)
    assert [h1["id"], h2["id"], h3["id"]] == ["H1", "H2", "H3"] == [each.name for each in HYPOTHESES]
    assert (h1["n"], h1["mean"]) == (20, pytest.approx(0.0595))
    assert h1["p"] == pytest.approx(2 / 2**20)
    assert h1["p_holm"] == pytest.approx(3 * h1["p"])
    assert h1["verdict"] == "helps"
    assert (h2["p"], h2["p_holm"], h2["verdict"]) == (1.0, 1.0, "equivalent")
    assert (h3["n"], h3["p"], h3["p_holm"], h3["verdict"]) == (0, None, None, "not yet tested")
    assert h3["untested"] == "an arm has no run"


def test_a_hypothesis_is_tested_only_on_all_folds_with_two_seeds_and_the_same_runs() -> None:
    gain = [0.05 + 0.001 * p for p in range(20)]
    complete, control = arm_runs("kd", gain), arm_runs("control", [0.0] * 20)
    h1 = hypothesis_results([*complete[:-1], *control])[0]
    assert (h1["p"], h1["n"], h1["verdict"]) == (None, 20, "not yet tested")
    assert h1["untested"] == "kd is not complete (fold 4: 1 of 2 seeds)"
    other_pairs = [{**each, "source_fold": (each["fold"] + 2) % 5} for each in control]
    assert hypothesis_results([*complete, *other_pairs])[0]["untested"].startswith("the two arms differ")


def test_the_second_five_pairs_count_once_they_are_complete_in_both_arms() -> None:
    def pairs(distance: int, arm: str, gain: float) -> list[dict[str, Any]]:
        gains = [gain * (1 + 0.01 * p) for p in range(20)]
        return [{**each, "source_fold": (each["fold"] + distance) % 5} for each in arm_runs(arm, gains)]

    first = [*pairs(1, "kd", 0.1), *pairs(1, "control", 0.0)]
    second = [*pairs(2, "kd", 0.3), *pairs(2, "control", 0.0)]
    for runs in (first, [*first, *second[:-1]], [*first, *second[1:]]):
        h1 = hypothesis_results(runs)[0]
        assert (h1["untested"], h1["mean"]) == ("", pytest.approx(0.1095))  # 0.1 * (1 + 0.01 * 9.5)
    assert hypothesis_results([*first, *second])[0]["mean"] == pytest.approx(0.219)
    # Two seeds of each fold, but neither round of five pairs has both.
    ragged = [run for runs, seed in ((first, 0), (second, 1)) for run in runs if run["seed"] == seed]
    assert hypothesis_results(ragged)[0]["untested"].startswith("kd is not complete (fold 0: 1 of 2 seeds")


def test_compression_needs_fifteen_times_fewer_parameters_and_a_bound_above_the_margin() -> None:
    assert allows_compression([-0.019, 0.01], 2, 30)
    assert not allows_compression([-0.02, 0.01], 2, 30)
    assert not allows_compression([-0.019, 0.01], 2, 29)
    assert not allows_compression(None, 1, 100)
