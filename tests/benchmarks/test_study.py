# SPDX-License-Identifier: Apache-2.0
"""The queue of the study: who trains on whom, the choice of the recipe, and the teachers' answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import SpatialPad

import benchmarks.study_plan as study_plan
from benchmarks.job_queue import run_jobs
from benchmarks.study_answers import mean_logit, read_answer, without_padding, write_answers, write_predictions
from benchmarks.study_job import StudyJob
from benchmarks.study_plan import RECIPES, STAGE_1, StudyPlan
from benchmarks.study_setting import FOLDS
from scripts.cli.main import main

FILES = {"ct": "CT.nii.gz", "pet": "PET.nii.gz", "mr": "MR.nii.gz", "label": "mask.nii.gz"}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyPlan:
    """The study of 38 patients whose files do not exist."""
    cases = []
    for number in range(38):
        name = f"P{number:02d}"
        files = {key: str(tmp_path / "data" / name / file) for key, file in FILES.items()}
        cases.append({"case_id": name, "patient_id": name, "image": files["ct"], **files})
    monkeypatch.setattr("benchmarks.study_setting.datalist", lambda *_: cases)
    return StudyPlan("sts", str(tmp_path / "data"), tmp_path / "runs", tmp_path / "results")


def options(job: StudyJob) -> dict[str, str]:
    """The overrides of a job's first command."""
    words = job.typed()[0]
    pairs = [words[i + 1].partition("=") for i, word in enumerate(words) if word == "--set"]
    return {key: value for key, _, value in pairs}


def prepared(job: StudyJob) -> tuple[list[dict[str, str]], list[list[str]]]:
    """The data list and the folds that a job writes; predictions are not written."""
    job.folder.mkdir(parents=True, exist_ok=True)
    job.preparations[0]()
    return (
        json.loads((job.folder / "cases.json").read_text()),
        json.loads((job.folder / "splits.json").read_text())["folds"],
    )


def write_record(job: StudyJob, dice: float) -> None:
    job.record.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"patient_id": str(number), "dice": dice, "status": "ok"} for number in range(3)]
    job.record.write_text(json.dumps({"cases": rows}))


def choose(plan: StudyPlan, best: str) -> None:
    """Write results of all recipes, of which one is better."""
    for job in plan.recipe_jobs():
        write_record(job, 0.7 if job.study_row.arm == best else 0.6)


def pass_gate(plan: StudyPlan, ensemble: float) -> None:
    """Judge the gate with this Dice of the ensemble; the lone student has 0.7."""
    choose(plan, "batch_dice")
    for job in plan.teacher_jobs(STAGE_1[:1]):
        for row in job.answers.rows if job.answers else ():
            plan.record(row).write_text(json.dumps({"cases": [{"patient_id": "0", "dice": ensemble, "status": "ok"}]}))
    plan.judge_gate()


