# SPDX-License-Identifier: Apache-2.0
"""Samples per second of one and of two processes; the real run is a slow test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import multi_process as scaling_benchmark
from benchmarks.multi_process import SIDES, measure, table
from scripts.data.cohorts.phantom import write_phantoms

TINY = ["--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]", "--set", "student_features=[8,8,8,8]"]


def test_the_ratio_is_of_samples_per_second_and_sides_take_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turns: list[tuple[int, int]] = []
    seconds = {  # medians 2, 1.6, 1, 2.5
        (1, 2): [1.0, 3.0, 2.0], (1, 1): [1.6, 1.6, 9.0], (2, 1): [1.0, 1.0, 5.0], (2, 2): [4.0, 2.5, 2.0],
    }  # fmt: skip

    def train(arguments: Any, output: Path, processes: int, batch: int, epochs: int) -> tuple[float, float]:
        turns.append((processes, batch))
        return seconds[processes, batch][len(turns[:-1]) // 4], 500.4

    monkeypatch.setattr(scaling_benchmark, "_train", train)
    rows = measure([], tmp_path, rounds=3, epochs=2)
    assert turns == [(1, 2), (1, 1), (2, 1), (2, 2)] * 3
    assert [row["median_s"] for row in rows] == [2.0, 1.6, 1.0, 2.5]
    assert [row["samples_per_s"] for row in rows] == [1.0, 0.625, 2.0, 1.6]  # 2 / 2, 1 / 1.6, 2 / 1, 4 / 2.5
    assert [row["ratio"] for row in rows] == [1.0, 0.625, 2.0, 1.6]
    assert "| 2 processes, batch 1 each | 1.000 | 2.00 | 2.00 | 500 |" in table(rows)


def test_a_training_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="1 process"):
        scaling_benchmark._train(["--data", "phantom", "--dataset-dir", str(tmp_path / "none")], tmp_path, 1, 2, 2)


@pytest.mark.slow
def test_each_side_really_trains(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "data", cases=10, seed=3, progress=False)
    arguments = ["--data", "phantom", "--dataset-dir", str(tmp_path / "data"), *TINY]
    rows = measure(arguments, tmp_path / "out", rounds=2, epochs=2)  # each round into the same folders
    assert [row["side"] for row in rows] == list(SIDES)
    assert all(row["median_s"] > 0 and row["peak_mib"] > 100 for row in rows)
