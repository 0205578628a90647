# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation in the bundle, compared with larger batches and with a loop written in this test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripts.report.curves import read_curves
from scripts.training import handlers
from scripts.training.accumulation import completes_step
from scripts.training.checkpoint import TrainingCheckpoint
from scripts.training.handlers import GradientClipping
from scripts.training.mixed_precision import GradientScaling
from scripts.training.skip_nonfinite import FiniteSteps

RATE, EPOCHS, CASES = 0.05, 2, 4
SGD = {"_target_": "torch.optim.SGD", "params": "$@trained.parameters()", "lr": "@learning_rate"}
RECIPE = {"optimizer": SGD, "learning_rate": RATE, "max_epochs": EPOCHS}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32 sums in another order


class Bar:
    """Stands for a progress bar."""

    def __init__(self, total: int, initial: int, **options: Any) -> None:
        self.total, self.done = total, initial

    def set_postfix(self, **values: Any) -> None:
        pass

    def update(self) -> None:
        self.done += 1

    def close(self) -> None:
        pass


def learnt(parser: ConfigParser) -> list[Tensor]:
    """The weights after the bundle's training."""
    parser.get_parsed_content("run")
    return [p.detach() for p in parser.get_parsed_content("network").parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, **CLOSE) for a, b in zip(first, second, strict=True))


def by_hand(parser: ConfigParser, window: int) -> tuple[list[Tensor], list[float]]:
    """Weights and mean losses per epoch of gradient descent whose step sums 1/window of up to ``window`` gradients."""
    network, loss = parser.get_parsed_content("network").train(), parser.get_parsed_content("segmentation_loss")
    loader, weights, means = parser.get_parsed_content("train#dataloader"), list(network.parameters()), []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch + 1)
        rate, values = RATE * (1 - epoch / EPOCHS) ** 0.9, []
        batches = list(loader)
        for start in range(0, len(batches), window):
            total = [torch.zeros_like(w) for w in weights]
            for batch in batches[start : start + window]:
                value = loss(network(batch["image"]), batch["label"])
                values.append(value.item())
                total = [t + g / window for t, g in zip(total, torch.autograd.grad(value, weights), strict=True)]
            with torch.no_grad():
                for weight, gradient in zip(weights, total, strict=True):
                    weight -= rate * gradient
        means.append(sum(values) / len(values))
    return [w.detach() for w in weights], means


def test_two_accumulated_steps_of_one_case_equal_one_step_of_two(
    tiny_bundle: Callable[..., ConfigParser], tmp_path: Path
) -> None:
    pairs = learnt(tiny_bundle(tmp_path / "pairs", batch_size=2, **RECIPE))
    singles = learnt(tiny_bundle(tmp_path / "singles", batch_size=1, accumulation=2, **RECIPE))
    assert same(pairs, singles)
    each = learnt(tiny_bundle(tmp_path / "each", batch_size=1, **RECIPE))
    assert not same(pairs, each)  # the tolerance sees it


def test_an_epoch_ends_with_a_step_of_the_remaining_gradients_and_every_batch_is_recorded(
    tiny_bundle: Callable[..., ConfigParser], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Bar] = []
    monkeypatch.setattr(handlers, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    options = {**RECIPE, "batch_size": 1, "accumulation": 3}
    parser = tiny_bundle(tmp_path, **options)
    trainer = parser.get_parsed_content("train#trainer")
    weights = learnt(parser)
    expected, losses = by_hand(tiny_bundle(tmp_path, **options), window=3)
    assert same(weights, expected)
    assert not same(weights, by_hand(tiny_bundle(tmp_path, **options), window=1)[0])
    assert (trainer.state.iteration, trainer.state.epoch_length) == (EPOCHS * CASES, CASES)
    rows = read_curves(tmp_path / "curves.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)  # of whole batches, not of their thirds
    assert [row["learning_rate"] for row in rows] == pytest.approx([RATE, RATE * 0.5**0.9])  # per epoch
    assert [(bar.total, bar.done) for bar in bars] == [(EPOCHS, EPOCHS)]


def trainer_of(images: list[list[float]], window: int, *attached: Any, epochs: int = 1, scaled: bool = False) -> Any:
    """A trainer of a linear map without bias from 0, by gradient descent of rate 1, whose gradients are the images."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[{"image": torch.tensor([image]), "label": torch.zeros(1, 1)} for image in images],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda prediction, label: (prediction - label).sum(),
        decollate=False,
        accumulation_steps=window,
        train_handlers=[*([GradientScaling("cpu")] if scaled else []), *attached],
        amp=scaled,
        amp_kwargs={"enabled": False},
    )


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_a_step_is_complete_where_the_optimizer_steps(window: int) -> None:
    trainer = trainer_of([[1.0, 0.0]] * 5, window, epochs=2)
    stepped, complete = [], []
    trainer.optimizer.register_step_post_hook(lambda *_: stepped.append(trainer.state.iteration))

    def note(engine: Engine) -> None:
        complete.extend([engine.state.iteration] if completes_step(engine) else [])

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    assert complete == stepped
    assert stepped[-1] == 10


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "float16"])
def test_accumulated_gradients_are_clipped_once_as_a_sum(scaled: bool) -> None:
    trainer = trainer_of([[3.0, 0.0], [0.0, 4.0], [0.6, 0.8]], 2, GradientClipping(1.25), scaled=scaled)
    trainer.run()
    # (3, 4) / 2 has the norm 2.5 and is halved; the last step is of (0.6, 0.8) / 2 alone, which is short enough.
    expected = torch.tensor([0.75 + 0.3, 1.0 + 0.4])
    torch.testing.assert_close(-trainer.network.weight.detach()[0], expected, rtol=1e-5, atol=0)


def test_the_average_of_the_weights_counts_steps_of_the_optimizer_and_not_iterations(tmp_path: Path) -> None:
    trainer = trainer_of([[2.0, 0.0]] * 4, 2)
    average = AveragedModel(trainer.network, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    files = str(tmp_path / "checkpoint.pt"), str(tmp_path / "model.pt")
    TrainingCheckpoint(*files, {"model": trainer.network}, average=average).attach(trainer)
    trainer.run()
    # The weight is -2 after the first step, with which the average begins, and -4 after the second.
    saved = torch.load(tmp_path / "model.pt", weights_only=True)["weight"]
    torch.testing.assert_close(saved, torch.tensor([[0.75 * -2.0 + 0.25 * -4.0, 0.0]]))


def test_the_average_of_the_weights_does_not_count_a_skipped_step(tmp_path: Path) -> None:
    trainer = trainer_of([[2.0, 0.0], [float("nan"), 0.0], [2.0, 0.0]], 1, FiniteSteps())
    average = AveragedModel(trainer.network, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    files = str(tmp_path / "checkpoint.pt"), str(tmp_path / "model.pt")
    TrainingCheckpoint(*files, {"model": trainer.network}, average=average).attach(trainer)
    trainer.run()
    assert int(average.n_averaged) == 2
    saved = torch.load(tmp_path / "model.pt", weights_only=True)["weight"]
    torch.testing.assert_close(saved, torch.tensor([[0.75 * -2.0 + 0.25 * -4.0, 0.0]]))
