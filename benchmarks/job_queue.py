# SPDX-License-Identifier: Apache-2.0
"""A resumable queue of trainings and evaluations, each in its own process."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import cast

from tqdm import tqdm

from scripts.cli.main import main
from scripts.cli.options import positive_int
from scripts.distillation.staged_training import FINAL_FILES
from scripts.utils.atomic_files import write_json
from scripts.utils.process_pool import end_with_parent

Command = tuple[str, ...]
COMMANDS = "commands.json"


@dataclass(frozen=True)
class Job:
    """One training and its evaluations, as the commands that a user would type.

    Args:
        row: name of the table row to which the job belongs.
        seed: random seed of the training.
        folder: output folder.
        commands: arguments of ``python -m scripts``: the training first, then the evaluations.
        needs: files that must exist before the job can start, such as the weights of a teacher.
        evaluations: sub folder of ``folder`` for each evaluation, in the order of ``commands``.
        outputs: files in ``folder`` that exist once the first command has finished.
    """

    row: str
    seed: int
    folder: Path
    commands: tuple[Command, ...]
    needs: tuple[Path, ...] = ()
    evaluations: tuple[str, ...] = ("eval",)
    outputs: tuple[str, ...] = FINAL_FILES

    def prepare(self) -> None:
        """Called before the commands; a subclass may write the files that they read."""

    def finish(self) -> None:
        """Called after the last command; a subclass may collect their results."""

    def keep_failure(self, printed: str) -> bool:
        """Called when a command has failed; a subclass may keep the failure as its result, and then returns true.

        Args:
            printed: what the commands of this process printed.
        """
        return False

    def typed(self) -> tuple[Command, ...]:
        """All commands; a subclass may decide on them when the job starts."""
        return self.commands

    @property
    def pending_commands(self) -> list[Command]:
        """The commands whose results do not exist yet."""
        first, *others = self.typed()
        if (self.folder / "checkpoint.pt").is_file():
            first = (*first, "--resume")
        training = [] if self._trained() else [first]
        evaluations = zip(self.evaluations, others, strict=True)
        return [*training, *(command for name, command in evaluations if not self._evaluated(name))]

    def keep_commands(self) -> None:
        """Write the commands into the folder, so that a plan of other settings does not take its results."""
        if self.commands:
            self.refuse_other_commands()
            write_json([list(command) for command in self.commands], self.folder / COMMANDS)

    def refuse_other_commands(self) -> None:
        """Raise ValueError if the folder was made by other commands."""
        path = self.folder / COMMANDS
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != [list(each) for each in self.commands]:
            raise ValueError(f"{self.folder} has results of other settings. Remove it, or choose another --output-dir.")

    @property
    def done(self) -> bool:
        """Whether every evaluation exists. A training without evaluations is done when its outputs exist.

        Raises:
            ValueError: the results are those of other commands.
        """
        self.refuse_other_commands()
        return all(map(self._evaluated, self.evaluations)) if self.evaluations else self._trained()

    def _trained(self) -> bool:
        return all((self.folder / name).is_file() for name in self.outputs)

    def _evaluated(self, name: str) -> bool:
        return (self.folder / name / "summary.json").is_file()


def add_queue_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--seeds``, ``--teacher-epochs``, ``--workers``, ``--only`` and ``--table``."""
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds of the trainings (default 0 1 2)"
    )
    parser.add_argument("--teacher-epochs", type=int, default=100, help="epochs of every teacher (default %(default)s)")
    parser.add_argument(
        "--workers", type=positive_int, default=2, help="parallel trainings, one thread each (default %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="run only these rows and the rows that they depend on"
    )
    parser.add_argument("--table", action="store_true", help="train nothing, only write the table of finished runs")


def command_lines(jobs: Sequence[Job]) -> str:
    """All commands of the jobs, one per line, as they are typed in a shell."""
    return "\n".join(f"python -m scripts {shlex.join(command)}" for job in jobs for command in job.commands)


def use_own_progress_lock() -> None:
    """Give a forked process its own lock for progress bars.

    Forked processes share tqdm's lock. If one of them is killed while it holds the lock, all others wait forever.
    """
    tqdm.set_lock(threading.RLock())


def _run_job(job: Job, run_command: Callable[[Sequence[str]], int]) -> None:
    """Run a job's pending commands in this forked process, with all output in ``log.txt`` in the job's folder.

    The process ends with the queue: else a queue that is started again would find its jobs running.
    """
    end_with_parent()
    use_own_progress_lock()
    job.folder.mkdir(parents=True, exist_ok=True)
    log_path = job.folder / "log.txt"
    before = log_path.stat().st_size if log_path.is_file() else 0
    with open(log_path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            job.keep_commands()
            job.prepare()
            exit_code = next((code for code in map(run_command, job.pending_commands) if code), 0)
            log.flush()
            if not exit_code:
                job.finish()
            elif job.keep_failure(log_path.read_bytes()[before:].decode(errors="replace")):
                exit_code = 0
        except BaseException:
            traceback.print_exc()
            exit_code = 1
    sys.exit(exit_code)


def run_jobs(jobs: Sequence[Job], workers: int, run_command: Callable[[Sequence[str]], int] = main) -> list[Job]:
    """Run the jobs that are not done, each in its own process.

    Processes are forked: PyTorch and MONAI are imported once, and each job's peak memory is its own.

    Args:
        jobs: the jobs; a job starts when the files that it needs exist.
        workers: number of parallel processes.
        run_command: runs the arguments of one ``python -m scripts`` command and returns its exit code.

    Returns:
        The jobs that failed, and those whose needs were never fulfilled.
    """
    context = multiprocessing.get_context("fork")
    pending = [job for job in jobs if not job.done]
    running: dict[int, tuple[ForkProcess, Job]] = {}
    failed = []
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(pending), desc="comparison", unit="run")
    while pending or running:
        while (job := _next_ready(pending)) and len(running) < workers:
            pending.remove(job)
            if job.done:  # by another queue
                bar.update()
                continue
            process = context.Process(target=_run_job, args=(job, run_command))
            process.start()
            running[process.sentinel] = (process, job)
        if not running:  # the remaining jobs need the results of failed ones
            failed += pending
            break
        for sentinel in wait(list(running)):
            process, job = running.pop(cast(int, sentinel))
            process.join()
            bar.update()
            if process.exitcode or not job.done:
                failed.append(job)
                tqdm.write(f"failed: {job.row}, seed {job.seed}, see {job.folder / 'log.txt'}")
    bar.close()
    return failed


def _next_ready(pending: Sequence[Job]) -> Job | None:
    """The first job whose needs exist."""
    return next((job for job in pending if all(path.is_file() for path in job.needs)), None)


def select_jobs(jobs: Sequence[Job], rows: Sequence[str]) -> list[Job]:
    """The jobs of some table rows and the jobs that they depend on, directly or not.

    Args:
        jobs: all jobs.
        rows: names of the rows; all jobs are selected if it is empty.
    """
    selected = [job for job in jobs if not rows or job.row in rows]
    while more := [job for job in jobs if job not in selected and _is_needed(job, selected)]:
        selected += more
    return [job for job in jobs if job in selected]


def _is_needed(job: Job, others: Sequence[Job]) -> bool:
    return any(path.is_relative_to(job.folder) for other in others for path in other.needs)
