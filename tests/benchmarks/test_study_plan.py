# SPDX-License-Identifier: Apache-2.0
"""The jobs of the study: who trains on whom, whose answers teach them, and in which order."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import benchmarks.study_taught as study_taught
from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_setting import FOLDS
from benchmarks.study_teachers import STAGE_1, STAGE_2
from scripts.cli.config import has_id, merge_configs
from scripts.data.folds import chosen_cases, fold_split
from tests.study_jobs import FOLDS_OF_PATIENTS, data_folds, judge, new_plan, options, seen_folds, settings

ALL = set(range(FOLDS))


def expected_folds(row: StudyRow) -> tuple[set[int], set[int]]:
    """The folds on which a training must see the labels, and only the images."""
    i, j = row.fold, row.source_fold
    others = ALL - {i}
    if row.experiment in ("C", "D", "E", "F", "experts"):
        return others, set()
    if row.experiment == "recipe":
        return others - {0}, set()
    assert j is not None
    if row.experiment == "teachers" or row.arm in ("elsewhere", "teachers_t1", "teachers_t2", "teachers_dynunet"):
        return others - {j}, set()
    if row.experiment == "B2":
        return {j}, others - {j}
    if row.arm == "kd_unlabelled":
        return set(), {j}
    return {j}, set()


def test_every_student_and_teacher_trains_on_its_folds_and_never_on_the_tested_one(jobs: list[StudyJob]) -> None:
    trained = [job for job in jobs if job.answers is None]
    for job in trained:
        labelled, unlabelled, tested = data_folds(job)
        assert (labelled, unlabelled) == expected_folds(job.study_row), job.study_row.name
        assert tested == {job.study_row.fold}
        assert job.study_row.fold not in labelled | unlabelled
        assert ("--unlabelled" in job.typed()[0]) == bool(unlabelled)
    counts: dict[str, int] = defaultdict(int)
    for job in trained:
        counts[job.study_row.experiment] += 1
    assert counts == {
        **{"recipe": 40, "teachers": 20 + 5, "few_labels_teachers": 10, "experts": 15, "weights": 10 + 5 * 3},
        **{"B1": 10 * 5 * 2, "B2": 5 * 2 * 2, "C": 3 * 4 * 10 + 10, "D": 7 * 10, "E": 4 * 5 * 2, "F": 11 * 5 * 2},
    }


def test_answers_are_those_of_teachers_that_have_or_have_not_seen_the_patient(
    jobs: list[StudyJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, list[Path]]] = []
    monkeypatch.setattr(study_taught, "write_predictions", lambda _, answers: written.append(answers))
    fold_of = {patient: k for k, part in enumerate(FOLDS_OF_PATIENTS) for patient in part}
    arms = set()
    for job in jobs:
        row = job.study_row
        if len(job.preparations) < 2:
            assert not any(path.suffix == ".npz" for path in job.needs) or job.answers or row.experiment == "weights"
            continue
        written.clear()
        for preparation in job.preparations:
            preparation()
        labelled, unlabelled, _ = data_folds(job)
        arms.add((row.experiment, row.arm))
        for answers in written:
            assert {fold_of[case] for case in answers} == labelled | unlabelled
            for case, paths in answers.items():
                assert set(paths) <= set(job.needs)
                for path in paths:
                    seen = seen_folds(path)
                    assert row.fold not in seen
                    if row.experiment == "B2":
                        assert seen == {row.source_fold}
                    elif row.experiment == "B1" or row.arm == "kd_out_of_fold":
                        assert fold_of[case] not in seen
                    else:
                        assert fold_of[case] in seen
        names = [
            sorted({path.stem.split("_")[0] for paths in answers.values() for path in paths}) for answers in written
        ]
        if row.arm == "self_training":
            assert names == [["lone"]]
            assert {path.stem for path in written[0][FOLDS_OF_PATIENTS[row.source_fold or 0][0]]} == {
                f"lone_on_{row.source_fold}_s{row.seed}"
            }
        elif row.arm == "kd_experts_dropout":
            assert names == [["expert"]] * 3
            modalities = [next(iter(answers.values()))[0].stem.split("_")[1] for answers in written]
            specs = [options(job.typed()[0], "--teacher")[i].partition("=")[0] for i in range(3)]
            assert modalities == specs == ["ct", "pet", "mr"]
        else:
            assert names == [["t1", "t2"]]
    assert arms == {
        *(("B1", arm) for arm in ("kd", "kd_unlabelled")),
        *(("B2", arm) for arm in ("kd", "self_training")),
        *(("C", arm) for arm in ("kd_in_sample", "kd_out_of_fold")),
        *(("D", arm) for arm in ("kd_dropout", "kd_mr", "kd_ct+pet", "kd_experts_dropout")),
        *(("E", arm) for arm in ("hinton_t1", "hinton_t4", "cwd", "dist")),
    }


def test_an_answer_file_is_named_after_what_its_network_has_seen(jobs: list[StudyJob]) -> None:
    weights = {job.folder / "model.pt": job for job in jobs if job.answers is None}
    answering = [job for job in jobs if job.answers and job.answers.teacher]
    assert len(answering) == 20 + 5 + 10 + 10 + 15
    for job in answering:
        assert job.answers is not None
        assert len(job.needs) == 1
        labelled, unlabelled, _ = data_folds(weights[job.needs[0]])
        assert not unlabelled
        assert seen_folds(job.answers.paths[0]) == labelled
        assert not {row.fold for row in job.rows} & labelled
    files = [job.answers.paths[0] for job in answering if job.answers]
    assert len(files) == len(set(files))
    needed = {path for job in jobs for path in job.needs if path.suffix == ".npz"}
    assert needed <= set(files)


def test_arms_of_an_experiment_have_the_same_steps_and_seeds(jobs: list[StudyJob]) -> None:
    steps: dict[tuple[Any, ...], set[int]] = defaultdict(set)
    seeds: dict[tuple[str, str, str], set[tuple[int, int | None, int]]] = defaultdict(set)
    for job in jobs:
        row = job.study_row
        if job.answers or row.experiment not in ("B1", "B2", "C", "D", "E", "F"):
            continue
        assert job.seed == row.seed
        assert abs(job.notes["steps"] - row.steps) <= 0.05 * row.steps
        seeds[row.experiment, row.arm, row.student].add((row.fold, row.source_fold, row.seed))
        if row.arm not in ("elsewhere", "alone_long"):
            steps[row.experiment, row.fold, row.source_fold].add(job.notes["steps"])
    assert all(len(lengths) == 1 for lengths in steps.values())
    next_folds = {(fold, (fold + 1) % FOLDS, seed) for fold in range(FOLDS) for seed in (0, 1)}
    later = {(fold, (fold + 2) % FOLDS, seed) for fold in range(FOLDS) for seed in (0, 1)}
    alone = {(fold, None, seed) for fold in range(FOLDS) for seed in (0, 1)}
    expected = {"B1": next_folds | later, "B2": next_folds}
    for (experiment, _, _), found in seeds.items():
        assert found == expected.get(experiment, alone)
    long = [job for job in jobs if job.study_row.arm == "alone_long"]
    assert {job.study_row.steps for job in long} == {2 * 4000 + 2000}


def test_the_order_of_the_jobs_is_that_of_their_value(jobs: list[StudyJob]) -> None:
    names = [job.study_row.name for job in jobs]
    assert len(names) == len(set(names))
    stage = {pair: 1 for pair in STAGE_1} | {pair: 2 for pair in STAGE_2}

    def group(row: StudyRow) -> str:
        if row.experiment in ("A", "teachers") and row.arm != "dynunet":
            assert row.source_fold is not None
            pair = (min(row.fold, row.source_fold), max(row.fold, row.source_fold))
            return f"A{stage[pair]}"
        if row.experiment == "C":
            late = {"alone_long": " long", "kd_out_of_fold": " out of fold"}.get(row.arm, "")
            return f"C {'3.5M' if row.student == '3.5M' else 'small' + late}"
        if row.experiment == "B1":
            return f"B1 {((row.source_fold or 0) - row.fold) % FOLDS}"
        if row.arm.startswith(("expert", "kd_experts")):
            return "D experts"
        return {"few_labels_teachers": "B2", "answers": "B2", "experts": "D experts"}.get(
            row.experiment, row.experiment
        )

    rows = [job.study_row for job in jobs if job.study_row.experiment != "weights" and job.study_row.arm != "dynunet"]
    assert list(dict.fromkeys(map(group, rows))) == [
        *("recipe", "A1", "B1 1", "C small", "B2", "D", "A2", "C small out of fold", "B1 2"),
        *("C small long", "D experts", "C 3.5M", "E", "F"),
    ]


def test_every_setting_of_a_job_is_an_id_of_the_configs(jobs: list[StudyJob]) -> None:
    """An id that the configs do not hold would end each job at its start, and the queue would go on with the next."""
    known = merge_configs(["train", "distill", "teacher"]) | merge_configs(["inference", "score"])
    keys = {key for job in jobs for command in job.typed() for key in settings(command)}
    assert {"segmentation_loss#batch", "student_features"} <= keys
    unknown = [key for key in keys if not key.startswith(("+", "loss#", "teacher_specs")) and not has_id(known, key)]
    assert unknown == []


def test_every_command_finds_its_cases_in_the_split_of_its_job(
    jobs: list[StudyJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teachers' split is one fold of all patients: nobody trains, and all are answered for."""
    monkeypatch.setattr(study_taught, "write_predictions", lambda *_: None)
    found: dict[str, set[int]] = {}
    for job in jobs:
        if not job.typed() or job.study_row.seed or job.study_row.fold:
            continue
        job.prepare()
        command = job.typed()[0]
        rows = json.loads((job.folder / "cases.json").read_text())
        cases = [{**row, "label": row.get("label", "")} for row in rows]
        fold = settings(command).get("fold", *options(command, "--fold"))
        which = "all" if command[0] == "cache-teachers" else "training"
        chosen = chosen_cases(fold_split(cases, int(fold), file=job.folder / "splits.json"), which)
        found.setdefault(f"{job.study_row.experiment} {command[0]}", set()).add(len(chosen))
    assert found["A cache-teachers"] == {38}
    assert found["teachers teacher"] == {22, 23}
    assert found["C train"] == found["C distill"] == {30}
    assert found["B1 distill"] == {8}


@pytest.mark.parametrize("native", [True, False])
def test_students_train_in_one_precision_on_every_cpu(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that goes on on another CPU must not give one arm of a comparison another precision."""
    monkeypatch.setattr("benchmarks.study_setting.native_bf16", lambda: native)
    plan = new_plan(tmp_path, monkeypatch)
    judge(plan, 0.9)
    precisions: dict[str, set[str]] = {}
    for job in plan.jobs():
        if job.answers is None:
            command = job.typed()[0]
            precisions.setdefault(command[0], set()).add(settings(command)["precision"])
    fastest = '"bfloat16"' if native else '"float32"'
    assert precisions == {"train": {'"float32"'}, "distill": {'"float32"'}, "teacher": {fastest}}
