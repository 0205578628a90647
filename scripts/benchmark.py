# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts benchmark NAME``: a function for each name; it returns what is printed."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.arguments import config_names
from scripts.comparison import Job, Plan, compare_methods, work_off
from scripts.comparison_table import write_comparison
from scripts.missing import MissingPlan, write_missing

Main = Callable[[Sequence[str]], int]


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
        work_off(plan.jobs(), args.workers, main)
    return write_missing(plan)
