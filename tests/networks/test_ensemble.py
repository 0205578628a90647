# SPDX-License-Identifier: Apache-2.0
"""An ensemble answers with the mean probability of its members."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scripts.networks import Ensemble


class Constant(nn.Module):
    """Logits that do not depend on the image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits.view(1, -1, 1, 1, 1).expand(len(image), -1, *image.shape[2:])


IMAGE = torch.zeros(2, 1, 2, 3, 4)


def test_the_softmax_of_the_result_is_the_mean_softmax_of_the_members() -> None:
    """Members with probabilities (0.9, 0.1) and (0.5, 0.5): the mean is (0.7, 0.3)."""
    first = Constant([2.0, 2.0 - float(torch.log(torch.tensor(9.0)))])
    logits = Ensemble([first, Constant([7.0, 7.0])])(IMAGE)
    assert logits.shape == (2, 2, 2, 3, 4)
    torch.testing.assert_close(logits.softmax(1)[0, :, 0, 0, 0], torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(2, 2, 3, 4))  # the logarithm of a probability


def test_a_sigmoid_head_is_averaged_as_a_probability() -> None:
    logits = Ensemble([Constant([0.0]), Constant([float(torch.logit(torch.tensor(0.9)))])])(IMAGE)
    torch.testing.assert_close(logits.sigmoid()[0, 0, 0, 0, 0], torch.tensor(0.7))


def test_one_member_answers_with_its_own_probabilities() -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(1, 3, 1)
    image = torch.randn(1, 1, 4, 4, 4)
    torch.testing.assert_close(Ensemble([network])(image).softmax(1), network(image).softmax(1))


def test_an_ensemble_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one network"):
        Ensemble([])
