# SPDX-License-Identifier: Apache-2.0
"""Run the study: does a teacher add anything, and how small may the student be? It continues where it stopped.

Example: python -m benchmarks study --dataset-dir DATA --output-dir runs/study
         python -m benchmarks study --table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import filter as filter_names
from pathlib import Path

from benchmarks.job_queue import run_jobs
from benchmarks.options import add_data_options, add_output_options
from benchmarks.study_job import StudyJob
from benchmarks.study_plan import StudyPlan
from benchmarks.study_shipped import StudyShipped
from scripts.cli.options import positive_int
from scripts.utils.markdown import markdown_table
from scripts.utils.run_manifest import git_commit


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    add_output_options(parser, "runs/study")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results/study"),
        help="folder of the kept results (default %(default)s)",
    )
    parser.add_argument(
        "--workers", type=positive_int, default=2, help="parallel jobs of one thread (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="such as cuda (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="patterns of the jobs to run, in this order, as 'B1.*'"
    )
    parser.add_argument(
        "--shorten",
        type=positive_int,
        default=1,
        metavar="N",
        help="for a trial, in the folders `trial` of the others: divide all steps by N",
    )
    parser.add_argument("--commit", default="", help="commit of the code, where it is not a git checkout")
    parser.add_argument(
        "--shipped",
        action="store_true",
        help="train the weights that are shipped, once the teachers of stage 1 have answered",
    )
    parser.add_argument("--costs", action="store_true", help="only measure the networks' costs, on an idle machine")
    parser.add_argument("--table", action="store_true", help="run nothing, only write tables, figures and statistics")


def run(args: argparse.Namespace) -> str:
    """Run what is not done yet, and return the state of the queue or the tables."""
    if args.costs:
        from benchmarks.study_costs import COST_COLUMNS, measure_costs

        return markdown_table(COST_COLUMNS, ([row[key] for key in COST_COLUMNS] for row in measure_costs(args.results)))
    if args.table:
        from benchmarks.study_table import write_study

        return write_study(args.results)
    if not args.dataset_dir:
        raise ValueError("The study needs --dataset-dir, the folder of the data set.")
    if args.shorten > 1:  # a trial must not be taken for a result
        args.results, args.output_dir = args.results / "trial", args.output_dir / "trial"
    git_commit()  # of the code that runs, whatever becomes of its folder meanwhile
    kind = StudyShipped if args.shipped else StudyPlan
    plan = kind(
        data=args.data,
        dataset_dir=args.dataset_dir,
        output=args.output_dir.resolve(),
        results=args.results.resolve(),
        device=args.device,
        shorten=args.shorten,
        commit=args.commit,
    )
    if args.dry_run:
        return "\n".join(f"{'done' if job.done else 'open'}  {job.study_row.name}" for job in chosen(plan, args.only))
    require_one_device(plan)
    while True:  # the verdict of the gate brings more jobs
        plan.judge_gate()
        known = plan.verdict
        failed = run_jobs(chosen(plan, args.only), args.workers)
        plan.judge_gate()
        if plan.verdict == known:
            break
    jobs = chosen(plan, args.only)
    done = sum(job.done for job in jobs)
    return f"{done} of {len(jobs)} jobs are done, {len(failed)} failed or wait for others. Gate: {plan.gate or 'open'}."


def require_one_device(plan: StudyPlan | StudyShipped) -> None:
    """Refuse to go on with results of a CPU on a GPU, or the reverse: all arms of a comparison need one precision.

    Raises:
        ValueError: there are such results.
    """
    for path in sorted((plan.results / "jobs").glob("*.json")):
        device = str(json.loads(path.read_text(encoding="utf-8"))["device"])
        if (device != "cpu") != plan.gpu:
            raise ValueError(
                f"{path} was made on {device}. On another kind of device precision and teachers differ. Choose an "
                "empty folder by --results."
            )


def chosen(plan: StudyPlan | StudyShipped, patterns: Sequence[str]) -> list[StudyJob]:
    """The jobs whose names match some patterns, in the order of the patterns."""
    by_name = {job.study_row.name: job for job in plan.jobs()}
    names = (name for pattern in patterns for name in filter_names(by_name, pattern))
    return [by_name[name] for name in dict.fromkeys(names)]
