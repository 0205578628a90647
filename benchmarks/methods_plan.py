# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods: which trainings it consists of, and the queue that works them off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from benchmarks.job_queue import Command, Job, with_needs, work_off
from scripts.data import datalist, fold_split

TEACHER = ("dynunet",)  # of every method, so that nothing but the method differs
BOTH = ("dynunet", "hdenseformer")  # dual distillation needs a CNN and a Transformer
TRANSFORMERS = ("hdenseformer", "unetr")  # Teach-Former's own setting, a row of its own
COMBINATION = ("teachformer", "dist")  # the two best of the first two seeds on STS: chosen with the table in view
TEACHER_RATE = 0.001
SHARE = 1.0  # the terms' gradients together, in units of L_seg's
ALONE = "student alone"
THRESHOLDS = {"PET above SUV 2.5": (2.5, 0.0), "PET above 41% of its maximum": (0.0, 0.41)}


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        data: name of the data set.
        dataset_dir: its folder.
        scale: config of the networks' sizes and the recipe.
        output: folder of everything.
        modalities: what all teachers and the student see.
        methods: names of the methods.
        seeds: of the trainings; the split stays.
        epochs: of every student and of every network trained in its place.
        teacher_epochs: of the teachers.
        fold: that is scored.
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
        """All trainings, in order: what others need, then seed by seed, the random teachers last."""
        rate = ("--set", f"learning_rate={TEACHER_RATE}")
        warm = max(1, self.epochs // 5)
        jobs = [self._plain(_warmed(method), 0, warm, extra=_fusion(method)) for method in ("", "dual")]
        for architecture in dict.fromkeys((*BOTH, *TRANSFORMERS)):
            jobs.append(self._plain(f"teacher {architecture}", 0, self.teacher_epochs, architecture, rate))
        for seed in self.seeds:
            jobs.append(self._plain(ALONE, seed, self.epochs))
            jobs += [self._distilled(method, seed, (method,), _teachers(method)) for method in self.methods]
            jobs.append(self._distilled(" + ".join(COMBINATION), seed, COMBINATION, TEACHER))
            jobs += [self._plain(f"{a}, same budget", seed, self.epochs, a) for a in ("dynunet", "segresnet")]
            jobs.append(self._plain("student with selective fusion", seed, self.epochs, extra=_fusion("dual")))
            jobs.append(self._distilled("teachformer, two Transformers", seed, ("teachformer",), TRANSFORMERS))
        for seed in self.seeds:
            for method in self.methods:
                row = f"{method}, random teachers"
                jobs.append(self._distilled(row, seed, (method,), _teachers(method), random=True))
        return jobs

    def weights(self, row: str) -> Path:
        """Weights of a row's first seed."""
        return self._folder(row, 0) / "model.pt"

    def _folder(self, row: str, seed: int) -> Path:
        return self.output / row.replace(",", "").replace(" + ", "_").replace(" ", "_") / f"seed{seed}"

    def _job(self, row: str, seed: int, train: Command, architecture: Command = (), extra: Command = ()) -> Job:
        folder = self._folder(row, seed)
        output = ("--seed", str(seed), "--output-dir", str(folder))
        score = ("evaluate", *self.common, "--weights", str(folder / "model.pt"), "--name", row)
        score = (*score, *architecture, *extra, "--output-dir", str(folder / "eval"))
        return Job(row, seed, folder, ((*train, *self.common, *output, *extra), score))

    def _plain(self, row: str, seed: int, epochs: int, architecture: str = "", extra: Command = ()) -> Job:
        named = ("--architecture", architecture, "--modalities", *self.modalities) if architecture else ()
        verb = "teacher" if architecture else "train"
        return self._job(row, seed, (verb, *named, "--epochs", str(epochs)), named, extra)

    def _distilled(
        self, row: str, seed: int, methods: Sequence[str], teachers: Sequence[str], random: bool = False
    ) -> Job:
        needs = [] if random else [self.weights(f"teacher {architecture}") for architecture in teachers]
        warmed = self.weights(_warmed("dual" if "dual" in methods else ""))
        train: Command = ("distill", "--epochs", str(self.epochs), "--balance", str(SHARE))
        train = (*train, "--balance-with", str(warmed))
        for method in methods:
            train = (*train, "--method", method)
        for architecture in teachers:
            weights = "random" if random else str(self.weights(f"teacher {architecture}"))
            train = (*train, "--teacher", f"{architecture}={weights}")
        job = self._job(row, seed, train, extra=_fusion("dual" if "dual" in methods else ""))
        return replace(job, needs=(*needs, warmed))


def _fusion(method: str) -> Command:
    """Dual distillation has another student; whoever loads its weights must say so."""
    return ("--set", "selective_fusion=true") if method == "dual" else ()


def _teachers(method: str) -> Command:
    return BOTH if method == "dual" else TEACHER


def _warmed(method: str) -> str:
    return "student warmed up" + (" with selective fusion" if method == "dual" else "")


def threshold_masks(plan: Plan) -> Iterator[tuple[str, Path]]:
    """Write the masks of the fixed PET thresholds on the PET's own grid; gives each row's name and folder.

    The maximum is that of the whole image, as it was cropped by its publishers.
    """
    _, cases = fold_split(datalist(plan.data, plan.dataset_dir), plan.fold)
    for row, (suv, fraction) in THRESHOLDS.items():
        folder = plan.output / row.replace(" ", "_").replace("%", "") / "masks"
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            image = sitk.ReadImage(str(case["pet"]), sitk.sitkFloat32)
            values = sitk.GetArrayViewFromImage(image)
            mask = sitk.GetImageFromArray((values >= max(suv, fraction * float(values.max()))).astype(np.uint8))
            mask.CopyInformation(image)
            sitk.WriteImage(mask, str(folder / f"{case['case_id']}.nii.gz"))
        yield row, folder


def compare_methods(
    plan: Plan, workers: int, main: Callable[[Sequence[str]], int], only: Sequence[str] = ()
) -> list[Job]:
    """Train and evaluate everything that is not there yet; returns the jobs of the table.

    Args:
        plan: what is compared.
        workers: processes at once, of one thread each.
        main: of ``scripts.cli.main``.
        only: rows to which it is limited, with what they need; empty: all.
    """
    jobs = with_needs(plan.jobs(), only)
    work_off(jobs, workers, main)
    if "pet" in plan.modalities:
        for row, masks in threshold_masks(plan):
            if not (masks.parent / "summary.json").is_file():
                scored = ("--predictions", str(masks), "--output-dir", str(masks.parent), "--name", row)
                main(["evaluate", *plan.common, *scored])
    return jobs
