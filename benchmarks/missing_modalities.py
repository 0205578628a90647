# SPDX-License-Identifier: Apache-2.0
"""Score students on every subset of the modalities: with and without modality dropout, with and without a teacher.

An interrupted run continues where it stopped.

Example: python -m benchmarks missing --data sts --dataset-dir DATA --output-dir runs/missing
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.job_queue import Command, Job, add_queue_options, command_lines, run_jobs, select_jobs
from benchmarks.methods_plan import TEACHER_LEARNING_RATE
from benchmarks.options import add_data_options, add_output_options, add_training_options
from scripts.cli.config import read_config
from scripts.evaluation.seeds import mean_over_seeds
from scripts.metrics import METRICS, Row, aggregate, paired_difference, read_rows
from scripts.utils.atomic_files import atomic_file, write_json, write_text
from scripts.utils.markdown import interval_text, markdown_table

METHOD = "dist"  # the best method that uses predictions alone, in the comparison of all methods
PLAIN, DROPOUT, DISTILLED_DROPOUT = "alone", "alone, dropout", f"distilled ({METHOD}), dropout"
ROWS = (PLAIN, DROPOUT, f"distilled ({METHOD})", DISTILLED_DROPOUT)
Entry = Mapping[str, Any]


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset of the modalities, largest first."""
    sizes = range(len(modalities), 0, -1)
    return [subset for size in sizes for subset in combinations(modalities, size)]


@dataclass(frozen=True)
class MissingPlan:
    """Four students, each scored on every subset of the modalities.

    Args:
        common: arguments of every command: data set, folder, scale, threads, fold.
        output: output folder.
        modalities: modalities of the data set.
        seeds: seeds of the students.
        epochs: epochs of the students.
        teacher_epochs: epochs of the only teacher, a DynUNet of all modalities.
        dropout: probability of dropping a modality.
    """

    common: Command
    output: Path
    modalities: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 60
    teacher_epochs: int = 100
    dropout: float = 0.25

    def jobs(self) -> list[Job]:
        """The teacher, its cache, then all students."""
        teacher, cache = (self.output / name for name in ("teacher_dynunet", "cache"))
        network = ("--architecture", "dynunet", "--modalities", *self.modalities, "--epochs", str(self.teacher_epochs))
        train_teacher = (
            *("teacher", *network, *self._run_options(teacher, 0)),
            *("--set", f"learning_rate={TEACHER_LEARNING_RATE}"),
        )
        teacher_option = ("--teacher", f"dynunet={teacher / 'model.pt'}")
        write_cache = ("cache-teachers", *teacher_option, *self._run_options(cache, 0))
        jobs = [
            Job("teacher", 0, teacher, (train_teacher,), evaluations=()),
            Job(
                *("cache", 0, cache, (write_cache,)),
                needs=(teacher / "model.pt",),
                evaluations=(),
                outputs=("dynunet/manifest.json",),
            ),
        ]
        needs = (cache / "dynunet" / "manifest.json",)
        distill = ("distill", "--method", METHOD, *teacher_option, "--cache-dir", str(cache))
        jobs += [self._student(row, seed, needs, distill) for seed in self.seeds for row in ROWS]
        return jobs

    def _run_options(self, folder: Path, seed: int) -> Command:
        return (*self.common, "--seed", str(seed), "--output-dir", str(folder))

    def _student(self, row: str, seed: int, needs: tuple[Path, ...], distill: Command) -> Job:
        folder = self.folder(row, seed)
        distilled = row.startswith("distilled")
        verb = distill if distilled else ("train",)
        dropout: Command = ("--modality-dropout", str(self.dropout)) if row.endswith("dropout") else ()
        train = (*verb, *dropout, "--epochs", str(self.epochs), *self._run_options(folder, seed))
        evaluate = ("evaluate", *self.common, "--weights", str(folder / "model.pt"), "--name", row)
        names = [f"eval_{'_'.join(subset)}" for subset in subsets(self.modalities)]
        evaluations = [
            (*evaluate, "--present", *subset, "--output-dir", str(folder / name))
            for subset, name in zip(subsets(self.modalities), names, strict=True)
        ]
        return Job(row, seed, folder, (train, *evaluations), needs if distilled else (), tuple(names))

    def folder(self, row: str, seed: int) -> Path:
        """Folder of the student of a row and seed."""
        return self.output / row.replace(", ", "_").replace(" ", "_").replace("(", "").replace(")", "") / f"seed{seed}"

    def rows(self, row: str, subset: Sequence[str], seeds: Sequence[int] | None = None) -> list[Row]:
        """The mean over the seeds, one row per case.

        Args:
            row: name of the student.
            subset: the modalities that were present.
            seeds: by default all that have been scored.
        """
        seeds = self.scored_seeds(row, subset) if seeds is None else seeds
        return mean_over_seeds([read_rows(self._cases(row, subset, seed)) for seed in seeds])

    def scored_seeds(self, row: str, subset: Sequence[str]) -> list[int]:
        """The seeds of a student that have been scored on a subset."""
        return [seed for seed in self.seeds if self._cases(row, subset, seed).is_file()]

    def _cases(self, row: str, subset: Sequence[str], seed: int) -> Path:
        return self.folder(row, seed) / f"eval_{'_'.join(subset)}" / "cases.csv"

    def difference(
        self, row: str, subset: Sequence[str], other: str, other_subset: Sequence[str]
    ) -> dict[str, Any] | None:
        """The paired difference in Dice between two students or subsets, over the seeds that both have.

        Args:
            row: name of the student.
            subset: the modalities that were present.
            other: name of the student that is subtracted.
            other_subset: the modalities that were present for it.

        Returns:
            The difference, or None if they have no seed in common.
        """
        other_seeds = self.scored_seeds(other, other_subset)
        seeds = [seed for seed in self.scored_seeds(row, subset) if seed in other_seeds]
        if not seeds:
            return None
        return paired_difference(self.rows(row, subset, seeds), self.rows(other, other_subset, seeds), "dice")


