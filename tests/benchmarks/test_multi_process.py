# SPDX-License-Identifier: Apache-2.0
"""Samples per second of one and of two processes. The real run is a slow test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import multi_process
from benchmarks.multi_process import SETUPS, format_table, measure, run_training
from scripts.data.cohorts.phantom import write_phantoms

TINY = ["--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]", "--set", "student_features=[8,8,8,8]"]


@pytest.mark.benchmarks
def test_the_ratio_is_of_samples_per_second_and_rounds_are_interleaved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []
    seconds = {  # medians 2, 1.6, 1, 2.5
        (1, 2): [1.0, 3.0, 2.0], (1, 1): [1.6, 1.6, 9.0], (2, 1): [1.0, 1.0, 5.0], (2, 2): [4.0, 2.5, 2.0],
    }  # fmt: skip

    def fake_training(options: Any, output: Path, processes: int, batch: int, epochs: int) -> tuple[float, float]:
        calls.append((processes, batch))
        return seconds[processes, batch][(len(calls) - 1) // 4], 500.4

    monkeypatch.setattr(multi_process, "run_training", fake_training)
    rows = measure([], tmp_path, rounds=3, epochs=2)
    assert calls == [(1, 2), (1, 1), (2, 1), (2, 2)] * 3
    assert [row["median_s"] for row in rows] == [2.0, 1.6, 1.0, 2.5]
    assert [row["samples_per_s"] for row in rows] == [1.0, 0.625, 2.0, 1.6]  # 2 / 2, 1 / 1.6, 2 / 1, 4 / 2.5
    assert [row["ratio"] for row in rows] == [1.0, 0.625, 2.0, 1.6]
    assert "| 2 processes, batch 1 each | 1.000 | 2.00 | 2.00 | 500 |" in format_table(rows)


@pytest.mark.benchmarks
def test_a_failed_training_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="1 process"):
        run_training(["--data", "phantom", "--dataset-dir", str(tmp_path / "none")], tmp_path, 1, 2, 2)


@pytest.mark.slow
def test_every_setup_trains(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "data", cases=10, seed=3, progress=False)
    options = ["--data", "phantom", "--dataset-dir", str(tmp_path / "data"), *TINY]
    rows = measure(options, tmp_path / "out", rounds=2, epochs=2)  # all rounds write to the same folders
    assert [row["side"] for row in rows] == list(SETUPS)
    assert all(row["median_s"] > 0 and row["peak_mib"] > 100 for row in rows)
