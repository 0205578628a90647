# SPDX-License-Identifier: Apache-2.0
"""Where the study runs: data, folds, folders and device; it turns a row of the plan into a job."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.study_job import StudyJob, StudyRow
from scripts.cli.config import read_config
from scripts.data import datalist
from scripts.data.folds import make_splits
from scripts.runtime.engines import native_bf16
from scripts.utils.atomic_files import write_json

FOLDS = 5
BATCH = 2
EVALUATED = ("spacing", "patch", "modalities", "intensity", "selective_fusion")  # settings of an evaluation, too
GRID = {"spacing": [4.0, 4.0, 4.0], "patch": [48, 48, 48], "ema": 0.99}


def other_folds(*left_out: int) -> list[int]:
    """All folds but these."""
    return [k for k in range(FOLDS) if k not in left_out]


@dataclass(frozen=True)
class StudySetting:
    """Where the study runs, and how.

    Args:
        data: name of the data set.
        dataset_dir: its folder.
        output: folder of the trainings, which are not kept.
        results: folder of the results, which are kept.
        device: such as ``cpu`` or ``cuda``.
        shorten: divide all numbers of steps by this, to try the queue. Such results are marked.
        commit: commit of the code, where it is not a git checkout.
    """

    data: str
    dataset_dir: str
    output: Path
    results: Path
    device: str = "cpu"
    shorten: int = 1
    commit: str = ""
    folds: list[list[str]] = field(init=False)
    cases: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_dir", os.path.abspath(self.dataset_dir))  # is named DATA in the records
        cases = datalist(self.data, self.dataset_dir)
        object.__setattr__(self, "cases", cases)
        object.__setattr__(self, "folds", make_splits((str(case["patient_id"]) for case in cases), FOLDS, seed=0))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Config of the data set."""
        return read_config(f"data/{self.data}")

    @property
    def grid_settings(self) -> dict[str, Any]:
        """What decides on the networks' grid."""
        kept = {key: self.settings[key] for key in ("modalities", "intensity", "naming")}
        return {**kept, "spacing": GRID["spacing"]}

    @property
    def gpu(self) -> bool:
        """Whether the trainings run on a GPU."""
        return self.device.startswith("cuda")

    @property
    def fastest_precision(self) -> str:
        """bfloat16 where the device has instructions for it."""
        return "bfloat16" if self.gpu or native_bf16() else "float32"

    def cases_of(self, folds: Sequence[int]) -> Iterator[dict[str, Any]]:
        patients = {patient for k in folds for patient in self.folds[k]}
        return (case for case in self.cases if str(case["patient_id"]) in patients)

    def record(self, row: StudyRow) -> Path:
        """The file of a row's result."""
        return self.results / "jobs" / f"{row.name}.json"

    def job_folder(self, row: StudyRow) -> Path:
        return self.output / row.name.replace("@", "_")  # MONAI reads @ as a reference

    def job(
        self,
        row: StudyRow,
        train: Sequence[int],
        unlabelled: Sequence[int],
        verb: Callable[[], Command],
        settings: Callable[[], dict[str, Any]],
        schedule: bool = False,
        evaluated: bool = True,
        evaluations: Mapping[str, Command] | None = None,
        staged: bool = False,
        modalities: Sequence[str] = (),
    ) -> StudyJob:
        """A training on some folds, evaluated on the row's fold.

        Args:
            row: where the result belongs.
            train: folds to train on with their labels.
            unlabelled: folds to train on without their labels.
            verb: gives the verb and its options, when the job starts.
            settings: gives config id -> value, when the job starts.
            schedule: set the length of the training.
            evaluated: evaluate the weights.
            evaluations: name -> options, where there are several; the arm of such a result is ``ARM@NAME``.
            modalities: those of the data list; by default all.
            staged: the verb divides ``--epochs`` among its stages, so that no setting may replace it.
        """
        folder = self.job_folder(row)
        steps = max(1, row.steps // self.shorten)
        labelled, others = list(self.cases_of(train)), list(self.cases_of(unlabelled))
        tested = [case for case in self.cases_of([row.fold]) if case not in labelled]
        per_epoch = max(1, (len(labelled) + len(others)) // BATCH)
        epochs = max(2 if staged else 1, -(-steps // per_epoch))

        used = tuple(modalities or self.settings["modalities"])

        def prepare() -> None:
            rows = [self._list_row(case, (*used, "label")) for case in (*labelled, *tested)]
            rows += [self._list_row(case, used) for case in others]
            write_json(rows, folder / "cases.json")
            patients = [sorted({str(case["patient_id"]) for case in part}) for part in (tested, [*labelled, *others])]
            write_json({"seed": 0, "folds": [part for part in patients if part]}, folder / "splits.json")

        length: dict[str, Any] = {"max_epochs": epochs, "val_interval": epochs + 1, "num_workers": 0}
        length |= {"save_interval": epochs if self.gpu else max(1, epochs // 10)}
        length |= {"precision": "bfloat16" if self.gpu else "float32"}  # of all arms, on whichever CPUs they run

        notes: dict[str, Any] = {"commit": self.commit, "shortened": self.shorten > 1, "steps": epochs * per_epoch}
        notes |= {"device": self.device, "train_folds": [*train], "unlabelled_folds": [*unlabelled]}
        job = StudyJob(
            row.name,
            row.seed,
            folder,
            (),
            study_row=row,
            results=self.results,
            preparations=(prepare,),
            notes=notes,
            tested=tuple(tested),
            folders={str(self.output): "RUNS", str(self.dataset_dir): "DATA"},
        )
        evaluate = ("evaluate", "--weights", str(folder / "model.pt"), "--fold", "0")
        named = {f"eval_{name.replace('+', '_')}": chosen for name, chosen in (evaluations or {}).items()}
        folders: dict[str, Command] = (named or {"eval": ()}) if evaluated else {}

        def commands() -> tuple[Command, ...]:
            values = {**(length if schedule else {}), **settings()}
            epochs_option = ("--epochs", str(values.pop("max_epochs"))) if staged else ()
            first = self.command(job, (*verb(), *epochs_option, "--fold", "0"), values, folder)
            others = (
                self.command(job, (*evaluate, *chosen), settings(), folder / name) for name, chosen in folders.items()
            )
            return first, *others

        scored = tuple(replace(row, arm=f"{row.arm}@{name}") for name in evaluations or ())
        return replace(job, build=commands, evaluations=tuple(folders), scored=scored)

    def _list_row(self, case: dict[str, Any], keys: Sequence[str]) -> dict[str, str]:
        """A case's row of a data list, with paths relative to the data set's folder."""
        files = {key: case[key] for key in keys if key in case}
        paths = {key: Path(path).relative_to(self.dataset_dir).as_posix() for key, path in files.items()}
        return {"case_id": str(case["case_id"]), "patient_id": str(case["patient_id"]), **paths}

    def command(self, job: StudyJob, verb: Command, settings: dict[str, Any], output: Path) -> Command:
        """A command of a job: its data, folders, device and settings."""
        files = ("--data-list", str(job.folder / "cases.json"), "--set", f"splits_file={job.folder / 'splits.json'}")
        where = ("--data", self.data, "--dataset-dir", self.dataset_dir, *files, "--output-dir", str(output))
        how = ["--seed", str(job.seed), "--threads", "1", "--device", self.device]
        if verb[0] != "evaluate":
            how += ["--set", f"volumes_dir={self.output / 'volumes'}"]
        values = {**GRID, **settings}
        if verb[0] == "evaluate":
            values = {key: value for key, value in values.items() if key in EVALUATED or "student" in key}
        sets = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        return (*verb, *where, *how, *sets)
