# SPDX-License-Identifier: Apache-2.0
"""The jobs of the study: does a teacher add anything, and how small may the student be?

Every job is one training and its evaluation, as the commands that a user would type. Folds are those of split seed 0.
``i`` is the fold that a network is tested on, ``j`` the fold that the pair (i, j) leaves out besides.

The settings were fixed before the first run; deviations from the plan are in docs/results/study/README.md.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.study_answers import write_predictions
from benchmarks.study_job import Answers, StudyJob, StudyRow
from benchmarks.study_setting import FOLDS, StudySetting
from benchmarks.study_statistics import patient_means
from scripts.utils.atomic_files import write_json

STAGE_1 = ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4))
STAGE_2 = ((0, 2), (1, 3), (2, 4), (0, 3), (1, 4))
SEEDS = (0, 1)
STUDENTS: dict[str, list[int]] = {  # widths in multiples of 8: CPUs compute other widths more slowly
    "0.2M": [8, 16, 24, 48],
    "0.9M": [8, 24, 48, 96],
    "3.5M": [24, 48, 96, 192],
}
RECIPES: dict[str, dict[str, Any]] = {  # candidates for the lone student's recipe, on top of the bundle's own
    "default": {},
    "batch_dice": {"segmentation_loss#batch": True},
    "batch_dice_fast": {"segmentation_loss#batch": True, "learning_rate": 0.002},
    "batch_dice_clipped": {"segmentation_loss#batch": True, "gradient_clip": 1.0},
    "batch_dice_fast_clipped": {"segmentation_loss#batch": True, "learning_rate": 0.002, "gradient_clip": 1.0},
}
RECIPE_STEPS = 1000
GATE_MARGIN = 0.03
TEACHER_STEPS = 4000
TEACHERS: dict[str, dict[str, Any]] = {
    "t1": {"architecture": "hdenseformer", "learning_rate": 0.001, "gradient_clip": 1.0},
    "t2": {"architecture": "unetr", "learning_rate": 0.0003, "gradient_clip": 1.0},
}
TEACHER_SCALE = "full"
VIT_SMALL = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6}  # where there is no GPU
TERMS = {"loss#terms#hinton#weight": 1.0, "loss#terms#dist#weight": 1.0}  # L_seg has weight 1, too: half and half
METHODS = ("--method", "hinton", "--method", "dist")
LABEL = ("--teacher", "label")
OUTSIDE = "outside"  # name of the cached teacher


class StudyPlan(StudySetting):
    """The jobs of every experiment."""

    def jobs(self) -> list[StudyJob]:
        """All jobs that can be planned, in the order of their value. Until the gate is judged, these are the first
        pair's teachers and the students without teachers."""
        students = [*self.another_hospital(), *self.compression()]
        if self.gate is None:
            alone = [job for job in students if not job.study_row.arm.startswith("kd")]
            return [*self.recipe_jobs(), *self.teacher_jobs(STAGE_1[:1]), *alone]
        return [*self.recipe_jobs(), *self.teacher_jobs(STAGE_1), *students]

    # The gate: are the teachers good enough, or must they train longer?

    @property
    def gate(self) -> dict[str, Any] | None:
        """The verdict of the gate; None before it is judged."""
        path = self.results / "gate.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def teacher_steps(self) -> int:
        """Length of the teachers' trainings, which the gate may double."""
        gate = self.gate
        return TEACHER_STEPS if gate is None else int(gate["steps"])

    def judge_gate(self) -> None:
        """Compare the first pair's ensemble with the lone student on the patients of fold 1, if both are known."""
        ensemble = self._ensemble(STAGE_1[0])
        if self.gate is not None or not ensemble.done or not all(path.is_file() for path in self.recipe_records):
            return
        chosen = max(RECIPES, key=self._recipe_score)
        rows = [job for job in self.recipe_jobs() if job.study_row.arm == chosen and job.study_row.fold == 1]
        scores = {
            "lone": mean_dice([job.record for job in rows]),
            "ensemble": mean_dice([self.record(self.teacher_row("ensemble", STAGE_1[0], 1))]),
        }
        passed = scores["ensemble"] - scores["lone"] >= GATE_MARGIN
        steps = TEACHER_STEPS if passed else 2 * TEACHER_STEPS
        write_json({"recipe": chosen, **scores, "passed": passed, "steps": steps}, self.results / "gate.json")

    # Experiment 0: the lone student's recipe, by cross-validation inside folds 1 to 4.

    def recipe_jobs(self) -> list[StudyJob]:
        """Every candidate recipe on every fold but the first."""
        inside = range(1, FOLDS)
        return [
            self.student_job(
                StudyRow("recipe", recipe, "0.9M", fold, None, seed, RECIPE_STEPS),
                train=[k for k in inside if k != fold],
                recipe=partial(RECIPES.__getitem__, recipe),
            )
            for recipe in RECIPES
            for fold in inside
            for seed in SEEDS
        ]

    @property
    def recipe_records(self) -> tuple[Path, ...]:
        """The results that the choice of the recipe needs."""
        return tuple(job.record for job in self.recipe_jobs())

    def chosen_recipe(self) -> dict[str, Any]:
        """The settings of the recipe with the highest mean Dice over patients and seeds."""
        return RECIPES[max(RECIPES, key=self._recipe_score)]

    def _recipe_score(self, recipe: str) -> float:
        return mean_dice([job.record for job in self.recipe_jobs() if job.study_row.arm == recipe])

    # Experiments A1 and A2: teachers that have not seen two of the folds.

    def teacher_jobs(self, pairs: Sequence[tuple[int, int]]) -> list[StudyJob]:
        """Two Transformers per pair of folds, the answers of each on all patients, and the ensemble's scores."""
        jobs = []
        for pair in pairs:
            jobs += [job for name in TEACHERS for job in self._one_teacher(name, pair)]
            jobs.append(self._ensemble(pair))
        return jobs

    def _one_teacher(self, name: str, pair: tuple[int, int]) -> list[StudyJob]:
        """The training of a teacher without the folds of a pair, and its answers over all flips."""
        settings = dict(TEACHERS[name])
        architecture = settings.pop("architecture")
        sizes: dict[str, Any] = {}
        if self.gpu:
            settings["num_workers"] = 2
        elif architecture == "unetr":
            sizes = {"+architectures#unetr": VIT_SMALL}
        row = self.teacher_row(name, pair, pair[0])
        train = [k for k in range(FOLDS) if k not in pair]
        command = ("teacher", "--architecture", architecture, "--scale", TEACHER_SCALE)
        training_row = replace(row, experiment="teachers")
        training = self.job(
            training_row, train, [], lambda: command, lambda: {**settings, **sizes}, schedule=True, evaluated=False
        )
        training = replace(training, kept=self.answers_path(name, pair))

        weights = training.folder / "model.pt"
        teacher = ("--teacher", f"{name}={architecture}={weights}")
        caching = ("cache-teachers", "--scale", TEACHER_SCALE, *teacher, "--tta", "flips", "--cases", "all")
        batch = {"+answers#inferer#sw_batch_size": 16 if self.gpu else 2}
        job = self.job(row, range(FOLDS), [], lambda: caching, lambda: {**batch, **sizes}, evaluated=False)
        answers = self._answers([self.answers_path(name, pair)], [replace(row), self.teacher_row(name, pair, pair[1])])
        job = replace(job, needs=(weights,), outputs=(f"{name}/manifest.json",), answers=replace(answers, teacher=name))
        return [training, job]

    def _ensemble(self, pair: tuple[int, int]) -> StudyJob:
        """The scores of the mean answer of a pair's teachers."""
        rows = [self.teacher_row("ensemble", pair, fold) for fold in pair]
        paths = [self.answers_path(name, pair) for name in TEACHERS]
        job = self.job(rows[0], [], [], tuple, dict, evaluated=False)
        return replace(job, needs=tuple(paths), build=tuple, answers=self._answers(paths, rows))

    def _answers(self, paths: Sequence[Path], rows: Sequence[StudyRow]) -> Answers:
        return Answers(tuple(paths), self.cases, self.folds, self.settings["labels"], self.grid_settings, tuple(rows))

    def teacher_row(self, arm: str, pair: tuple[int, int], fold: int) -> StudyRow:
        """The row of a pair's teachers, tested on one of its folds."""
        (other,) = (k for k in pair if k != fold)
        return StudyRow("A", arm, f"{self.teacher_steps} steps", fold, other, 0, self.teacher_steps)

    def answers_path(self, name: str, pair: tuple[int, int]) -> Path:
        """The answers of one teacher of a pair."""
        return self.results / "answers" / f"{name}_without_{min(pair)}_{max(pair)}_{self.teacher_steps}.npz"

    # Experiment B1: another hospital. Fold j is its own, the teachers come from elsewhere.

    def another_hospital(self) -> list[StudyJob]:
        """Five arms for each tested fold i and own fold i + 1."""
        jobs = []
        for seed in SEEDS:
            for fold in range(FOLDS):
                own = (fold + 1) % FOLDS
                jobs += [
                    self.student_job(StudyRow("B1", "alone", "0.9M", fold, own, seed, 1500), [own]),
                    self.student_job(StudyRow("B1", "control", "0.9M", fold, own, seed, 1500), [own], LABEL),
                    self.taught_job(StudyRow("B1", "kd", "0.9M", fold, own, seed, 1500), [own]),
                    self.taught_job(StudyRow("B1", "kd_unlabelled", "0.9M", fold, own, seed, 1500), [], [own]),
                    self.student_job(
                        StudyRow("B1", "elsewhere", "0.9M", fold, own, seed, 1500),
                        [k for k in range(FOLDS) if k not in (fold, own)],
                    ),
                ]
        return jobs

    # Experiment C: compression, all labels.

    def compression(self, students: Sequence[str] = ("0.2M", "0.9M")) -> list[StudyJob]:
        """Alone, taught by teachers that have seen the patients, and the control, for each size of the student."""
        jobs = []
        for seed in SEEDS:
            for fold in range(FOLDS):
                train = [k for k in range(FOLDS) if k != fold]
                for student in students:
                    jobs += [
                        self.student_job(StudyRow("C", "alone", student, fold, None, seed, 2000), train),
                        self.student_job(StudyRow("C", "control", student, fold, None, seed, 2000), train, LABEL),
                        self.taught_job(StudyRow("C", "kd_in_sample", student, fold, None, seed, 2000), train),
                    ]
        return jobs

    # Parts of the jobs.

    def student_job(
        self,
        row: StudyRow,
        train: Sequence[int],
        teacher: Command = (),
        unlabelled: Sequence[int] = (),
        recipe: Callable[[], dict[str, Any]] | None = None,
    ) -> StudyJob:
        """A student alone, or with a teacher.

        Args:
            row: where the result belongs.
            train: folds to train on with their labels.
            teacher: options that name the teacher.
            unlabelled: folds to train on without their labels.
            recipe: gives the settings of the training; by default the chosen recipe.
        """
        command: Command = ("distill", *METHODS, *teacher) if teacher else ("train",)
        command = (*command, "--unlabelled") if unlabelled else command

        def settings() -> dict[str, Any]:
            chosen = self.chosen_recipe() if recipe is None else recipe()
            return {"student_features": STUDENTS[row.student], **chosen, **(TERMS if teacher else {})}

        job = self.job(row, train, unlabelled, lambda: command, settings, schedule=True)
        return job if recipe else replace(job, needs=self.recipe_records)

    def taught_job(self, row: StudyRow, train: Sequence[int], unlabelled: Sequence[int] = ()) -> StudyJob:
        """A student that learns from the answers of teachers that have not seen the tested fold.

        With a ``source_fold`` j its patients are answered by the teachers of the pair (i, j); else every patient is
        answered by the teachers that have seen that patient.
        """
        sources = self._answers_for(row, [*train, *unlabelled])
        folder = self.job_folder(row)
        spec, predictions = folder / "teacher.json", folder / "predictions"

        def prepare() -> None:
            write_json({"predictions": str(predictions), "modalities": self.settings["modalities"]}, spec)
            write_predictions(predictions, sources)

        teacher = ("--teacher", f"{OUTSIDE}={spec}", "--cache-dir", str(folder / "cache"))
        job = self.student_job(row, train, teacher, unlabelled)
        needs = (*job.needs, *dict.fromkeys(path for paths in sources.values() for path in paths))
        caching: Command = ("cache-teachers", "--teacher", f"{OUTSIDE}={spec}", "--fold", "0")
        caching = (*caching, "--unlabelled") if unlabelled else caching
        before = self.command(job, caching, {}, folder / "cache")
        return replace(job, needs=needs, before=(before,), preparations=(*job.preparations, prepare))

    def _answers_for(self, row: StudyRow, folds: Sequence[int]) -> dict[str, list[Path]]:
        sources: dict[str, list[Path]] = {}
        for source in folds:
            if row.source_fold is not None:
                pairs = [(row.fold, source)]
            else:
                pairs = [pair for pair in STAGE_1 if row.fold in pair and source not in pair]
            for case in self.cases_of([source]):
                sources[str(case["case_id"])] = [self.answers_path(name, pair) for pair in pairs for name in TEACHERS]
        return sources


def mean_dice(records: Sequence[Path]) -> float:
    """Mean Dice over the patients of some results, see ``patient_means``."""
    runs = [json.loads(record.read_text(encoding="utf-8")) for record in records]
    return statistics.fmean(patient_means(runs).values())
