# SPDX-License-Identifier: Apache-2.0
"""The recipe of the study's students."""

from __future__ import annotations

from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_plan import StudyPlan
from benchmarks.study_students import CONTROL, RECIPES
from tests.study_jobs import choose, judge, settings


def test_the_recipe_with_the_best_mean_dice_is_frozen_for_all_arms(plan: StudyPlan) -> None:
    judge(plan, 0.9, "batch_dice_fast_clipped")
    assert plan.chosen_recipe() == RECIPES["batch_dice_fast_clipped"]
    students = [job for job in plan.jobs() if job.study_row.experiment in ("B1", "C") and not job.answers]
    assert len(students) == 100 + 3 * 4 * 10 + 10
    for job in students:
        given = settings(job.typed()[0])
        clip = "1.0" if job.study_row.arm in ("alone", "alone_long", "elsewhere") else "2.0"
        assert (given["learning_rate"], given["gradient_clip"]) == ("0.002", clip)
        assert given["segmentation_loss#batch"] == "true"
        assert given["ema"] == "0.99"
    choose(plan, "default")  # runs that are repeated after the gate was judged
    assert plan.recipe == "batch_dice_fast_clipped"
    assert all(settings(job.typed()[0])["learning_rate"] == "0.002" for job in students)


def test_all_students_wait_for_the_recipe(plan: StudyPlan, jobs: list[StudyJob]) -> None:
    recipes = {path.name for path in plan.recipe_records}
    for job in jobs:
        if not job.answers and job.study_row.experiment in ("B1", "B2", "C", "D", "E", "F"):
            assert recipes <= {path.name for path in job.needs}


def test_a_loss_of_twice_the_scale_is_clipped_at_twice_the_norm(plan: StudyPlan) -> None:
    """L_seg and the terms count half each in the plan, and have weight 1 each in the commands."""
    choose(plan, "batch_dice_fast_clipped")
    lone = plan.student_job(StudyRow("B1", "alone", "0.9M", 0, 1, 0, 1500), [1])
    control = plan.student_job(StudyRow("B1", "control", "0.9M", 0, 1, 0, 1500), [1], CONTROL)
    clips = [settings(job.typed()[0])["gradient_clip"] for job in (lone, control)]
    assert clips == ["1.0", "2.0"]
    weights = [settings(control.typed()[0])[f"loss#terms#{name}#weight"] for name in ("hinton", "dist")]
    assert weights == ["1.0", "1.0"]
    choose(plan, "batch_dice")  # which does not clip
    assert "gradient_clip" not in settings(control.typed()[0])
