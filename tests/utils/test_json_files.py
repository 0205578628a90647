# SPDX-License-Identifier: Apache-2.0
"""JSON files that somebody else wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.utils.json_files import read_json, read_object


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"é": [1]}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == read_object(tmp_path / "a.json") == {"é": [1]}


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not JSON .*Correct the file"):
        read_json(tmp_path / "a.json")


def test_another_content_than_an_object_and_no_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json is not the task\. Write an object with its keys"):
        read_object(tmp_path / "a.json", "task")
    with pytest.raises(FileNotFoundError, match=r"There is no task at .*b\.json\. Check the path"):
        read_json(tmp_path / "b.json", "task")
