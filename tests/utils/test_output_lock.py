# SPDX-License-Identifier: Apache-2.0
"""An output lock leaves no file behind, and removing its file never lets two processes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.utils.output_lock import acquire, release

CONTEND = """
import os, sys
from scripts.utils import output_lock
from scripts.utils.output_lock import acquire, release
output_lock.OWNER_SECONDS = 0.0
acquired = refused = 0
while acquired < 40:
    try:
        acquire(sys.argv[1])
    except ValueError:
        refused += 1
        continue
    os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))  # fails if another process has the lock as well
    os.unlink(sys.argv[2])
    release()
    acquired += 1
print(acquired, refused)
"""


@pytest.mark.parametrize("name", ["mask.nii.gz", "out"])
def test_after_a_release_no_file_of_the_lock_is_left(name: str, tmp_path: Path) -> None:
    acquire(tmp_path / name)
    folder = tmp_path if name == "mask.nii.gz" else tmp_path / name
    assert sorted(path.name.rsplit(".", 1)[1] for path in folder.iterdir()) == ["json", "lock"]
    release()
    assert list(folder.iterdir()) == []
    acquire(tmp_path / name)
    release()
    assert list(folder.iterdir()) == []


def test_a_process_that_ends_normally_leaves_no_file_of_the_lock(run_python: Any, tmp_path: Path) -> None:
    code = "import sys; from scripts.utils.output_lock import acquire; acquire(sys.argv[1])"
    assert run_python("-c", code, tmp_path / "mask.nii.gz").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_processes_that_acquire_and_release_in_turn_never_both_have_the_lock(start_python: Any, tmp_path: Path) -> None:
    arguments = ("-c", CONTEND, tmp_path / "mask.nii.gz", tmp_path / "marker")
    logs = [tmp_path / f"log{number}" for number in range(4)]
    processes = [start_python(*arguments, output=log) for log in logs]
    for process in processes:
        process.join(120)
    assert [log.with_suffix(".err").read_text() for log in logs] == [""] * 4
    counts = [log.with_suffix(".out").read_text().split() for log in logs]
    assert [acquired for acquired, _ in counts] == ["40"] * 4
    assert sum(int(refused) for _, refused in counts) > 10
    assert list(tmp_path.glob(".*")) == []
