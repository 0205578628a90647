# SPDX-License-Identifier: Apache-2.0
"""Run a function on every case of a data set, in several processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import SimpleITK as sitk  # noqa: N813
from tqdm import tqdm

from scripts.data.case_list import Item
from scripts.utils.process_pool import run_jobs

Result = TypeVar("Result")


def run_cases(
    work: Callable[[Item], Result],
    cases: Sequence[Item],
    workers: int,
    description: str,
    on_death: Callable[[str], Result],
) -> list[Result]:
    """Run ``work`` on every case, each in a process with one thread, and return the results in the cases' order.

    Args:
        work: called with one case; it must be importable, as for every process pool.
        cases: items of a data list.
        workers: number of processes.
        description: shown at the progress bar.
        on_death: returns the result, given the case's id, where a process died.
    """
    jobs = {str(case["case_id"]): case for case in cases}
    with tqdm(total=len(jobs), desc=description, unit="case") as bar:
        one_thread: dict[str, Any] = {
            "initializer": sitk.ProcessObject.SetGlobalDefaultNumberOfThreads,
            "initargs": (1,),
        }
        results = run_jobs(work, jobs, workers, on_death, lambda *_: bar.update(), **one_thread)
    return list(results.values())
