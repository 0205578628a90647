# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts benchmark NAME``: a function for each name; it returns what is printed."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.job_queue import Job, with_needs, work_off
from benchmarks.methods_plan import Plan, compare_methods
from benchmarks.methods_table import write_comparison
from benchmarks.missing_modalities import MissingPlan, write_missing
from scripts.cli.config import config_names
from scripts.utils.atomic_files import write_json

logger = logging.getLogger(__name__)

Main = Callable[[Sequence[str]], int]
SCALES = {"methods": "compare", "missing": "compare"}  # the others: small


def _require_data(args: argparse.Namespace) -> None:
    if not args.dataset_dir:
        raise ValueError("There is nothing to compare on: name the data set's folder by --dataset-dir.")


def _lines(jobs: Sequence[Job]) -> str:
    return "\n".join(f"python -m scripts {shlex.join(command)}" for job in jobs for command in job.commands)


def methods(args: argparse.Namespace, modalities: Sequence[str], main: Main) -> str:
    """Train and score every method under one recipe."""
    _require_data(args)
    plan = Plan(
        data=args.data,
        dataset_dir=args.dataset_dir,
        scale=args.scale,
        output=Path(args.output_dir or "runs/compare"),
        modalities=tuple(modalities),
        methods=tuple(config_names("methods")),
        seeds=tuple(args.seeds),
        epochs=args.epochs or Plan.epochs,
        teacher_epochs=args.teacher_epochs,
        fold=args.fold or 0,
    )
    if args.dry_run:
        return _lines(plan.jobs())
    jobs = plan.jobs() if args.table else compare_methods(plan, args.workers, main, args.only)
    return write_comparison(plan, jobs, args.json)


def missing(args: argparse.Namespace, modalities: Sequence[str], main: Main) -> str:
    """Train students with and without modality dropout and a teacher, score each on every subset of modalities."""
    _require_data(args)
    data = ("--data", args.data, "--dataset-dir", args.dataset_dir, "--scale", args.scale)
    plan = MissingPlan(
        common=(*data, "--threads", "1", "--fold", str(args.fold or 0)),
        output=Path(args.output_dir or "runs/missing"),
        modalities=tuple(modalities),
        seeds=tuple(args.seeds),
        epochs=args.epochs or MissingPlan.epochs,
        teacher_epochs=args.teacher_epochs,
    )
    if args.dry_run:
        return _lines(plan.jobs())
    if not args.table:
        failed = work_off(with_needs(plan.jobs(), args.only), args.workers, main)
        if failed:
            raise RuntimeError(f"{len(failed)} run(s) failed: see their log.txt in {plan.output}, and start it again.")
    return write_missing(plan)


def _data(args: argparse.Namespace, output: Path, main: Main) -> tuple[str, str]:
    """The data set to train on: the one that was named, or phantoms."""
    if args.dataset_dir:
        return args.data, args.dataset_dir
    folder = output / "phantoms"
    if not folder.is_dir() and not args.dry_run:
        main(["phantom", "--cases", "10", "--output-dir", str(folder)])
    return "phantom", str(folder)


def scaling(args: argparse.Namespace, modalities: Sequence[str], main: Main) -> str:
    """Time a training step in one and in two processes of one core each, in turns."""
    from benchmarks import multi_process as scaling_benchmark

    output = Path(args.output_dir or "runs/benchmark")
    data, folder = _data(args, output, main)
    named = ("--data", data, "--dataset-dir", folder, "--scale", args.scale, "--fold", str(args.fold or 0))
    if args.dry_run:
        return "\n".join(scaling_benchmark.SIDES)
    rows = scaling_benchmark.measure(named, output / "scaling", args.rounds, args.epochs or 3)
    write_json(rows, args.json or output / "scaling.json")
    return scaling_benchmark.table(rows)


