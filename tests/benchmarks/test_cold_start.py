# SPDX-License-Identifier: Apache-2.0
"""The instrument that times whole commands: seconds and memory of a process, sizes of packages, the bundle's line."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from benchmarks import cold_start
from benchmarks.cold_start import bundle_command, installed_mib, requirement_lines, run_process, time_in_turns


def test_seconds_and_memory_are_those_of_the_process() -> None:
    run = run_process([sys.executable, "-c", "import time; block = bytearray(200 * 2**20); time.sleep(0.3)"])
    assert 0.3 <= run.seconds < 30
    assert 200 <= run.peak_mib < 200 + 1000
    assert run_process([sys.executable, "-c", ""]).peak_mib < run.peak_mib


def test_a_command_that_fails_ends_the_benchmark_with_what_it_printed() -> None:
    with pytest.raises(ValueError, match="failed: no such patient"):
        run_process([sys.executable, "-c", "print('no such patient'); raise SystemExit(1)"])


def test_commands_run_in_turns_and_the_first_round_is_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    commands = {name: [sys.executable, "-c", f"open({str(log)!r}, 'a').write({name!r})"] for name in "ab"}
    runs = time_in_turns(commands, rounds=2)
    assert log.read_text() == "ababab"
    assert {name: len(each) for name, each in runs.items()} == {"a": 2, "b": 2}


def test_the_size_of_packages_includes_what_they_require_once() -> None:
    files = distribution("nibabel").files or []
    alone = sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).is_file())
    with_numpy = installed_mib(["nibabel"])
    assert with_numpy > alone / 2**20 + 20  # NumPy
    assert installed_mib(["nibabel", "numpy"]) == pytest.approx(with_numpy)
    assert installed_mib(["no-such-package>=1"]) == 0


def test_requirements_are_read_without_comments_and_options(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("# all\nnumpy>=2  # arrays\n\n-e .\ntorch==2.13.0\n")
    assert requirement_lines(tmp_path / "r.txt") == ["numpy>=2", "torch==2.13.0"]


def test_the_bundles_way_is_the_line_of_the_dry_run(tmp_path: Path) -> None:
    command = bundle_command(["segment", "--ct", "a.nii.gz", "--output", str(tmp_path / "m.nii.gz")])
    assert command[:5] == [sys.executable, "-W", "ignore", "-m", "monai.bundle"]
    assert "--config_file" in command


def test_the_table_of_cases_names_their_images(tmp_path: Path) -> None:
    options = cold_start._table([tmp_path / "STS_001"], tmp_path / "cases.csv")
    assert options == ["--data-list", str(tmp_path / "cases.csv"), "--allow-outside"]
    rows = (tmp_path / "cases.csv").read_text().splitlines()
    assert rows[0] == "case_id,ct,pet,mr"
    assert rows[1].split(",")[:2] == ["STS_001", str(tmp_path / "STS_001" / "CT_image.nii.gz")]
