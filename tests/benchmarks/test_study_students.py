# SPDX-License-Identifier: Apache-2.0
"""The recipe of the study's students."""

from __future__ import annotations

from benchmarks.study_job import StudyJob
from benchmarks.study_plan import StudyPlan
from benchmarks.study_students import RECIPES
from tests.study_jobs import choose, settings


def test_the_recipe_with_the_best_mean_dice_is_frozen_for_all_arms(plan: StudyPlan) -> None:
    choose(plan, "batch_dice_fast_clipped")
    assert plan.chosen_recipe() == RECIPES["batch_dice_fast_clipped"]
    students = [job for job in plan.jobs() if job.study_row.experiment in ("B1", "C")]
    for job in students:
        given = settings(job.typed()[0])
        assert (given["learning_rate"], given["gradient_clip"]) == ("0.002", "1.0")
        assert given["segmentation_loss#batch"] == "true"
        assert given["ema"] == "0.99"
    choose(plan, "default")
    assert all("learning_rate" not in settings(job.typed()[0]) for job in students)  # decided when a job starts


def test_all_students_wait_for_the_recipe(plan: StudyPlan, jobs: list[StudyJob]) -> None:
    recipes = {path.name for path in plan.recipe_records}
    for job in jobs:
        if not job.answers and job.study_row.experiment in ("B1", "B2", "C", "D", "E", "F"):
            assert recipes <= {path.name for path in job.needs}
