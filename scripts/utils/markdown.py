# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and numbers in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table.

    Args:
        head: the column titles.
        rows: one sequence of cells per row; a cell is written as text, ``None`` as an empty cell.

    Returns:
        The table, without a line break at its end. Text in a cell cannot end the cell or start an HTML tag.
    """
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval_text(summary: Mapping[str, Any], digits: int, sign: str = "") -> str:
    """A mean and its interval as text, such as ``0.700 [0.650, 0.750]``; without an interval the mean alone.

    Args:
        summary: with ``mean`` and ``ci95``; either may be None.
        digits: decimals.
        sign: ``"+"`` to write the sign of positive numbers.
    """
    if summary["mean"] is None:
        return "undefined"
    ends = [f"{x:{sign}.{digits}f}" for x in summary["ci95"] or ()]
    return f"{summary['mean']:{sign}.{digits}f}" + (f" [{', '.join(ends)}]" if ends else "")


def _cell(value: object) -> str:
    text = "" if value is None else " ".join(str(value).split())
    return re.sub(r"([\\|<])", r"\\\1", text)
