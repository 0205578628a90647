# SPDX-License-Identifier: Apache-2.0
"""Experiments E and F of the study: other methods of distillation, at the weights of their papers, all labels.

E has methods that need predictions only, which the same teachers answer as in the in-sample arm of C. F has methods
that need features: a teacher runs in every step. It is a teacher of the pair of the tested fold and the next one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_setting import FOLDS, other_folds
from benchmarks.study_students import SEEDS, Lesson
from benchmarks.study_taught import StudyTaught
from benchmarks.study_teachers import STAGE_1, TEACHER_SCALE, TEACHERS

METHOD_STEPS = 2000
_TEMPERATURE = "+loss#terms#hinton#loss#temperature"
_CWD_LOGITS = {"tap": "logits", "weight": 3.0, "loss": {"_target_": "scripts.losses.ChannelWiseDivergence"}}
PREDICTION_METHODS: dict[str, Lesson] = {
    "hinton_t1": Lesson(("--method", "hinton"), {_TEMPERATURE: 1.0}),
    "hinton_t4": Lesson(("--method", "hinton"), {_TEMPERATURE: 4.0}),
    # Without its term on features, which no cached answer has.
    "cwd": Lesson(
        ("--method", "hinton"),
        {"loss#terms#hinton#weight": 1.0, _TEMPERATURE: 1.0, "+loss#terms#cwd_logits": _CWD_LOGITS},
    ),
    "dist": Lesson(("--method", "dist")),
}
FEATURE_METHODS: dict[str, tuple[str, ...]] = {  # method -> its teachers, in ``TEACHERS``
    "teachformer": ("t2",),
    "rskd": ("t2",),
    "cpkd": ("t2",),
    "dual": ("t2", "dynunet"),  # a Transformer and a CNN
    "gkd": ("t1",),  # its encoder and decoder can be called separately
    "emkd": ("t2",),
    "skd": ("t2",),
    "ifvd": ("t2",),
    "cirkd": ("t2",),
    "hint": ("t2",),
    "cwd": ("t2",),
}
STAGED_METHODS = ("gkd",)
STUDENT_OF: dict[str, dict[str, Any]] = {"dual": {"selective_fusion": True}}


class StudyMethods(StudyTaught):
    """The jobs of the experiments E and F."""

    def prediction_methods(self, seed: int) -> list[StudyJob]:
        """Experiment E with one seed."""
        jobs = []
        for method, lesson in PREDICTION_METHODS.items():
            for fold in range(FOLDS):
                train = other_folds(fold)
                row = StudyRow("E", method, "0.9M", fold, None, seed, METHOD_STEPS)
                jobs.append(self.taught_job(row, self.in_sample(fold, train), train, lesson=lesson))
        return jobs

    def references(self) -> list[StudyJob]:
        """The CNN of each pair of stage 1, a teacher of F and a row beside the Transformers."""
        return [job for pair in STAGE_1 for job in self.pair_teacher("dynunet", pair)]

    def feature_methods(self, seed: int) -> list[StudyJob]:
        """Experiment F with one seed: the teachers' weights, where they are gone, and the students."""
        jobs = []
        for method, names in FEATURE_METHODS.items():
            for fold in range(FOLDS):
                jobs += self._feature_jobs(method, names, fold, seed)
        return jobs

    def _feature_jobs(self, method: str, names: tuple[str, ...], fold: int, seed: int) -> list[StudyJob]:
        (pair,) = (pair for pair in STAGE_1 if set(pair) == {fold, (fold + 1) % FOLDS})
        options: Command = ("--method", method, "--scale", TEACHER_SCALE)
        sizes: dict[str, Any] = {}
        weights = []
        for name in names:
            training, _ = self.pair_teacher(name, pair)
            pupils = [self.record(row) for row in self._feature_rows(fold) if name in FEATURE_METHODS[row.arm]]
            weights.append(self.restored(training, [self.answers_path(name, pair)], pupils))
            sizes |= self.sizes(name)
            options = (
                *options,
                "--teacher",
                f"{name}={TEACHERS[name]['architecture']}={weights[-1].folder / 'model.pt'}",
            )
        (row,) = (each for each in self._feature_rows(fold) if (each.arm, each.seed) == (method, seed))
        lesson = Lesson(options, sizes, staged=method in STAGED_METHODS)
        train = other_folds(fold)
        job = self.student_job(row, train, lesson, student=STUDENT_OF.get(method))
        return [*weights, replace(job, needs=(*job.needs, *(each.folder / "model.pt" for each in weights)))]

    def _feature_rows(self, fold: int) -> list[StudyRow]:
        """The students of F that are tested on a fold."""
        return [
            StudyRow("F", method, "0.9M", fold, None, seed, METHOD_STEPS)
            for method in FEATURE_METHODS
            for seed in SEEDS
        ]
