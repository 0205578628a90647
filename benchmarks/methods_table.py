# SPDX-License-Identifier: Apache-2.0
"""The table and the figure of a comparison: means over seeds, intervals over patients."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.job_queue import Job
from benchmarks.methods_plan import ALONE, THRESHOLDS, Plan
from scripts.data import datalist, fold_split
from scripts.metrics import METRICS, Row, aggregate, paired_difference, read_rows
from scripts.report.curves import read_curves
from scripts.utils.atomic_files import atomic_file, write_json, write_text
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import write_manifest

WARMED = "student warmed up"
_HEAD = ("network", "seeds", "Dice", "Dice per seed", "Dice - alone", "HD95 mm", "ASSD mm", "missed", "train s", "MiB")


def seed_mean(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """One row per case: the mean over the seeds' rows, where a failure counts as Dice 0 and the image's diagonal.

    Args:
        runs: rows per case, one sequence per seed, of the same cases.
    """
    by_case: dict[str, list[Row]] = {}
    for rows in runs:
        for row in rows:
            by_case.setdefault(str(row["case_id"]), []).append(row)
    merged = []
    for case, rows in by_case.items():
        worst = {"dice": 0.0, "hd95_mm": rows[0]["diagonal_mm"], "assd_mm": rows[0]["diagonal_mm"]}
        filled = {m: [worst[m] if row[m] is None else float(row[m]) for row in rows] for m in METRICS}
        means = {m: statistics.fmean(values) for m, values in filled.items()}
        merged.append({**rows[0], **means, "case_id": case, "status": "ok"})
    return merged


def _cost(folder: Path) -> dict[str, float]:
    """Seconds of a training, its stages included, its median step and its peak memory."""
    manifests = [folder / "manifest.json", *sorted(folder.glob("stages/*/manifest.json"))]
    read = [json.loads(path.read_text(encoding="utf-8")) for path in manifests if path.is_file()]
    curves = folder / "curves.csv"
    steps = [row["seconds_per_step"] or 0.0 for row in read_curves(curves)] if curves.is_file() else [0.0]
    return {
        "seconds": sum(m["wall_seconds"] or 0.0 for m in read),
        "step_s": statistics.median(steps),
        "peak_mib": max((m["peak_mib"] for m in read), default=0.0),
    }


def entry(row: str, folders: Sequence[Path], evaluations: Sequence[Path]) -> dict[str, Any]:
    """A row of the table from its seeds' folders."""
    runs = [read_rows(folder / "cases.csv") for folder in evaluations]
    rows, costs = seed_mean(runs), [_cost(folder) for folder in folders]
    weights = [_term_weights(folder) for folder in folders]
    return {
        "row": row,
        "seeds": len(runs),
        "rows": rows,
        "aggregate": aggregate(rows),
        "dice_per_seed": [round(statistics.fmean(float(r["dice"] or 0.0) for r in run), 3) for run in runs],
        "missed": sum(r["status"] != "ok" for run in runs for r in run),
        "term_weights": weights,
        "distilled": any(weights),
        **{key: statistics.median(c[key] for c in costs) for key in ("seconds", "step_s", "peak_mib") if costs},
    }


def _term_weights(folder: Path) -> dict[str, float]:
    """The weights of a distillation's terms, as its manifest has them."""
    path = folder / "manifest.json"
    loss = (json.loads(path.read_text(encoding="utf-8")).get("config") or {}).get("loss", {}) if path.is_file() else {}
    terms = loss.get("terms", {}) if isinstance(loss, Mapping) else {}
    return {name: term["weight"] for name, term in terms.items()}


