# SPDX-License-Identifier: Apache-2.0
"""Evaluations without pictures."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_outlines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds: only tests with "outlines" in their names draw."""
    if "outlines" not in request.node.name:
        monkeypatch.setattr("scripts.evaluation.score.case_overlays", lambda *arguments: [])