@pytest.mark.parametrize(("ensemble", "steps"), [(0.729, 8000), (0.731, 4000)])
def test_the_gate_decides_how_long_the_teachers_train(plan: StudyPlan, ensemble: float, steps: int) -> None:
    before = plan.jobs()
    assert plan.gate is None
    assert not any(job.study_row.arm.startswith("kd") for job in before)
    pass_gate(plan, ensemble)
    verdict = {"passed": steps == 4000, "steps": steps}
    assert plan.gate == {
        "recipe": "batch_dice", "lone": pytest.approx(0.7), "ensemble": ensemble, **verdict
    }  # fmt: skip
    trainings = [job for job in plan.jobs() if job.study_row.experiment == "teachers"]
    assert len(trainings) == 10
    assert {options(job)["max_epochs"] for job in trainings} <= {str(-(-steps // 11)), str(-(-steps // 12))}
    assert sum(job.study_row.arm.startswith("kd") for job in plan.jobs()) == 40


def test_no_training_and_no_teacher_sees_the_tested_fold(plan: StudyPlan) -> None:
    pass_gate(plan, 0.9)
    tested = 0
    for job in plan.jobs():
        row = job.study_row
        if row.experiment == "A":
            continue
        rows, folds = prepared(job)
        training = {each["patient_id"] for each in rows} - set(plan.folds[row.fold])
        assert folds[0] == plan.folds[row.fold]
        assert sorted(folds[1]) == sorted(training)
        if row.experiment == "teachers":
            assert row.source_fold is not None
            assert not training & set(plan.folds[row.source_fold])
        answers = [path.stem for path in job.needs if path.suffix == ".npz"]
        assert all(f"{row.fold}" in stem.split("_")[2:4] for stem in answers)  # t1_without_0_1_4000
        assert bool(answers) == row.arm.startswith("kd")
        tested += 1
    assert tested == 40 + 10 + 50 + 60


def test_the_recipe_is_chosen_without_the_first_fold(plan: StudyPlan) -> None:
    for job in plan.recipe_jobs():
        rows, _ = prepared(job)
        assert not {each["patient_id"] for each in rows} & set(plan.folds[0])


def test_the_recipe_with_the_best_mean_dice_is_frozen_for_all_arms(plan: StudyPlan) -> None:
    choose(plan, "batch_dice_fast_clipped")
    assert plan.chosen_recipe() == RECIPES["batch_dice_fast_clipped"]
    students = [job for job in plan.jobs() if job.study_row.experiment in ("B1", "C")]
    for job in students:
        given = options(job)
        assert (given["learning_rate"], given["gradient_clip"]) == ("0.002", "1.0")
        assert given["segmentation_loss#batch"] == "true"
        assert given["ema"] == "0.99"
    choose(plan, "default")
    assert all("learning_rate" not in options(job) for job in students)  # decided when a job starts


def test_students_wait_for_the_recipe_and_for_their_teachers(plan: StudyPlan) -> None:
    recipes = {job.record for job in plan.recipe_jobs()}
    for job in plan.another_hospital():
        assert recipes <= set(job.needs)
        pair = sorted((job.study_row.fold, job.study_row.source_fold or 0))
        answers = {plan.answers_path(name, (pair[0], pair[1])) for name in ("t1", "t2")}
        assert (answers <= set(job.needs)) == job.study_row.arm.startswith("kd")


def test_arms_of_a_fold_train_for_the_same_steps(plan: StudyPlan) -> None:
    choose(plan, "default")
    epochs: dict[tuple[Any, ...], set[str]] = {}
    for job in plan.jobs():
        row = job.study_row
        if row.experiment in ("B1", "C") and row.arm != "elsewhere":
            epochs.setdefault((row.experiment, row.fold), set()).add(options(job)["max_epochs"])
    assert len(epochs) == 2 * FOLDS
    assert all(len(each) == 1 for each in epochs.values())
    # 7 patients give 3 steps of two, 8 give 4: 1500 steps are 500 or 375 epochs.
    assert {epochs["B1", fold].pop() for fold in range(FOLDS)} == {"500", "375"}


def test_without_labels_the_training_list_has_none(plan: StudyPlan) -> None:
    job = next(job for job in plan.another_hospital() if job.study_row.arm == "kd_unlabelled")
    rows, folds = prepared(job)
    assert {each["patient_id"] for each in rows if "label" not in each} == set(folds[1])
    assert {each["patient_id"] for each in rows if "label" in each} == set(folds[0])


def test_in_sample_answers_come_from_teachers_that_have_seen_the_patient(plan: StudyPlan) -> None:
    job = next(job for job in plan.compression() if job.study_row.arm == "kd_in_sample" and job.study_row.fold == 2)
    stems = {path.stem for path in job.needs if path.suffix == ".npz"}
    pairs = {tuple(map(int, stem.split("_")[2:4])) for stem in stems}
    assert pairs == {(1, 2), (2, 3)}  # the pairs of stage 1 with fold 2
    sources = plan._answers_for(job.study_row, [1])
    assert {path.stem for paths in sources.values() for path in paths} == {"t1_without_2_3_4000", "t2_without_2_3_4000"}
    assert all(len(pair) == 2 and pair[0] < pair[1] for pair in STAGE_1)


def test_answers_keep_a_tenth_of_a_logit_and_the_affine(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(0, 8, (4, 5, 6))
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    write_answers(tmp_path / "answers" / "t1.npz", {"P1": (logits, affine)})
    read, matrix = read_answer(tmp_path / "answers" / "t1.npz", "P1")
    inside = np.abs(logits) < 12.7
    assert np.abs(read - logits)[inside].max() <= 0.05 + 1e-5
    np.testing.assert_allclose(read[~inside], 12.7 * np.sign(logits[~inside]), rtol=1e-6)
    np.testing.assert_array_equal(matrix, affine)


def test_predictions_hold_the_logit_of_the_mean_probability(tmp_path: Path) -> None:
    low, high = np.log(0.2 / 0.8), np.log(0.6 / 0.4)
    np.testing.assert_allclose(mean_logit([np.full(2, low), np.full(2, high)]), np.log(0.4 / 0.6))
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    affine = np.diag([-4.0, 4.0, 4.0, 1.0])
    for file, value in zip(files, (-2.0, 1.0), strict=True):
        write_answers(file, {"P1": (np.full((2, 3, 4), value), affine)})
    write_predictions(tmp_path / "predictions", {"P1": files})
    image = nib.load(tmp_path / "predictions" / "P1.nii.gz")
    values = np.asarray(image.dataobj)
    assert values.shape == (2, 3, 4, 2)
    mean = (1 / (1 + np.exp(2.0)) + 1 / (1 + np.exp(-1.0))) / 2
    np.testing.assert_allclose(values[..., 1], np.log(mean / (1 - mean)), rtol=1e-5)
    assert not values[..., 0].any()
    np.testing.assert_array_equal(image.affine, affine)


@pytest.mark.parametrize("shape", [(3, 8, 5), (8, 8, 8), (10, 7, 1)])
def test_padding_of_the_training_volumes_is_cut_off(shape: tuple[int, int, int]) -> None:
    volume = torch.arange(float(np.prod(shape))).reshape(shape)
    padded = SpatialPad((8, 8, 8))(volume[None])[0].numpy()
    np.testing.assert_array_equal(without_padding(padded, shape), volume.numpy())


@pytest.mark.slow
def test_the_queue_runs_to_the_student_of_two_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_plan, "RECIPES", {"default": {}})
    monkeypatch.setattr(study_plan, "SEEDS", (0,))
    monkeypatch.setattr(study_plan, "TEACHER_SCALE", "demo")
    monkeypatch.setattr(study_plan, "VIT_SMALL", {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4})
    assert main(["phantom", "--cases", "10", "--output-dir", str(tmp_path / "data")]) == 0
    plan = StudyPlan("phantom", str(tmp_path / "data"), tmp_path / "runs", tmp_path / "results", shorten=500)
    hospital = [job for job in plan.another_hospital() if job.study_row.fold == 0]
    jobs = [*plan.recipe_jobs(), *plan.teacher_jobs([(0, 1)]), *hospital]
    assert run_jobs(jobs, 2) == []
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results" / "jobs").iterdir()}
    assert {name.split(".")[1] for name in records if name.startswith("B1")} == {
        "alone", "control", "kd", "kd_unlabelled", "elsewhere"
    }  # fmt: skip
    assert {name.split(".")[1] for name in records if name.startswith("A")} == {"t1", "t2", "ensemble"}
    for record in records.values():
        assert record["shortened"] is True
        assert {case["patient_id"] for case in record["cases"]} == set(plan.folds[record["fold"]])
        assert not any(str(tmp_path) in command for command in record["commands"])
    assert all(job.done for job in jobs)
