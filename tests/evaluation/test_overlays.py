# SPDX-License-Identifier: Apache-2.0
"""The cases that the report of an evaluation shows."""

from __future__ import annotations

from typing import Any

from scripts.evaluation.overlays import pick_cases


def case(name: str, dice: float | None) -> dict[str, Any]:
    return {"case_id": name, "dice": dice}


def test_best_lower_median_and_worst_are_picked_with_ties_ordered_by_case_id() -> None:
    rows = [case("d", 0.9), case("b", 0.9), case("e", 0.1), case("c", 0.1), case("x", None), case("m", 0.5)]
    assert pick_cases(rows) == {"best": "b", "median": "m", "worst": "c"}
    assert pick_cases([case("a", 0.2), case("b", 0.4)]) == {"best": "b", "median": "a", "worst": "a"}


def test_without_a_defined_dice_no_case_is_picked() -> None:
    assert pick_cases([case("a", None)]) == pick_cases([]) == {}
