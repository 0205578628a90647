# SPDX-License-Identifier: Apache-2.0
"""Read the folder of an evaluation: its summary, its case table and the cases in its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.evaluation.summary_table import markdown_summary
from scripts.image_io.checks import Rules
from scripts.image_io.reader import header_of
from scripts.metrics import Row
from scripts.metrics.lesion_measures import read_measures
from scripts.report.tables import summary_table

Case = Mapping[str, Any]

_TASK = ("cohort", "layout", "modalities", "intensity", "labels", "classes", "regions", "ignore", "mask_values")


def modality_images(case: Case, modalities: Sequence[str], rules: Rules) -> dict[str, tuple[str, int]]:
    """The file of each modality of a case, and its channel there: 0 of its own file, or that of one 4D file of all."""
    own = {key: (str(case[key]), 0) for key in modalities if key in case}
    if own or "image" not in case:
        return own
    try:
        shape = header_of(case["image"], rules).shape
    except (ValueError, OSError):
        return {}
    is_stacked = len(shape) == 4 and shape[3] == len(modalities)
    return {key: (str(case["image"]), channel) for channel, key in enumerate(modalities)} if is_stacked else {}


def evaluated_cases(folder: str) -> list[Case]:
    """The cases of an evaluation, from its manifest; empty where there is no manifest.

    Raises:
        ValueError: the manifest is damaged or not that of an evaluation.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return []
    cases = cases_in_manifest(path)
    if cases is None:
        raise _not_an_evaluation(path)
    return cases


def evaluated_task(folder: str) -> dict[str, Any]:
    """The settings ``_TASK`` of an evaluation, those that its manifest holds."""
    try:
        config = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))["config"]
        return {key: None if config[key] == "$None" else config[key] for key in _TASK if key in config}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def cases_in_manifest(manifest: Path) -> list[Case] | None:
    """The cases that a manifest lists; None where the file is damaged or not the manifest of an evaluation."""
    try:
        cases = json.loads(manifest.read_text(encoding="utf-8"))["data"]
    except (ValueError, TypeError, KeyError):
        return None
    valid = isinstance(cases, list) and all(isinstance(case, dict) and "case_id" in case for case in cases)
    return cases if valid else None


def read_summary(path: Path) -> dict[str, Any]:
    """Read the ``summary.json`` of an evaluation.

    Raises:
        ValueError: the file is damaged, or a value is missing that a table or the report needs.
    """
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        markdown_summary([summary])
        summary_table([summary])
        valid = {"predictions", "aggregate"} <= set(summary)
        valid = valid and {"bootstrap", "definitions"} <= set(summary["aggregate"])
    except (ValueError, TypeError, KeyError, AttributeError):
        valid = False
    if not valid:
        raise _not_an_evaluation(path)
    return summary


def evaluated_measures(folder: str) -> list[Row]:
    """The rows of ``measures.csv`` of an evaluation; none where it was made without them.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / "measures.csv"
    return read_measures(path) if path.is_file() else []


def masks_folder(folder: str | Path, summary: Mapping[str, Any]) -> str:
    """The folder of the masks that an evaluation has scored.

    Args:
        folder: of the evaluation.
        summary: its ``summary.json``; up to version 0.13 it has the path from the working folder of the evaluation.
    """
    path = Path(folder) / summary["predictions"]
    return str(path if path.is_dir() else summary["predictions"])


def _not_an_evaluation(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged or was not written by `evaluate`. Run `evaluate` again.")


def add_centres(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    """The rows with the key ``centre`` from the data list; empty text where a case names none."""
    centres = {str(case["case_id"]): case["centre"] for case in cases if case.get("centre")}
    return [{**row, "centre": centres.get(str(row["case_id"]), "")} for row in rows]
