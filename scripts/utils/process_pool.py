# SPDX-License-Identifier: Apache-2.0
"""Run jobs in several processes. A process that dies loses its own job, and no other."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
PROCESS_DIED = "its process died: killed, or out of memory"


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Mapping[str, Job],
    workers: int,
    on_death: Callable[[str], Result],
    on_result: Callable[[str, Result], object] = lambda name, result: None,
    **options: Any,
) -> dict[str, Result]:
    """Run ``work`` on every job and return the results in the order of the jobs.

    A process that dies breaks its whole pool without telling which job it had. The unfinished jobs then run one at a
    time until the job that kills its process is found; after that they run in parallel again.

    Args:
        work: called with one job; its exceptions are raised here.
        jobs: name -> job.
        workers: number of processes.
        on_death: returns the result, given the job's name, for a job whose process died.
        on_result: called with each job's name and result as soon as the result is available.
        options: further arguments of ``ProcessPoolExecutor``.
    """
    results: dict[str, Result] = {}
    pending, processes = list(jobs), max(1, workers)
    while pending:
        with ProcessPoolExecutor(min(processes, len(pending)), **options) as pool:
            futures: dict[Future[Result], str] = {}
            with contextlib.suppress(BrokenProcessPool):  # a process may die before all jobs are submitted
                for name in pending:
                    futures[pool.submit(work, jobs[name])] = name
            try:
                for future in as_completed(futures):
                    with contextlib.suppress(BrokenProcessPool):
                        name = futures[future]
                        results[name] = future.result()
                        on_result(name, results[name])
            except BaseException:  # an interruption does not wait for the jobs that have not begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        pending = [name for name in pending if name not in results]
        if pending and processes == 1:  # jobs run in order: the first pending one killed the process
            name = pending.pop(0)
            results[name] = on_death(name)
            on_result(name, results[name])
            processes = max(1, workers)
        else:
            processes = 1
    return {name: results[name] for name in jobs}


def end_with_parent() -> None:
    """Initializer of a pool's process: end it when its parent is killed (Linux); else it would wait for ever."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
