# SPDX-License-Identifier: Apache-2.0
"""The order in which the report of an evaluation lists its cases."""

from __future__ import annotations

from typing import Any

from scripts.evaluation.overlays import worst_first


def case(name: str, dice: float | None, status: str = "ok") -> dict[str, Any]:
    return {"case_id": name, "dice": dice, "status": status}


def test_the_worst_case_is_first_with_ties_ordered_by_case_id() -> None:
    rows = [case("d", 0.9), case("b", 0.9), case("m", 0.0, "missed"), case("f", 0.0, "false_positive"), case("c", 0.1)]
    assert worst_first(rows) == ["f", "m", "c", "b", "d"]


def test_cases_without_a_dice_come_last_and_cases_without_a_mask_are_left_out() -> None:
    rows = [case("x", None, "true_negative"), case("e", None, "error"), case("a", 1.0)]
    assert worst_first(rows) == ["a", "x"]
    assert worst_first([]) == []
