# SPDX-License-Identifier: Apache-2.0
"""One job of the study: a training and its evaluation. It leaves one JSON and one table of cases."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.job_queue import Command, Job
from benchmarks.lower_bound import cpu_name
from benchmarks.study_answers import mean_logit, read_answer, tumour_logit, without_padding, write_answers, write_masks
from scripts.data import preprocessing
from scripts.evaluation.score import score
from scripts.image_io.checks import LABEL, Rules
from scripts.image_io.reader import header_of
from scripts.metrics import image_diagonal_mm, read_rows
from scripts.training.skip_nonfinite import DIVERGED
from scripts.utils.atomic_files import write_bytes, write_json
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import git_commit
from scripts.utils.tensor_files import load_plain

COLUMNS = ("case_id", "patient_id", "region", "dice", "hd95_mm", "assd_mm", "status", "diagonal_mm")
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
        student = self.student.replace(" ", "_")
        return f"{self.experiment}.{self.arm}.{student}.f{self.fold}{source}.s{self.seed}"


@dataclass(frozen=True)
class Answers:
    """The answers of a pair's teachers that a job collects and scores.

    Args:
        paths: answer files; the job writes the first if ``teacher`` is given, else it scores their mean.
        cases: data list of all cases.
        folds: patients of each fold.
        labels: values of the reference masks for each class.
        settings: what decides on the networks' grid.
        rows: where the scores belong.
        teacher: name of the teacher in the cache.
    """

    paths: tuple[Path, ...]
    cases: Sequence[Mapping[str, Any]]
    folds: Sequence[Sequence[str]]
    labels: Sequence[Sequence[int]]
    settings: Mapping[str, Any]
    rows: tuple[StudyRow, ...]
    teacher: str = ""

    def collect(self, cache: Path) -> None:
        """Write the answer file from what ``cache-teachers`` wrote."""
        files = preprocessing(mode="train", labels=self.labels, patch=[1, 1, 1], **self.settings).files
        answers = {}
        for case in self.cases:
            name, (affine, shape) = str(case["case_id"]), files.grid(case)
            logits = tumour_logit(load_plain(cache / self.teacher / f"{name}.pt")["logits"])
            answers[name] = (without_padding(logits, shape), affine)
        write_answers(self.paths[0], answers)

    def score(self, folder: Path, row: StudyRow) -> list[dict[str, Any]]:
        """Score the mean answer on a row's fold, which the teachers have not seen; returns a row per case."""
        tested = [case for case in self.cases if str(case["patient_id"]) in self.folds[row.fold]]
        logits = [[read_answer(path, str(case["case_id"]))[0] for path in self.paths] for case in tested]
        masks = zip(tested, map(mean_logit, logits), strict=True)
        write_masks(folder / "masks", masks, self.settings)
        intensity = {key: self.settings["intensity"][key] for key in self.settings["modalities"]}
        score(row.arm, tested, self.labels, str(folder / "masks"), str(folder), intensity, workers=1)
        return read_rows(folder / "cases.csv")


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
        serves: the files for which the weights of this training are needed; once they all exist, it is not. None of a
            training that is evaluated itself.
        answers: what a job of the teachers collects instead of an evaluation.
        scored: where the results of the evaluations belong, if there are several.
        trained: the training whose network answers; the record describes it.
        tested: the cases of the tested fold; if the training diverges, each of them counts as failed.
        description: file that describes a job without rows.
    """

    study_row: StudyRow = field(kw_only=True)
    results: Path = field(kw_only=True)
    build: Callable[[], tuple[Command, ...]] = field(default=tuple, kw_only=True)
    before: tuple[Command, ...] = field(default=(), kw_only=True)
    preparations: tuple[Callable[[], None], ...] = field(default=(), kw_only=True)
    notes: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    folders: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    serves: tuple[Path, ...] | None = field(default=None, kw_only=True)
    answers: Answers | None = field(default=None, kw_only=True)
    scored: tuple[StudyRow, ...] = field(default=(), kw_only=True)
    trained: StudyJob | None = field(default=None, kw_only=True)
    tested: tuple[Mapping[str, Any], ...] = field(default=(), kw_only=True)
    description: Path | None = field(default=None, kw_only=True)

    @property
    def rows(self) -> tuple[StudyRow, ...]:
        """Where the results of this job belong."""
        return self.answers.rows if self.answers else self.scored or (self.study_row,)

    @property
    def record(self) -> Path:
        """The file of the result."""
        return self._record(self.study_row)

    def _record(self, row: StudyRow) -> Path:
        return self.results / "jobs" / f"{row.name}.json"

    @property
    def done(self) -> bool:
        """Whether the result is kept, or nothing needs it any more."""
        described = self.description is None or self.description.is_file()
        if self.serves is not None:
            served = bool(self.serves) and all(path.is_file() for path in self.serves)
            return served or (self._trained() and described)
        written = not (self.answers and self.answers.teacher) or self.answers.paths[0].is_file()
        return described and written and all(self._record(row).is_file() for row in self.rows)

    def typed(self) -> tuple[Command, ...]:
        """The commands, as they are now."""
        return self.build()

    @property
    def pending_commands(self) -> list[Command]:
        """The commands whose results do not exist yet; a training's are preceded by what it needs."""
        if not self.build():
            return []
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
            self._keep_answers(self.answers)
        elif self.serves is None:
            for name, row in zip(self.evaluations, self.rows, strict=True):
                self._keep(row, read_rows(self.folder / name / "cases.csv"))
            for name in ("cache", "predictions", *self.evaluations):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.description is not None:
            write_json(self._described(self.study_row, []), self.description)
        for state in self.folder.glob("checkpoint*.pt"):
            state.unlink()

    def _keep_answers(self, answers: Answers) -> None:
        """Keep the scores, then the answers: with these the weights are no longer needed."""
        final = answers.paths[0]
        if answers.teacher:
            answers = replace(answers, paths=(self.folder / final.name,))
            answers.collect(self.folder)
        for row in answers.rows:
            self._keep(row, answers.score(self.folder / row.name, row))
        if answers.teacher:
            write_bytes(answers.paths[0].read_bytes(), final)

    def keep_failure(self, printed: str) -> bool:
        """Keep a training that has diverged: all of its cases have failed, so that it stays in every table."""
        if DIVERGED not in printed or not self.tested or self.serves is not None:
            return False
        failed = {"status": "error", "dice": None, "hd95_mm": None, "assd_mm": None, "region": ""}
        rows = [
            {**failed, "case_id": case["case_id"], "patient_id": case["patient_id"], "diagonal_mm": _diagonal(case)}
            for case in self.tested
        ]
        for row in self.rows:
            self._keep(row, rows)
        return True

    def _keep(self, row: StudyRow, rows: list[dict[str, Any]]) -> None:
        write_json(self._described(row, rows), self._record(row))

    def _described(self, row: StudyRow, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The record of a result: how it was made, and its cases."""
        source = self.trained or self
        manifest_path = source.folder / "manifest.json"
        manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else {}
        typed = [*source.before, *source.typed(), *(self.typed() if self.trained else ())]
        commands = [shlex.join(("python", "-m", "scripts", *command)) for command in typed]
        for folder, name in self.folders.items():
            commands = [command.replace(folder, name) for command in commands]
        on_gpu = str(source.notes.get("device", "cpu")).startswith("cuda")
        return {
            **{key: getattr(row, key) for key in row.__dataclass_fields__},
            **source.notes,
            "commit": manifest.get("git_commit") or source.notes.get("commit") or git_commit(),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "processor": cpu_name(1),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "seconds": manifest.get("wall_seconds"),
            "parameters": source._parameters(),
            "answers": {path.name: sha256(path) for path in source.needs if path.suffix == ".npz"},
            "commands": commands,
            "manifest": {key: manifest.get(key) for key in MANIFEST},
            "cases": [{key: each[key] for key in COLUMNS} for each in rows],
        }

    def _parameters(self) -> int | None:
        weights = self.folder / "model.pt"
        if not weights.is_file():
            return None
        state = cast("Mapping[str, torch.Tensor]", load_plain(weights))
        return sum(value.numel() for value in state.values())


def _diagonal(case: Mapping[str, Any]) -> float:
    """The diagonal of a case's reference mask in mm."""
    header = header_of(case[LABEL], Rules())
    return image_diagonal_mm(header.shape[:3], np.linalg.norm(header.affine[:3, :3], axis=0))
