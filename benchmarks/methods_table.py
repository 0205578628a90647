# SPDX-License-Identifier: Apache-2.0
"""The table and the figure of the comparison of methods: means over seeds, intervals over patients."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.job_queue import Job
from benchmarks.methods_plan import ALONE, PET_THRESHOLDS, MethodsPlan
from scripts.data import datalist, fold_split
from scripts.evaluation.seeds import mean_over_seeds
from scripts.metrics import METRICS, aggregate, paired_difference, read_rows
from scripts.metrics.case_rows import FAILURES, filled_value
from scripts.report.curves import read_curves
from scripts.utils.atomic_files import atomic_file, write_json, write_text
from scripts.utils.checksums import sha256
from scripts.utils.markdown import interval_text, markdown_table
from scripts.utils.run_manifest import torch_usage, write_manifest

_HEAD = ("network", "seeds", "Dice", "Dice per seed", "Dice - alone", "HD95 mm", "ASSD mm", "missed", "train s", "MiB")
Entry = Mapping[str, Any]


def _training_cost(folder: Path) -> dict[str, float]:
    """Seconds of a training including its stages, seconds of its median step, and its peak memory in MiB."""
    paths = [folder / "manifest.json", *sorted(folder.glob("stages/*/manifest.json"))]
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    curves = folder / "curves.csv"
    steps = [row["seconds_per_step"] or 0.0 for row in read_curves(curves)] if curves.is_file() else [0.0]
    return {
        "seconds": sum(manifest["wall_seconds"] or 0.0 for manifest in manifests),
        "step_s": statistics.median(steps),
        "peak_mib": max((manifest["peak_mib"] for manifest in manifests), default=0.0),
    }


def _term_weights(folder: Path) -> dict[str, float]:
    """The weights of the distillation terms from the manifest of a training; empty if there are none."""
    path = folder / "manifest.json"
    loss = (json.loads(path.read_text(encoding="utf-8")).get("config") or {}).get("loss", {}) if path.is_file() else {}
    terms = loss.get("terms", {}) if isinstance(loss, Mapping) else {}
    return {name: term["weight"] for name, term in terms.items()}


def table_entry(row: str, trainings: Sequence[Path], evaluations: Sequence[Path]) -> dict[str, Any]:
    """Summarise one row of the table.

    Args:
        row: its name.
        trainings: folder of each seed's training; empty for masks that no network made.
        evaluations: folder of each seed's evaluation.
    """
    runs = [read_rows(folder / "cases.csv") for folder in evaluations]
    rows, costs = mean_over_seeds(runs), [_training_cost(folder) for folder in trainings]
    weights = [_term_weights(folder) for folder in trainings]
    return {
        "row": row,
        "seeds": len(runs),
        "rows": rows,
        "aggregate": aggregate(rows),
        "dice_per_seed": [round(_mean_dice(run), 3) for run in runs],
        "missed": sum(r["status"] in FAILURES for run in runs for r in run),
        "term_weights": weights,
        "distilled": any(weights),
        **{key: statistics.median(cost[key] for cost in costs) for key in ("seconds", "step_s", "peak_mib") if costs},
    }


def _mean_dice(rows: Sequence[Mapping[str, Any]]) -> float:
    """With failures as 0, without cases whose reference and mask are both empty."""
    values = [value for row in rows if (value := filled_value(dict(row), "dice")) is not None]
    return statistics.fmean(values) if values else math.nan


def table_entries(plan: MethodsPlan, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Summarise all rows that have a result, each with its paired difference to the student alone.

    Args:
        plan: what is compared.
        jobs: in the order of the table.
    """
    folders: dict[str, list[Path]] = {}
    seeds: dict[str, list[int]] = {}
    for job in jobs:
        if job.done:
            folders.setdefault(job.row, []).append(job.folder)
            seeds.setdefault(job.row, []).append(job.seed)
    entries = [table_entry(row, each, [folder / "eval" for folder in each]) for row, each in folders.items()]
    for row in PET_THRESHOLDS:
        if (plan.threshold_folder(row) / "cases.csv").is_file():
            entries.append(table_entry(row, [], [plan.threshold_folder(row)]))
    alone = {
        seed: read_rows(folder / "eval" / "cases.csv")
        for seed, folder in zip(seeds.get(ALONE, []), folders.get(ALONE, []), strict=True)
    }
    for entry in entries:
        row = entry["row"]
        if not alone or row == ALONE:
            continue
        rows, reference = entry["rows"], mean_over_seeds([*alone.values()])
        if row in seeds and not row.startswith("teacher "):  # teachers and thresholds share no seed with the student
            common = {
                seed: read_rows(folder / "eval" / "cases.csv")
                for seed, folder in zip(seeds[row], folders[row], strict=True)
                if seed in alone
            }
            if not common:
                continue
            rows, reference = mean_over_seeds([*common.values()]), mean_over_seeds([alone[seed] for seed in common])
        entry["difference"] = {m: paired_difference(rows, reference, m) for m in METRICS}
    return entries


