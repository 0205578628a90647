# SPDX-License-Identifier: Apache-2.0
"""The shipped weights, by the recipe of the study: ``python -m benchmarks study --shipped``.

1. The teachers of stage 1 answer each patient out of fold: those of the two pairs that its fold belongs to.
2. The student learns from these answers and the labels of all patients, with modality dropout, on patches of random
   size up to whole volumes. Nothing is selected; its weights are ``model.pt`` in the folder ``shipped.final...``.
3. The same recipe is cross-validated: with every subset of the modalities, and in one pass over the whole volume. The
   teachers are those of stage 1 that have not seen the tested fold. For the patients of two folds some of them answer
   out of fold; those of the other two folds get the answers of teachers that have seen them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.job_queue import Command
from benchmarks.study_experiments import DROPOUT, on_every_subset
from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_setting import FOLDS, other_folds
from benchmarks.study_students import KD
from benchmarks.study_taught import StudyTaught
from benchmarks.study_teachers import STAGE_1, weights_only

STUDENT = "0.9M"
STEPS = 8000
SPACING = [3.0, 3.0, 3.0]  # mm
LARGEST, SMALLEST, CELL = [80, 80, 96], 48, 16  # voxels; most volumes of STS fit into the largest patch
ONE_PASS = ("--set", "whole_volume=true")


class RandomSizes:
    """A ``prepare_batch`` that cuts each batch to a patch of random size at a random place.

    Args:
        prepare: the ``prepare_batch`` whose tensors ``B C H W D`` are cut, all alike.
        smallest: voxels per axis that a patch has at least.
        cell: sizes are multiples of this many voxels, and the smallest one.

    The sizes come from PyTorch's generator, which is seeded at the start of each epoch.
    """

    def __init__(self, prepare: Callable[..., Any], smallest: int = SMALLEST, cell: int = CELL) -> None:
        self.prepare, self.smallest, self.cell = prepare, smallest, cell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare and cut; the image is the first of what ``prepare`` returns."""
        batch = self.prepare(*args, **kwargs)
        box = tuple(map(self._part, batch[0].shape[2:]))
        return _cut(batch, (slice(None), slice(None), *box))

    def _part(self, size: int) -> slice:
        """A random part of an axis."""
        steps = max(0, size - self.smallest) // self.cell
        part = min(size, self.smallest + self.cell * int(torch.randint(steps + 1, ())))
        start = int(torch.randint(size - part + 1, ()))
        return slice(start, start + part)


def _cut(value: Any, box: tuple[slice, ...]) -> Any:
    """Cut all tensors ``B C H W D`` in nested tuples and dicts."""
    if isinstance(value, dict):
        return {key: _cut(item, box) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_cut(item, box) for item in value)
    return value[box] if isinstance(value, torch.Tensor) and value.dim() == len(box) else value


SIZES = {"_target_": "benchmarks.study_shipped.RandomSizes", "prepare": "$@teacher_cache.prepare_batch"}
LESSON = replace(KD, settings={**KD.settings, "train#prepare_batch": SIZES})


class StudyShipped(StudyTaught):
    """The jobs of the shipped weights."""

    def jobs(self) -> list[StudyJob]:
        """The student of all patients, then the cross-validation.

        Raises:
            ValueError: the gate is not judged, so that the length of the teachers' training is open.
        """
        if self.gate is None:
            raise ValueError("The gate of the study is not judged yet. Run `python -m benchmarks study` first.")
        return [self._final(), *map(self._cross_validated, range(FOLDS))]

    def _final(self) -> StudyJob:
        answers = self.sources(range(FOLDS), lambda fold: self.pair_answers([pair for pair in STAGE_1 if fold in pair]))
        row = StudyRow("shipped", "final", STUDENT, 0, None, 0, STEPS)
        everyone = {**self._student(), "fold": None}  # no patient validates
        job = weights_only(self.taught_job(row, answers, range(FOLDS), lesson=LESSON, student=everyone))
        return replace(job, description=self.results / "shipped.json")

    def _cross_validated(self, fold: int) -> StudyJob:
        train = other_folds(fold)
        evaluations: dict[str, Command] = {**on_every_subset(self.settings["modalities"]), "one_pass": ONE_PASS}
        row = StudyRow("shipped", "cross_validated", STUDENT, fold, None, 0, STEPS)
        unseen = [pair for pair in STAGE_1 if fold in pair]
        answers = self.sources(train, lambda k: self.pair_answers([pair for pair in unseen if k in pair] or unseen))
        return self.taught_job(row, answers, train, lesson=LESSON, student=self._student(), evaluations=evaluations)

    def _student(self) -> dict[str, Any]:
        settings = {"spacing": SPACING, "patch": LARGEST, "modality_dropout": DROPOUT}
        return {**settings, "precision": self.fastest_precision}
