# SPDX-License-Identifier: Apache-2.0
"""What a student is worth when modalities are missing: every subset, with and without modality dropout and teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.job_queue import Command, Job
from benchmarks.methods_plan import SHARE, TEACHER_RATE
from benchmarks.methods_table import interval, seed_mean
from scripts.metrics import METRICS, Row, aggregate, paired_difference, read_rows
from scripts.utils.atomic_files import atomic_file, write_json, write_text

METHOD = "dist"  # the best on predictions alone in the comparison of all methods
PLAIN, DROPPED, DISTILLED = "alone", "alone, dropout", f"distilled ({METHOD}), dropout"
ROWS = (PLAIN, DROPPED, f"distilled ({METHOD})", DISTILLED)


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset, the whole first, then by size."""
    sizes = range(len(modalities), 0, -1)
    return [subset for size in sizes for subset in combinations(modalities, size)]


@dataclass(frozen=True)
class MissingPlan:
    """Four students, each scored on every subset of the modalities.

    Args:
        common: arguments of every command: data, folder, scale, threads, fold.
        output: folder of everything.
        modalities: of the data set.
        seeds: of the students.
        epochs: of the students.
        teacher_epochs: of the one teacher, DynUNet on all modalities.
        dropout: probability of losing a modality.
    """

    common: Command
    output: Path
    modalities: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 60
    teacher_epochs: int = 100
    dropout: float = 0.25

    def jobs(self) -> list[Job]:
        """The teacher, its cache, a student on which the terms are weighed, then the students seed by seed."""
        teacher, cache, warmed = (self.output / name for name in ("teacher_dynunet", "cache", "warmed"))
        named = ("--architecture", "dynunet", "--modalities", *self.modalities, "--epochs", str(self.teacher_epochs))
        learn = ("teacher", *named, *self._to(teacher, 0), "--set", f"learning_rate={TEACHER_RATE}")
        start = ("train", "--epochs", str(max(1, self.epochs // 5)), *self._to(warmed, 0))
        weights = ("--teacher", f"dynunet={teacher / 'model.pt'}")
        keep = ("cache-teachers", *weights, *self._to(cache, 0))
        jobs = [
            Job("teacher", 0, teacher, (learn,), (), ()),
            Job("student warmed up", 0, warmed, (start,), (), ()),
            Job("cache", 0, cache, (keep,), (teacher / "model.pt",), (), ("dynunet/manifest.json",)),
        ]
        needs = (cache / "dynunet" / "manifest.json", warmed / "model.pt")
        balance = ("--balance", str(SHARE), "--balance-with", str(needs[1]))
        taught = ("--method", METHOD, *weights, "--cache-dir", str(cache), *balance)
        jobs += [self._student(row, seed, needs, taught) for seed in self.seeds for row in ROWS]
        return jobs

    def _to(self, folder: Path, seed: int) -> Command:
        return (*self.common, "--seed", str(seed), "--output-dir", str(folder))

    def _student(self, row: str, seed: int, needs: tuple[Path, ...], taught: Command) -> Job:
        folder = self.folder(row, seed)
        distilled = row.startswith("distilled")
        verb = ("distill", *taught) if distilled else ("train",)
        lost: Command = ("--modality-dropout", str(self.dropout)) if row.endswith("dropout") else ()
        train = (*verb, *lost, "--epochs", str(self.epochs), *self._to(folder, seed))
        score = ("evaluate", *self.common, "--weights", str(folder / "model.pt"), "--name", row)
        names = [f"eval_{'_'.join(subset)}" for subset in subsets(self.modalities)]
        scores = [
            (*score, "--present", *subset, "--output-dir", str(folder / name))
            for subset, name in zip(subsets(self.modalities), names, strict=True)
        ]
        return Job(row, seed, folder, (train, *scores), needs if distilled else (), tuple(names))

    def folder(self, row: str, seed: int) -> Path:
        """Where a student of a seed is."""
        return self.output / row.replace(", ", "_").replace(" ", "_").replace("(", "").replace(")", "") / f"seed{seed}"

    def rows(self, row: str, subset: Sequence[str], seeds: Sequence[int] | None = None) -> list[Row]:
        """Per case the mean over these seeds, by default those that are there."""
        seeds = self.scored(row, subset) if seeds is None else seeds
        return seed_mean([read_rows(self._cases(row, subset, seed)) for seed in seeds])

    def scored(self, row: str, subset: Sequence[str]) -> list[int]:
        """Seeds of a student that have been scored on a subset."""
        return [seed for seed in self.seeds if self._cases(row, subset, seed).is_file()]

    def _cases(self, row: str, subset: Sequence[str], seed: int) -> Path:
        return self.folder(row, seed) / f"eval_{'_'.join(subset)}" / "cases.csv"

    def difference(
        self, row: str, subset: Sequence[str], other: str, other_subset: Sequence[str]
    ) -> dict[str, Any] | None:
        """Dice less that of another student or subset, over the seeds that both have; None where there is none."""
        others = self.scored(other, other_subset)
        seeds = [seed for seed in self.scored(row, subset) if seed in others]
        pair = self.rows(row, subset, seeds), self.rows(other, other_subset, seeds)
        return paired_difference(*pair, "dice") if seeds else None


def measured(plan: MissingPlan) -> list[dict[str, Any]]:
    """One entry per student and subset: metrics, and Dice against the same student with every modality.

    Differences are taken over the seeds that both sides have, so that a plan that is half done compares like with like.
    """
    found = []
    for row in ROWS:
        for subset in subsets(plan.modalities):
            rows = plan.rows(row, subset)
            if not rows:
                continue
            entry: dict[str, Any] = {"row": row, "present": list(subset), "metrics": aggregate(rows)["metrics"]}
            entry["loss"] = plan.difference(row, subset, row, plan.modalities)
            if row != PLAIN and (against := plan.difference(row, subset, PLAIN, subset)):
                entry["against_plain"] = against
            found.append(entry)
    return found


def shares(found: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> dict[str, float]:
    """Dice that each student loses with one modality missing, on average, as a share of what the plain one loses."""
    losses: dict[str, list[float]] = {}
    for entry in found:
        if len(entry["present"]) == len(modalities) - 1 and entry["loss"]:
            losses.setdefault(entry["row"], []).append(entry["loss"]["mean"])
    means = {row: sum(values) / len(values) for row, values in losses.items()}
    # Without a loss there is nothing to have a share of.
    return {row: mean / means[PLAIN] for row, mean in means.items()} if means.get(PLAIN, 0.0) < 0 else {}


def markdown(found: Sequence[Mapping[str, Any]], share: Mapping[str, float]) -> str:
    """The table: means over seeds and patients, 95% bootstrap intervals over patients."""
    head = ("present", "student", "Dice", "loss of Dice", "Dice - plain", "HD95 mm", "ASSD mm")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    order = list(dict.fromkeys(tuple(entry["present"]) for entry in found))
    for entry in sorted(found, key=lambda each: (-len(each["present"]), order.index(tuple(each["present"])))):
        metrics = [entry["metrics"][m]["worst_filled"] for m in METRICS]
        dice, hd95, assd = (interval(m, digits) for m, digits in zip(metrics, (3, 1, 1), strict=True))
        loss, plain = (interval(entry[key], 3, "+") if entry.get(key) else "" for key in ("loss", "against_plain"))
        cells = [", ".join(entry["present"]), entry["row"], dice, loss, plain, hd95, assd]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "With one modality missing, a student loses this share of what the plain one loses:"]
    lines += [f"- {row}: {value:.2f}" for row, value in share.items()]
    return "\n".join(lines)


def figure(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Dice of every student on every subset, with its interval."""
    groups = list(dict.fromkeys(tuple(entry["present"]) for entry in found))
    plot, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, row in enumerate(ROWS):
        mine = {tuple(e["present"]): e["metrics"]["dice"]["worst_filled"] for e in found if e["row"] == row}
        places = [(groups.index(subset) + 0.2 * (i - 1.5), summary) for subset, summary in mine.items()]
        bars = axis.bar([x for x, _ in places], [s["mean"] for _, s in places], width=0.18, label=row)
        for bar, (x, summary) in zip(bars, places, strict=True):
            if summary["ci95"]:
                axis.plot([x, x], summary["ci95"], color="black", linewidth=1)
            bar.set_alpha(0.85)
    axis.set_xticks(range(len(groups)), [" + ".join(subset) for subset in groups])
    axis.set_ylabel("Dice, 95% interval over patients")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(ROWS), frameon=False)
    with atomic_file(path) as file:
        plot.savefig(file, format="png", dpi=110)
    plt.close(plot)


def write_missing(plan: MissingPlan) -> str:
    """Write ``table.md``, ``table.json``, ``commands.json`` and ``figure.png`` into the plan's folder.

    Returns:
        The table.
    """
    found = measured(plan)
    share = shares(found, plan.modalities)
    text = markdown(found, share)
    write_text(text + "\n", plan.output / "table.md")
    write_json({"rows": found, "share_of_the_plain_loss": share, "dropout": plan.dropout}, plan.output / "table.json")
    commands = [{"row": j.row, "seed": j.seed, "commands": [" ".join(c) for c in j.commands]} for j in plan.jobs()]
    write_json(commands, plan.output / "commands.json")
    figure(found, plan.output / "figure.png")
    return text
