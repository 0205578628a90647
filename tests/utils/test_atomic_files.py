# SPDX-License-Identifier: Apache-2.0
"""Files are complete or absent, no matter which step fails."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from scripts.utils.atomic_files import atomic_file, write_json, write_text


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"x": None, "y": [1.5]}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"x": math.nan}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": None, "y": [1.5]}


def test_a_failed_rename_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text("old", tmp_path / "a.txt")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text("new", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_text("old", tmp_path / "a.txt")
    with pytest.raises(TypeError, match="bytes"), atomic_file(tmp_path / "a.txt") as file:
        file.writelines([b"ne", "w"])
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_file(tmp_path / "a.txt") as first:
        first.write(b"first " * 1000)
        monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
        write_text("second", tmp_path / "a.txt")
        first.write(b"first " * 1000)
    assert (tmp_path / "a.txt").read_bytes() == b"first " * 2000


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "a.json", tmp_path / "a.json"
    target.parent.mkdir()
    target.write_text("{}")
    link.symlink_to(target)
    write_json([1], link)
    assert link.is_symlink()
    assert json.loads(target.read_text()) == [1]


def test_a_folder_or_a_link_to_one_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "link"):
        with pytest.raises(IsADirectoryError, match=f"{name} is a folder. Name a file."):
            write_text("x", tmp_path / name)
    assert (tmp_path / "link").is_symlink()
    assert not list((tmp_path / "folder").iterdir())
