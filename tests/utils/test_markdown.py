# SPDX-License-Identifier: Apache-2.0
"""Markdown tables."""

from __future__ import annotations

from scripts.utils.markdown import markdown_table


def test_a_row_per_item_and_none_is_an_empty_cell() -> None:
    table = markdown_table(["network", "Dice"], [("student", "0.81"), ("teacher", None)])
    assert table.splitlines() == ["| network | Dice |", "| --- | --- |", "| student | 0.81 |", "| teacher |  |"]


def test_text_in_a_cell_cannot_break_the_table() -> None:
    table = markdown_table(["name"], [["a|b <script>\nc\\d"]])
    assert table.splitlines()[2] == r"| a\|b \<script> c\\d |"