def table_entries(plan: MissingPlan) -> list[dict[str, Any]]:
    """One entry per student and subset: its metrics, and the change in Dice against all modalities (``loss``).

    Differences are taken over the seeds that both students have, so that an unfinished plan is compared fairly.
    """
    entries = []
    for row in ROWS:
        for subset in subsets(plan.modalities):
            rows = plan.rows(row, subset)
            if not rows:
                continue
            entry: dict[str, Any] = {"row": row, "present": list(subset), "metrics": aggregate(rows)["metrics"]}
            entry["loss"] = plan.difference(row, subset, row, plan.modalities)
            if row != PLAIN and (against_plain := plan.difference(row, subset, PLAIN, subset)):
                entry["against_plain"] = against_plain
            entries.append(entry)
    return entries


def loss_shares(entries: Sequence[Entry], modalities: Sequence[str]) -> dict[str, float]:
    """The mean Dice that each student loses when one modality is missing, as a share of the plain student's loss.

    The result is empty if the plain student loses nothing.
    """
    losses: dict[str, list[float]] = {}
    for entry in entries:
        if len(entry["present"]) == len(modalities) - 1 and entry["loss"]:
            losses.setdefault(entry["row"], []).append(entry["loss"]["mean"])
    means = {row: sum(values) / len(values) for row, values in losses.items()}
    return {row: mean / means[PLAIN] for row, mean in means.items()} if means.get(PLAIN, 0.0) < 0 else {}


