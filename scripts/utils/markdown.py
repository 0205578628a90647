# SPDX-License-Identifier: Apache-2.0
"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


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


def _cell(value: object) -> str:
    text = "" if value is None else " ".join(str(value).split())
    return re.sub(r"([\\|<])", r"\\\1", text)
