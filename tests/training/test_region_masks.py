# SPDX-License-Identifier: Apache-2.0
"""The validation's Dice of several regions: by hand, and as columns of the learning curves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, ValidationHandler
from torch import nn

from scripts.data.modalities import UNLABELLED
from scripts.report.curves import curve_figures, read_curves
from scripts.runtime.regions import IGNORED
from scripts.training.learning_curves import CurveWriter
from scripts.training.region_masks import RegionMasks

REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
LABEL = [0, 1, 2, 3, 3, IGNORED, UNLABELLED, 0]
PREDICTION = [0, 2, 2, 3, 1, 3, 3, 0]


def masks(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 2, 2, 2)


def test_every_region_is_a_channel_and_ignored_voxels_are_in_none() -> None:
    output = [{"pred": masks(PREDICTION).to(torch.uint8), "label": masks(LABEL)}]
    (prediction,), (label,) = RegionMasks(REGIONS)(output)
    assert label.flatten(1).tolist() == [
        [0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0],
    ]  # fmt: skip
    assert prediction.flatten(1).tolist() == [
        [0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0],
    ]  # fmt: skip


def validated(path: Path, labels: list[list[int]], regions: dict[str, list[int]]) -> None:
    """One epoch of a training that does nothing, with a validation whose prediction is always ``PREDICTION``."""
    cases = [{"image": masks(PREDICTION), "label": masks(label)} for label in labels]
    metric = {"val_dice": MeanDice(output_transform=RegionMasks(regions))}
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), DataLoader(cases, batch_size=1), nn.Identity(), key_val_metric=metric
    )
    trainer = Engine(lambda *_: {"loss": torch.tensor(1.0)})
    ValidationHandler(1, evaluator).attach(trainer)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    CurveWriter(str(path), None, optimizer, evaluator, list(regions)).attach(trainer)
    trainer.run([0], max_epochs=1)


def test_the_curves_hold_the_mean_over_regions_and_each_region(tmp_path: Path) -> None:
    """Dice of the case's regions: 1, 2 * 2 / (2 + 3) and 2 * 1 / (1 + 2); in the other case only WT is defined."""
    only_oedema = [0, 2, 2, 0, 0, 0, 0, 0]
    validated(tmp_path / "curves.csv", [LABEL, only_oedema], REGIONS)
    (row,) = read_curves(tmp_path / "curves.csv")
    whole = 2 * 2 / (2 + 6)  # the two voxels of the label are among six predicted ones
    assert row["val_dice/WT"] == pytest.approx((1 + whole) / 2)
    assert row["val_dice/TC"] == pytest.approx(0.8)
    assert row["val_dice/ET"] == pytest.approx(2 / 3)
    assert row["val_dice"] == pytest.approx(((1 + 0.8 + 2 / 3) / 3 + whole) / 2)
    titles = [figure.title for figure in curve_figures({"student": [row]})]
    assert titles == ["Training loss", "Validation Dice", "Validation Dice of student"]


def test_a_region_that_no_case_has_leaves_its_cell_empty(tmp_path: Path) -> None:
    validated(tmp_path / "curves.csv", [[0, 2, 2, 0, 0, 0, 0, 0]], REGIONS)
    (row,) = read_curves(tmp_path / "curves.csv")
    assert (row["val_dice/TC"], row["val_dice/ET"]) == (None, None)
    assert row["val_dice"] == row["val_dice/WT"] == 0.5


def test_one_region_has_no_column_of_its_own(tmp_path: Path) -> None:
    validated(tmp_path / "curves.csv", [LABEL], {"tumour": [1, 2, 3]})
    (row,) = read_curves(tmp_path / "curves.csv")
    assert row["val_dice"] == 1.0
    assert not [name for name in row if "/" in name]
