# SPDX-License-Identifier: Apache-2.0
"""The queue of the study: one job of every kind, shortened, on phantoms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import benchmarks.study_experiments as study_experiments
import benchmarks.study_methods as study_methods
import benchmarks.study_students as study_students
import benchmarks.study_teachers as study_teachers
from benchmarks.job_queue import run_jobs
from benchmarks.study_job import StudyJob
from benchmarks.study_plan import StudyPlan
from scripts.cli.main import main


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shortened study of ten phantoms with small teachers; the recipe and the teachers of pair (0, 1) are done."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_students, "RECIPES", {"default": {}})
        for module in (study_students, study_experiments):
            patch.setattr(module, "SEEDS", (0,))
        for module in (study_teachers, study_methods):
            patch.setattr(module, "TEACHER_SCALE", "demo")
        patch.setattr(study_teachers, "VIT_SMALL", {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4})
        assert main(["phantom", "--cases", "10", "--output-dir", str(root / "data")]) == 0
        plan = StudyPlan("phantom", str(root / "data"), root / "runs", root / "results", shorten=500)
        assert run_jobs([*plan.recipe_jobs(), *plan.teacher_jobs([(0, 1)])], 2) == []
        yield plan


def run_and_read(plan: StudyPlan, jobs: Iterable[StudyJob]) -> set[str]:
    """Run those of some jobs that test fold 0, but not the teachers of pair (0, 4).

    Returns:
        ``EXPERIMENT.ARM`` of their results, which are complete.
    """
    chosen = [job for job in jobs if job.study_row.fold == 0 and job.study_row.source_fold != 4]
    assert run_jobs(chosen, 2) == []
    assert all(job.done for job in chosen)
    found = set()
    for job in chosen:
        for row in job.rows if job.serves is None else ():
            record = json.loads(plan.record(row).read_text())
            assert record["shortened"] is True
            assert {case["patient_id"] for case in record["cases"]} == set(plan.folds[row.fold])
            assert not any(plan.dataset_dir in command or str(plan.output) in command for command in record["commands"])
            found.add(f"{row.experiment}.{row.arm}")
    return found


def stand_in(plan: StudyPlan, *paths: Path) -> None:
    """Copy the answers of a teacher, in the place of answers that would take long."""
    for path in paths:
        shutil.copy(plan.answers_path("t1", (0, 1)), path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_another_hospital(plan: StudyPlan) -> None:
    assert run_and_read(plan, plan.another_hospital()) == {
        "B1.alone", "B1.control", "B1.kd", "B1.kd_unlabelled", "B1.elsewhere"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_few_labels(plan: StudyPlan) -> None:
    alone = [job for job in plan.another_hospital() if job.study_row.arm == "alone"]
    expected = {f"B2.{arm}" for arm in ("t1", "t2", "ensemble", "kd", "self_training")}
    assert run_and_read(plan, [*alone, *plan.few_labels()]) == {"B1.alone", *expected}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compression_out_of_fold_longer_and_the_teachers(plan: StudyPlan) -> None:
    stand_in(plan, *(plan.answers_path(name, (0, other)) for name in ("t1", "t2") for other in (2, 3, 4)))
    jobs = [*plan.teachers_themselves(), *plan.compression_out_of_fold(["0.2M"]), *plan.alone_longer()]
    assert run_and_read(plan, jobs) == {"C.teachers", "C.kd_out_of_fold", "C.alone_long"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_missing_modalities(plan: StudyPlan) -> None:
    stand_in(plan, *(plan.answers_path(name, (0, 4)) for name in ("t1", "t2")))
    subsets = ("ct+pet+mr", "ct+pet", "ct+mr", "pet+mr", "ct", "pet", "mr")
    dropout = {f"D.{arm}_dropout@{subset}" for arm in ("alone", "kd", "kd_experts") for subset in subsets}
    fixed = {f"D.{arm}_{name}" for arm in ("alone", "kd") for name in ("mr", "ct+pet")}
    experts = {f"D.expert@{modality}" for modality in ("ct", "pet", "mr")}
    assert run_and_read(plan, [*plan.missing_modalities(), *plan.experts()]) == dropout | fixed | experts


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_methods(plan: StudyPlan) -> None:
    stand_in(plan, *(plan.answers_path(name, (0, 4)) for name in ("t1", "t2")))
    jobs = [*plan.prediction_methods(0), *plan.references(), *plan.feature_methods(0)]
    assert run_and_read(plan, jobs) == {
        *(f"E.{method}" for method in study_methods.PREDICTION_METHODS),
        *(f"F.{method}" for method in study_methods.FEATURE_METHODS),
        "A.dynunet",
    }
