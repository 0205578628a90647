# SPDX-License-Identifier: Apache-2.0
"""Compare the settings of a run with the record beside its weights, see ``scripts.utils.task_file``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.utils.checksums import sha256
from scripts.utils.task_file import Record, task_path

logger = logging.getLogger(__name__)

HEAD = {"head": "softmax"}  # of records that name none
COMPARED = ("modalities", "intensity", "spacing", "labels", "head", "sigmoid_regions")


def require_same_settings(
    weights: str | Path, task: Record, settings: Mapping[str, Any], ignore: bool = False, others: Sequence[str] = ()
) -> None:
    """Refuse settings that contradict the record beside weights: other input gives another mask without a word.

    Args:
        weights: file of the weights.
        task: the record.
        settings: ``COMPARED`` of the run, as plain values.
        ignore: log the contradictions as a warning instead.
        others: further contradictions, one clause each.

    Raises:
        ValueError: there is a contradiction; all are named.
    """
    if Path(weights).is_file() and task.get("weights_sha256") not in (None, sha256(weights)):
        logger.warning("%s describes other weights than %s: its sha256 differs", task_path(weights), weights)
    clauses = [*setting_differences({**HEAD, **task}, settings), *others]
    refuse_contradictions(weights, clauses, ignore, " What you do not name is taken from the weights.")


def setting_differences(task: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Compare the plain settings of a run with a record; of the intensities those of the modalities in use."""
    clauses = []
    for key in (key for key in settings if key in task):
        one, two = task[key], settings[key]
        if key == "intensity" and isinstance(one, dict) and isinstance(two, dict):
            used = settings.get("modalities", one)
            one, two = ({name: value for name, value in each.items() if name in used} for each in (one, two))
        clauses += value_differences(key, one, two)
    return clauses


def value_differences(name: str, first: Any, second: Any) -> list[str]:
    """Compare two plain values, dicts by their keys: ``its <name> is <first>, this run's is <second>``."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        pairs = ((f"{name}#{key}", first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second]))
        return [clause for pair in pairs for clause in value_differences(*pair)]
    return [] if first == second else [f"its {name} is {_shown(first)}, this run's is {_shown(second)}"]


def _shown(value: Any) -> str:
    """A value in a sentence: a component by the name of its class."""
    if isinstance(value, Mapping):
        return str(value["_target_"]).rsplit(".", 1)[-1] if "_target_" in value else f"{{{', '.join(value)}}}"
    is_checksum = isinstance(value, str) and len(value) == 64
    return "none" if value is None else f"{value[:12]}..." if is_checksum else str(value)


def refuse_contradictions(weights: str | Path, clauses: Sequence[str], ignore: bool, advice: str = "") -> None:
    """Refuse contradictions, or log them as a warning.

    Args:
        weights: file of the weights.
        clauses: the contradictions; nothing happens without any.
        ignore: log them.
        advice: a last sentence of the error.

    Raises:
        ValueError: there are contradictions, and ``ignore`` is false.
    """
    if not clauses:
        return
    found = f"{task_path(weights)} contradicts this run: {'; '.join(clauses)}"
    if not ignore:
        raise ValueError(
            f"{found}. Use the settings that the weights were trained with, or --set ignore_task=true "
            f"(--ignore_task True).{advice}"
        )
    logger.warning("%s. ignore_task is set.", found)
