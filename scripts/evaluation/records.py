# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves in its folder, read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.evaluation.summary_table import table
from scripts.metrics import Row
from scripts.report.tables import summary_table

Case = Mapping[str, Any]


def evaluated_cases(folder: str) -> list[Case]:
    """The cases of an evaluation, from its manifest."""
    path = Path(folder) / "manifest.json"
    cases = cases_in_manifest(path) if path.is_file() else []
    if cases is None:
        raise not_an_evaluation(path)
    return cases


def cases_in_manifest(manifest: Path) -> list[Case] | None:
    """The cases that an evaluation's manifest notes; None where it is cut off, or of something else."""
    try:
        cases = json.loads(manifest.read_text(encoding="utf-8"))["data"]
    except (ValueError, TypeError, KeyError):
        return None
    known = isinstance(cases, list) and all(isinstance(case, dict) and "case_id" in case for case in cases)
    return cases if known else None


def not_an_evaluation(path: Path) -> ValueError:
    return ValueError(f"{path} is not what `evaluate` writes: run it again.")


def read_summary(path: Path) -> dict[str, Any]:
    """An evaluation's summary, if the report can be made of it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        table([found])
        summary_table([found])
        known = {"predictions", "aggregate"} <= set(found) and {"bootstrap", "definitions"} <= set(found["aggregate"])
    except (ValueError, TypeError, KeyError, AttributeError):
        known = False
    if not known:
        raise not_an_evaluation(path)
    return found


def add_centres(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    """The rows with the centre that the data list names, where it does."""
    centres = {str(case["case_id"]): case["centre"] for case in cases if case.get("centre")}
    return [{**row, "centre": centres.get(str(row["case_id"]), "")} for row in rows]
