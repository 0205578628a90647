# SPDX-License-Identifier: Apache-2.0
"""Time a training step in one process and in two, each on one core: how much does a second process gain?

Without ``--dataset-dir`` the samples are phantoms.

Example: python -m benchmarks scaling --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.options import add_data_options, add_json_option, add_output_options, add_training_options
from benchmarks.training_step import training_data
from scripts.report.curves import read_curves
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table

SETUPS = {  # name -> number of processes, batch size of each
    "1 process, batch 2": (1, 2),
    "1 process, batch 1": (1, 1),
    "2 processes, batch 1 each": (2, 1),
    "2 processes, batch 2 each": (2, 2),
}


def run_training(options: Sequence[str], output: Path, processes: int, batch: int, epochs: int) -> tuple[float, float]:
    """Run one training by torchrun.

    Args:
        options: options of ``python -m scripts train``.
        output: output folder; an earlier training in it is replaced.
        processes: number of processes.
        batch: cases per step in each process.
        epochs: length of the training.

    Returns:
        The median seconds per step after the first epoch, and the peak memory of the first process in MiB.

    Raises:
        RuntimeError: the training failed.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    settings = ("--threads", "1", "--epochs", str(epochs), "--set", f"batch_size={batch}", "--set", "val_interval=1000")
    target = ("--output-dir", str(output), "--set", "overwrite=true")
    command = (*launcher, "-m", "scripts", "train", "--multi-gpu", *options, *settings, *target)
    # Gloo may fail when it shuts down, after all files are written. The manifest is written last: it tells success.
    manifest = output / "manifest.json"
    manifest.unlink(missing_ok=True)
    process = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, check=False)
    if not manifest.is_file():
        errors = [line for line in process.stderr.splitlines() if line.startswith("error:")] or [process.stderr[-300:]]
        raise RuntimeError(f"A training with {processes} process(es) failed: {errors[0]}")
    steps = [row["seconds_per_step"] or 0.0 for row in read_curves(output / "curves.csv") if (row["epoch"] or 0) > 1]
    return statistics.median(steps), json.loads(manifest.read_text(encoding="utf-8"))["peak_mib"]


def measure(options: Sequence[str], output: Path, rounds: int, epochs: int) -> list[dict[str, Any]]:
    """Time all ``SETUPS`` in interleaved rounds.

    Args:
        options: options of ``python -m scripts train``: data set, folder, scale, fold.
        output: folder of the trainings.
        rounds: trainings per setup; the median counts.
        epochs: epochs of each training, at least 2 because the first is not counted.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "samples_per_s", "peak_mib"}``; ``ratio`` compares the samples per
        second with those of the first setup.
    """
    seconds: dict[str, list[float]] = {name: [] for name in SETUPS}
    peaks: dict[str, float] = {}
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        for name, (processes, batch) in SETUPS.items():
            folder = output / name.replace(",", "").replace(" ", "_")
            step, peaks[name] = run_training(options, folder, processes, batch, max(2, epochs))
            seconds[name].append(step)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rates = {name: processes * batch / medians[name] for name, (processes, batch) in SETUPS.items()}
    base = next(iter(rates.values()))
    return [
        {
            "side": name,
            "what": "training step",
            "median_s": round(medians[name], 4),
            "ratio": round(rate / base, 3),
            "samples_per_s": round(rate, 3),
            "peak_mib": round(peaks[name]),
        }
        for name, rate in rates.items()
    ]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ("candidate", "median s per step", "samples per s", "ratio", "peak MiB per process")
    cells = [
        (row["side"], f"{row['median_s']:.3f}", f"{row['samples_per_s']:.2f}", f"{row['ratio']:.2f}", row["peak_mib"])
        for row in rows
    ]
    return markdown_table(head, cells)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    add_training_options(parser, scale="small")
    add_output_options(parser, "runs/benchmark")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of every training (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="trainings per candidate (default %(default)s)")
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Time all setups and return the table."""
    data, folder = training_data(args)
    if args.dry_run:
        return "\n".join(SETUPS)
    options = ("--data", data, "--dataset-dir", folder, "--scale", args.scale, "--fold", str(args.fold))
    rows = measure(options, args.output_dir / "scaling", args.rounds, args.epochs)
    write_json(rows, args.json or args.output_dir / "scaling.json")
    return format_table(rows)
