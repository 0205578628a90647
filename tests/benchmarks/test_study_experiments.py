# SPDX-License-Identifier: Apache-2.0
"""The commands of the experiments B to D of the study."""

from __future__ import annotations

import json

from benchmarks.study_job import StudyJob
from benchmarks.study_setting import FOLDS
from tests.study_jobs import data_folds, options, settings

EVERY_SUBSET = {"ct+pet+mr", "ct+pet", "ct+mr", "pet+mr", "ct", "pet", "mr"}


def test_students_with_dropout_are_scored_on_every_subset(jobs: list[StudyJob]) -> None:
    dropout = [job for job in jobs if job.study_row.experiment == "D" and job.study_row.arm.endswith("_dropout")]
    assert len(dropout) == 3 * 10
    for job in dropout:
        training, *evaluations = job.typed()
        assert settings(training)["modality_dropout"] == "0.25"
        assert {row.arm for row in job.rows} == {f"{job.study_row.arm}@{subset}" for subset in EVERY_SUBSET}
        for row, command, name in zip(job.rows, evaluations, job.evaluations, strict=True):
            start = command.index("--present") + 1
            present = row.arm.partition("@")[2].split("+")
            assert list(command[start : start + len(present)]) == present
            assert command[start + len(present)].startswith("--")
            assert options(command, "--output-dir") == [str(job.folder / name)]
        confidence = settings(training).get("loss#weighting") == '"confidence"'
        assert confidence == (job.study_row.arm == "kd_experts_dropout")
    assert "@" not in "".join(str(job.folder.name) for job in jobs)


def test_students_of_fixed_inputs_read_nothing_else(jobs: list[StudyJob]) -> None:
    for name, modalities in (("mr", ["mr"]), ("ct+pet", ["ct", "pet"])):
        fixed = [job for job in jobs if job.study_row.arm in (f"alone_{name}", f"kd_{name}")]
        assert len(fixed) == 20
        for job in fixed:
            commands = [*job.before, *job.typed()]
            assert len(commands) == (3 if job.study_row.arm.startswith("kd") else 2)
            assert all(json.loads(settings(command)["modalities"]) == modalities for command in commands)
            assert all(list(json.loads(settings(command)["intensity"])) == modalities for command in commands)
            assert job.rows == (job.study_row,)
            data_folds(job)
            rows = json.loads((job.folder / "cases.json").read_text())
            assert all(set(row) == {"case_id", "patient_id", "label", *modalities} for row in rows)


def test_self_training_waits_for_the_lone_student_and_trains_it_again_only_if_its_weights_are_gone(
    jobs: list[StudyJob],
) -> None:
    lone = {(job.study_row.fold, job.study_row.seed): job for job in jobs if job.study_row.experiment == "answers"}
    assert len(lone) == 10
    for (fold, seed), job in lone.items():
        name = f"B1.alone.0.9M.f{fold}.j{(fold + 1) % FOLDS}.s{seed}"
        alone = next(each for each in jobs if each.study_row.name == name)
        assert job.needs == (alone.folder / "model.pt",)
        (restored,) = (each for each in jobs if each.study_row.experiment == "weights" and each.folder == alone.folder)
        assert alone.record in restored.needs
        assert restored.typed() == alone.typed()[:1]
        assert restored.evaluations == ()
        assert not restored.done
        assert options(job.typed()[0], "--tta") == ["flips"]
