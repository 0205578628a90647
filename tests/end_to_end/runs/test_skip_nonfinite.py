# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss or gradient is NaN or infinite change nothing, name their cases, and the third stops the run."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.engines
import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from scripts.cli.main import main
from scripts.losses import SegmentationLoss
from scripts.training.mixed_precision import GradientScaling
from scripts.training.skip_nonfinite import FiniteSteps

BAD = "PHANTOM_002"
RATE = 0.1


class Trap:
    """A loss that is NaN for one case of MONAI's batches; it records the batches."""

    def __init__(self, patch: pytest.MonkeyPatch, most: int = 99) -> None:
        self.batches: list[list[str]] = []
        self.bad: list[list[str]] = []
        self.most = most
        prepare, forward = monai.engines.default_prepare_batch, SegmentationLoss.forward

        def noting(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.batches.append(list(batch["case_id"]))
            return prepare(batch, *args, **kwargs)

        def trapped(loss: Any, *args: Any) -> Tensor:
            value = forward(loss, *args)
            if BAD in self.batches[-1] and len(self.bad) < self.most:
                self.bad.append(self.batches[-1])
                return value * math.nan
            return value

        patch.setattr(monai.engines, "default_prepare_batch", noting)
        patch.setattr(SegmentationLoss, "forward", trapped)


@pytest.fixture
def train(tiny: list[str], cohort: Path) -> Callable[..., list[str]]:
    """The command line of a training of five epochs, two steps each."""

    def arguments(output: Path, *more: str) -> list[str]:
        line = ["train", *tiny, "--dataset-dir", cohort, "--output-dir", output, "--epochs", 5, *more]
        return [*map(str, line), "--set", "spacing=[12,12,12]", "--set", "val_interval=100", "--set", "save_interval=1"]

    return arguments


def finite(path: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in torch.load(path, weights_only=True).values())


def test_the_third_nonfinite_step_stops_the_run_and_the_checkpoint_is_finite(
    train: Any, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = Trap(monkeypatch)
    error = refused(*train(tmp_path))
    names = list(dict.fromkeys(name for batch in trap.bad for name in batch))
    assert len(trap.bad) == 3
    assert BAD in names
    assert f"Loss or gradient was NaN or infinite in 3 training steps (cases: {', '.join(names)}): check these" in error
    assert error.endswith("lower the learning rate. The last checkpoint is not affected.")
    assert not (tmp_path / "model.pt").exists()
    epochs = len(trap.batches) // 2  # of two steps each: the last one was not finished, or not saved
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["trainer"]["iteration"] // 2 in (epochs - 1, epochs)
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_run_that_stops_before_its_first_checkpoint_does_not_mention_one(
    train: Any, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SegmentationLoss.forward
    monkeypatch.setattr(SegmentationLoss, "forward", lambda *arguments: forward(*arguments) * math.nan)
    error = refused(*train(tmp_path), "--set", "save_interval=5")
    assert not (tmp_path / "checkpoint.pt").exists()
    assert error.endswith("check these images and labels, and lower the learning rate.")


def test_two_nonfinite_steps_are_skipped_with_a_warning_and_the_training_continues(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trap = Trap(monkeypatch, most=2)
    assert main(train(tmp_path)) == 0
    assert len(trap.batches) == 10
    assert finite(tmp_path / "model.pt")
    warnings = [line for line in caplog.text.splitlines() if "skipped a training step" in line]
    assert [line.rsplit(": ", 1)[1].rstrip(")") for line in warnings] == [", ".join(batch) for batch in trap.bad]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_nonfinite_step_changes_no_bit_of_weights_and_optimizer(
    precision: str, tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = Trap(monkeypatch, most=1)
    parser = tiny_bundle(tmp_path, precision=precision, max_epochs=2)
    trainer = parser.get_parsed_content("train#trainer")
    states = [_state(trainer)]
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: states.append(_state(engine)))
    parser.get_parsed_content("run")
    changed = [not _same(a, b) for a, b in itertools.pairwise(states)]
    first = next(index for index, batch in enumerate(trap.batches) if BAD in batch)
    assert changed == [index != first for index in range(4)]
    assert finite(tmp_path / "model.pt")


def _state(trainer: Any) -> list[Tensor]:
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in [*trainer.network.state_dict().values(), *moments]]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Small:
    """A trainer of one convolution, and a batch normalisation in front where asked; one step of the third is bad.

    ``how``: ``loss`` NaN, ``infinite`` loss, or a ``gradient`` that is NaN behind a loss that is not, or an ``image``
    of NaN, which reaches the running mean of the normalisation.
    """

    def __init__(
        self, how: str, bad: int = 3, accumulation: int = 1, scaler: bool = False, norm: bool = True, steps: int = 4
    ) -> None:
        torch.manual_seed(0)
        layers = [nn.BatchNorm3d(1)] if norm else []
        network = nn.Sequential(*layers, nn.Conv3d(1, 1, 1))
        data = [
            {"image": torch.randn(1, 1, 3, 3, 3), "label": torch.randn(1, 1, 3, 3, 3), "case_id": [f"case {i}"]}
            for i in range(1, steps + 1)
        ]
        if how == "image":
            data[bad - 1]["image"][0, 0, 0, 0, 0] = math.nan
        factor = {"loss": math.nan, "infinite": math.inf}.get(how, 1.0)
        self.trainer: Any = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=1, train_data_loader=data, network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=RATE), decollate=False,
            loss_function=lambda pred, label: nn.functional.mse_loss(pred, label)
            * (factor if self.trainer.state.iteration == bad else 1.0),
            train_handlers=[FiniteSteps(), *([GradientScaling("cpu", initial=2.0)] if scaler else [])],
            accumulation_steps=accumulation, amp=scaler, amp_kwargs={"enabled": False},
        )  # fmt: skip
        if how == "gradient":
            handlers = self.trainer._event_handlers[IterationEvents.BACKWARD_COMPLETED]
            self.trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._spoil, bad)
            handlers.insert(0, handlers.pop())  # before the handler checks the step
        self.states = [_state(self.trainer)]
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda each: self.states.append(_state(each)))
        self.data = data

    @staticmethod
    def _spoil(engine: Any, bad: int) -> None:
        if engine.state.iteration == bad:
            next(engine.network.parameters()).grad.fill_(math.nan)

    def changed(self) -> list[bool]:
        """Of each step, whether it changed anything: weights or buffers."""
        self.trainer.run()
        return [not _same(a, b) for a, b in itertools.pairwise(self.states)]


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("how", ["loss", "infinite", "image", "gradient"])
def test_a_nonfinite_step_changes_nothing_not_even_a_running_mean(how: str, scaler: bool) -> None:
    small = Small(how, scaler=scaler, norm=how != "gradient")
    assert small.changed() == [True, True, False, True]
    assert all(bool(value.isfinite().all()) for value in small.states[-1])


