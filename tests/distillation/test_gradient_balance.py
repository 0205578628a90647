# SPDX-License-Identifier: Apache-2.0
"""Weights from gradients, on networks whose gradients are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from scripts.distillation.distiller import Distiller
from scripts.distillation.gradient_balance import gradient_norms, shared_weights
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


def total(logits: Tensor, label: Tensor) -> Tensor:
    """A gradient of (3 mean(x_0), 4 mean(x_1)) to the two factors."""
    return 3 * logits[:, 0].mean() + 4 * logits[:, 1].mean()


def test_norms_of_the_students_gradients_are_averaged_over_batches() -> None:
    distiller = Distiller(Scale((1.0, 1.0)), {"one": Scale((0.0, 0.0))})
    terms = {
        name: {"tap": "logits", "weight": 9.0, "loss": loss} for name, loss in (("a", FirstChannel()), ("b", Silent()))
    }
    loss = DistillationLoss(total, distiller, terms)
    images = [torch.ones(1, 2, 2, 2, 2), 3 * torch.ones(1, 2, 2, 2, 2)]
    norms = gradient_norms(distiller, loss, ((image, torch.zeros(1, 1, 2, 2, 2), {}) for image in images))
    assert norms == pytest.approx({"segmentation": (5 + 15) / 2, "a": (1 + 3) / 2, "b": 0.0})
    assert all(p.grad is None for p in distiller.parameters())


def test_the_share_is_divided_among_the_terms_that_have_a_gradient(caplog: pytest.LogCaptureFixture) -> None:
    weights = shared_weights({"segmentation": 2.0, "a": 0.5, "b": 8.0, "c": 0.0, "d": 1e-4}, share=1.0)
    assert weights == {"a": 2.0, "b": 0.125, "c": 0.0, "d": 0.0}
    assert "negligible gradient get weight 0: c, d" in caplog.text
    assert math.isclose(sum(w * n for w, n in ((2.0, 0.5), (0.125, 8.0))), 2.0)


def test_terms_that_all_have_no_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="terms a, b give the student no gradient"):
        shared_weights({"segmentation": 2.0, "a": 0.0, "b": 0.0}, share=1.0)
