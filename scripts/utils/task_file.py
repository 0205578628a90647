# SPDX-License-Identifier: Apache-2.0
"""Read ``<stem>.task.json``, which describes what the weights beside it were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUFFIX = ".task.json"
Record = dict[str, Any]


def task_path(weights: str | Path) -> Path:
    """The file that describes the weights: ``model.task.json`` beside ``model.pt``."""
    path = Path(weights)
    return path.with_name(f"{path.stem}{SUFFIX}")


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
