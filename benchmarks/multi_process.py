# SPDX-License-Identifier: Apache-2.0
"""Samples per second of one process and of two, each on one core: what a second process is worth."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.report.curves import read_curves

SIDES = {  # name -> processes, cases per step in each
    "1 process, batch 2": (1, 2),
    "1 process, batch 1": (1, 1),
    "2 processes, batch 1 each": (2, 1),
    "2 processes, batch 2 each": (2, 2),
}


def _train(arguments: Sequence[str], output: Path, processes: int, batch: int, epochs: int) -> tuple[float, float]:
    """One training by torchrun; the median seconds per step after its first epoch, and MiB of the first process."""
    settings = ("--threads", "1", "--epochs", str(epochs), "--set", f"batch_size={batch}", "--set", "val_interval=1000")
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    anew = ("--output-dir", str(output), "--set", "overwrite=true")  # every round trains from the beginning
    command = (*launcher, "-m", "scripts", "train", "--multi-gpu", *arguments, *settings, *anew)
    # Gloo's teardown may fail after everything is written: the manifest, written last, is what counts.
    (output / "manifest.json").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, check=False)
    if not (output / "manifest.json").is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("error:")] or [done.stderr[-300:]]
        raise RuntimeError(f"A training with {processes} process(es) failed: {said[0]}")
    steps = [row["seconds_per_step"] or 0.0 for row in read_curves(output / "curves.csv") if (row["epoch"] or 0) > 1]
    peak = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["peak_mib"]
    return statistics.median(steps), peak


def measure(arguments: Sequence[str], output: Path, rounds: int, epochs: int) -> list[dict[str, Any]]:
    """One row per side: the median over rounds, in which the sides take turns.

    Args:
        arguments: of ``python -m scripts train``: data, folder, scale, fold.
        output: folder of the trainings.
        rounds: trainings per side.
        epochs: of each training, from 2; the first is not counted.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "samples_per_s", "peak_mib"}``; ``ratio`` is of the samples per
        second to those of one process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    peaks: dict[str, float] = {}
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        for name, (processes, batch) in SIDES.items():
            folder = output / name.replace(",", "").replace(" ", "_")
            step, peaks[name] = _train(arguments, folder, processes, batch, max(2, epochs))
            seconds[name].append(step)
    rates = {n: processes * batch / statistics.median(seconds[n]) for n, (processes, batch) in SIDES.items()}
    base = next(iter(rates.values()))
    return [
        {
            "side": name,
            "what": "training step",
            "median_s": round(statistics.median(seconds[name]), 4),
            "ratio": round(rate / base, 3),
            "samples_per_s": round(rate, 3),
            "peak_mib": round(peaks[name]),
        }
        for name, rate in rates.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| side | median s per step | samples per s | ratio | peak MiB per process |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["side"], f"{row['median_s']:.3f}", f"{row['samples_per_s']:.2f}", f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join([*cells, str(row["peak_mib"])]) + " |")
    return "\n".join(lines)
