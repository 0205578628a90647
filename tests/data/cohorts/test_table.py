# SPDX-License-Identifier: Apache-2.0
"""The reader of a table in the data set's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.data.case_list import datalist


def test_the_cases_of_the_table_are_listed(tree: Callable[..., Path]) -> None:
    root = tree("b.nii.gz", "a.nii.gz", "b_seg.nii.gz")
    (root / "cases.csv").write_text("case_id,ct,label\nb,b.nii.gz,b_seg.nii.gz\na,a.nii.gz,\n")
    first, second = datalist("table", root, modalities=["ct"], layout={"file": "cases.csv"})
    assert first == {"case_id": "a", "patient_id": "a", "image": str(root / "a.nii.gz"), "ct": str(root / "a.nii.gz")}
    assert second["label"] == str(root / "b_seg.nii.gz")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, 'needs the name of its table: "layout": {"file": "cases.csv"}'),
        ({"table": "cases.csv"}, "has the key table, which the cohort 'table' does not know. Use file"),
        ({"file": "../cases.csv"}, "leads out of"),
    ],
)
def test_a_wrong_layout_is_one_sentence(layout: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        datalist("table", tmp_path, modalities=["ct"], layout=layout)


def test_a_table_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data list at .*cases\.csv"):
        datalist("table", tmp_path, modalities=["ct"], layout={"file": "cases.csv"})
