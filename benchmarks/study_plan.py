# SPDX-License-Identifier: Apache-2.0
"""The jobs of the study: does a teacher add anything, and how small may the student be?

Every job is one training and its evaluations, as the commands that a user would type. Folds are those of split seed 0.
``i`` is the fold that a network is tested on, ``j`` the fold that the pair (i, j) leaves out besides.

The settings were fixed before the first run; deviations from the plan are in docs/results/study/README.md.
"""

from __future__ import annotations

from benchmarks.study_experiments import StudyExperiments
from benchmarks.study_job import StudyJob
from benchmarks.study_methods import StudyMethods
from benchmarks.study_students import SEEDS
from benchmarks.study_teachers import STAGE_1, STAGE_2


class StudyPlan(StudyExperiments, StudyMethods):
    """The jobs of every experiment, in the order of their value."""

    def jobs(self) -> list[StudyJob]:
        """All jobs that can be planned: until the gate is judged only the recipe and the first pair's teachers."""
        if self.gate is None:
            return [*self.recipe_jobs(), *self.teacher_jobs(STAGE_1[:1])]
        jobs = [
            *self.recipe_jobs(),
            *self.teacher_jobs(STAGE_1),
            *self.another_hospital(),
            *self.compression(),
            *self.teachers_themselves(),
            *self.few_labels(),
            *self.missing_modalities(),
            *self.teacher_jobs(STAGE_2),
            *self.compression_out_of_fold(),
            *self.another_hospital(distance=2),
            *self.alone_longer(),
            *self.experts(),
            *self.compression(["3.5M"]),
            *self.compression_out_of_fold(["3.5M"]),
            *self.references(),
        ]
        for seed in SEEDS:
            jobs += [*self.prediction_methods(seed), *self.feature_methods(seed)]
        return list({job.study_row.name: job for job in jobs}.values())
