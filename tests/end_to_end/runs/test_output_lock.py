# SPDX-License-Identifier: Apache-2.0
"""One run at a time on one output: the second is refused, and the output of a killed run is taken over."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.cli.main import main
from scripts.utils.atomic_files import write_json
from scripts.utils.output_lock import acquire, release


def wait_for(path: Path) -> None:
    """Wait until a file exists; otherwise the test's time limit ends the test."""
    while not path.exists():
        time.sleep(0.002)


@pytest.fixture
def holder(child: Any, tmp_path: Path) -> Callable[[Path], Any]:
    """``holder(output)``: a process that keeps the output locked until it ends."""

    def start(output: Path) -> Any:
        mark = tmp_path / "held"

        def work() -> int:
            acquire(output)
            mark.touch()
            signal.pause()
            return 0

        process = child(work)
        wait_for(mark)
        mark.unlink()
        return process

    return start


@pytest.fixture(params=["train", "evaluate", "segment"])
def command(request: pytest.FixtureRequest, tiny: list[str], weights: Path, cohort: Path, tmp_path: Path) -> Any:
    """A command line, its output, and a file that the command writes there."""
    output, common = tmp_path / "out", [*tiny, "--set", "spacing=[12,12,12]"]
    if request.param == "segment":
        case, mask = cohort / "PHANTOM_001", output / "mask.nii.gz"
        files = [f"--{key}={case / name}" for key, name in (("ct", "CT_image.nii.gz"), ("pet", "PET_image.nii.gz"))]
        line = ["segment", *common, *files, "--allow-missing", "--weights", weights, "--output", mask]
        return [*map(str, line), "--engine", "torch"], mask, mask
    line = [request.param, *common, "--dataset-dir", cohort, "--output-dir", output]
    anew = ["--set", "overwrite=true"]  # twice into one folder
    more = ["--epochs", 1, "--set", "val_interval=100", *anew] if request.param == "train" else ["--weights", weights]
    return [*map(str, [*line, *more])], output, output / ("model.pt" if request.param == "train" else "summary.json")


def test_a_second_run_is_refused_until_the_first_one_is_killed(
    command: Any, holder: Any, refused: Any, caplog: pytest.LogCaptureFixture
) -> None:
    arguments, output, result = command
    first = holder(output)
    error = refused(*arguments)
    assert f"{output} is in use by process {first.pid} on " in error
    assert "wait until it has ended, or choose another output" in error
    assert not [path for path in (output.parent if output.suffix else output).rglob("*") if path.name[0] != "."]
    first.kill()
    first.end()
    assert main(arguments) == 0
    assert f"{output} was left by process {first.pid}, which has ended: this run takes it over" in caplog.text
    assert result.is_file()
    caplog.clear()
    assert main(arguments) == 0  # in one process one after the other
    assert "was left by process" not in caplog.text


def test_different_masks_in_one_folder_can_be_written_at_once_but_not_the_same_mask(
    holder: Any, refused: Any, noise_case: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    files, first = noise_case(tmp_path / "in", 16), tmp_path / "out" / "first.nii.gz"
    process = holder(first)
    assert main(segment_arguments(files, first.with_name("second.nii.gz"))) == 0
    assert f"{first} is in use by process {process.pid}" in refused(*segment_arguments(files, first))
    assert not first.exists()
    assert first.with_name("second.nii.gz").is_file()


def test_of_six_processes_that_start_at_once_one_gets_the_lock(child: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"

    def work() -> int:
        wait_for(go)
        try:
            acquire(tmp_path / "out")
        except ValueError:
            return 3
        wait_for(tmp_path / "end")
        return 0

    processes = [child(work) for _ in range(6)]
    go.touch()
    codes = []
    while sum(code == 3 for code in codes) < 5:
        codes = [os.waitid(os.P_PID, p.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in processes]
        codes = [status and status.si_status for status in codes]
    (tmp_path / "end").touch()
    assert sorted(process.end()[0] for process in processes) == [0, 3, 3, 3, 3, 3]


FORKING = """
import os, sys
from scripts.utils.output_lock import acquire, release
acquire(sys.argv[1])
if (pid := os.fork()) == 0:
    if sys.argv[2] == "release":
        release(os.getppid())
    os._exit(0) if sys.argv[2] == "_exit" else sys.exit(0)  # the latter runs what is registered for the end
print(os.waitpid(pid, 0)[1], flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("way", ["_exit", "exit", "release"])
def test_a_forked_child_that_ends_does_not_release_its_parents_lock(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKING, str(tmp_path / "out"), way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "0\n"  # the child has ended
        with pytest.raises(ValueError, match=f"in use by process {parent.pid} "):
            acquire(tmp_path / "out")
        parent.communicate("\n")
    assert parent.returncode == 0
    acquire(tmp_path / "out")


def test_after_a_release_another_process_gets_the_lock_without_a_warning(
    child: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert child(lambda: acquire(tmp_path) or release() or 0).end()[0] == 0
    assert not (tmp_path / ".run.json").exists()
    with caplog.at_level(logging.WARNING):
        acquire(tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "elsewhere"}'])
def test_a_damaged_owner_file_of_an_ended_process_is_ignored(content: str, tmp_path: Path) -> None:
    (tmp_path / ".run.json").write_text(content)
    acquire(tmp_path)
    assert f'"pid": {os.getpid()}' in (tmp_path / ".run.json").read_text()


@pytest.mark.parametrize("content", ['{"pid": "x"}', '{"pid": 1}', "[]"])
def test_a_damaged_owner_file_of_a_running_process_still_means_a_refusal(
    content: str, holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.utils.output_lock.TAKEOVER_SECONDS", 0.1)
    process = holder(tmp_path / "out")
    (tmp_path / "out" / ".run.json").write_text(content)
    with pytest.raises(ValueError, match=r"out is in use by .*: wait until it has ended, or choose another output"):
        acquire(tmp_path / "out")
    assert process.alive()


def test_only_the_part_files_of_the_killed_run_are_removed(holder: Any, tmp_path: Path) -> None:
    first = holder(tmp_path / "a.nii.gz")
    first.kill()
    first.end()
    mine, other = tmp_path / f".a.nii.gz.{first.pid}.part", tmp_path / f".b.nii.gz.{first.pid}.part"
    mine.touch()
    other.touch()
    acquire(tmp_path / "a.nii.gz")
    assert not mine.exists()
    assert other.exists()


@pytest.mark.skipif(not Path("/proc/version").is_file(), reason="no /proc, where no file can be created")
@pytest.mark.parametrize("output", ["/proc", "/proc/mask.nii.gz"])
def test_a_folder_without_write_access_is_not_reported_as_in_use(output: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"{output} cannot be written, because no file can be created in its folder \(No such"
    ):
        acquire(output)


def test_the_command_reports_a_mask_that_cannot_be_written(
    refused: Any, noise_case: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    error = refused(*segment_arguments(noise_case(tmp_path, 16), Path("/proc/mask.nii.gz")))
    assert "/proc/mask.nii.gz cannot be written" in error
    assert "choose another output" in error
    assert "in use" not in error


def test_the_owner_file_names_the_host(tmp_path: Path) -> None:
    write_json({"pid": 1}, tmp_path / ".run.json")
    acquire(tmp_path)
    assert os.uname().nodename in (tmp_path / ".run.json").read_text()
