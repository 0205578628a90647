# SPDX-License-Identifier: Apache-2.0
"""Which cases of an evaluation the network was trained on, by the record beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.evaluation.records import Case
from scripts.metrics import Row, aggregate
from scripts.metrics.aggregates import case_count
from scripts.utils.checksums import sha256
from scripts.utils.task_file import case_ids, read_task, seen_ids, task_path

YES, NO, UNKNOWN = "yes", "no", "unknown"


def trained_on(weights: str | Path | None, cases: Sequence[Case]) -> tuple[dict[str, str], str]:
    """Find the cases that the weights were trained on.

    A case counts as trained on if the record lists its id or its patient's id. The record has the cases of the
    training, and those of the networks that were learned from: pretrained weights and teachers. It is
    ``<stem>.task.json`` beside the weights, which every training writes.

    Args:
        weights: file of the network's weights; None where they are not known, as for masks made elsewhere.
        cases: data list.

    Returns:
        ``yes``, ``no`` or ``unknown`` by case, and the reason why it is unknown, else empty.

    Raises:
        ValueError: the record cannot be read.
    """
    unknown = {str(case["case_id"]): UNKNOWN for case in cases}
    if weights is None:
        return unknown, ""
    path, record = task_path(weights), read_task(weights)
    if record is None:
        return unknown, f"{path} does not exist, so it is unknown which cases the network was trained on"
    training_cases = record.get("training_cases")
    if not isinstance(training_cases, list) or not all(isinstance(c, dict) and "case_id" in c for c in training_cases):
        raise ValueError(f"{path} lists no training cases. Restore it, or remove it.")
    if record.get("weights_sha256") and Path(weights).is_file() and record["weights_sha256"] != sha256(weights):
        return unknown, f"{path} describes other weights than {weights}, so it is unknown which cases trained them"
    seen = seen_ids(record)
    return {str(case["case_id"]): YES if case_ids(case) & seen else NO for case in cases}, ""


def training_summary(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Summarise the column ``trained_on`` of a case table.

    Args:
        rows: of the table.
        seed: of the bootstrap.

    Returns:
        ``cases``, those that trained the network, and ``unseen_aggregate`` of the others; None where that is unknown or
        needless.
    """
    training = sorted({str(row["case_id"]) for row in rows if row.get("trained_on") == YES})
    unseen = [row for row in rows if row.get("trained_on") == NO]
    known = bool(training or unseen)
    return {
        "cases": training if known else None,
        "unseen_aggregate": aggregate(unseen, seed=seed) if training and unseen else None,
    }


def training_notes(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on every evaluation with cases that the network was trained on."""
    notes = []
    for summary in summaries:
        training = (summary.get("trained_on") or {}).get("cases")
        if training:
            total = case_count(summary["aggregate"], len(summary.get("regions") or ()))
            notes.append(
                f"{summary['name']} was trained on {len(training)} of these {total} cases ({', '.join(training)}), or "
                "learned from a network that was. Results on them do not show how it does on new patients"
                + (": read the row of the unseen cases." if len(training) < total else ".")
            )
    return notes
