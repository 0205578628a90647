# SPDX-License-Identifier: Apache-2.0
"""The teachers of the study, and the gate."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from benchmarks.study_job import StudyJob
from benchmarks.study_plan import StudyPlan
from benchmarks.study_teachers import TEACHERS
from scripts.networks.architecture import read_architecture
from tests.study_jobs import judge, options, seen_folds, settings


def test_ensembles_are_scored_on_folds_that_none_of_them_has_seen(jobs: list[StudyJob]) -> None:
    ensembles = [job for job in jobs if job.answers and not job.answers.teacher]
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for job in ensembles:
        assert job.answers is not None
        assert job.needs == job.answers.paths
        for row in job.rows:
            counts[row.experiment, row.arm] += 1
            assert all(row.fold not in seen_folds(path) for path in job.needs)
        if job.study_row.experiment == "C":
            assert job.study_row.student == "ensemble"
            assert len(job.needs) == 4  # two teachers of both pairs of stage 1 with this fold
    assert counts == {("A", "ensemble"): 20, ("B2", "ensemble"): 5, ("C", "teachers"): 5}


@pytest.mark.benchmarks
@pytest.mark.parametrize(("name", "millions"), [("t1", 4.5), ("t2", 29.4), ("dynunet", 5.6)])
def test_teachers_have_their_sizes_and_fit_the_patch(plan: StudyPlan, name: str, millions: float) -> None:
    architecture = TEACHERS[name]["architecture"]
    changes = plan.sizes(name).get(f"+architectures#{architecture}", {})
    with torch.device("meta"):
        network = read_architecture(architecture).build(3, 2, [48, 48, 48], "full", changes)
        assert network(torch.zeros(1, 3, 48, 48, 48)).shape == (1, 2, 48, 48, 48)
    assert round(sum(weights.numel() for weights in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("scores", "steps", "teachers", "passed"),
    [
        ([0.731], 4000, ["t1", "t2"], True),
        ([0.729, 0.731], 8000, ["t1", "t2"], True),
        ([0.729, 0.729, 0.731], 8000, ["t1", "t2", "dynunet"], True),
        ([0.729, 0.729, 0.729], 8000, ["t1", "t2", "dynunet"], False),
    ],
)
def test_the_gate_lengthens_the_teachers_then_widens_the_ensemble_then_goes_on(
    plan: StudyPlan, scores: list[float], steps: int, teachers: list[str], passed: bool
) -> None:
    for score in scores:
        assert plan.gate is None
        assert not any(job.study_row.arm.startswith("kd") for job in plan.jobs())
        judge(plan, score)
    gate = plan.gate
    assert gate is not None
    assert (gate["passed"], gate["steps"], gate["teachers"]) == (passed, steps, teachers)
    assert gate["recipe"] == "batch_dice"
    assert gate["lone"] == pytest.approx(0.7)
    assert [each["ensemble"] for each in gate["tries"]] == pytest.approx(scores)
    planned = plan.jobs()
    trainings = [job for job in planned if job.study_row.experiment == "teachers" and job.study_row.arm != "dynunet"]
    assert len(trainings) == 20
    assert {options(job.typed()[0], "--epochs") == [] for job in trainings} == {True}
    assert {int(settings(job.typed()[0])["max_epochs"]) for job in trainings} <= {-(-steps // 11), -(-steps // 12)}
    taught = next(job for job in planned if job.study_row.arm == "kd")
    assert len([path for path in taught.needs if path.suffix == ".npz"]) == len(teachers)
    judge(plan, 0.1)
    assert plan.gate == gate
