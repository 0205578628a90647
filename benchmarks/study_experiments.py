# SPDX-License-Identifier: Apache-2.0
"""Experiments B to D of the study: another hospital, few labels, compression, missing modalities.

``fold`` is the tested fold. In B1 and B2 ``own`` is the fold of the hospital's own patients, which have labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.missing_modalities import subsets
from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_setting import FOLDS, other_folds
from benchmarks.study_students import CONTROL, KD, SEEDS
from benchmarks.study_taught import StudyTaught
from benchmarks.study_teachers import STAGE_1, TEACHER_STEPS, Sources

HOSPITAL_STEPS, ALL_STEPS = 1500, 2000
DROPOUT = 0.25
FIXED = (("mr",), ("ct", "pet"))  # inputs of students that read no other modality
EXPERT = "t1"  # architecture of the experts of one modality
CONFIDENCE = replace(KD, settings={**KD.settings, "loss#weighting": "confidence"})


class StudyExperiments(StudyTaught):
    """The jobs of the experiments B1, B2, C and D."""

    # B1: another hospital. Its own patients are one fold, the teachers come from elsewhere.

    def another_hospital(self, distance: int = 1) -> list[StudyJob]:
        """Five arms for each tested fold i and own fold i + distance."""
        jobs = []
        for seed in SEEDS:
            for fold in range(FOLDS):
                own = (fold + distance) % FOLDS
                answers = self.out_of_fold(fold, [own])
                jobs += [
                    self._lone(fold, own, seed),
                    self.student_job(_hospital_row("control", fold, own, seed), [own], CONTROL),
                    self.taught_job(_hospital_row("kd", fold, own, seed), answers, [own]),
                    self.taught_job(_hospital_row("kd_unlabelled", fold, own, seed), answers, [], [own]),
                    self.student_job(_hospital_row("elsewhere", fold, own, seed), other_folds(fold, own)),
                ]
        return jobs

    def _lone(self, fold: int, own: int, seed: int) -> StudyJob:
        return self.student_job(_hospital_row("alone", fold, own, seed), [own])

    # B2: few labels. The own fold has labels, the rest has none; the teachers are trained on the own fold only.

    def few_labels(self) -> list[StudyJob]:
        """Teachers of each own fold, then two arms: KD by their ensemble, and self-training.

        Self-training: the lone student of B1 answers the same patients, by the mean over all flips as the teachers do.
        Its answers then teach a new student of its size by the same loss.
        """
        jobs = []
        for fold in range(FOLDS):
            own = (fold + 1) % FOLDS
            for name in self.members:
                row = _few_labels_teacher(name, fold, own)
                jobs += self.teacher(name, [own], [row], self._few_labels_answers(name, own), "few_labels_teachers")
            paths = [self._few_labels_answers(name, own) for name in self.members]
            jobs.append(self.ensemble(paths, [_few_labels_teacher("ensemble", fold, own)]))
        for seed in SEEDS:
            for fold in range(FOLDS):
                own = (fold + 1) % FOLDS
                others = other_folds(fold, own)
                lone = self.results / "answers" / f"lone_on_{own}_s{seed}.npz"
                jobs += self.lone_answers(self._lone(fold, own, seed), lone)
                ensemble = [self._few_labels_answers(name, own) for name in self.members]
                for arm, paths in (("kd", ensemble), ("self_training", [lone])):
                    answers = self.same_answers([own, *others], paths)
                    jobs.append(self.taught_job(_hospital_row(arm, fold, own, seed, "B2"), answers, [own], others))
        return jobs

    def _few_labels_answers(self, name: str, own: int) -> Path:
        return self.results / "answers" / f"{name}_on_{own}_{TEACHER_STEPS}.npz"

    # C: compression, all labels.

    def compression(self, students: Sequence[str] = ("0.2M", "0.9M")) -> list[StudyJob]:
        """Alone, the control, and taught by teachers that have seen the patients, for each size of the student."""
        jobs = []
        for seed in SEEDS:
            for fold in range(FOLDS):
                train = other_folds(fold)
                answers = self.in_sample(fold, train)
                for student in students:
                    jobs += [
                        self.student_job(_all_row("C", "alone", fold, seed, student), train),
                        self.student_job(_all_row("C", "control", fold, seed, student), train, CONTROL),
                        self.taught_job(_all_row("C", "kd_in_sample", fold, seed, student), answers, train),
                    ]
        return jobs

    def compression_out_of_fold(self, students: Sequence[str] = ("0.2M", "0.9M")) -> list[StudyJob]:
        """Taught by teachers that have not seen the patients: each fold has its own pair of teachers."""
        return [
            self.taught_job(
                _all_row("C", "kd_out_of_fold", fold, seed, student),
                self.out_of_fold(fold, other_folds(fold)),
                other_folds(fold),
            )
            for seed in SEEDS
            for fold in range(FOLDS)
            for student in students
        ]

    def teachers_themselves(self) -> list[StudyJob]:
        """For each tested fold the ensemble of the teachers of ``in_sample``, none of which has seen it."""
        return [
            self.ensemble(
                self.pair_answers([pair for pair in STAGE_1 if fold in pair]),
                [StudyRow("C", "teachers", "ensemble", fold, None, 0, self.teacher_steps)],
            )
            for fold in range(FOLDS)
        ]

    def alone_longer(self) -> list[StudyJob]:
        """Alone, for the steps of the teachers of one ensemble and the student together."""
        steps = len(self.members) * self.teacher_steps + ALL_STEPS
        return [
            self.student_job(StudyRow("C", "alone_long", "0.9M", fold, None, seed, steps), other_folds(fold))
            for seed in SEEDS
            for fold in range(FOLDS)
        ]

    # D: missing modalities, all labels.

    def missing_modalities(self) -> list[StudyJob]:
        """Students with modality dropout, scored on every subset, and students of fixed inputs."""
        every_subset = on_every_subset(self.settings["modalities"])
        dropout = {"modality_dropout": DROPOUT}
        jobs = []
        for seed in SEEDS:
            for fold in range(FOLDS):
                train = other_folds(fold)
                answers = self.in_sample(fold, train)
                jobs += [
                    self.student_job(
                        _all_row("D", "alone_dropout", fold, seed), train, student=dropout, evaluations=every_subset
                    ),
                    self.taught_job(
                        _all_row("D", "kd_dropout", fold, seed),
                        answers,
                        train,
                        student=dropout,
                        evaluations=every_subset,
                    ),
                ]
                for fixed in FIXED:
                    name, student = "+".join(fixed), self._reading(fixed)
                    jobs += [
                        self.student_job(_all_row("D", f"alone_{name}", fold, seed), train, student=student),
                        self.taught_job(_all_row("D", f"kd_{name}", fold, seed), answers, train, student=student),
                    ]
        return jobs

    def _reading(self, modalities: Sequence[str]) -> dict[str, Any]:
        """The settings of a student that reads these modalities only."""
        intensity = {modality: self.settings["intensity"][modality] for modality in modalities}
        return {"modalities": list(modalities), "intensity": intensity}

    def experts(self) -> list[StudyJob]:
        """Three experts of one modality each, which have seen all other folds, and the students of all three."""
        modalities = self.settings["modalities"]
        jobs = []
        for fold in range(FOLDS):
            for modality in modalities:
                row = StudyRow("D", f"expert@{modality}", f"{TEACHER_STEPS} steps", fold, None, 0, TEACHER_STEPS)
                path = self._expert_answers(modality, fold)
                jobs += self.teacher(EXPERT, other_folds(fold), [row], path, "experts", modality)
        for seed in SEEDS:
            for fold in range(FOLDS):
                train = other_folds(fold)
                experts: dict[str, Sources] = {
                    modality: self.same_answers(train, [self._expert_answers(modality, fold)])
                    for modality in modalities
                }
                jobs.append(
                    self.taught_job(
                        _all_row("D", "kd_experts_dropout", fold, seed),
                        experts,
                        train,
                        lesson=CONFIDENCE,
                        student={"modality_dropout": DROPOUT},
                        evaluations=on_every_subset(modalities),
                    )
                )
        return jobs

    def _expert_answers(self, modality: str, fold: int) -> Path:
        return self.results / "answers" / f"expert_{modality}_without_{fold}_{TEACHER_STEPS}.npz"


def on_every_subset(modalities: Sequence[str]) -> dict[str, Command]:
    """The evaluations of a student with each non-empty subset of its modalities."""
    return {"+".join(subset): ("--present", *subset) for subset in subsets(modalities)}


def _hospital_row(arm: str, fold: int, own: int, seed: int, experiment: str = "B1") -> StudyRow:
    return StudyRow(experiment, arm, "0.9M", fold, own, seed, HOSPITAL_STEPS)


def _few_labels_teacher(arm: str, fold: int, own: int) -> StudyRow:
    return StudyRow("B2", arm, f"{TEACHER_STEPS} steps", fold, own, 0, TEACHER_STEPS)


def _all_row(experiment: str, arm: str, fold: int, seed: int, student: str = "0.9M") -> StudyRow:
    return StudyRow(experiment, arm, student, fold, None, seed, ALL_STEPS)
