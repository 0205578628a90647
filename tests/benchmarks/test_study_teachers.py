# SPDX-License-Identifier: Apache-2.0
"""The teachers of the study, and the gate."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks.study_job import Answers, StudyJob, StudyRow
from benchmarks.study_plan import StudyPlan
from benchmarks.study_statistics import patient_means
from benchmarks.study_teachers import TEACHERS
from scripts.metrics import checked_rows
from scripts.networks.architecture import read_architecture
from tests.study_jobs import FOLDS_OF_PATIENTS, judge, options, seen_folds, settings


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


def test_weights_are_trained_again_only_while_a_result_needs_them(plan: StudyPlan) -> None:
    judge(plan, 0.8)
    jobs = plan.jobs()
    again = [job for job in jobs if job.study_row.experiment == "weights"]
    assert len(again) == 10 + 5 * 3
    results = [path for job in again for path in job.serves or ()]
    for job in jobs:
        for row in job.rows if job.serves is None and job.study_row.experiment == "F" else ():
            assert plan.record(row) in results
    assert not any(job.done for job in again)
    for path in results:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert all(job.done for job in again)
    results[0].unlink()
    assert [job.done for job in again].count(False) == 1


def test_answers_are_kept_after_their_scores(plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the answers are kept, the weights may be gone; so a job killed before the last score must not leave them."""
    _, answering = plan.pair_teacher("t1", (0, 1))
    final = plan.answers_path("t1", (0, 1))
    monkeypatch.setattr(Answers, "collect", lambda answers, _: answers.paths[0].write_bytes(b"answers"))
    scored: list[StudyRow] = []

    def score(answers: Answers, _: Path, row: StudyRow) -> list[dict[str, Any]]:
        assert answers.paths[0].read_bytes() == b"answers"
        assert not final.exists()
        scored.append(row)
        return []

    monkeypatch.setattr(Answers, "score", score)
    answering.folder.mkdir(parents=True)
    answering.finish()
    assert scored == [*answering.rows]
    assert final.read_bytes() == b"answers"
    assert answering.done


def test_the_record_of_a_teachers_answers_describes_its_training(plan: StudyPlan) -> None:
    training, answering = plan.pair_teacher("t1", (0, 1))
    training.folder.mkdir(parents=True)
    torch.save({"w": torch.zeros(3, 5)}, training.folder / "model.pt")
    manifest = {"git_commit": "c0ffee", "wall_seconds": 12.5, "threads": 1}
    (training.folder / "manifest.json").write_text(json.dumps(manifest))
    record = answering._described(answering.rows[0], [])
    assert (record["commit"], record["seconds"], record["parameters"]) == ("c0ffee", 12.5, 15)
    assert (record["experiment"], record["arm"], record["train_folds"]) == ("A", "t1", [2, 3, 4])
    patients = sum(len(FOLDS_OF_PATIENTS[k]) for k in (2, 3, 4))
    assert record["steps"] == -(-4000 // (patients // 2)) * (patients // 2)
    verbs = [command.split()[3] for command in record["commands"]]
    assert verbs == ["teacher", "cache-teachers"]
    assert "learning_rate=0.001" in record["commands"][0]


def test_a_student_says_by_which_answers_it_was_taught(plan: StudyPlan) -> None:
    judge(plan, 0.8)
    job = next(job for job in plan.another_hospital() if job.study_row.arm == "kd")
    for path in job.needs:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            path.write_bytes(path.name.encode())
    record = job._described(job.study_row, [])
    own = job.study_row.source_fold
    assert (record["train_folds"], record["unlabelled_folds"]) == ([own], [])
    assert record["answers"] == {
        name: hashlib.sha256(name.encode()).hexdigest()
        for name in (f"{teacher}_without_{min(0, own)}_{max(0, own)}_4000.npz" for teacher in ("t1", "t2"))
    }


@pytest.mark.parametrize("diverged", [True, False])
def test_a_training_that_ends_with_nan_stays_in_with_failed_cases(plan: StudyPlan, diverged: bool) -> None:
    job = plan.recipe_jobs()[0]
    label = nib.Nifti1Image(np.zeros((30, 40, 20), np.uint8), np.diag([2.0, 2.0, 5.0, 1.0]))
    for case in job.tested:
        Path(case["label"]).parent.mkdir(parents=True, exist_ok=True)
        nib.save(label, case["label"])
    printed = "Loss or gradient was NaN or infinite in 3 training steps" if diverged else "no room on the disk"
    assert job.keep_failure(printed) is diverged
    assert job.done is diverged
    if not diverged:
        return
    cases = json.loads(job.record.read_text())["cases"]
    assert {case["patient_id"] for case in cases} == set(FOLDS_OF_PATIENTS[job.study_row.fold])
    assert {case["status"] for case in cases} == {"error"}
    assert all(case["diagonal_mm"] == pytest.approx((60**2 + 80**2 + 100**2) ** 0.5) for case in cases)
    assert patient_means([{"cases": checked_rows(cases)}]) == {case["patient_id"]: 0.0 for case in cases}
    assert not plan.pair_teacher("t1", (0, 1))[0].keep_failure(printed)  # without a teacher nobody can go on
