# SPDX-License-Identifier: Apache-2.0
"""The trainings and evaluations of the comparison of all methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from benchmarks.job_queue import Command, Job, run_jobs, select_jobs
from scripts.cli.distill import STAGED_METHOD
from scripts.cli.main import main
from scripts.data import datalist, fold_split

DEFAULT_TEACHERS = ("dynunet",)  # the same for every method, so that only the method differs
DUAL_TEACHERS = ("dynunet", "hdenseformer")  # dual distillation needs a CNN and a Transformer
TRANSFORMER_TEACHERS = ("hdenseformer", "unetr")  # Teach-Former's own setting, a row of its own
COMBINED_METHODS = ("teachformer", "dist")  # the two best of the first two seeds on STS, chosen after seeing the table
TEACHER_LEARNING_RATE = 0.001
ALONE = "student alone"
PET_THRESHOLDS = {  # row -> SUV, fraction of the maximum
    "PET above SUV 2.5": (2.5, 0.0),
    "PET above 41% of its maximum": (0.0, 0.41),
}


@dataclass(frozen=True)
class MethodsPlan:
    """What is compared.

    Args:
        data: name of the data set.
        dataset_dir: its folder.
        scale: config of the network sizes and the recipe.
        output: output folder.
        modalities: modalities of the student and of all teachers.
        methods: names of the methods.
        seeds: seeds of the trainings; the split of the cases is the same for all.
        epochs: epochs of every student, and of the networks that are trained with the same budget.
        teacher_epochs: epochs of the teachers.
        fold: the validation fold.
    """

    data: str
    dataset_dir: str
    scale: str
    output: Path
    modalities: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    teacher_epochs: int = 100
    fold: int = 0
    common: Command = field(init=False)

    def __post_init__(self) -> None:
        common = ("--data", self.data, "--dataset-dir", self.dataset_dir, "--scale", self.scale)
        object.__setattr__(self, "common", (*common, "--threads", "1", "--fold", str(self.fold)))

    def jobs(self) -> list[Job]:
        """All jobs: first those that others need, then seed by seed, the controls with random teachers last."""
        rate = ("--set", f"learning_rate={TEACHER_LEARNING_RATE}")
        jobs = [
            self._plain(f"teacher {architecture}", 0, self.teacher_epochs, architecture, rate)
            for architecture in dict.fromkeys((*DUAL_TEACHERS, *TRANSFORMER_TEACHERS))
        ]
        for seed in self.seeds:
            jobs.append(self._plain(ALONE, seed, self.epochs))
            jobs += [self._distilled(method, seed, (method,), _teachers(method)) for method in self.methods]
            jobs.append(self._distilled(" + ".join(COMBINED_METHODS), seed, COMBINED_METHODS, DEFAULT_TEACHERS))
            jobs += [
                self._plain(f"{architecture}, same budget", seed, self.epochs, architecture)
                for architecture in ("dynunet", "segresnet")
            ]
            jobs.append(self._plain("student with selective fusion", seed, self.epochs, extra=_student_options("dual")))
            jobs.append(self._distilled("teachformer, two Transformers", seed, ("teachformer",), TRANSFORMER_TEACHERS))
        with_random = [method for method in self.methods if method != STAGED_METHOD]  # which needs trained teachers
        for seed in self.seeds:
            for method in with_random:
                row = f"{method}, random teachers"
                jobs.append(self._distilled(row, seed, (method,), _teachers(method), random=True))
        return jobs

    def weights(self, row: str) -> Path:
        """Path of the weights of a row's first seed."""
        return self._folder(row, 0) / "model.pt"

    def threshold_folder(self, row: str) -> Path:
        """Output folder of one of ``PET_THRESHOLDS``."""
        return self.output / row.replace(" ", "_").replace("%", "")

    def _folder(self, row: str, seed: int) -> Path:
        return self.output / row.replace(",", "").replace(" + ", "_").replace(" ", "_") / f"seed{seed}"

    def _job(self, row: str, seed: int, train: Command, architecture: Command = (), extra: Command = ()) -> Job:
        folder = self._folder(row, seed)
        output = ("--seed", str(seed), "--output-dir", str(folder))
        evaluate = ("evaluate", *self.common, "--weights", str(folder / "model.pt"), "--name", row)
        evaluate = (*evaluate, *architecture, *extra, "--output-dir", str(folder / "eval"))
        return Job(row, seed, folder, ((*train, *self.common, *output, *extra), evaluate))

    def _plain(self, row: str, seed: int, epochs: int, architecture: str = "", extra: Command = ()) -> Job:
        """A training without teachers: of the student, or of another architecture."""
        network = ("--architecture", architecture, "--modalities", *self.modalities) if architecture else ()
        verb = "teacher" if architecture else "train"
        return self._job(row, seed, (verb, *network, "--epochs", str(epochs)), network, extra)

    def _distilled(
        self, row: str, seed: int, methods: Sequence[str], teachers: Sequence[str], random: bool = False
    ) -> Job:
        """A distillation; ``random``: from teachers with random weights."""
        needs = () if random else tuple(self.weights(f"teacher {architecture}") for architecture in teachers)
        train: Command = ("distill", "--epochs", str(self.epochs))
        for method in methods:
            train = (*train, "--method", method)
        for architecture in teachers:
            weights = "random" if random else str(self.weights(f"teacher {architecture}"))
            train = (*train, "--teacher", f"{architecture}={weights}")
        job = self._job(row, seed, train, extra=_student_options("dual" if "dual" in methods else ""))
        return replace(job, needs=needs)


def _student_options(method: str) -> Command:
    """Options of a method's student, for training and for loading its weights: dual distillation has another one."""
    return ("--set", "selective_fusion=true") if method == "dual" else ()


def _teachers(method: str) -> Command:
    return DUAL_TEACHERS if method == "dual" else DEFAULT_TEACHERS


def write_threshold_masks(plan: MethodsPlan) -> Iterator[tuple[str, Path]]:
    """Write the masks of the fixed PET thresholds on the PET's own grid; yields the row and the folder of each.

    The maximum is that of the whole image, as its publishers cropped it.
    """
    _, cases = fold_split(datalist(plan.data, plan.dataset_dir), plan.fold)
    for row, (suv, fraction) in PET_THRESHOLDS.items():
        folder = plan.threshold_folder(row) / "masks"
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            image = sitk.ReadImage(str(case["pet"]), sitk.sitkFloat32)
            values = sitk.GetArrayViewFromImage(image)
            threshold = max(suv, fraction * float(values.max()))
            mask = sitk.GetImageFromArray((values >= threshold).astype(np.uint8))
            mask.CopyInformation(image)
            sitk.WriteImage(mask, str(folder / f"{case['case_id']}.nii.gz"))
        yield row, folder


def compare_methods(plan: MethodsPlan, workers: int, only: Sequence[str] = ()) -> tuple[list[Job], int]:
    """Train and evaluate everything that is not done yet.

    Args:
        plan: what is compared.
        workers: number of parallel processes, one thread each.
        only: names of the rows to run, with the rows that they depend on; all rows if it is empty.

    Returns:
        The jobs of these rows, done or not, and the number of runs that failed.
    """
    jobs = select_jobs(plan.jobs(), only)
    failed = len(run_jobs(jobs, workers))
    if "pet" in plan.modalities:
        for row, masks in write_threshold_masks(plan):
            if not (masks.parent / "summary.json").is_file():
                options = ("--predictions", str(masks), "--output-dir", str(masks.parent), "--name", row)
                failed += main(["evaluate", *plan.common, *options]) != 0
    return jobs, failed