def training(args: argparse.Namespace, modalities: Sequence[str], main: Main) -> str:
    """Time a training step of every side, in turns; phantoms where no data set is named."""
    from benchmarks import training_step as cost

    output = Path(args.output_dir or "runs/benchmark")
    data, folder = _data(args, output, main)
    threads = args.threads or 1
    base = ("train", f"data/{data}", f"scale/{args.scale}")
    common = {"dataset_dir": folder, "threads": threads, "output_dir": str(output / "unused"), "fold": args.fold or 0}
    named = ("--data", data, "--dataset-dir", folder, "--scale", args.scale, "--threads", str(threads))
    cache = output / f"cache_{data}_{args.scale}"
    groups = [
        cost.cost_sides(base, common, modalities, cache),
        cost.method_sides(base, common, modalities, config_names("methods")),
    ]
    if args.dry_run:
        return "\n".join(f"{side.name}: {', '.join(side.configs)}" for sides in groups for side in sides)
    cost.prepare(cache, (*named, "--fold", str(args.fold or 0), "--set", "overlap=0"), main)
    rows = [row for sides in groups for row in cost.alternate(sides, max(args.rounds, cost.LEAST_ROUNDS))]
    write_json(rows, args.json or output / "training.json")
    return cost.table(rows)


def _exported(patients: Path, main: Main) -> None:
    """Export the shipped weights where that has not been done; int8 needs the patients that they were trained on."""
    from benchmarks.inference_candidates import WEIGHTS
    from scripts.inference.engine_choice import read_export
    from scripts.inference.engines import UnavailableError

    try:
        read_export(WEIGHTS)
    except UnavailableError as error:
        logger.info("%s", error)
        known = ["--dataset-dir", str(patients), "--precisions", "fp32", "bf16", "int8"] if patients.is_dir() else []
        main(["export", *known])  # what cannot be had is left out below, with the reason


def inference(args: argparse.Namespace, modalities: Sequence[str], main: Main) -> str:
    """Time inference from files to a written mask: engines, stock MONAI, teachers, nnU-Net, in turns."""
    from benchmarks import inference_speed as speed
    from benchmarks.hardware_floor import cpu_name
    from benchmarks.inference_candidates import MAIN, PATIENT, SIZES, Plan, check_student

    check_student(modalities, args.scale)
    output = Path(args.output_dir or "runs/benchmark") / "inference"
    turns = {"threads": args.threads or 0, "rounds": max(1, args.rounds), "slow_rounds": max(1, args.slow_rounds)}
    plan = Plan(args.data, args.scale, output, args.dataset_dir or "", only=tuple(args.only), **turns)
    names = args.volume or [MAIN, *SIZES, *([PATIENT] if args.dataset_dir else [])]
    if args.dry_run:
        return "\n".join(dict.fromkeys(speed.describe(names, plan)))
    _exported(Path(args.dataset_dir or "") / "sts", main)
    rows: list[speed.Row] = []
    machine = cpu_name(args.threads or 0)
    said = [f"On {machine}."]
    for more, words in speed.compare(names, plan):
        rows, said = [*rows, *more], list(dict.fromkeys([*said, *words]))
        write_json({"cpu": machine, "rows": rows, "notes": said}, args.json or output / "inference.json")
    if args.plot:
        speed.plot(rows, Path(args.plot), machine)
    return "\n".join([speed.table(rows), "", *said])


def metrics(args: argparse.Namespace, modalities: Sequence[str], main: Main) -> str:
    """Time Dice, HD95 and ASSD of every package that is installed, in turns."""
    from benchmarks import metrics_speed as cost
    from benchmarks.hardware_floor import cpu_name

    sides, absent = cost.chosen(args.only)
    if args.dry_run:
        return "\n".join(sides)
    output = Path(args.output_dir or "runs/benchmark")
    pairs = cost.synthetic_pairs()
    if args.dataset_dir:
        pairs |= cost.cohort_pairs(Path(args.dataset_dir))
    rows = cost.measure(pairs, sides, args.rounds)
    write_json(rows, args.json or output / "metrics.json")
    return "\n".join([*absent, f"On {cpu_name()}.", "", cost.table(rows)])
