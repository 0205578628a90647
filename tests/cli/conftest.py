# SPDX-License-Identifier: Apache-2.0
"""A batch in one process, for tests of what it does with each case."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.cli import segment_cohort as batch


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One case after the other in this process, whose log is afterwards as it was."""

    def run_jobs(work: Any, jobs: Any, workers: int, died: Any, done: Any, **_: Any) -> None:
        for name, job in jobs.items():
            done(name, work(job))

    monkeypatch.setattr(batch, "run_jobs", run_jobs)
    level, propagates = logging.root.manager.disable, logging.getLogger("scripts").propagate
    yield
    logging.disable(level)
    logging.getLogger("scripts").propagate = propagates
