# SPDX-License-Identifier: Apache-2.0
"""Check the bundle on one GPU: a whole epoch with its validation, bf16 training steps, cached and online teachers,
memory, and the mask against the CPU's.

Example: python -m benchmarks gpu --output-dir runs/gpu
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.interleaved_timing import Candidate
from benchmarks.options import add_json_option, add_output_options
from benchmarks.training_step import (
    MIN_ROUNDS,
    PLAIN,
    bare_trainer,
    cache_teachers,
    format_table,
    random_teachers,
    time_candidates,
)
from scripts.cli.bundle_run import Expression
from scripts.cli.config import config_names, read_config
from scripts.cli.main import main
from scripts.report.curves import read_curves
from scripts.utils.atomic_files import write_json

STUDIES = 10_000
LEAST_DICE = 0.999  # of the masks of CPU and GPU


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_output_options(parser, "runs/gpu")
    parser.add_argument("--device", default="cuda", help="the GPU (default %(default)s)")
    parser.add_argument("--scale", default="full", choices=config_names("scale"), help="size (default %(default)s)")
    parser.add_argument("--teachers", nargs="+", default=["unetr", "hdenseformer"], help="architectures")
    add_json_option(parser)


def candidates(args: argparse.Namespace, folder: Path, cache: Path) -> list[Candidate]:
    """Plain training in float32 and bf16, then the teachers cached and online, in bf16."""
    base = ("train", "data/phantom", f"scale/{args.scale}")
    common = {
        "dataset_dir": str(folder),
        "threads": 1,
        "num_workers": 4,
        "output_dir": str(args.output_dir / "unused"),
        "device": Expression(f"$torch.device({args.device!r})"),
        "precision": "bfloat16" if args.device.startswith("cuda") else "float32",
    }
    taught = {**common, "teacher_specs": random_teachers(args.teachers, read_config("data/phantom")["modalities"])}
    terms = (*base, "distill", "methods/hinton")
    return [
        Candidate(PLAIN, base, common),
        Candidate("plain, float32", base, {**common, "precision": "float32"}),
        Candidate("cached teachers", (*terms, "cached"), {**taught, "cache_dir": str(cache)}),
        Candidate("online teachers", terms, taught),
    ]


def _peak_memory(candidate: Candidate, device: str, pipe: Connection) -> None:
    """Worker process: train an epoch and send the peak memory of the GPU in MiB."""
    bare_trainer(candidate, epochs=1).run()
    pipe.send(torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith("cuda") else 0.0)


def peak_memory(candidate: Candidate, device: str) -> float:
    """Peak memory of the GPU in MiB over an epoch, in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_peak_memory, args=(candidate, device, there))
    process.start()
    there.close()
    try:
        return float(here.recv())
    except EOFError:
        raise RuntimeError(f"The training '{candidate.name}' ended early. See the error message above.") from None
    finally:
        process.join()


def _command(*words: Any) -> None:
    """Run a command in a process of its own, because a process that has used the GPU must not be forked."""
    command = list(map(str, words))
    process = multiprocessing.get_context("fork").Process(target=lambda: exit(main(command)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"`{command[0]}` failed. See the error message above.")


def segment_on(device: str, folder: Path, mask: Path) -> None:
    """Segment one phantom."""
    case = folder / "PHANTOM_001"
    files = ("--ct", case / "CT_image.nii.gz", "--pet", case / "PET_image.nii.gz", "--mr", case / "MR_T1_image.nii.gz")
    options = ("--device", device, "--engine", "torch", "--precision", "fp32", "--output", mask)
    _command("segment", *files, *options)


def train_an_epoch(options: Sequence[str], output: Path) -> None:
    """Train one epoch with its validation, which must have a Dice."""
    settings = ("--epochs", "1", "--set", "val_interval=1", "--set", "overwrite=true")
    _command("train", *options, *settings, "--output-dir", output)
    if read_curves(output / "curves.csv")[-1].get("val_dice") is None:
        raise RuntimeError("The validation gave no Dice.")


def compare_masks(folder: Path, output: Path, device: str) -> dict[str, Any]:
    """Segment one phantom on the CPU and on the GPU and compare the masks."""
    masks = []
    for name in ("cpu", device):
        mask = output / f"mask_{name.replace(':', '_')}.nii.gz"
        segment_on(name, folder, mask)
        masks.append(np.asanyarray(nib.load(mask).dataobj) > 0)  # type: ignore[attr-defined]
    cpu, gpu = masks
    both = int(cpu.sum() + gpu.sum())
    dice = 2 * int((cpu & gpu).sum()) / both if both else 0.0
    if dice < LEAST_DICE:
        raise RuntimeError(f"The masks of CPU and {device} have a Dice of {dice:.4f}, less than {LEAST_DICE}.")
    return {"voxels": int(cpu.sum()), "different_voxels": int((cpu != gpu).sum()), "dice": round(dice, 6)}


def run(args: argparse.Namespace) -> str:
    """Run all checks and return the report."""
    folder, cache = args.output_dir / "phantoms", args.output_dir / "cache"
    choices = candidates(args, folder, cache)
    if args.dry_run:
        return "\n".join(f"{each.name}: {', '.join(each.configs)}" for each in choices)
    if not folder.is_dir():
        main(["phantom", "--cases", "10", "--output-dir", str(folder)])
    masks = compare_masks(folder, args.output_dir, args.device)
    options = ("--data", "phantom", "--dataset-dir", str(folder), "--scale", args.scale, "--device", args.device)
    train_an_epoch(options, args.output_dir / "epoch")
    cache_teachers(cache, (*options, "--fold", "0", "--set", "overlap=0"), args.teachers)
    rows = time_candidates(choices, MIN_ROUNDS)
    for row, candidate in zip(rows, choices, strict=True):
        row["gpu_mib"] = round(peak_memory(candidate, args.device))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else args.device
    report = {"device": name, "torch": torch.__version__, "scale": args.scale, "masks": masks, "steps": rows}
    write_json(report, args.json or args.output_dir / "gpu.json")
    return _report(name, masks, rows)


def _report(device: str, masks: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"device: {device}, torch {torch.__version__}",
        f"masks of CPU and GPU: {masks['different_voxels']} of {masks['voxels']} voxels differ, Dice {masks['dice']}",
        format_table(rows),
        *(f"GPU memory, {row['side']}: {row['gpu_mib']} MiB" for row in rows),
        *(
            f"an epoch of {STUDIES} studies, batches of 2, {row['side']}: {row['median_s'] * STUDIES / 2 / 60:.1f} min"
            for row in rows
        ),
    ]
    return "\n".join(lines)
