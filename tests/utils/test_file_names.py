# SPDX-License-Identifier: Apache-2.0
"""Names in NFC and in NFD (macOS) are the same name."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from scripts.utils.file_names import find_file, nfc

COMPOSED = "M\u00fcller"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def test_nfc_makes_both_forms_equal() -> None:
    assert COMPOSED != DECOMPOSED
    assert nfc(DECOMPOSED) == nfc(COMPOSED) == COMPOSED


@pytest.mark.parametrize(("on_disk", "asked"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED), (COMPOSED, COMPOSED)])
def test_find_file_finds_either_form(tmp_path: Path, on_disk: str, asked: str) -> None:
    file = tmp_path / on_disk / f"{on_disk}.nii.gz"
    file.parent.mkdir()
    file.touch()
    assert find_file(tmp_path / asked / f"{asked}.nii.gz") == file
    assert find_file(tmp_path / asked) == file.parent
    assert find_file(tmp_path / asked / "other.nii.gz") is None
    assert find_file(tmp_path / "none" / f"{asked}.nii.gz") is None


def test_find_file_refuses_two_forms_of_one_name(tmp_path: Path) -> None:
    name = "\u1e69"  # has two decomposed forms besides this one
    forms = {unicodedata.normalize("NFD", name), "s\u0307\u0323"}
    for form in forms:
        (tmp_path / form).touch()
    with pytest.raises(ValueError, match="2 entries"):
        find_file(tmp_path / name)
