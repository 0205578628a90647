# SPDX-License-Identifier: Apache-2.0
"""Studies whose jobs are planned, but not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study_job import StudyJob
from benchmarks.study_plan import StudyPlan
from tests.study_jobs import judge, new_plan


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyPlan:
    """A study of which nothing is known."""
    return new_plan(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[StudyJob]:
    """All jobs of a study whose gate is passed."""
    with pytest.MonkeyPatch.context() as patch:
        judged = new_plan(tmp_path_factory.mktemp("study"), patch)
        judge(judged, 0.9)
        return judged.jobs()
