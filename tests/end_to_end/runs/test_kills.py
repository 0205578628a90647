# SPDX-License-Identifier: Apache-2.0
"""Signal 9 while masks are being saved: a mask under its final name is complete."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import scripts.utils.atomic_files
from scripts.cli.main import main

KILLS, CASES = 20, 6
OLD = b"an earlier mask"
Evaluate = Callable[[Path], int]


@pytest.fixture(scope="module")
def evaluate(tiny: list[str], weights: Path, cohort: Path) -> Evaluate:
    """``evaluate(output)`` segments six phantoms and scores them."""

    def run(output: Path) -> int:
        arguments = ["evaluate", *tiny, "--dataset-dir", cohort, "--weights", weights, "--engine", "torch"]
        return main([*map(str, arguments), "--set", "spacing=[12,12,12]", "--output-dir", str(output)])

    return run


@pytest.fixture(scope="module")
def undisturbed(evaluate: Evaluate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The masks of a run that is not killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert evaluate(folder) == 0
    masks = _masks(folder)
    assert len(masks) == CASES
    assert len(set(masks.values())) == CASES
    return masks


def _masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("masks/[!.]*")}


def _earlier(folder: Path, names: Any) -> None:
    (folder / "masks").mkdir(parents=True)
    for name in names:
        (folder / "masks" / name).write_bytes(OLD)


def test_twenty_kills_while_masks_are_saved_leave_old_or_new_masks_and_the_next_run_completes(
    evaluate: Evaluate, undisturbed: dict[str, bytes], child: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chance, kills, counts = random.Random(20), 0, []
    for number in range(KILLS):
        output = tmp_path / str(number)
        _earlier(output, undisturbed)
        process, wanted = child(lambda folder=output: evaluate(folder)), chance.randrange(1, CASES)
        while process.alive() and list(_masks(output).values()).count(OLD) > CASES - wanted:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        if process.alive():
            process.kill()
            kills += process.end()[0] == -signal.SIGKILL
        masks = _masks(output)
        assert set(masks) == set(undisturbed)
        assert {name for name, mask in masks.items() if mask not in (OLD, undisturbed[name])} == set()
        counts.append(list(masks.values()).count(OLD))
    assert kills == KILLS
    assert len(set(counts)) > 2  # they came at different moments
    (output / "masks" / f".half.nii.gz.{process.pid}.part").write_bytes(b"half")
    (output / "masks" / ".half.nii.gz.1.part").write_bytes(b"of a run that goes on")
    assert evaluate(output) == 0
    assert _masks(output) == undisturbed
    assert [path.name for path in output.glob("masks/.*.part")] == [".half.nii.gz.1.part"]
    assert f"{output} was left by process" in caplog.text


@pytest.mark.parametrize("moment", ["half written", "written", "flushed", "named"])
def test_a_kill_at_each_step_of_saving_a_mask(
    moment: str, evaluate: Evaluate, undisturbed: dict[str, bytes], child: Any, tmp_path: Path
) -> None:
    _earlier(tmp_path, undisturbed)
    third, replace, fsync = sorted(undisturbed)[2], os.replace, os.fsync
    seen: list[str] = []

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def open_file(path: Any, mode: str) -> Any:
        seen.append(Path(path).name)
        return open(path, mode)

    def flush(number: int) -> None:
        mine = seen[-1].startswith(f".{third}.")
        if mine and moment == "half written":
            os.ftruncate(number, os.fstat(number).st_size // 2)
        if mine and moment in ("half written", "written"):
            die()
        fsync(number)

    def name_it(source: Any, target: Any) -> None:
        mine = Path(target).name == third
        if mine and moment == "flushed":
            die()
        replace(source, target)
        if mine and moment == "named":
            die()

    def sabotaged() -> int:
        scripts.utils.atomic_files.open, os.fsync, os.replace = open_file, flush, name_it
        return evaluate(tmp_path)

    code, printed = child(sabotaged).end()
    assert code == -signal.SIGKILL, printed
    done = 3 if moment == "named" else 2
    assert _masks(tmp_path) == {
        name: undisturbed[name] if index < done else OLD for index, name in enumerate(sorted(undisturbed))
    }
    assert len(list(tmp_path.glob("masks/.*.part"))) == (moment != "named")
