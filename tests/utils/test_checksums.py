# SPDX-License-Identifier: Apache-2.0
"""Checksums of files: right, and read only once while a file stays as it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from scripts.utils import checksums
from scripts.utils.checksums import sha256


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(checksums, "SETTLED_SECONDS", -1.0)


def _expected(text: bytes) -> str:
    return hashlib.new("sha256", text).hexdigest()


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"first")
    with patch.object(checksums, "_digest", wraps=checksums._digest) as reads:
        assert [sha256(file), sha256(str(file))] == [_expected(b"first")] * 2
        assert reads.call_count == 1
        file.write_bytes(b"other size")
        assert sha256(file) == _expected(b"other size")
        assert reads.call_count == 2


@pytest.mark.usefixtures("settled")
def test_another_file_under_the_same_name_is_read_although_size_and_time_are_the_same(tmp_path: Path) -> None:
    file, other = tmp_path / "weights.pt", tmp_path / "other.pt"
    file.write_bytes(b"aaaa")
    assert sha256(file) == _expected(b"aaaa")
    other.write_bytes(b"bbbb")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert sha256(file) == _expected(b"bbbb")


def test_a_file_that_has_just_been_written_is_read_every_time(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"aaaa")
    before = file.stat()
    assert sha256(file) == _expected(b"aaaa")
    with file.open("r+b") as changed:  # within one tick of the clock of the file system nothing tells of it
        changed.write(b"bbbb")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256(file) == _expected(b"bbbb")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        sha256(tmp_path / "absent.pt")
