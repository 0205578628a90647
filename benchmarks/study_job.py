# SPDX-License-Identifier: Apache-2.0
"""One job of the study: a training and its evaluation. It leaves one JSON and one table of cases."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.job_queue import Command, Job
from benchmarks.study_answers import Array, NetworkGrid, mean_logit, tumour_logit, without_padding, write_answers
from scripts.evaluation.score import score
from scripts.metrics import read_rows
from scripts.utils.atomic_files import write_json
from scripts.utils.tensor_files import load_plain

COLUMNS = ("case_id", "patient_id", "dice", "hd95_mm", "assd_mm", "status", "diagonal_mm")
MANIFEST = ("bundle_version", "versions", "threads", "wall_seconds", "peak_mib", "teachers_sha256", "data_sha256")


@dataclass(frozen=True)
class StudyRow:
    """Where a result belongs.

    Args:
        experiment: such as B1.
        arm: what is compared, such as kd.
        student: its size, or the teacher.
        fold: the tested fold.
        source_fold: the other fold of a pair, if any.
        seed: of the training.
        steps: length of the training.
    """

    experiment: str
    arm: str
    student: str
    fold: int
    source_fold: int | None
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its files."""
        source = "" if self.source_fold is None else f".j{self.source_fold}"
        return f"{self.experiment}.{self.arm}.{self.student}.f{self.fold}{source}.s{self.seed}"


@dataclass(frozen=True)
class Answers:
    """The answers of a pair's teachers that a job collects and scores.

    Args:
        path: the answer file.
        teachers: their names in the cache.
        cases: data list of all cases.
        folds: patients of each fold.
        labels: values of the reference masks for each class.
        settings: what decides on the networks' grid.
        rows: where the scores belong: each teacher and the ensemble on each of the pair's folds.
    """

    path: Path
    teachers: tuple[str, ...]
    cases: Sequence[Mapping[str, Any]]
    folds: Sequence[Sequence[str]]
    labels: Sequence[Sequence[int]]
    settings: Mapping[str, Any]
    rows: tuple[StudyRow, ...]

    def collect(self, cache: Path, record: Callable[[StudyRow, list[dict[str, Any]]], None]) -> None:
        """Write the answer file and score the answers on the folds that the teachers have not seen.

        Args:
            cache: folder that ``cache-teachers`` wrote.
            record: keeps the case rows of a result.
        """
        grid = NetworkGrid(self.settings)
        answers: dict[str, dict[str, Array]] = {}
        affines: dict[str, Array] = {}
        for case in self.cases:
            name, image = str(case["case_id"]), grid.image(case)
            stored = {k: load_plain(cache / k / f"{name}.pt")["logits"] for k in self.teachers}
            logits = {k: without_padding(tumour_logit(each), image.shape[1:]) for k, each in stored.items()}
            answers[name] = {**logits, "ensemble": mean_logit(list(logits.values()))}
            affines[name] = image.affine.numpy()
        for row in self.rows:
            tested = [case for case in self.cases if str(case["patient_id"]) in self.folds[row.fold]]
            folder = cache / row.name
            grid.write_masks(folder / "masks", [(case, answers[str(case["case_id"])][row.arm]) for case in tested])
            intensity = self.settings["intensity"]
            score(row.arm, tested, self.labels, str(folder / "masks"), str(folder), intensity, workers=1)
            record(row, read_rows(folder / "cases.csv"))
        write_answers(self.path, {name: (each["ensemble"], affines[name]) for name, each in answers.items()})


@dataclass(frozen=True)
class StudyJob(Job):
    """A job whose results are kept as ``jobs/<name>.json``.

    Args:
        study_row: where the result belongs.
        results: folder of the kept results.
        build: gives the commands when the job starts, because they may depend on the results of others.
        before: a command that the training needs first.
        preparations: called before the commands.
        notes: further values of the record.
        folders: folder -> what stands for it in the commands of the record.
        kept: a file that makes this job unnecessary.
        answers: what a job of the teachers collects instead of an evaluation.
    """

    study_row: StudyRow = field(kw_only=True)
    results: Path = field(kw_only=True)
    build: Callable[[], tuple[Command, ...]] = field(default=tuple, kw_only=True)
    before: tuple[Command, ...] = field(default=(), kw_only=True)
    preparations: tuple[Callable[[], None], ...] = field(default=(), kw_only=True)
    notes: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    folders: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    kept: Path | None = field(default=None, kw_only=True)
    answers: Answers | None = field(default=None, kw_only=True)

    @property
    def record(self) -> Path:
        """The file of the result."""
        return self.results / "jobs" / f"{self.study_row.name}.json"

    @property
    def done(self) -> bool:
        """Whether the result is kept, or nothing needs it any more."""
        if self.answers is not None:
            return self.answers.path.is_file()
        if self.kept is not None:
            return self.kept.is_file() or self._trained()
        return self.record.is_file()

    def typed(self) -> tuple[Command, ...]:
        """The commands, as they are now."""
        return self.build()

    @property
    def pending_commands(self) -> list[Command]:
        """The commands whose results do not exist yet; a training's are preceded by what it needs."""
        pending = super().pending_commands
        return pending if self._trained() else [*self.before, *pending]

    def prepare(self) -> None:
        """Write the files that the commands read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for preparation in self.preparations:
            preparation()

    def finish(self) -> None:
        """Keep the result, and remove what nobody needs any more."""
        if self.answers is not None:
            self.answers.collect(self.folder, self._keep)
        elif self.kept is None:
            self._keep(self.study_row, read_rows(self.folder / "eval" / "cases.csv"))
            for name in ("cache", "predictions", "eval"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        for state in self.folder.glob("checkpoint*.pt"):
            state.unlink()

    def _keep(self, row: StudyRow, rows: list[dict[str, Any]]) -> None:
        manifest_path = self.folder / "manifest.json"
        manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else {}
        commands = [shlex.join(("python", "-m", "scripts", *command)) for command in (*self.before, *self.typed())]
        for folder, name in self.folders.items():
            commands = [command.replace(folder, name) for command in commands]
        record = {
            **{key: getattr(row, key) for key in row.__dataclass_fields__},
            **self.notes,
            "commit": manifest.get("git_commit") or self.notes.get("commit"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "processor": processor(),
            "seconds": manifest.get("wall_seconds"),
            "parameters": self._parameters(),
            "commands": commands,
            "manifest": {key: manifest.get(key) for key in MANIFEST},
            "cases": [{key: each[key] for key in COLUMNS} for each in rows],
        }
        write_json(record, self.results / "jobs" / f"{row.name}.json")

    def _parameters(self) -> int | None:
        weights = self.folder / "model.pt"
        if not weights.is_file():
            return None
        state = cast("Mapping[str, torch.Tensor]", load_plain(weights))
        return sum(value.numel() for value in state.values())


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
