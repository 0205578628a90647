# SPDX-License-Identifier: Apache-2.0
"""Read ``<stem>.task.json``, which describes what the weights beside it were trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.utils.file_names import nfc

SUFFIX = ".task.json"
Record = dict[str, Any]


def task_path(weights: str | Path) -> Path:
    """The file that describes the weights: ``model.task.json`` beside ``model.pt``."""
    path = Path(weights)
    return path.with_name(f"{path.stem}{SUFFIX}")


def case_ids(case: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The names by which a case is found in a record: its own and its patient's."""
    names = {"case": case["case_id"], "patient": case.get("patient_id", case["case_id"])}
    return {(kind, nfc(str(name))) for kind, name in names.items()}


def seen_cases(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The cases of a record: those of the training, and those of the networks that it learned from."""
    return [*(record.get("training_cases") or ()), *(record.get("inherited_cases") or ())]


def seen_ids(record: Mapping[str, Any]) -> set[tuple[str, str]]:
    """``case_ids`` of all ``seen_cases``."""
    return {name for case in seen_cases(record) for name in case_ids(case)}


def read_task(weights: str | Path) -> Record | None:
    """Read the record beside weights; None if there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    path = task_path(weights)
    if not path.is_file():
        return None
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} cannot be read ({error}). Restore it, or remove it.") from error
    if not isinstance(task, dict):
        raise ValueError(f"{path} is no description of weights: it holds no names. Restore it, or remove it.")
    return task
