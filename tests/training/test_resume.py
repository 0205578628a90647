# SPDX-License-Identifier: Apache-2.0
"""A training that is killed at random moments ends with the same bits as one that never was."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.job_queue import use_own_progress_lock
from scripts.cli.main import main

EPOCHS, KILLS = 26, 20
SETTINGS = [
    "--data", "phantom", "--threads", "1", "--seed", "5", "--modality-dropout", "0.3",
    "--method", "hint", "--teacher", "dynunet=random",
    "--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]", "--set", "student_features=[4,8,8,8]",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]}}',
    "--set", "val_interval=100", "--set", "save_interval=1",
]  # fmt: skip


def _child(arguments: list[str], log: Path, sabotage: Callable[[], None] | None) -> None:
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        use_own_progress_lock()
        if sabotage:
            sabotage()
        os._exit(main(arguments))


def start(cohort: Path, output: Path, *more: str, sabotage: Callable[[], None] | None = None) -> ForkProcess:
    """The training as a process of its own (forked, so that nothing is imported again)."""
    output.mkdir(parents=True, exist_ok=True)
    arguments = ["distill", *SETTINGS, "--dataset-dir", str(cohort), "--output-dir", str(output), "--resume", *more]
    process = multiprocessing.get_context("fork").Process(target=_child, args=(arguments, output / "log.txt", sabotage))
    process.start()
    return process


def finish(cohort: Path, output: Path, *more: str) -> None:
    process = start(cohort, output, *more)
    process.join(240)
    assert process.exitcode == 0, (output / "log.txt").read_text()[-2000:]


def leaves(x: Any, path: str = "") -> dict[str, Any]:
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list | tuple) else None
    return {path: x} if items is None else {k: v for n, i in items for k, v in leaves(i, f"{path}/{n}").items()}


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, adapters, optimizer, scheduler, trainer and every epoch's losses, bit by bit."""
    for name in ("checkpoint.pt", "model.pt"):
        a, b = (leaves(torch.load(folder / name, weights_only=True)) for folder in (first, second))
        assert list(a) == list(b)
        different = [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k])]
        assert different == []
    tables = []
    for folder in (first, second):
        with open(folder / "curves.csv", newline="") as file:
            tables.append([{**row, "seconds_per_step": ""} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


@pytest.fixture(scope="module")
def whole(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    output = tmp_path_factory.mktemp("whole")
    finish(cohort, output, "--epochs", str(EPOCHS))
    return output


def _epochs_done(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["trainer"]["iteration"] // 2 if checkpoint.is_file() else 0


def test_twenty_kills_at_random_moments_change_no_bit(cohort: Path, whole: Path, tmp_path: Path) -> None:
    chance, kills, checkpoint = random.Random(0), 0, tmp_path / "checkpoint.pt"
    while kills < 200:
        # On a fast machine the epochs could run out before the kills: then it is killed while it starts.
        scarce = EPOCHS - _epochs_done(checkpoint) <= KILLS - kills
        process = start(cohort, tmp_path, "--epochs", str(EPOCHS))
        saves, born = 0 if scarce else chance.choice([0, 1, 1, 2]), time.monotonic()
        seen = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
        while saves and process.is_alive() and time.monotonic() - born < 60:
            now = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
            saves, seen = saves - (now != seen), now
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        if not process.is_alive():
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += 1
    process.join()
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()[-2000:]
    print(f"{kills} kills")
    assert kills >= KILLS
    assert_same_run(whole, tmp_path)
    assert [path.name for path in tmp_path.glob(".checkpoint*")] == []


def test_workers_do_not_change_a_run_and_a_kill_does_not_either(cohort: Path, tmp_path: Path) -> None:
    few = ("--epochs", "3")
    finish(cohort, tmp_path / "none", *few)
    process = start(cohort, tmp_path / "two", *few, "--set", "num_workers=2")
    while process.is_alive() and not (tmp_path / "two" / "checkpoint.pt").is_file():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    finish(cohort, tmp_path / "two", *few, "--set", "num_workers=2")
    assert_same_run(tmp_path / "none", tmp_path / "two")


def test_a_kill_in_the_middle_of_saving_leaves_the_state_before(
    cohort: Path, whole: Path, tmp_path: Path, die_in_save: Callable[[int], None]
) -> None:
    process = start(cohort, tmp_path, "--epochs", str(EPOCHS), sabotage=lambda: die_in_save(3))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]["iteration"] == 4  # 2 epochs of 2 steps
    finish(cohort, tmp_path, "--epochs", str(EPOCHS))
    assert_same_run(whole, tmp_path)


def _die_after_saving() -> None:
    """Be killed when the fourth checkpoint is there."""
    replace, calls = os.replace, []

    def last(source: Any, target: Any) -> None:
        replace(source, target)
        calls.append(Path(target).name)
        if calls.count("checkpoint.pt") == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = last


def test_a_broken_newest_state_falls_back_to_the_one_before_and_says_so(
    cohort: Path, whole: Path, tmp_path: Path
) -> None:
    process = start(cohort, tmp_path, "--epochs", str(EPOCHS), sabotage=_die_after_saving)
    process.join(120)
    path = tmp_path / "checkpoint.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one flipped bit
    path.write_bytes(bytes(damaged))
    finish(cohort, tmp_path, "--epochs", str(EPOCHS))
    log = (tmp_path / "log.txt").read_text()
    assert f"{path} is damaged: trying the checkpoint before it" in log
    assert "checkpoint.previous.pt after epoch 3" in log
    assert_same_run(whole, tmp_path)


def test_no_readable_state_is_refused_rather_than_started_anew(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    process = start(cohort, tmp_path, "--epochs", "2")
    process.join(120)
    assert process.exitcode == 1
    assert "cannot be read: remove it to start a new run" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "model.pt").exists()
