# SPDX-License-Identifier: Apache-2.0
"""Resuming without the newest checkpoint, and starting a training in the folder of an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.cli.main import main


@pytest.mark.parametrize("lost", ["newest", "both"])
def test_a_resumed_training_uses_the_previous_checkpoint_or_reports_that_it_starts_at_epoch_1(
    lost: str, tiny: list[str], cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = ["train", *tiny, "--dataset-dir", cohort, "--output-dir", tmp_path, "--epochs", 3]
    line += ["--set", "spacing=[12,12,12]", "--set", "val_interval=100", "--set", "save_interval=1"]
    arguments = [str(each) for each in line]
    assert main(arguments) == 0
    whole = torch.load(tmp_path / "model.pt", weights_only=True)
    (tmp_path / "checkpoint.pt").unlink()
    if lost == "both":
        (tmp_path / "checkpoint.previous.pt").unlink()
    caplog.clear()
    assert main([*arguments, "--resume"]) == 0
    log = caplog.text
    previous = f"resumed {tmp_path / 'checkpoint.previous.pt'} after epoch 2"
    nothing = f"No checkpoint at {tmp_path / 'checkpoint.pt'}: training starts at epoch 1"
    assert (previous in log, nothing in log) == (lost == "newest", lost == "both")
    again = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_without_resume_an_earlier_run_is_kept_unless_overwrite_is_set(
    tiny: list[str], cohort: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = ["train", *tiny, "--dataset-dir", cohort, "--output-dir", tmp_path, "--epochs", 2]
    line += ["--set", "spacing=[12,12,12]", "--set", "val_interval=100", "--set", "save_interval=1"]
    arguments = [str(each) for each in line]
    assert main(arguments) == 0
    kept = ("checkpoint.pt", "checkpoint.previous.pt", "model.pt", "curves.csv", "manifest.json")
    before = {name: (tmp_path / name).read_bytes() for name in kept}
    message = f"{tmp_path / 'checkpoint.pt'} already contains a checkpoint (epoch 2). Use --resume to continue, or"
    assert message in refused(*arguments)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == before
    assert main([*arguments, "--epochs", "1", "--set", "overwrite=true"]) == 0
    assert not (tmp_path / "checkpoint.previous.pt").exists()  # one epoch of a run of its own