def format_table(entries: Sequence[Entry]) -> str:
    """The Markdown table: means over seeds and patients, 95% bootstrap intervals over patients."""
    return markdown_table(_HEAD, map(_cells, entries))


def _cells(entry: Entry) -> list[str]:
    metrics = entry["aggregate"]["metrics"]
    dice, hd95, assd = (
        interval_text(metrics[m]["worst_filled"], digits) for m, digits in zip(METRICS, (3, 1, 1), strict=True)
    )
    difference = interval_text(entry["difference"]["dice"], 3, "+") if "difference" in entry else ""
    dice_per_seed = " ".join(f"{value:.3f}" for value in entry["dice_per_seed"])
    trained = "seconds" in entry
    cost = [f"{entry['seconds']:.0f}", f"{entry['peak_mib']:.0f}"] if trained else ["", ""]
    seeds = str(entry["seeds"]) if trained else ""
    return [entry["row"], seeds, dice, dice_per_seed, difference, hd95, assd, str(entry["missed"]), *cost]


def write_figure(entries: Sequence[Entry], path: Path) -> None:
    """Draw the Dice of every row with its interval, and its paired difference to the student alone."""
    rows = sorted(entries, key=lambda entry: entry["aggregate"]["metrics"]["dice"]["worst_filled"]["mean"])
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, 0.3 * len(rows) + 1.2), layout="constrained")
    for i, entry in enumerate(rows):
        colour = "tab:red" if entry["row"] == ALONE else "tab:blue" if entry["distilled"] else "tab:gray"
        summary = entry["aggregate"]["metrics"]["dice"]["worst_filled"]
        _draw_interval(left, summary["ci95"], i, colour)
        left.plot(entry["dice_per_seed"], [i] * len(entry["dice_per_seed"]), ".", color=colour, alpha=0.5)
        left.plot(summary["mean"], i, "o", color=colour)
        if "difference" in entry:
            difference = entry["difference"]["dice"]
            _draw_interval(right, difference["ci95"], i, colour)
            right.plot(difference["mean"], i, "o", color=colour)
    left.set_yticks(range(len(rows)), [entry["row"] for entry in rows])
    left.set_xlabel("Dice: mean, 95% interval over patients, seeds")
    right.set_xlabel("Dice minus that of the student alone, paired")
    right.axvline(0, color="tab:red", linewidth=1)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _draw_interval(axis: Axes, interval: Sequence[float] | None, row: int, colour: str) -> None:
    """Draw an interval, which a single patient has not."""
    if interval is not None:
        axis.plot(interval, [row, row], color=colour)


def _write_cases(entries: Sequence[Entry], path: Path) -> None:
    """Write the mean over the seeds of every row and case."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "case_id", *METRICS])
    for entry in entries:
        name = entry["row"].replace(",", "")
        writer.writerows(
            [name, row["case_id"], *("" if row[m] is None else f"{row[m]:.4f}" for m in METRICS)]
            for row in entry["rows"]
        )
    write_text(text.getvalue(), path)


def _cost_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The cost of a training step of every row, relative to that of the student alone."""
    base = next((entry["step_s"] for entry in entries if entry["row"] == ALONE), None)
    return [
        {
            "side": entry["row"],
            "what": "training step",
            "median_s": round(entry["step_s"], 4),
            "ratio": round(entry["step_s"] / base, 3) if base else None,
            "peak_mib": entry["peak_mib"],
        }
        for entry in entries
        if entry.get("step_s")
    ]


def write_comparison(plan: MethodsPlan, jobs: Sequence[Job], json_file: str | None = None) -> str:
    """Write the comparison into the plan's folder.

    The files are ``table.md``, ``table.json`` (with the weights of the terms), ``cases.csv``, ``commands.json``,
    ``figure.png`` and ``manifest.json``.

    Args:
        plan: what was compared.
        jobs: its jobs; those without a result are left out.
        json_file: also write the costs to this file, as rows ``{"side", "what", "median_s", "ratio", "peak_mib"}``.

    Returns:
        The Markdown table.
    """
    entries = table_entries(plan, jobs)
    table = format_table(entries)
    write_text(table + "\n", plan.output / "table.md")
    write_json([{k: v for k, v in entry.items() if k != "rows"} for entry in entries], plan.output / "table.json")
    commands = [
        {"row": job.row, "seed": job.seed, "commands": [" ".join(command) for command in job.commands]}
        for job in jobs
        if job.done
    ]
    write_json(commands, plan.output / "commands.json")
    _write_cases(entries, plan.output / "cases.csv")
    write_figure(entries, plan.output / "figure.png")
    teachers: dict[str, str | None] = {
        job.row: sha256(job.folder / "model.pt") for job in jobs if job.done and job.row.startswith("teacher ")
    }
    training, validation = fold_split(datalist(plan.data, plan.dataset_dir), plan.fold)
    write_manifest(plan.output, {"training": training, "validation": validation}, teachers, **torch_usage())
    if json_file:
        write_json(_cost_rows(entries), json_file)
    return table
