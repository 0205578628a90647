# SPDX-License-Identifier: Apache-2.0
"""A table of the cases in the data set's folder: ``"layout": {"file": "cases.csv"}``, see `scripts.data.case_table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.data.case_list import Item, refuse_unknown_keys, require_folder
from scripts.data.case_table import path_inside, read_case_table
from scripts.image_io.checks import LABEL


def datalist(root: Path, modalities: Sequence[str], layout: Mapping[str, str], allow_outside: bool) -> list[Item]:
    """List the cases of the table, sorted by `case_id`.

    Args:
        root: folder that the table, and the paths in it, are relative to.
        modalities: columns of the table, the reference first.
        layout: ``file``, the table.
        allow_outside: accept a table, and paths in it, outside ``root``.

    Raises:
        ValueError: the layout names no table, or the table cannot be read.
        FileNotFoundError: no folder, or no table.
    """
    refuse_unknown_keys(layout, ("file",), "table")
    if "file" not in layout:
        raise ValueError('The cohort \'table\' needs the name of its table: "layout": {"file": "cases.csv"}.')
    root = require_folder(root, "table", layout["file"])
    file = path_inside(layout["file"], root, allow_outside, "layout")
    items = read_case_table(file, root, [*modalities, "image", LABEL], allow_outside)
    return sorted(items, key=lambda item: item["case_id"])
