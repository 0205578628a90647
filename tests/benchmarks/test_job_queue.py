# SPDX-License-Identifier: Apache-2.0
"""The queue of the comparisons, with commands that only write the expected files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.job_queue import Job, command_lines, run_jobs, select_jobs
from scripts import bundle_root


def fake_command(arguments: Sequence[str]) -> int:
    """Write the files of a training or an evaluation; fail in a folder named "broken"."""
    output = Path(arguments[arguments.index("out") + 1])
    if "broken" in str(output):
        raise ValueError("broken on purpose")
    print(" ".join(arguments))
    output.mkdir(parents=True, exist_ok=True)
    (output / ("summary.json" if arguments[0] == "evaluate" else "model.pt")).write_text("{}")
    if arguments[0] != "evaluate":
        (output / "manifest.json").write_text("{}")
    return 0


def make_job(folder: Path, *needs: Path) -> Job:
    training, evaluation = ("train", "out", str(folder)), ("evaluate", "out", str(folder / "eval"))
    return Job(folder.name, 0, folder, (training, evaluation), needs)


def test_a_job_waits_for_its_needs_and_finished_commands_are_not_repeated(tmp_path: Path) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    jobs = [make_job(second, first / "model.pt"), make_job(first), make_job(third, second / "model.pt")]
    assert run_jobs(jobs, 2, fake_command) == []
    assert all(job.done for job in jobs)
    times = {job.row: (job.folder / "log.txt").stat().st_mtime_ns for job in jobs}
    assert times["first"] < times["second"] < times["third"]
    (third / "eval" / "summary.json").unlink()
    assert run_jobs(jobs, 2, fake_command) == []
    repeated = {job.row for job in jobs if (job.folder / "log.txt").stat().st_mtime_ns != times[job.row]}
    assert repeated == {"third"}
    assert (third / "log.txt").read_text().count("train") == 1  # only its evaluation was missing
    assert (third / "log.txt").read_text().count("evaluate") == 2


def test_a_job_that_another_queue_has_done_meanwhile_is_not_run(tmp_path: Path) -> None:
    first, second = make_job(tmp_path / "first"), make_job(tmp_path / "second")

    def command(arguments: Sequence[str]) -> int:
        for job in (first, second):  # the other queue does both
            for each in job.commands:
                fake_command(each)
        return fake_command(arguments)

    assert run_jobs([first, second], 1, command) == []
    assert (first.folder / "log.txt").is_file()
    assert not (second.folder / "log.txt").exists()


def test_results_of_other_settings_are_not_taken_for_done(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    assert run_jobs([job], 1, fake_command) == []
    assert job.done
    training, evaluation = job.commands
    other = replace(job, commands=((*training, "--epochs", "60"), evaluation))
    with pytest.raises(ValueError, match=r"job has results of other settings\. Remove it, or choose another --output"):
        run_jobs([other], 1, fake_command)


def test_an_interrupted_training_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoint.pt").write_text("")
    assert run_jobs([make_job(tmp_path / "half")], 1, fake_command) == []
    assert "--resume" in (tmp_path / "half" / "log.txt").read_text().splitlines()[0]


def test_a_failed_job_logs_its_error_and_stops_only_the_jobs_that_need_it(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken", tmp_path / "other"
    jobs = [make_job(broken), make_job(tmp_path / "dependent", broken / "model.pt"), make_job(other)]
    assert [job.row for job in run_jobs(jobs, 2, fake_command)] == ["broken", "dependent"]
    assert jobs[2].done
    assert "broken on purpose" in (broken / "log.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent on request")
def test_jobs_end_with_a_queue_that_is_killed(tmp_path: Path) -> None:
    """Else a queue that is started again would run the same jobs beside them."""
    code = (
        "import os, time; from pathlib import Path; from benchmarks.job_queue import Job, run_jobs\n"
        f"folder = Path({str(tmp_path / 'job')!r})\n"
        "def command(_): (folder / 'pid').write_text(str(os.getpid())); time.sleep(60); return 0\n"
        "run_jobs([Job('job', 0, folder, (('train',),), evaluations=())], 1, command)\n"
    )
    queue = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], cwd=bundle_root(), stderr=subprocess.DEVNULL)
    written = tmp_path / "job" / "pid"
    for _ in range(600):
        if written.is_file() and written.read_text():
            break
        time.sleep(0.1)
    pid = int(written.read_text())
    queue.kill()
    queue.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still running")


def test_a_failure_may_be_kept_as_the_result(tmp_path: Path) -> None:
    class Keeping(Job):
        def keep_failure(self, printed: str) -> bool:
            (self.folder / "kept").write_text(printed)
            return "diverged" in printed

        @property
        def done(self) -> bool:
            return (self.folder / "kept").is_file()

    def command(arguments: Sequence[str]) -> int:
        print(*arguments)
        return 1

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.txt").write_text("of an earlier session\n")
    jobs = [
        Keeping(name, 0, tmp_path / name, ((words,),), evaluations=())
        for name, words in (("a", "diverged"), ("b", "x"))
    ]
    assert [job.row for job in run_jobs(jobs, 1, command)] == ["b"]
    assert (tmp_path / "a" / "kept").read_text() == "diverged\n"


def test_rows_are_selected_with_all_jobs_that_they_depend_on(tmp_path: Path) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    jobs = [make_job(first), make_job(second, first / "model.pt"), make_job(third, second / "model.pt")]
    assert [job.row for job in select_jobs(jobs, ["second"])] == ["first", "second"]
    assert [job.row for job in select_jobs(jobs, ["third"])] == ["first", "second", "third"]
    assert select_jobs(jobs, []) == jobs


def test_command_lines_are_quoted_for_the_shell(tmp_path: Path) -> None:
    job = Job("row", 0, tmp_path, (("train", "--name", "two words"), ("evaluate",)))
    assert command_lines([job]) == "python -m scripts train --name 'two words'\npython -m scripts evaluate"
