# SPDX-License-Identifier: Apache-2.0
"""Weights from gradients, on networks whose gradients are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts.distillation.distiller import Distiller
from scripts.distillation.gradient_balance import GradientBalance, gradient_norms, shared_weights
from scripts.distillation.loss import DistillationLoss


class Scale(nn.Module):
    """Logits: the image's channels, each times its own factor."""

    def __init__(self, factors: tuple[float, float]) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors))
        self.network, self.channels = nn.Identity(), [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.view(1, 2, 1, 1, 1)


class FirstChannel(nn.Module):
    """Mean difference in the first channel: a gradient of mean(x_0) to the first factor."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student[:, 0] - teacher.detach()[:, 0]).mean()


class Silent(nn.Module):
    """Always 0."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student * 0).sum()


class Total(nn.Module):
    """A gradient of ``factor`` times (3 mean(x_0), 4 mean(x_1)) to the two factors of the student."""

    factor = 1.0

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        return self.factor * (3 * logits[:, 0].mean() + 4 * logits[:, 1].mean())


LABEL = torch.zeros(1, 1, 2, 2, 2)


class Trainer:
    """A trainer's part that the handler needs: a distillation of one term that acts and one that does not."""

    def __init__(self, share: float = 1.0, epochs: int = 10, steps: int = 20) -> None:
        self.distiller = Distiller(Scale((1.0, 1.0)), {"one": Scale((0.0, 0.0))})
        losses = {"a": FirstChannel(), "b": Silent()}
        terms = {name: {"tap": "logits", "weight": 9.0, "loss": loss} for name, loss in losses.items()}
        self.segmentation = Total()
        self.loss = DistillationLoss(self.segmentation, self.distiller, terms)
        self.balance = GradientBalance(self.distiller.student, self.loss, share)
        self.state = SimpleNamespace(max_epochs=epochs, epoch_length=steps, iteration=0, output={})
        self.scaler: Any = None

    def step(self, image: Tensor, iteration: int, factor: float = 1.0) -> dict[str, float]:
        """A step on an image, where the gradient of L_seg is ``factor`` times as large; returns the weights."""
        self.segmentation.factor = factor
        self.state.iteration = iteration
        self.state.output = {"pred": self.distiller.train()(image), "label": LABEL}
        self.balance(self)
        return dict(self.loss.weights)


IMAGE = torch.ones(1, 2, 2, 2, 2)


def test_the_norm_of_the_students_gradient_is_measured_without_a_change() -> None:
    trainer = Trainer()
    outputs = trainer.distiller.train()(3 * IMAGE)
    norms = gradient_norms(trainer.distiller.student, trainer.loss, outputs, LABEL)
    assert norms == pytest.approx({"segmentation": 15, "a": 3, "b": 0.0})
    assert all(p.grad is None for p in trainer.distiller.parameters())
    assert trainer.loss.training


def test_the_share_is_divided_among_the_terms_that_have_a_gradient() -> None:
    weights = shared_weights({"segmentation": 2.0, "a": 0.5, "b": 8.0, "c": 0.0, "d": 1e-4}, share=1.0)
    assert weights == {"a": 2.0, "b": 0.125, "c": 0.0, "d": 0.0}
    assert math.isclose(sum(w * n for w, n in ((2.0, 0.5), (0.125, 8.0))), 2.0)


def test_the_first_step_sets_the_weights_and_the_next_ones_average_the_norms() -> None:
    trainer = Trainer(share=2.0)
    assert trainer.step(IMAGE, 1) == {"a": 10.0, "b": 0.0}  # 2 * 5 / 1
    # Norms (5 + 5) / 2 of L_seg and (1 + 3) / 2 of the term.
    assert trainer.step(3 * IMAGE, 2, factor=1 / 3) == {"a": 5.0, "b": 0.0}


def test_a_step_between_measurements_changes_nothing() -> None:
    trainer = Trainer()
    trainer.step(IMAGE, 1)
    for iteration in (9, 20):  # after the 8 batches of the first measurement; a tenth has 20 steps
        assert trainer.step(IMAGE, iteration, factor=100) == {"a": 5.0, "b": 0.0}


@pytest.mark.parametrize(("factor", "weight"), [(0.01, 0.05), (0.5, 2.5), (2.0, 5.0)])
def test_the_second_measurement_takes_the_smaller_weight(factor: float, weight: float) -> None:
    trainer = Trainer()
    trainer.step(IMAGE, 1)
    assert trainer.step(IMAGE, 21, factor) == {"a": pytest.approx(weight), "b": 0.0}


@pytest.mark.parametrize(("factor", "weight"), [(0.01, 5 / 3), (0.5, 2.5), (2.0, 10.0), (100.0, 15.0)])
def test_later_measurements_change_a_weight_by_at_most_three_times(factor: float, weight: float) -> None:
    trainer = Trainer()
    trainer.step(IMAGE, 1)
    trainer.step(IMAGE, 21)
    for iteration in (41, 42):  # the limit is from the weight before the measurement, not from step to step
        assert trainer.step(IMAGE, iteration, factor)["a"] == pytest.approx(weight)


def test_a_term_that_was_negligible_takes_its_first_weight() -> None:
    trainer = Trainer()
    trainer.loss.losses["a"] = Silent()
    assert trainer.step(IMAGE, 1) == {"a": 0.0, "b": 0.0}
    trainer.loss.losses["a"] = FirstChannel()
    assert trainer.step(IMAGE, 21) == {"a": 5.0, "b": 0.0}
    trainer.loss.losses["a"] = Silent()
    assert trainer.step(IMAGE, 41) == {"a": 5.0, "b": 0.0}


def test_a_batch_without_finite_gradient_is_not_measured() -> None:
    trainer = Trainer()
    assert trainer.step(math.nan * IMAGE, 1) == {"a": 9.0, "b": 9.0}
    assert trainer.step(IMAGE, 2) == {"a": 5.0, "b": 0.0}


def test_a_resumed_training_continues_its_measurement() -> None:
    trainer, resumed = Trainer(), Trainer()
    for iteration in (1, 21, 41):
        trainer.step(IMAGE, iteration)
    resumed.balance.load_state_dict(trainer.balance.state_dict())
    assert resumed.loss.weights == trainer.loss.weights
    assert resumed.step(3 * IMAGE, 42, 7.0) == trainer.step(3 * IMAGE, 42, 7.0)


def test_the_weights_are_logged_with_the_losses() -> None:
    trainer = Trainer()
    trainer.step(IMAGE, 1)
    trainer.balance.log(trainer)
    assert trainer.loss.logged["balance/a"] == 5.0


def test_terms_that_all_have_no_gradient_are_refused() -> None:
    trainer = Trainer()
    trainer.loss.weights = {"a": 0.0, "b": 0.0}
    with pytest.raises(ValueError, match="terms a, b give the student no gradient"):
        trainer.balance.require_gradient(trainer)


def test_a_share_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="--balance must be positive, got 0"):
        Trainer(share=0)


def test_a_batch_without_labels_is_no_measurement() -> None:
    trainer = Trainer()
    assert trainer.step(IMAGE, 1, factor=0) == {"a": 9.0, "b": 9.0}  # those of the config
    assert trainer.step(IMAGE, 2) == {"a": 5.0, "b": 0.0}
