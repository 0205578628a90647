# SPDX-License-Identifier: Apache-2.0
"""A resumable queue of trainings and evaluations, each a command in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
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

from scripts.distillation.staged_training import FINISHED

Command = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One training and its evaluations, as the commands that a user would type.

    Args:
        row: the row of the table to which it belongs.
        seed: of the training.
        folder: where it writes.
        commands: arguments of ``python -m scripts``: the training, then the evaluations.
        needs: weights that must be there before it can begin.
        evaluations: what each evaluation is called, in ``folder``.
        makes: files that the first command leaves in ``folder`` when it has come to its end.
    """

    row: str
    seed: int
    folder: Path
    commands: tuple[Command, ...]
    needs: tuple[Path, ...] = ()
    evaluations: tuple[str, ...] = ("eval",)
    makes: tuple[str, ...] = FINISHED

    @property
    def todo(self) -> list[Command]:
        """The commands whose results are not there."""
        training = [] if self._made() else [self.commands[0]]
        named = zip(self.evaluations, self.commands[1:], strict=True)
        return [*training, *(c for name, c in named if not (self.folder / name / "summary.json").is_file())]

    @property
    def done(self) -> bool:
        """Whether every evaluation is there; a training without any is done when it has come to its end."""
        if not self.evaluations:
            return self._made()
        return all((self.folder / name / "summary.json").is_file() for name in self.evaluations)

    def _made(self) -> bool:
        return all((self.folder / name).is_file() for name in self.makes)


def own_bars() -> None:
    """Give a forked process its own lock of progress bars: if it is killed in one, its relatives do not wait for it."""
    tqdm.set_lock(threading.RLock())


def _work(main: Callable[[Sequence[str]], int], job: Job) -> None:
    """Run a job's commands in this (forked) process; its words go into a log beside its results."""
    own_bars()
    job.folder.mkdir(parents=True, exist_ok=True)
    resumed = (*job.commands[0], "--resume") if (job.folder / "checkpoint.pt").is_file() else job.commands[0]
    commands = [resumed if command is job.commands[0] else command for command in job.todo]
    path = job.folder / "log.txt"
    with open(path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            code = next((code for code in map(main, commands) if code), 0)
        except BaseException:
            traceback.print_exc()
            code = 1
    sys.exit(code)


def work_off(jobs: Sequence[Job], workers: int, main: Callable[[Sequence[str]], int]) -> list[Job]:
    """Work off the jobs that are not done, each in a process of its own; returns those that failed.

    Processes are forked, so that PyTorch and MONAI are imported once and each job's peak memory is its own.
    """
    context = multiprocessing.get_context("fork")
    todo = [job for job in jobs if not job.done]
    running: dict[int, tuple[ForkProcess, Job]] = {}
    failed = []
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="comparison", unit="run")
    while todo or running:
        while (job := _next(todo)) and len(running) < workers:
            todo.remove(job)
            process = context.Process(target=_work, args=(main, job))
            process.start()
            running[process.sentinel] = (process, job)
        if not running:  # nothing left to wait for: what they need has failed
            failed += todo
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


def _next(todo: Sequence[Job]) -> Job | None:
    """The first job whose needs are there."""
    return next((job for job in todo if all(path.is_file() for path in job.needs)), None)


def with_needs(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs of some rows and what they need, directly or not; all of them where no row is named."""
    wanted = [job for job in jobs if not only or job.row in only]
    while more := [job for job in jobs if job not in wanted and _serves(job, wanted)]:
        wanted += more
    return [job for job in jobs if job in wanted]


def _serves(job: Job, others: Sequence[Job]) -> bool:
    return any(path.is_relative_to(job.folder) for other in others for path in other.needs)
