# SPDX-License-Identifier: Apache-2.0
"""Work in several processes, of which one may die: it takes its own job with it and no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
DIED = "its process died: killed, or out of memory"


def survive(
    work: Callable[[Job], Result],
    jobs: Mapping[str, Job],
    workers: int,
    died: Callable[[str], Result],
    done: Callable[[str, Result], object] = lambda name, result: None,
    **options: Any,
) -> dict[str, Result]:
    """The result of every job, in their order.

    A dead process breaks its whole pool and does not say at which job; what is left is then done one by one.

    Args:
        work: of one job; what it raises is raised here.
        jobs: by name.
        workers: processes.
        died: what stands for a job's result, by its name, where its process died.
        done: called with the name and the result of every job, as soon as it is there.
        options: of ``ProcessPoolExecutor``.
    """
    found: dict[str, Result] = {}
    left, at_once = list(jobs), max(1, workers)
    while left:
        with ProcessPoolExecutor(min(at_once, len(left)), **options) as pool:
            futures: dict[Future[Result], str] = {}
            with contextlib.suppress(BrokenProcessPool):  # a process may die before all are submitted
                for name in left:
                    futures[pool.submit(work, jobs[name])] = name
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    name = futures[future]
                    found[name] = future.result()
                    done(name, found[name])
        left = [name for name in left if name not in found]
        if left and at_once == 1:  # alone in the pool: the first of those left is the one that died
            name = left.pop(0)
            found[name] = died(name)
            done(name, found[name])
            at_once = max(1, workers)
        else:
            at_once = 1
    return {name: found[name] for name in jobs}
