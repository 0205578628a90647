# SPDX-License-Identifier: Apache-2.0
"""A study of 38 patients whose files do not exist, and what its jobs say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_plan import StudyPlan
from benchmarks.study_setting import FOLDS
from benchmarks.study_teachers import STAGE_1
from scripts.data.folds import make_splits

FILES = {"ct": "CT.nii.gz", "pet": "PET.nii.gz", "mr": "MR.nii.gz", "label": "mask.nii.gz"}
ALL = set(range(FOLDS))
FOLDS_OF_PATIENTS = make_splits([f"P{number:02d}" for number in range(38)], FOLDS, seed=0)


def new_plan(root: Path, monkeypatch: pytest.MonkeyPatch, kind: Any = StudyPlan) -> Any:
    """The study of 38 patients whose files do not exist."""
    cases = []
    for number in range(38):
        name = f"P{number:02d}"
        files = {key: str(root / "data" / name / file) for key, file in FILES.items()}
        cases.append({"case_id": name, "patient_id": name, "image": files["ct"], **files})
    monkeypatch.setattr("benchmarks.study_setting.datalist", lambda *_: cases)
    return kind("sts", str(root / "data"), root / "runs", root / "results")


def options(command: Sequence[str], name: str = "--set") -> list[str]:
    """The values of an option in a command."""
    return [command[i + 1] for i, word in enumerate(command) if word == name]


def settings(command: Sequence[str]) -> dict[str, str]:
    """The overrides of a command."""
    return {key: value for key, _, value in (pair.partition("=") for pair in options(command))}


def write_record(plan: StudyPlan, row: StudyRow, dice: float) -> None:
    path = plan.record(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"patient_id": str(number), "dice": dice, "status": "ok"} for number in range(3)]
    path.write_text(json.dumps({"cases": rows}))


def choose(plan: StudyPlan, best: str) -> None:
    """Write results of all recipes, of which one is better."""
    for job in plan.recipe_jobs():
        write_record(plan, job.study_row, 0.7 if job.study_row.arm == best else 0.6)


def judge(plan: StudyPlan, ensemble: float, best: str = "batch_dice") -> None:
    """Judge the gate with this Dice of the ensemble; the lone student of the best recipe has 0.7."""
    choose(plan, best)
    for job in plan.teacher_jobs(STAGE_1[:1]):
        for row in job.rows if job.answers else ():
            write_record(plan, row, ensemble)
    plan.judge_gate()


def data_folds(job: StudyJob) -> tuple[set[int], set[int], set[int]]:
    """The folds on which a job trains with labels, without them, and is tested; from the files that it writes."""
    job.folder.mkdir(parents=True, exist_ok=True)
    job.preparations[0]()
    rows = json.loads((job.folder / "cases.json").read_text())
    tested, *training = json.loads((job.folder / "splits.json").read_text())["folds"]
    fold_of = {patient: k for k, part in enumerate(FOLDS_OF_PATIENTS) for patient in part}
    trained = {row["patient_id"]: "label" in row for row in rows if row["patient_id"] not in tested}
    assert sorted(trained) == sorted(training[0] if training else [])
    parts = [{fold_of[p] for p, label in trained.items() if label is wanted} for wanted in (True, False)]
    assert sum(len(FOLDS_OF_PATIENTS[k]) for part in parts for k in part) == len(trained)  # whole folds
    return parts[0], parts[1], {fold_of[patient] for patient in tested}


def seen_folds(path: Path) -> set[int]:
    """The folds that the network of an answer file has seen, by the name of the file."""
    words = path.stem.split("_")
    numbers = {int(word) for word in words if len(word) == 1}
    return numbers if "on" in words else ALL - numbers
