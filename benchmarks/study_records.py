# SPDX-License-Identifier: Apache-2.0
"""The finished jobs of the study: reading and checking them, and one CSV of all scored cases."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.metrics import METRICS, checked_rows
from scripts.metrics.case_rows import FAILURES
from scripts.utils.atomic_files import write_text

Run = Mapping[str, Any]

RUN_KEYS = ("experiment", "arm", "student", "fold", "source_fold", "seed")
CASE_COLUMNS = (*RUN_KEYS, "patient_id", *METRICS, "status")
ROUNDING = 0.05  # steps are rounded up to whole epochs, so the folds of an arm differ by less than this share
_NEEDED = (*RUN_KEYS, "steps", "commit", "device", "processor", "seconds", "parameters", "cases")


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Read every finished job of a study.

    Args:
        folder: of the study; each job is one file ``jobs/NAME.json``.

    Returns:
        The runs in a fixed order, and one sentence per refused run. A run is refused if it is marked as shortened or
        has fewer steps (``same_length``) than the longest run of its experiment, arm and student.

    Raises:
        FileNotFoundError: there is no finished job.
        ValueError: a file is damaged, or two files hold the same run.
    """
    paths = sorted((folder / "jobs").glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder / 'jobs'} contains no finished job. Run `python -m benchmarks study` first.")
    runs: dict[tuple[str, ...], Run] = {}
    for path in paths:
        run = _read_run(path)
        if run_name(run) in runs:
            raise ValueError(f"{path} holds the same run as another file: {_described(run)}. Delete one.")
        runs[run_name(run)] = run
    ordered = [runs[name] for name in sorted(runs)]
    refusals = {run_name(run): reason for run in ordered if (reason := _refusal(run, ordered))}
    return [run for run in ordered if run_name(run) not in refusals], list(refusals.values())


def _read_run(path: Path) -> Run:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _NEEDED if key not in run]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if not run["cases"]:
            raise ValueError("it has no case")
        return {**run, "cases": checked_rows(run["cases"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a job of the study: {error}. Delete it and run the job again.") from error


def run_name(run: Run) -> tuple[str, ...]:
    """The values of ``RUN_KEYS`` as text; they identify a run."""
    return tuple("" if run[key] is None else str(run[key]) for key in RUN_KEYS)


def _refusal(run: Run, runs: Sequence[Run]) -> str:
    """Why a run is refused; empty if it is not."""
    longest = max(other["steps"] or 0 for other in runs if run_name(other)[:3] == run_name(run)[:3])
    if not run.get("shortened") and same_length(run["steps"] or 0, longest):
        return ""
    return f"Refused: {_described(run)} is a shortened run of {run['steps']} steps. It is in no table."


def _described(run: Run) -> str:
    numbers = [f"{key} {run[key]}" for key in RUN_KEYS[3:] if run[key] is not None]
    return ", ".join([run["experiment"], run["arm"], run["student"], *numbers])


def same_length(steps: int, others: int) -> bool:
    """Whether two numbers of steps are equal up to the rounding to whole epochs."""
    return abs(steps - others) <= ROUNDING * max(steps, others)


def select_runs(runs: Sequence[Run], experiment: str, arm: str, student: str) -> list[Run]:
    """The runs of one arm."""
    return [run for run in runs if (run["experiment"], run["arm"], run["student"]) == (experiment, arm, student)]


def failed_cases(runs: Sequence[Run]) -> int:
    """The number of cases that are missed, false positive or unreadable."""
    return sum(row["status"] in FAILURES for run in runs for row in run["cases"])


def diverged_runs(runs: Sequence[Run]) -> int:
    """The number of runs without any segmented tumour: each of their cases has failed."""
    return sum(all(row["status"] in FAILURES for row in run["cases"]) for run in runs)


def write_cases(runs: Sequence[Run], path: Path) -> None:
    """Write one row per run and case with the columns ``CASE_COLUMNS``; undefined values are empty cells."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CASE_COLUMNS)
    for run in runs:
        for row in run["cases"]:
            writer.writerow([run[key] for key in RUN_KEYS] + [row[key] for key in CASE_COLUMNS[len(RUN_KEYS) :]])
    write_text(buffer.getvalue(), path)
