# SPDX-License-Identifier: Apache-2.0
"""The teachers of the study (experiments A1 and A2), and the gate that judges them.

A teacher answers for every patient once, as the mean probability over all flips of the image. A kept file holds the
answers; the students read them, and the teachers' scores are computed from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.study_job import Answers, StudyJob, StudyRow
from benchmarks.study_setting import FOLDS, other_folds
from benchmarks.study_students import StudyStudents
from scripts.utils.atomic_files import write_json

STAGE_1 = ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4))
STAGE_2 = ((0, 2), (1, 3), (2, 4), (0, 3), (1, 4))
GATE_MARGIN = 0.03
TEACHER_STEPS = 4000
TEACHERS: dict[str, dict[str, Any]] = {
    "t1": {"architecture": "hdenseformer", "learning_rate": 0.001, "gradient_clip": 1.0},
    "t2": {"architecture": "unetr", "learning_rate": 0.0003, "gradient_clip": 1.0},
    "dynunet": {"architecture": "dynunet", "learning_rate": 0.001, "gradient_clip": 1.0},
}
TRIES: tuple[tuple[int, tuple[str, ...]], ...] = (  # steps and ensemble that the gate judges, one after the other
    (TEACHER_STEPS, ("t1", "t2")),
    (2 * TEACHER_STEPS, ("t1", "t2")),
    (2 * TEACHER_STEPS, ("t1", "t2", "dynunet")),
)
TEACHER_SCALE = "full"
CNN = {"filters": [32, 64, 128, 256]}  # 5.6 M; more stages do not fit patches of 48 voxels
VIT_SMALL = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6}  # where there is no GPU

Sources = Mapping[str, Sequence[Path]]  # case -> the answer files whose mean probability it gets


@dataclass(frozen=True)
class Origin:
    """A network that answers.

    Args:
        name: of the teacher in the cache.
        architecture: as ``--teacher`` names it, with its modalities where these are not all.
        sizes: settings of the network.
    """

    name: str
    architecture: str
    sizes: Mapping[str, Any]


class StudyTeachers(StudyStudents):
    """Trainings of teachers, and their answers."""

    # The gate: are the teachers good enough, must they train longer, or must there be more of them?

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What the gate has judged so far; None before the first try."""
        path = self.results / "gate.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def gate(self) -> dict[str, Any] | None:
        """The verdict of the gate; None before it is final."""
        verdict = self.verdict
        return verdict if verdict and verdict["final"] else None

    @property
    def teacher_steps(self) -> int:
        """Length of the teachers' trainings, which the gate may double."""
        verdict = self.verdict
        return int(verdict["steps"]) if verdict else TRIES[0][0]

    @property
    def members(self) -> tuple[str, ...]:
        """The teachers of an ensemble, to which the gate may add one."""
        verdict = self.verdict
        return tuple(verdict["teachers"]) if verdict else TRIES[0][1]

    @property
    def recipe(self) -> str:
        """The name of the recipe that the gate was judged with; before, see ``StudyStudents``."""
        verdict = self.verdict
        return str(verdict["recipe"]) if verdict else super().recipe

    def judge_gate(self) -> None:
        """Compare the first pair's ensemble with the lone student on the patients of fold 1, if both are known.

        If it fails, the next of ``TRIES`` follows. After the last, the study goes on and says that the gate failed.
        """
        ensemble = self._ensemble(STAGE_1[0])
        if self.gate is not None or not ensemble.done or not all(path.is_file() for path in self.recipe_records):
            return
        tries = [*(self.verdict or {"tries": []})["tries"]]
        lone, dice = self.lone_dice(1), self.mean_dice([self._ensemble_row(STAGE_1[0], 1)])
        passed = dice - lone >= GATE_MARGIN
        tries.append({"steps": self.teacher_steps, "teachers": self.members, "ensemble": dice, "passed": passed})
        final = passed or len(tries) == len(TRIES)
        steps, teachers = TRIES[min(len(tries) - int(final), len(TRIES) - 1)]
        verdict = {"recipe": self.recipe, "lone": lone, "tries": tries, "passed": passed, "final": final}
        write_json({**verdict, "steps": steps, "teachers": teachers}, self.results / "gate.json")

    # Teachers that have not seen two of the folds.

    def teacher_jobs(self, pairs: Sequence[tuple[int, int]]) -> list[StudyJob]:
        """The teachers of each pair of folds, the answers of each on all patients, and the ensemble's scores."""
        jobs = []
        for pair in pairs:
            jobs += [job for name in self.members for job in self.pair_teacher(name, pair)]
            jobs.append(self._ensemble(pair))
        return jobs

    def pair_teacher(self, name: str, pair: tuple[int, int]) -> list[StudyJob]:
        """The training of a teacher without the folds of a pair, and its answers."""
        rows = [self.teacher_row(name, pair, fold) for fold in pair]
        train = other_folds(*pair)
        return self.teacher(name, train, rows, self.answers_path(name, pair), "teachers")

    def teacher(
        self, name: str, train: Sequence[int], rows: Sequence[StudyRow], path: Path, trained_as: str, modality: str = ""
    ) -> list[StudyJob]:
        """The training of a teacher, and its answers over all flips.

        Args:
            name: in ``TEACHERS``.
            train: folds to train on.
            rows: where its scores belong; the fold of none of them is in ``train``.
            path: file of its answers.
            trained_as: experiment in the training's name.
            modality: the only one that it reads; by default all.
        """
        settings = {**TEACHERS[name], "precision": self.fastest_precision}
        architecture = settings.pop("architecture")
        sizes = self.sizes(name)
        if self.gpu:
            settings["num_workers"] = 2
        command: Command = ("teacher", "--architecture", architecture, "--scale", TEACHER_SCALE)
        command = (*command, "--modalities", modality) if modality else command
        row = replace(rows[0], experiment=trained_as)
        training = self.job(
            row, train, [], lambda: command, lambda: {**settings, **sizes}, schedule=True, evaluated=False
        )
        training = replace(training, serves=(path,))
        origin = Origin(modality or name, f"{architecture}:{modality}" if modality else architecture, sizes)
        return [training, self.answering(training, origin, rows[0], rows, path)]

    def sizes(self, name: str) -> dict[str, Any]:
        """The settings that a teacher's network needs wherever it is built."""
        architecture = TEACHERS[name]["architecture"]
        sizes: dict[str, Any] = {"dynunet": CNN} if self.gpu else {"dynunet": CNN, "unetr": VIT_SMALL}
        return {f"+architectures#{architecture}": sizes[architecture]} if architecture in sizes else {}

    def answering(
        self, training: StudyJob, origin: Origin, row: StudyRow, scored: Sequence[StudyRow], path: Path
    ) -> StudyJob:
        """The answers of a trained network on all patients.

        Args:
            training: leaves the weights.
            origin: the network.
            row: name of the job.
            scored: where its scores belong.
            path: file of the answers.
        """
        weights = training.folder / "model.pt"
        teacher = ("--teacher", f"{origin.name}={origin.architecture}={weights}")
        caching = ("cache-teachers", "--scale", TEACHER_SCALE, *teacher, "--tta", "flips", "--cases", "all")
        batch = {"+answers#inferer#sw_batch_size": 16 if self.gpu else 2}
        job = self.job(row, range(FOLDS), [], lambda: caching, lambda: {**batch, **origin.sizes}, evaluated=False)
        answers = replace(self._answers([path], scored), teacher=origin.name)
        outputs = (f"{origin.name}/manifest.json",)
        return replace(job, needs=(weights,), outputs=outputs, answers=answers, trained=training)

    def restored(self, training: StudyJob, needs: Sequence[Path], serves: Sequence[Path]) -> StudyJob:
        """A training whose results are kept, again, if its weights are needed and no longer there.

        Args:
            training: its folder gets the weights.
            needs: the results, so that both never run at the same time.
            serves: the files that are made with the weights.
        """
        trained = training.study_row
        row = replace(trained, experiment="weights", arm=f"{trained.experiment}_{trained.arm}")
        return replace(weights_only(training, serves), row=row.name, study_row=row, needs=(*training.needs, *needs))

    def ensemble(self, paths: Sequence[Path], rows: Sequence[StudyRow]) -> StudyJob:
        """The scores of the mean answer of several teachers."""
        job = self.job(rows[0], [], [], tuple, dict, evaluated=False)
        return replace(job, needs=tuple(paths), build=tuple, answers=self._answers(paths, rows))

    def _ensemble(self, pair: tuple[int, int]) -> StudyJob:
        paths = [self.answers_path(name, pair) for name in self.members]
        return self.ensemble(paths, [self._ensemble_row(pair, fold) for fold in pair])

    def _ensemble_row(self, pair: tuple[int, int], fold: int) -> StudyRow:
        widened = self.members != TRIES[0][1]
        return self.teacher_row("ensemble_widened" if widened else "ensemble", pair, fold)

    def _answers(self, paths: Sequence[Path], rows: Sequence[StudyRow]) -> Answers:
        return Answers(tuple(paths), self.cases, self.folds, self.settings["labels"], self.grid_settings, tuple(rows))

    def teacher_row(self, arm: str, pair: tuple[int, int], fold: int) -> StudyRow:
        """The row of a pair's teachers, tested on one of its folds."""
        (other,) = (k for k in pair if k != fold)
        return StudyRow("A", arm, f"{self.teacher_steps} steps", fold, other, 0, self.teacher_steps)

    def answers_path(self, name: str, pair: tuple[int, int]) -> Path:
        """The answers of one teacher of a pair."""
        return self.results / "answers" / f"{name}_without_{min(pair)}_{max(pair)}_{self.teacher_steps}.npz"

    # Which answers a student learns from.

    def out_of_fold(self, fold: int, folds: Sequence[int]) -> Sources:
        """For each case of some folds the teachers that have seen neither it nor the tested fold."""
        return self.sources(folds, lambda source: self.pair_answers([(fold, source)]))

    def in_sample(self, fold: int, folds: Sequence[int]) -> Sources:
        """For each case of some folds the teachers of stage 1 that have seen it, but not the tested fold."""
        return self.sources(
            folds, lambda source: self.pair_answers([pair for pair in STAGE_1 if fold in pair and source not in pair])
        )

    def pair_answers(self, pairs: Sequence[tuple[int, int]]) -> list[Path]:
        return [self.answers_path(name, pair) for pair in pairs for name in self.members]

    def sources(self, folds: Sequence[int], answers: Callable[[int], Sequence[Path]]) -> Sources:
        """The answer files of each case, which depend on its fold."""
        return {
            str(case["case_id"]): paths for fold in folds for paths in [answers(fold)] for case in self.cases_of([fold])
        }

    def same_answers(self, folds: Sequence[int], paths: Sequence[Path]) -> Sources:
        """The same answer files for each case."""
        return self.sources(folds, lambda _: paths)


def weights_only(training: StudyJob, serves: Sequence[Path] = ()) -> StudyJob:
    """A training that is not evaluated and leaves its weights, for some files or for good."""
    return replace(training, serves=tuple(serves), build=lambda: training.build()[:1], evaluations=(), scored=())