def test_an_overflow_that_the_scaler_skips_is_not_counted() -> None:
    small = Small("gradient", scaler=True, norm=False)
    with_handler = small.trainer._event_handlers[IterationEvents.BACKWARD_COMPLETED]
    handler = next(each[0] for each in with_handler if isinstance(each[0], FiniteSteps))
    small.trainer.run()
    assert handler.steps == 0
    assert small.trainer.scaler.get_scale() == 1.0  # half of 2


@pytest.mark.parametrize(("bad", "kept"), [(1, [2]), (2, [])])
def test_gradients_accumulated_before_a_nonfinite_step_are_dropped_and_later_ones_count(
    bad: int, kept: list[int]
) -> None:
    small = Small("loss", bad=bad, accumulation=2, norm=False, steps=2)
    small.trainer.run()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 1, 1))
    weights = list(network.parameters())
    for step in kept:
        batch = small.data[step - 1]
        loss = nn.functional.mse_loss(network(batch["image"]), batch["label"]) / 2
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= RATE * gradient
    for state, expected in zip(small.states[-1], weights, strict=True):
        torch.testing.assert_close(state, expected.detach())


def test_a_scaler_skips_everything_accumulated_with_a_nonfinite_step() -> None:
    small = Small("loss", bad=1, accumulation=2, scaler=True, norm=False)
    assert small.changed() == [False, False, False, True]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_last_allowed_step_raises_before_the_optimizer_steps(most: int, caplog: pytest.LogCaptureFixture) -> None:
    small = Small("loss", norm=False)
    small.trainer.loss_function = lambda pred, label: nn.functional.mse_loss(pred, label) * math.nan
    (handler,) = [
        each[0]
        for each in small.trainer._event_handlers[IterationEvents.BACKWARD_COMPLETED]
        if isinstance(each[0], FiniteSteps)
    ]
    handler.most = most
    names = ", ".join(f"case {i}" for i in range(1, most + 1))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match=rf"in {most} training steps \(cases: {names}\): "),
    ):
        small.trainer.run()
    assert caplog.text.count("skipped a training step") == most
    assert _same(small.states[0], _state(small.trainer))


def test_batches_without_case_ids_are_counted_as_well() -> None:
    small = Small("loss", norm=False)
    for batch in small.data:
        del batch["case_id"]
    small.trainer.loss_function = lambda pred, label: pred.sum() * math.nan
    with pytest.raises(ValueError, match=r"in 3 training steps \(cases: unnamed\): check"):
        small.trainer.run()
