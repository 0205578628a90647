# SPDX-License-Identifier: Apache-2.0
"""Markdown tables."""

from __future__ import annotations

from scripts.utils.markdown import interval_text, markdown_table


def test_a_row_per_item_and_none_is_an_empty_cell() -> None:
    table = markdown_table(["network", "Dice"], [("student", "0.81"), ("teacher", None)])
    assert table.splitlines() == ["| network | Dice |", "| --- | --- |", "| student | 0.81 |", "| teacher |  |"]


def test_text_in_a_cell_cannot_break_the_table() -> None:
    table = markdown_table(["name"], [["a|b <script>\nc\\d"]])
    assert table.splitlines()[2] == r"| a\|b \<script> c\\d |"


def test_an_interval_is_left_out_where_there_is_none() -> None:
    assert interval_text({"mean": 0.7, "ci95": [0.65, 0.754]}, 2) == "0.70 [0.65, 0.75]"
    assert interval_text({"mean": 0.1, "ci95": [-0.1, 0.3]}, 1, "+") == "+0.1 [-0.1, +0.3]"
    assert interval_text({"mean": 0.5, "ci95": None}, 1) == "0.5"
    assert interval_text({"mean": None, "ci95": None}, 1) == "undefined"
