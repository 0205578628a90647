# SPDX-License-Identifier: Apache-2.0
"""The students of the study, and experiment 0: the recipe of the lone student.

The recipe is chosen by cross-validation inside folds 1 to 4. It then holds for every student of every arm.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_setting import FOLDS, StudySetting
from benchmarks.study_statistics import patient_means

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


@dataclass(frozen=True)
class Lesson:
    """What a student is taught by.

    Args:
        options: of ``distill``: methods and teachers.
        settings: config id -> value.
        staged: the method trains in stages.
        doubled: its loss is twice what is meant, so that gradients are clipped at twice the recipe's norm. AdamW does
            not depend on the scale of a loss, clipping does.
    """

    options: Command
    settings: Mapping[str, Any] = field(default_factory=dict)
    staged: bool = False
    doubled: bool = False

    def by(self, *teachers: str) -> Lesson:
        """This lesson with further options, which name its teachers."""
        return replace(self, options=(*self.options, *teachers))


KD = Lesson(  # L_seg has weight 1, too: twice half and half
    ("--method", "hinton", "--method", "dist"),
    {"loss#terms#hinton#weight": 1.0, "loss#terms#dist#weight": 1.0},
    doubled=True,
)
CONTROL = KD.by("--teacher", "label")


class StudyStudents(StudySetting):
    """Trainings of students, and the choice of their recipe."""

    def student_job(
        self,
        row: StudyRow,
        train: Sequence[int],
        lesson: Lesson | None = None,
        unlabelled: Sequence[int] = (),
        recipe: Callable[[], dict[str, Any]] | None = None,
        student: Mapping[str, Any] | None = None,
        evaluations: Mapping[str, Command] | None = None,
    ) -> StudyJob:
        """A student alone, or with teachers.

        Args:
            row: where the result belongs.
            train: folds to train on with their labels.
            lesson: what it is taught by.
            unlabelled: folds to train on without their labels.
            recipe: gives the settings of the training; by default the chosen recipe.
            student: settings of this student, such as its modalities.
            evaluations: see ``StudySetting.job``.
        """
        command: Command = ("distill", *lesson.options) if lesson else ("train",)
        command = (*command, "--unlabelled") if unlabelled else command

        def settings() -> dict[str, Any]:
            chosen = self.chosen_recipe() if recipe is None else recipe()
            taught = dict(lesson.settings) if lesson else {}
            if lesson and lesson.doubled and "gradient_clip" in chosen:
                taught["gradient_clip"] = 2 * chosen["gradient_clip"]
            return {"student_features": STUDENTS[row.student], **chosen, **taught, **(student or {})}

        job = self.job(
            row,
            train,
            unlabelled,
            lambda: command,
            settings,
            schedule=True,
            evaluations=evaluations,
            staged=lesson is not None and lesson.staged,
            modalities=(student or {}).get("modalities", ()),
        )
        return job if recipe else replace(job, needs=self.recipe_records)

    def recipe_jobs(self) -> list[StudyJob]:
        """Every candidate recipe on every fold but the first."""
        return [
            self.student_job(
                row, train=[k for k in range(1, FOLDS) if k != row.fold], recipe=partial(RECIPES.__getitem__, row.arm)
            )
            for row in self._recipe_rows()
        ]

    def _recipe_rows(self) -> list[StudyRow]:
        return [
            StudyRow("recipe", recipe, "0.9M", fold, None, seed, RECIPE_STEPS)
            for recipe in RECIPES
            for fold in range(1, FOLDS)
            for seed in SEEDS
        ]

    @property
    def recipe_records(self) -> tuple[Path, ...]:
        """The results that the choice of the recipe needs."""
        return tuple(map(self.record, self._recipe_rows()))

    @property
    def recipe(self) -> str:
        """The name of the recipe with the highest mean Dice over patients and seeds."""
        return max(RECIPES, key=self._recipe_score)

    def chosen_recipe(self) -> dict[str, Any]:
        """The settings of the recipe with the highest mean Dice."""
        return RECIPES[self.recipe]

    def _recipe_score(self, recipe: str) -> float:
        return self.mean_dice([row for row in self._recipe_rows() if row.arm == recipe])

    def lone_dice(self, fold: int) -> float:
        """Mean Dice of the chosen recipe on a fold."""
        recipe = self.recipe
        return self.mean_dice([row for row in self._recipe_rows() if (row.arm, row.fold) == (recipe, fold)])

    def mean_dice(self, rows: Sequence[StudyRow]) -> float:
        """Mean Dice over the patients of some results, see ``patient_means``."""
        runs = [json.loads(self.record(row).read_text(encoding="utf-8")) for row in rows]
        return statistics.fmean(patient_means(runs).values())