def entries(plan: Plan, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """All rows that have a result, in the order of the jobs, each with its paired difference to the lone student."""
    folders: dict[str, list[Path]] = {}
    seeds: dict[str, list[int]] = {}
    for job in jobs:
        if job.done and not job.row.startswith(WARMED):
            folders.setdefault(job.row, []).append(job.folder)
            seeds.setdefault(job.row, []).append(job.seed)
    found = [entry(row, each, [folder / "eval" for folder in each]) for row, each in folders.items()]
    for row in THRESHOLDS:
        folder = plan.output / row.replace(" ", "_").replace("%", "")
        if (folder / "cases.csv").is_file():
            found.append(entry(row, [], [folder]))
    alone = dict(
        zip(seeds.get(ALONE, []), (read_rows(f / "eval" / "cases.csv") for f in folders.get(ALONE, [])), strict=True)
    )
    for each in found:
        if alone and each["row"] != ALONE:
            # Students meet the lone student of their own seeds; teachers and thresholds have no seed in common with it.
            own = [] if each["row"].startswith("teacher ") else seeds.get(each["row"], [])
            rows = seed_mean([alone[seed] for seed in (own or alone) if seed in alone])
            each["difference"] = {m: paired_difference(each["rows"], rows, m) for m in METRICS}
    return found


def interval(summary: Mapping[str, Any], digits: int, sign: str = "") -> str:
    """A mean with its interval, as text."""
    low, high = summary["ci95"] or (float("nan"),) * 2
    return f"{summary['mean']:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table: means over seeds and patients, 95% bootstrap intervals over patients."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for each in found:
        metrics = each["aggregate"]["metrics"]
        dice, hd95, assd = (interval(metrics[m]["worst_filled"], d) for m, d in zip(METRICS, (3, 1, 1), strict=True))
        difference = interval(each["difference"]["dice"], 3, "+") if "difference" in each else ""
        per_seed = " ".join(f"{x:.3f}" for x in each["dice_per_seed"])
        cost = [f"{each['seconds']:.0f}", f"{each['peak_mib']:.0f}"] if "seconds" in each else ["", ""]
        seeds = str(each["seeds"]) if "seconds" in each else ""
        cells = [each["row"], seeds, dice, per_seed, difference, hd95, assd, str(each["missed"]), *cost]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Dice of every row with its interval, and its paired difference to the lone student."""
    rows = sorted(found, key=lambda each: each["aggregate"]["metrics"]["dice"]["worst_filled"]["mean"])
    plot, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, 0.3 * len(rows) + 1.2), layout="constrained")
    for i, each in enumerate(rows):
        colour = "tab:red" if each["row"] == ALONE else "tab:blue" if each["distilled"] else "tab:gray"
        summary = each["aggregate"]["metrics"]["dice"]["worst_filled"]
        left.plot(summary["ci95"], [i, i], color=colour)
        left.plot(each["dice_per_seed"], [i] * len(each["dice_per_seed"]), ".", color=colour, alpha=0.5)
        left.plot(summary["mean"], i, "o", color=colour)
        if "difference" in each:
            difference = each["difference"]["dice"]
            right.plot(difference["ci95"], [i, i], color=colour)
            right.plot(difference["mean"], i, "o", color=colour)
    left.set_yticks(range(len(rows)), [each["row"] for each in rows])
    left.set_xlabel("Dice: mean, 95% interval over patients, seeds")
    right.set_xlabel("Dice minus the lone student's, paired")
    right.axvline(0, color="tab:red", linewidth=1)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    with atomic_file(path) as file:
        plot.savefig(file, format="png", dpi=110)
    plt.close(plot)


def _write_cases(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Every row's mean over its seeds, per case."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "case_id", *METRICS])
    for each in found:
        name = each["row"].replace(",", "")
        writer.writerows([name, row["case_id"], *(f"{row[m]:.4f}" for m in METRICS)] for row in each["rows"])
    write_text(text.getvalue(), path)


def write_comparison(plan: Plan, jobs: Sequence[Job], json_file: str | None = None) -> str:
    """Write the comparison into the plan's folder and return the table.

    ``table.md``, ``table.json`` (with the terms' weights), ``cases.csv``, ``commands.json``, ``figure.png`` and
    ``manifest.json``.

    Args:
        plan: what was compared.
        jobs: its trainings; those without a result are left out.
        json_file: also write the costs as rows ``{"side", "what", "median_s", "ratio", "peak_mib"}``.
    """
    found = entries(plan, jobs)
    text = markdown(found)
    write_text(text + "\n", plan.output / "table.md")
    write_json([{k: v for k, v in each.items() if k != "rows"} for each in found], plan.output / "table.json")
    commands = [{"row": j.row, "seed": j.seed, "commands": [" ".join(c) for c in j.commands]} for j in jobs if j.done]
    write_json(commands, plan.output / "commands.json")
    _write_cases(found, plan.output / "cases.csv")
    figure(found, plan.output / "figure.png")
    teachers: dict[str, str | None] = {
        job.row: sha256(job.folder / "model.pt") for job in jobs if job.done and job.row.startswith("teacher ")
    }
    cases = fold_split(datalist(plan.data, plan.dataset_dir), plan.fold)
    write_manifest(plan.output, {"training": cases[0], "validation": cases[1]}, teachers)
    if json_file:
        base = next((each["step_s"] for each in found if each["row"] == ALONE), None)
        timed = [each for each in found if each.get("step_s")]
        rows = [
            {
                "side": each["row"],
                "what": "training step",
                "median_s": round(each["step_s"], 4),
                "ratio": round(each["step_s"] / base, 3) if base else None,
                "peak_mib": each["peak_mib"],
            }
            for each in timed
        ]
        write_json(rows, json_file)
    return text
