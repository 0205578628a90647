# SPDX-License-Identifier: Apache-2.0
"""Tiny cases and weights, commands in forked processes that can be killed or limited, and their error messages."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.job_queue import use_own_progress_lock
from scripts.cli.main import main
from scripts.networks import Student

FEATURES = (4, 8, 8, 8)
NORM = ("group", {"num_groups": 4})
TINY = [
    "--data", "phantom", "--threads", "1", "--seed", "0", "--set", "patch=[16,16,16]",
    "--set", f"student_features={list(FEATURES)}", "--set", 'student_norm=["group",{"num_groups":4}]',
]  # fmt: skip
RANGES = {"ct": (-1000.0, 300.0), "pet": (0.0, 10.0), "mr": (0.0, 1200.0)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are for ``make test-faults``: they kill processes and fill disks."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("faults")


class Child:
    """A function in a forked process, and what it prints. Forking avoids importing MONAI again."""

    def __init__(self, work: Callable[[], int]) -> None:
        self.source, sink = os.pipe()
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            self._work(work, sink)
        os.close(sink)

    @staticmethod
    def _work(work: Callable[[], int], sink: int) -> None:
        code = 70
        try:
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            use_own_progress_lock()
            logging.basicConfig(level=logging.WARNING, force=True)  # print the log instead of passing it to pytest
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        """Send signal 9."""
        os.kill(self.pid, signal.SIGKILL)

    def alive(self) -> bool:
        """Return whether the process is still running."""
        if self.code is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.code = 0  # waited for; its code is not asked for
        return self.code is None

    def end(self) -> tuple[int, str]:
        """Wait for the process; return its exit code (negative: the signal that ended it) and what it printed."""
        with os.fdopen(self.source, "rb") as pipe:
            printed = pipe.read().decode()
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code, printed


@pytest.fixture
def child() -> Iterator[Callable[[Callable[[], int]], Child]]:
    """``child(work)`` runs ``work`` in a forked process, which is killed when the test ends."""
    started: list[Child] = []

    def start(work: Callable[[], int]) -> Child:
        started.append(Child(work))
        return started[-1]

    yield start
    for each in started:
        if each.code is None:
            each.kill()
            os.waitpid(each.pid, 0)


def sentence_in(printed: str) -> str:
    """Return the one error message in the output, which must not contain a traceback."""
    assert "Traceback" not in printed, printed
    errors: list[str] = re.findall(r"^.*?(error: .*)$", printed, re.MULTILINE)  # a progress bar may precede it
    assert len(errors) == 1, printed
    return errors[0]


@pytest.fixture(scope="session")
def sentence() -> Callable[[str], str]:
    """``sentence(printed)``: the one line that starts with error:."""
    return sentence_in


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(*arguments)``: run a command that must end with exit code 1, and return its error message."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(each) for each in arguments]) == 1
        return sentence_in(capfd.readouterr().err)

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Arguments of a tiny student on small windows."""
    return list(TINY)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of that student with both classes equally likely, so that its masks are noise."""
    torch.manual_seed(3)
    student = Student(3, 2, FEATURES, norm=NORM).eval()
    with torch.no_grad():
        logits = student(torch.rand(1, 3, 32, 32, 32))
        student.head.conv.bias -= logits.mean((0, 2, 3, 4))
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({"model": student.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def noise_case(write_nifti: Callable[..., Path]) -> Callable[..., dict[str, Path]]:
    """``noise_case(folder, size)``: ct, pet and mr of seeded noise on one grid of 1 mm; their masks hardly compress."""

    def make(folder: Path, size: int = 32, seed: int = 0) -> dict[str, Path]:
        chance = np.random.default_rng(seed)
        return {
            key: write_nifti(folder / f"{key}.nii.gz", chance.uniform(low, high, (size,) * 3).astype(np.float32))
            for key, (low, high) in RANGES.items()
        }

    return make


@pytest.fixture(scope="session")
def segment_arguments(weights: Path) -> Callable[..., list[str]]:
    """``segment_arguments(files, output, *more)``: the command line, without ``python -m scripts``."""

    def make(files: dict[str, Path], output: Path, *more: object) -> list[str]:
        images: list[Any] = [each for key, path in files.items() for each in (f"--{key}", path)]
        rest = ["--output", output, "--weights", weights, "--engine", "torch", "--set", "spacing=[1,1,1]", *more]
        return ["segment", *TINY, *map(str, [*images, *rest])]

    return make
