# SPDX-License-Identifier: Apache-2.0
"""The jobs of the study: does a teacher add anything, and how small may the student be?

Every job is one training and its evaluation, as the commands that a user would type. Folds are those of split seed 0.
``i`` is the fold that a network is tested on, ``j`` the fold that the pair (i, j) leaves out besides.

The settings were fixed before the first run; deviations from the plan are in docs/results/study/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from benchmarks.job_queue import Command
from benchmarks.study_answers import write_predictions
from benchmarks.study_job import Answers, StudyJob, StudyRow
from scripts.cli.config import read_config
from scripts.data import datalist
from scripts.data.folds import make_splits
from scripts.utils.atomic_files import write_json

FOLDS = 5
STAGE_1 = ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4))
STAGE_2 = ((0, 2), (1, 3), (2, 4), (0, 3), (1, 4))
SEEDS = (0, 1)
STUDENTS: dict[str, list[int]] = {  # widths in multiples of 8: CPUs compute other widths more slowly
    "0.2M": [8, 16, 24, 48],
    "0.9M": [8, 24, 48, 96],
    "3.5M": [24, 48, 96, 192],
}
BATCH = 2
GRID = {"spacing": [4.0, 4.0, 4.0], "patch": [48, 48, 48], "ema": 0.99}
RECIPES: dict[str, dict[str, Any]] = {  # candidates for the lone student's recipe, on top of the bundle's own
    "default": {},
    "batch_dice": {"segmentation_loss#batch": True},
    "batch_dice_fast": {"segmentation_loss#batch": True, "learning_rate": 0.002},
    "batch_dice_clipped": {"segmentation_loss#batch": True, "gradient_clip": 1.0},
    "batch_dice_fast_clipped": {"segmentation_loss#batch": True, "learning_rate": 0.002, "gradient_clip": 1.0},
}
RECIPE_STEPS = 1000
GATE_MARGIN = 0.03
TEACHERS: dict[str, dict[str, Any]] = {
    "t1": {"architecture": "hdenseformer", "learning_rate": 0.001, "gradient_clip": 1.0},
    "t2": {"architecture": "unetr", "learning_rate": 0.0003, "gradient_clip": 1.0},
}
TEACHER_SCALE = "full"
VIT_SMALL = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6}  # where there is no GPU
TERMS = {"loss#terms#hinton#weight": 1.0, "loss#terms#dist#weight": 1.0}  # L_seg has weight 1, too: half and half
METHODS = ("--method", "hinton", "--method", "dist")
LABEL = ("--teacher", "label")
OUTSIDE = "outside"  # name of the cached teacher


@dataclass(frozen=True)
class StudyPlan:
    """Where the study runs, and how.

    Args:
        data: name of the data set.
        dataset_dir: its folder.
        output: folder of the trainings, which are not kept.
        results: folder of the results, which are kept.
        device: such as ``cpu`` or ``cuda``.
        shorten: divide all numbers of steps by this, to try the queue. Such results are marked.
        commit: commit of the code, where it is not a git checkout.
    """

    data: str
    dataset_dir: str
    output: Path
    results: Path
    device: str = "cpu"
    shorten: int = 1
    commit: str = ""
    folds: list[list[str]] = field(init=False)
    cases: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        cases = datalist(self.data, self.dataset_dir)
        object.__setattr__(self, "cases", cases)
        object.__setattr__(self, "folds", make_splits((str(case["patient_id"]) for case in cases), FOLDS, seed=0))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Config of the data set."""
        return read_config(f"data/{self.data}")

    @property
    def grid_settings(self) -> dict[str, Any]:
        """What decides on the networks' grid."""
        kept = {key: self.settings[key] for key in ("modalities", "intensity", "naming")}
        return {**kept, "spacing": GRID["spacing"]}

    @property
    def gpu(self) -> bool:
        """Whether the trainings run on a GPU."""
        return self.device.startswith("cuda")

    def jobs(self) -> list[StudyJob]:
        """All jobs, in the order of their value."""
        return [*self.recipe_jobs(), *self.teacher_jobs(STAGE_1), *self.another_hospital(), *self.compression()]

    # Experiment 0: the lone student's recipe, by cross-validation inside folds 1 to 4.

    def recipe_jobs(self) -> list[StudyJob]:
        """Every candidate recipe on every fold but the first."""
        inside = range(1, FOLDS)
        return [
            self.student_job(
                StudyRow("recipe", recipe, "0.9M", fold, None, seed, RECIPE_STEPS),
                train=[k for k in inside if k != fold],
                recipe=partial(RECIPES.__getitem__, recipe),
            )
            for recipe in RECIPES
            for fold in inside
            for seed in SEEDS
        ]

    @property
    def recipe_records(self) -> tuple[Path, ...]:
        """The results that the choice of the recipe needs."""
        return tuple(job.record for job in self.recipe_jobs())

    def chosen_recipe(self) -> dict[str, Any]:
        """The settings of the recipe with the highest mean Dice over patients and seeds."""
        return RECIPES[max(RECIPES, key=self._recipe_score)]

    def _recipe_score(self, recipe: str) -> float:
        return mean_dice([job.record for job in self.recipe_jobs() if job.study_row.arm == recipe])

    def gate(self) -> dict[str, Any]:
        """The teachers' ensemble of the pair (0, 1) against the lone student on the patients of fold 1."""
        chosen = max(RECIPES, key=self._recipe_score)
        rows = [job for job in self.recipe_jobs() if job.study_row.arm == chosen and job.study_row.fold == 1]
        lone = mean_dice([job.record for job in rows])
        ensemble = mean_dice([self.results / "jobs" / f"{self.teacher_row('ensemble', (0, 1), 1).name}.json"])
        return {"recipe": chosen, "lone": lone, "ensemble": ensemble, "passed": ensemble - lone >= GATE_MARGIN}

    # Experiments A1 and A2: teachers that have not seen two of the folds.

    def teacher_jobs(self, pairs: Sequence[tuple[int, int]]) -> list[StudyJob]:
        """Two Transformers per pair of folds, the answers of each on all patients, and the ensemble's scores."""
        jobs = [job for name in TEACHERS for pair in pairs for job in self._one_teacher(name, pair)]
        return [*jobs, *(self._ensemble(pair) for pair in pairs)]

    def _one_teacher(self, name: str, pair: tuple[int, int]) -> list[StudyJob]:
        """The training of a teacher without the folds of a pair, and its answers over all flips."""
        settings = dict(TEACHERS[name])
        architecture = settings.pop("architecture")
        sizes: dict[str, Any] = {}
        if self.gpu:
            settings["num_workers"] = 2
        elif architecture == "unetr":
            sizes = {"+architectures#unetr": VIT_SMALL}
        row = self.teacher_row(name, pair, pair[0])
        train = [k for k in range(FOLDS) if k not in pair]
        command = ("teacher", "--architecture", architecture, "--scale", TEACHER_SCALE)
        training_row = replace(row, experiment="teachers")
        training = self._job(
            training_row, train, [], lambda: command, lambda: {**settings, **sizes}, schedule=True, evaluated=False
        )
        training = replace(training, kept=self.answers_path(name, pair))

        weights = training.folder / "model.pt"
        teacher = ("--teacher", f"{name}={architecture}={weights}")
        caching = ("cache-teachers", "--scale", TEACHER_SCALE, *teacher, "--tta", "flips", "--cases", "all")
        batch = {"+answers#inferer#sw_batch_size": 16 if self.gpu else 2}
        job = self._job(row, range(FOLDS), [], lambda: caching, lambda: {**batch, **sizes}, evaluated=False)
        answers = self._answers([self.answers_path(name, pair)], [replace(row), self.teacher_row(name, pair, pair[1])])
        job = replace(job, needs=(weights,), outputs=(f"{name}/manifest.json",), answers=replace(answers, teacher=name))
        return [training, job]

    def _ensemble(self, pair: tuple[int, int]) -> StudyJob:
        """The scores of the mean answer of a pair's teachers."""
        rows = [self.teacher_row("ensemble", pair, fold) for fold in pair]
        paths = [self.answers_path(name, pair) for name in TEACHERS]
        job = self._job(rows[0], [], [], tuple, dict, evaluated=False)
        return replace(job, needs=tuple(paths), build=tuple, answers=self._answers(paths, rows))

    def _answers(self, paths: Sequence[Path], rows: Sequence[StudyRow]) -> Answers:
        return Answers(tuple(paths), self.cases, self.folds, self.settings["labels"], self.grid_settings, tuple(rows))

    def teacher_row(self, arm: str, pair: tuple[int, int], fold: int) -> StudyRow:
        """The row of a pair's teachers, tested on one of its folds."""
        (other,) = (k for k in pair if k != fold)
        return StudyRow("A", arm, arm, fold, other, 0, 4000)

    def answers_path(self, name: str, pair: tuple[int, int]) -> Path:
        """The answers of one teacher of a pair."""
        return self.results / "answers" / f"{name}_without_{min(pair)}_{max(pair)}.npz"

    # Experiment B1: another hospital. Fold j is its own, the teachers come from elsewhere.

    def another_hospital(self) -> list[StudyJob]:
        """Five arms for each tested fold i and own fold i + 1."""
        jobs = []
        for seed in SEEDS:
            for fold in range(FOLDS):
                own = (fold + 1) % FOLDS
                jobs += [
                    self.student_job(StudyRow("B1", "alone", "0.9M", fold, own, seed, 1500), [own]),
                    self.student_job(StudyRow("B1", "control", "0.9M", fold, own, seed, 1500), [own], LABEL),
                    self.taught_job(StudyRow("B1", "kd", "0.9M", fold, own, seed, 1500), [own]),
                    self.taught_job(StudyRow("B1", "kd_unlabelled", "0.9M", fold, own, seed, 1500), [], [own]),
                    self.student_job(
                        StudyRow("B1", "elsewhere", "0.9M", fold, own, seed, 1500),
                        [k for k in range(FOLDS) if k not in (fold, own)],
                    ),
                ]
        return jobs

    # Experiment C: compression, all labels.

    def compression(self, students: Sequence[str] = ("0.2M", "0.9M")) -> list[StudyJob]:
        """Alone, taught by teachers that have seen the patients, and the control, for each size of the student."""
        jobs = []
        for seed in SEEDS:
            for fold in range(FOLDS):
                train = [k for k in range(FOLDS) if k != fold]
                for student in students:
                    jobs += [
                        self.student_job(StudyRow("C", "alone", student, fold, None, seed, 2000), train),
                        self.student_job(StudyRow("C", "control", student, fold, None, seed, 2000), train, LABEL),
                        self.taught_job(StudyRow("C", "kd_in_sample", student, fold, None, seed, 2000), train),
                    ]
        return jobs

    # Parts of the jobs.

    def student_job(
        self,
        row: StudyRow,
        train: Sequence[int],
        teacher: Command = (),
        unlabelled: Sequence[int] = (),
        recipe: Callable[[], dict[str, Any]] | None = None,
    ) -> StudyJob:
        """A student alone, or with a teacher.

        Args:
            row: where the result belongs.
            train: folds to train on with their labels.
            teacher: options that name the teacher.
            unlabelled: folds to train on without their labels.
            recipe: gives the settings of the training; by default the chosen recipe.
        """
        command: Command = ("distill", *METHODS, *teacher) if teacher else ("train",)
        command = (*command, "--unlabelled") if unlabelled else command

        def settings() -> dict[str, Any]:
            chosen = self.chosen_recipe() if recipe is None else recipe()
            return {"student_features": STUDENTS[row.student], **chosen, **(TERMS if teacher else {})}

        job = self._job(row, train, unlabelled, lambda: command, settings, schedule=True)
        return job if recipe else replace(job, needs=self.recipe_records)

    def taught_job(self, row: StudyRow, train: Sequence[int], unlabelled: Sequence[int] = ()) -> StudyJob:
        """A student that learns from the answers of teachers that have not seen the tested fold.

        With a ``source_fold`` j its patients are answered by the teachers of the pair (i, j); else every patient is
        answered by the teachers that have seen that patient.
        """
        sources = self._answers_for(row, [*train, *unlabelled])
        folder = self._folder(row)
        spec, predictions = folder / "teacher.json", folder / "predictions"

        def prepare() -> None:
            write_json({"predictions": str(predictions), "modalities": self.settings["modalities"]}, spec)
            write_predictions(predictions, sources)

        teacher = ("--teacher", f"{OUTSIDE}={spec}", "--cache-dir", str(folder / "cache"))
        job = self.student_job(row, train, teacher, unlabelled)
        needs = (*job.needs, *dict.fromkeys(path for paths in sources.values() for path in paths))
        caching: Command = ("cache-teachers", "--teacher", f"{OUTSIDE}={spec}", "--fold", "0")
        caching = (*caching, "--unlabelled") if unlabelled else caching
        before = self._command(job, caching, {}, folder / "cache")
        return replace(job, needs=needs, before=(before,), preparations=(*job.preparations, prepare))

    def _answers_for(self, row: StudyRow, folds: Sequence[int]) -> dict[str, list[Path]]:
        sources: dict[str, list[Path]] = {}
        for source in folds:
            if row.source_fold is not None:
                pairs = [(row.fold, source)]
            else:
                pairs = [pair for pair in STAGE_1 if row.fold in pair and source not in pair]
            for case in self._cases_of([source]):
                sources[str(case["case_id"])] = [self.answers_path(name, pair) for pair in pairs for name in TEACHERS]
        return sources

    def _cases_of(self, folds: Sequence[int]) -> Iterator[dict[str, Any]]:
        patients = {patient for k in folds for patient in self.folds[k]}
        return (case for case in self.cases if str(case["patient_id"]) in patients)

    def _folder(self, row: StudyRow) -> Path:
        return self.output / row.name

    def _job(
        self,
        row: StudyRow,
        train: Sequence[int],
        unlabelled: Sequence[int],
        command: Callable[[], Command],
        settings: Callable[[], dict[str, Any]],
        schedule: bool = False,
        evaluated: bool = True,
    ) -> StudyJob:
        """A training on some folds, evaluated on the row's fold."""
        folder = self._folder(row)
        steps = max(1, row.steps // self.shorten)
        labelled, others = list(self._cases_of(train)), list(self._cases_of(unlabelled))
        tested = [case for case in self._cases_of([row.fold]) if case not in labelled]
        per_epoch = max(1, (len(labelled) + len(others)) // BATCH)
        epochs = -(-steps // per_epoch)

        def prepare() -> None:
            rows = [self._list_row(case) for case in (*labelled, *tested)]
            rows += [{key: value for key, value in self._list_row(case).items() if key != "label"} for case in others]
            write_json(rows, folder / "cases.json")
            patients = [sorted({str(case["patient_id"]) for case in part}) for part in (tested, [*labelled, *others])]
            write_json({"seed": 0, "folds": [part for part in patients if part]}, folder / "splits.json")

        length: dict[str, Any] = {"max_epochs": epochs, "val_interval": epochs + 1, "num_workers": 0}
        length |= {"save_interval": epochs if self.gpu else max(1, epochs // 10)}
        length |= {"precision": "bfloat16" if self.gpu else "float32"}

        notes: dict[str, Any] = {"commit": self.commit, "shortened": self.shorten > 1, "steps": epochs * per_epoch}
        job = StudyJob(
            row.name,
            row.seed,
            folder,
            (),
            study_row=row,
            results=self.results,
            preparations=(prepare,),
            notes=notes,
            folders={str(self.output): "RUNS", str(self.dataset_dir): "DATA"},
        )
        evaluate = ("evaluate", "--weights", str(folder / "model.pt"), "--fold", "0")

        def commands() -> tuple[Command, ...]:
            values = {**(length if schedule else {}), **settings()}
            first = self._command(job, (*command(), "--fold", "0"), values, folder)
            if not evaluated:
                return (first,)
            return first, self._command(job, evaluate, settings(), folder / "eval")

        return replace(job, build=commands, evaluations=("eval",) if evaluated else ())

    def _list_row(self, case: dict[str, Any]) -> dict[str, str]:
        """A case's row of a data list, with paths relative to the data set's folder."""
        files = {key: case[key] for key in (*self.settings["modalities"], "label") if key in case}
        paths = {key: Path(path).relative_to(self.dataset_dir).as_posix() for key, path in files.items()}
        return {"case_id": str(case["case_id"]), "patient_id": str(case["patient_id"]), **paths}

    def _command(self, job: StudyJob, verb: Command, settings: dict[str, Any], output: Path) -> Command:
        """A command of a job: its data, folders, device and settings."""
        files = ("--data-list", str(job.folder / "cases.json"), "--set", f"splits_file={job.folder / 'splits.json'}")
        where = ("--data", self.data, "--dataset-dir", self.dataset_dir, *files, "--output-dir", str(output))
        how = ["--seed", str(job.seed), "--threads", "1", "--device", self.device]
        if verb[0] != "evaluate":
            how += ["--set", f"volumes_dir={self.output / 'volumes'}"]
        values = {**GRID, **settings}
        if verb[0] == "evaluate":
            values = {key: value for key, value in values.items() if key in ("spacing", "patch") or "student" in key}
        sets = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        return (*verb, *where, *how, *sets)


def mean_dice(records: Sequence[Path]) -> float:
    """Mean Dice over the patients of some results, each patient's mean over its results first. A failure counts 0."""
    values: dict[str, list[float]] = {}
    for record in records:
        for case in json.loads(record.read_text(encoding="utf-8"))["cases"]:
            if case["status"] != "true_negative":
                values.setdefault(str(case["patient_id"]), []).append(float(case["dice"] or 0.0))
    means = [sum(each) / len(each) for each in values.values()]
    return sum(means) / len(means)