def format_table(entries: Sequence[Entry], shares: Mapping[str, float]) -> str:
    """The Markdown table and the shares of ``loss_shares``.

    The table has means over seeds and patients, and 95% bootstrap intervals over patients.
    """
    head = ("present", "student", "Dice", "loss of Dice", "Dice - plain", "HD95 mm", "ASSD mm")
    order = list(dict.fromkeys(tuple(entry["present"]) for entry in entries))
    rows = []
    for entry in sorted(entries, key=lambda each: (-len(each["present"]), order.index(tuple(each["present"])))):
        metrics = [entry["metrics"][m]["worst_filled"] for m in METRICS]
        dice, hd95, assd = (interval_text(m, digits) for m, digits in zip(metrics, (3, 1, 1), strict=True))
        loss, against_plain = (
            interval_text(entry[key], 3, "+") if entry.get(key) else "" for key in ("loss", "against_plain")
        )
        rows.append([", ".join(entry["present"]), entry["row"], dice, loss, against_plain, hd95, assd])
    lines = ["", "Loss of Dice with one modality missing, as a share of the plain student's loss:"]
    lines += [f"- {row}: {share:.2f}" for row, share in shares.items()]
    return "\n".join([markdown_table(head, rows), *lines])


def write_figure(entries: Sequence[Entry], path: Path) -> None:
    """Draw the Dice of every student on every subset, with its interval."""
    groups = list(dict.fromkeys(tuple(entry["present"]) for entry in entries))
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, row in enumerate(ROWS):
        dice = {tuple(e["present"]): e["metrics"]["dice"]["worst_filled"] for e in entries if e["row"] == row}
        bars = [(groups.index(subset) + 0.2 * (i - 1.5), summary) for subset, summary in dice.items()]
        axis.bar([x for x, _ in bars], [s["mean"] for _, s in bars], width=0.18, alpha=0.85, label=row)
        for x, summary in bars:
            if summary["ci95"]:
                axis.plot([x, x], summary["ci95"], color="black", linewidth=1)
    axis.set_xticks(range(len(groups)), [" + ".join(subset) for subset in groups])
    axis.set_ylabel("Dice, 95% interval over patients")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(ROWS), frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def write_missing(plan: MissingPlan) -> str:
    """Write ``table.md``, ``table.json``, ``commands.json`` and ``figure.png`` into the plan's folder.

    Returns:
        The table.
    """
    entries = table_entries(plan)
    shares = loss_shares(entries, plan.modalities)
    table = format_table(entries, shares)
    write_text(table + "\n", plan.output / "table.md")
    content = {"rows": entries, "share_of_the_plain_loss": shares, "dropout": plan.dropout}
    write_json(content, plan.output / "table.json")
    commands = [
        {"row": job.row, "seed": job.seed, "commands": [" ".join(command) for command in job.commands]}
        for job in plan.jobs()
    ]
    write_json(commands, plan.output / "commands.json")
    write_figure(entries, plan.output / "figure.png")
    return table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser, required=True)
    add_training_options(parser, scale="compare")
    add_output_options(parser, "runs/missing")
    add_queue_options(parser)
    parser.add_argument(
        "--epochs", type=int, default=MissingPlan.epochs, help="epochs of every student (default %(default)s)"
    )


def run(args: argparse.Namespace) -> str:
    """Run what is not done yet and return the table."""
    data = ("--data", args.data, "--dataset-dir", args.dataset_dir, "--scale", args.scale)
    plan = MissingPlan(
        common=(*data, "--threads", "1", "--fold", str(args.fold)),
        output=args.output_dir,
        modalities=tuple(read_config(f"data/{args.data}")["modalities"]),
        seeds=tuple(args.seeds),
        epochs=args.epochs,
        teacher_epochs=args.teacher_epochs,
    )
    if args.dry_run:
        return command_lines(plan.jobs())
    if not args.table:
        failed = run_jobs(select_jobs(plan.jobs(), args.only), args.workers)
        if failed:
            raise RuntimeError(
                f"{len(failed)} run(s) failed. See their log.txt in {plan.output}. To continue, repeat this command."
            )
    return write_missing(plan)
