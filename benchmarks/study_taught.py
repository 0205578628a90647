# SPDX-License-Identifier: Apache-2.0
"""Students of the study that learn from answers which their teachers gave before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.study_answers import write_predictions
from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_students import KD, STUDENTS, Lesson
from benchmarks.study_teachers import Origin, Sources, StudyTeachers
from scripts.utils.atomic_files import write_json

OUTSIDE = "outside"  # name of a cached teacher that reads all modalities of its student
SHARED = (
    "modalities",
    "intensity",
    "spacing",
    "patch",
    "fold",
)  # settings of a student that its teachers' cache needs, too


class StudyTaught(StudyTeachers):
    """Trainings of students that learn from answers."""

    def taught_job(
        self,
        row: StudyRow,
        teachers: Sources | Mapping[str, Sources],
        train: Sequence[int],
        unlabelled: Sequence[int] = (),
        lesson: Lesson = KD,
        student: Mapping[str, Any] | None = None,
        evaluations: Mapping[str, Command] | None = None,
    ) -> StudyJob:
        """A student that learns from answers.

        Args:
            row: where the result belongs.
            teachers: of one teacher, which needs what the student reads; or the modality that an expert needs -> its
                answers.
            train, unlabelled, student, evaluations: see ``student_job``.
            lesson: the methods.
        """
        first = next(iter(teachers.values()))
        named: Mapping[str, Any] = teachers if isinstance(first, Mapping) else {OUTSIDE: teachers}
        student = student or {}
        modalities = student.get("modalities", self.settings["modalities"])
        folder = self.job_folder(row)
        files = {name: _teacher_files(folder, name) for name in named}

        def prepare() -> None:
            for name, (spec, predictions) in files.items():
                used = modalities if name == OUTSIDE else [name]
                write_json({"predictions": str(predictions), "modalities": used}, spec)
                write_predictions(predictions, named[name])

        specs = tuple(part for name, (spec, _) in files.items() for part in ("--teacher", f"{name}={spec}"))
        lesson = lesson.by(*specs, "--cache-dir", str(folder / "cache"))
        job = self.student_job(row, train, lesson, unlabelled, student=student, evaluations=evaluations)
        answers = (path for sources in named.values() for paths in sources.values() for path in paths)
        caching: Command = ("cache-teachers", *specs, "--fold", "0")
        caching = (*caching, "--unlabelled") if unlabelled else caching
        shared = {key: value for key, value in student.items() if key in SHARED}
        before = self.command(job, caching, shared, folder / "cache")
        needs = (*job.needs, *dict.fromkeys(answers))
        return replace(job, needs=needs, before=(before,), preparations=(*job.preparations, prepare))

    def lone_answers(self, alone: StudyJob, path: Path) -> list[StudyJob]:
        """The answers of a lone student on all patients, given as a teacher gives them."""
        row = replace(alone.study_row, experiment="answers")
        sizes = {"+architectures#student": {"features": STUDENTS[row.student]}}
        training = self.restored(alone, [alone.record], [path])
        job = self.answering(training, Origin("lone", "student", sizes), row, [], path)
        return [training, replace(job, description=path.with_suffix(".json"))]


def _teacher_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The specification of a teacher that answers from a cache, and the folder of its predictions."""
    if name == OUTSIDE:
        return folder / "teacher.json", folder / "predictions"
    return folder / f"teacher_{name}.json", folder / "predictions" / name
