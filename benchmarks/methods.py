# SPDX-License-Identifier: Apache-2.0
"""Train and score every distillation method under one recipe. An interrupted comparison continues where it stopped.

Example: python -m benchmarks methods --data sts --dataset-dir DATA --output-dir runs/compare
"""

from __future__ import annotations

import argparse

from benchmarks.job_queue import add_queue_options, command_lines
from benchmarks.methods_plan import MethodsPlan, compare_methods
from benchmarks.methods_table import write_comparison
from benchmarks.options import add_data_options, add_json_option, add_output_options, add_training_options
from scripts.cli.config import config_names, read_config


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser, required=True)
    add_training_options(parser, scale="compare")
    add_output_options(parser, "runs/compare")
    add_queue_options(parser)
    parser.add_argument(
        "--epochs", type=int, default=MethodsPlan.epochs, help="epochs of every student (default %(default)s)"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Run what is not done yet and return the table."""
    plan = MethodsPlan(
        data=args.data,
        dataset_dir=args.dataset_dir,
        scale=args.scale,
        output=args.output_dir,
        modalities=tuple(read_config(f"data/{args.data}")["modalities"]),
        methods=tuple(config_names("methods")),
        seeds=tuple(args.seeds),
        epochs=args.epochs,
        teacher_epochs=args.teacher_epochs,
        fold=args.fold,
    )
    if args.dry_run:
        return command_lines(plan.jobs())
    jobs, failed = (plan.jobs(), 0) if args.table else compare_methods(plan, args.workers, args.only)
    table = write_comparison(plan, jobs, args.json)
    if failed:
        print(table)
        raise RuntimeError(
            f"{failed} run(s) failed. See their log.txt in {plan.output}. To continue, repeat this command."
        )
    return table
