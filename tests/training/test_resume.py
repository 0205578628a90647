# SPDX-License-Identifier: Apache-2.0
"""A training that is killed at random moments ends with the same bits as one that was never interrupted."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

KILLS, EPOCHS, FEW_EPOCHS = 20, 26, 5
SETTINGS = [
    "--data", "phantom", "--threads", "1", "--seed", "5", "--modality-dropout", "0.3",
    "--method", "hint", "--teacher", "dynunet=random",
    "--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]", "--set", "student_features=[4,8,8,8]",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]}}',
    "--set", "val_interval=100", "--set", "save_interval=1",
]  # fmt: skip
Start = Callable[..., BaseProcess]

# Python code that runs before the training and kills it later.
DIE_IN_THE_THIRD_SAVE = """
import os, signal, torch
save, calls = torch.save, []
def save_half(state, file):
    calls.append(1)
    save(state, file)
    if len(calls) == 3:
        file.flush()
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
"""
DIE_AFTER_THE_FOURTH_CHECKPOINT = """
import os, signal
replace, names = os.replace, []
def replace_and_die(source, target):
    replace(source, target)
    names.append(os.path.basename(target))
    if names.count("checkpoint.pt") == 4:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
"""
MAIN = "\nimport sys\nfrom scripts.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"


@pytest.fixture(scope="module")
def start(start_python: Any, cohort: Path) -> Start:
    """``start(output, *arguments, sabotage="")``: the training as a process; it logs to ``output``/log.err."""

    def run(output: Path, *more: object, sabotage: str = "") -> BaseProcess:
        output.mkdir(parents=True, exist_ok=True)
        arguments = ["distill", *SETTINGS, "--dataset-dir", cohort, "--output-dir", output, "--resume", *more]
        process: BaseProcess = start_python("-c", sabotage + MAIN, *arguments, output=output / "log")
        return process

    return run


@pytest.fixture(scope="module")
def finish(start: Start) -> Callable[..., None]:
    """``finish(output, *arguments)``: run the training to its end."""

    def run(output: Path, *more: object) -> None:
        process = start(output, *more)
        process.join(240)
        assert process.exitcode == 0, (output / "log.err").read_text()[-2000:]

    return run


def kill(process: BaseProcess) -> None:
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


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
def uninterrupted(finish: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that nobody interrupts."""
    output = tmp_path_factory.mktemp("uninterrupted")
    finish(output, "--epochs", FEW_EPOCHS)
    return output


def _epochs_done(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["trainer"]["iteration"] // 2 if checkpoint.is_file() else 0


def test_twenty_kills_at_random_moments_change_no_bit(
    start: Start, finish: Callable[..., None], tmp_path: Path
) -> None:
    finish(tmp_path / "uninterrupted", "--epochs", EPOCHS)
    output = tmp_path / "killed"
    chance, kills, checkpoint = random.Random(0), 0, output / "checkpoint.pt"
    while kills < 200:
        # On a fast machine the epochs could run out before the kills. Then the process is killed while it starts.
        scarce = EPOCHS - _epochs_done(checkpoint) <= KILLS - kills
        process = start(output, "--epochs", EPOCHS)
        saves, started = 0 if scarce else chance.choice([0, 1, 1, 2]), time.monotonic()
        seen = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
        while saves and process.is_alive() and time.monotonic() - started < 60:
            now = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
            saves, seen = saves - (now != seen), now
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        if kills >= KILLS or not process.is_alive():
            break
        kill(process)
        kills += 1
    process.join(240)
    assert process.exitcode == 0, (output / "log.err").read_text()[-2000:]
    print(f"{kills} kills")
    assert kills >= KILLS
    assert_same_run(tmp_path / "uninterrupted", output)
    assert [path.name for path in output.glob(".checkpoint*")] == []


def test_neither_workers_nor_a_kill_change_a_run(
    start: Start, finish: Callable[..., None], uninterrupted: Path, tmp_path: Path
) -> None:
    workers = ("--epochs", FEW_EPOCHS, "--set", "num_workers=2")
    process = start(tmp_path, *workers)
    while process.is_alive() and not (tmp_path / "checkpoint.pt").is_file():
        time.sleep(0.01)
    kill(process)
    finish(tmp_path, *workers)
    assert_same_run(uninterrupted, tmp_path)


def test_a_kill_in_the_middle_of_saving_leaves_the_checkpoint_before(
    start: Start, finish: Callable[..., None], uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, "--epochs", FEW_EPOCHS, sabotage=DIE_IN_THE_THIRD_SAVE)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]["iteration"] == 4  # 2 epochs of 2 steps
    finish(tmp_path, "--epochs", FEW_EPOCHS)
    assert_same_run(uninterrupted, tmp_path)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    start: Start, finish: Callable[..., None], uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, "--epochs", FEW_EPOCHS, sabotage=DIE_AFTER_THE_FOURTH_CHECKPOINT)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    path = tmp_path / "checkpoint.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one flipped bit
    path.write_bytes(bytes(damaged))
    finish(tmp_path, "--epochs", FEW_EPOCHS)
    log = (tmp_path / "log.err").read_text()
    assert f"{path} is damaged: trying the checkpoint before it" in log
    assert "checkpoint.previous.pt after epoch 3" in log
    assert_same_run(uninterrupted, tmp_path)


def test_without_a_readable_checkpoint_a_resumed_training_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    process = start(tmp_path, "--epochs", 2)
    process.join(120)
    assert process.exitcode == 1
    assert "cannot be read: remove it to start a new run" in (tmp_path / "log.err").read_text()
    assert not (tmp_path / "model.pt").exists()
