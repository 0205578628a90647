# SPDX-License-Identifier: Apache-2.0
"""Learning curves, progress bar, seeds and manifest, on running engines."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, ValidationHandler, from_engine
from torch import nn

from scripts.report.curves import read_curves
from scripts.training.checkpoint import TrainingCheckpoint
from scripts.training.handlers import GradientClipping, ManifestWriter, Progress, SeedEpochs
from scripts.training.learning_curves import CurveWriter

OPTIMIZER = SimpleNamespace(param_groups=[{"lr": 0.25}])


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def engine_of(losses: list[float], loss: Any = None) -> Engine:
    """An engine whose steps give these losses in turn, over and over; ``loss.logged`` follows them."""

    def step(engine: Engine, value: float) -> dict[str, torch.Tensor]:
        if loss is not None:
            loss.logged = {"segmentation": value, "soft": 10 * value, "weight/ct": 0.5}
        return {"loss": torch.tensor(value)}

    return Engine(step)


def run(path: Path, losses: list[float], epochs: int, loss: Any = None, before: Any = None) -> list[dict[str, str]]:
    engine = engine_of(losses, loss)
    CurveWriter(str(path), loss, OPTIMIZER).attach(engine)
    if before is not None:
        engine.add_event_handler(Events.STARTED, before)  # after the curves, as a checkpoint in train.json
    engine.run(losses, max_epochs=epochs)
    return table(path)


def test_a_row_per_epoch_holds_the_means_over_its_steps(tmp_path: Path) -> None:
    rows = run(tmp_path / "new" / "curves.csv", [1.0, 2.0, 6.0], 2)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["loss"]) for row in rows] == [3.0, 3.0]
    assert [float(row["learning_rate"]) for row in rows] == [0.25, 0.25]
    assert all(0 < float(row["seconds_per_step"]) < 60 for row in rows)
    assert list(rows[0]) == ["epoch", "loss", "learning_rate", "seconds_per_step"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.csv"]


def test_every_logged_term_is_a_column_by_its_name(tmp_path: Path) -> None:
    (row,) = run(tmp_path / "curves.csv", [1.0, 3.0], 1, SimpleNamespace())
    assert {key: float(row[key]) for key in row if "/" in key} == {
        "loss/segmentation": 2.0,
        "loss/soft": 20.0,
        "weight/ct": 0.5,
    }


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean(tmp_path: Path) -> None:
    """Its step was skipped. An epoch of such steps has an empty cell."""
    (row,) = run(tmp_path / "curves.csv", [1.0, float("nan"), 2.0], 1)
    assert row["loss"] == "1.5"
    (row,) = run(tmp_path / "curves.csv", [float("nan"), float("inf")], 1)
    assert row["loss"] == ""
    assert read_curves(tmp_path / "curves.csv")[0]["loss"] is None


def test_reading_gives_back_numbers(tmp_path: Path) -> None:
    run(tmp_path / "curves.csv", [1.0, 2.0], 3)
    rows = read_curves(tmp_path / "curves.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] == 1.5 for row in rows)


def test_a_resumed_run_keeps_earlier_rows_and_replaces_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    run(path, [1.0], 4)

    def resume(engine: Engine) -> None:
        engine.state.epoch, engine.state.iteration = 2, 2

    rows = run(path, [5.0], 5, SimpleNamespace(), before=resume)
    assert [(row["epoch"], float(row["loss"])) for row in rows] == [
        ("1", 1.0), ("2", 1.0), ("3", 5.0), ("4", 5.0), ("5", 5.0),
    ]  # fmt: skip
    assert [row["loss/soft"] for row in rows] == ["", "", "50.0", "50.0", "50.0"]  # a column that the old rows lack


def test_a_new_run_starts_a_new_table(tmp_path: Path) -> None:
    run(tmp_path / "curves.csv", [1.0], 3)
    assert [float(row["loss"]) for row in run(tmp_path / "curves.csv", [5.0], 1)] == [5.0]


def training(folder: Path, epochs: int, resume: bool = False, interval: int = 2) -> list[dict[str, str]]:
    """A real training with validation every other epoch, handlers in the order of configs/train.json."""
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    image = torch.randn(2, 1, 4, 4, 4)
    loader = DataLoader([{"image": x, "label": (x > 0).float()} for x in image], batch_size=1)
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), loader, network, key_val_metric={"val_dice": MeanDice(
            include_background=False, num_classes=2, output_transform=from_engine(["pred", "label"]))},
        postprocessing=lambda item: {**item, "pred": item["pred"].argmax(0, keepdim=True)},
    )  # fmt: skip
    evaluator.add_event_handler(Events.COMPLETED, lambda e: e.state.metrics.update(val_dice=0.5 + trainer.state.epoch))

    def loss(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(prediction, label[:, 0].long())

    trainer = SupervisedTrainer(
        torch.device("cpu"), epochs, loader, network, optimizer, loss, decollate=False,
        train_handlers=[
            ValidationHandler(interval=interval, validator=evaluator),
            CurveWriter(str(folder / "curves.csv"), loss, optimizer, evaluator),
            TrainingCheckpoint(
                str(folder / "checkpoint.pt"), str(folder / "model.pt"),
                {"model": network, "optimizer": optimizer}, interval=1, resume=resume,
            ),
            Progress("training", epochs=True),
        ],
    )  # fmt: skip
    trainer.run()
    return table(folder / "curves.csv")


def test_only_epochs_with_a_validation_have_a_validation_dice(tmp_path: Path) -> None:
    rows = training(tmp_path, 5)
    assert [row.get("val_dice") for row in rows] == ["", "2.5", "", "4.5", ""]


def test_a_training_resumed_from_its_checkpoint_keeps_its_curve(tmp_path: Path) -> None:
    first = training(tmp_path, 2)
    rows = training(tmp_path, 4, resume=True)
    assert rows[:2] == first
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]


def test_without_a_single_validation_there_is_no_column_for_it(tmp_path: Path) -> None:
    assert "val_dice" not in training(tmp_path, 1)[0]


@pytest.mark.parametrize("epochs", [True, False])
def test_progress_counts_epochs_or_cases_to_the_end(epochs: bool, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_of([1.5, 2.5])
    Progress("working", epochs).attach(engine)
    engine.run([1.5, 2.5, 0.5], max_epochs=4 if epochs else 1)
    shown = capsys.readouterr().err
    assert "working: 100%" in shown
    assert ("4/4" if epochs else "3/3") in shown


def test_progress_needs_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(lambda engine, batch: [{"pred": batch}])
    Progress("segmenting").attach(engine)
    engine.run([1, 2])
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("decollated", [False, True])
def test_progress_shows_the_last_loss(decollated: bool, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(lambda engine, value: [{"loss": value}] if decollated else {"loss": value})
    Progress("training", epochs=True).attach(engine)
    engine.run([1.5, 0.25])
    assert "loss=0.250" in capsys.readouterr().err


def test_the_manifest_is_written_when_the_run_ends(tmp_path: Path, fake_git: Any) -> None:
    cases = [{"case_id": "A", "image": "a.nii"}]
    engine = engine_of([1.0])
    ManifestWriter(str(tmp_path), cases, {"teacher_ct": SimpleNamespace(sha256="ab" * 32)}).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: None)
    assert not (tmp_path / "manifest.json").exists()
    engine.run([1.0], max_epochs=1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"] is None  # no workflow of MONAI runs
    assert manifest["teachers_sha256"] == {"teacher_ct": "ab" * 32}
    assert manifest["data"] == cases
    assert manifest["threads"] == torch.get_num_threads()
    assert 0 <= manifest["wall_seconds"] < 60


def test_a_run_that_fails_leaves_no_manifest(tmp_path: Path, fake_git: Any) -> None:
    def fail(engine: Engine, batch: Any) -> None:
        raise RuntimeError("out of memory")

    engine = Engine(fail)
    ManifestWriter(str(tmp_path), []).attach(engine)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.run([1.0], max_epochs=1)
    assert not (tmp_path / "manifest.json").exists()


def drawn(seed: int, rank: int, first: int, history: int, earlier: int = 0) -> dict[int, tuple[float, ...]]:
    """The first number of every global generator in each epoch up to 3, in a run that starts after ``first`` epochs."""
    found: dict[int, tuple[float, ...]] = {}

    def step(engine: Any, value: float) -> None:
        numbers = (random.random(), float(np.random.rand()), float(torch.rand(1, dtype=torch.float64)))
        found.setdefault(engine.state.epoch, numbers)
        torch.rand(history)  # dropout takes more or less of them

    engine: Any = Engine(step)
    engine.add_event_handler(Events.STARTED, lambda: setattr(engine.state, "rank", rank))
    SeedEpochs(seed, earlier).attach(engine)
    if first:
        engine.load_state_dict({"epoch": first, "epoch_length": 2, "max_epochs": 3})
    random.seed(history)
    np.random.seed(history)
    torch.manual_seed(history)
    engine.run([0.0, 0.0], max_epochs=3)
    return found


def test_random_numbers_of_an_epoch_depend_only_on_seed_epoch_and_process() -> None:
    whole = drawn(seed=5, rank=0, first=0, history=1)
    assert list(whole) == [1, 2, 3]
    again = drawn(seed=5, rank=0, first=1, history=7)
    assert again == {epoch: whole[epoch] for epoch in (2, 3)}
    assert drawn(seed=5, rank=0, first=0, history=1, earlier=1)[1] == whole[2]
    others = [*whole.values(), *drawn(5, 1, 0, 1).values(), *drawn(6, 0, 0, 1).values()]
    for generator in zip(*others, strict=True):
        assert len(set(generator)) == len(others)


@pytest.mark.parametrize(("norm", "expected"), [(2.5, [1.5, 2.0]), (10.0, [3.0, 4.0])])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(norm: float, expected: list[float]) -> None:
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.tensor([[3.0, 4.0]]), "label": torch.zeros(1, 1)}],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda prediction, label: (prediction - label).sum(),
        decollate=False,
        train_handlers=[GradientClipping(norm)],
    )
    trainer.run()
    torch.testing.assert_close(-network.weight.detach()[0], torch.tensor(expected), rtol=1e-5, atol=0)
