# SPDX-License-Identifier: Apache-2.0
"""TokenRankingLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.token_ranking import TokenRankingLoss

W2 = 1 / math.log2(3)
DESCENDING = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def importance(x: np.ndarray) -> np.ndarray:
    received = np.zeros((len(x), math.prod(x.shape[2:])))
    for b, sample in enumerate(x):
        tokens = sample.reshape(len(sample), -1).T
        tokens = (tokens - tokens.mean(1, keepdims=True)) / np.sqrt(tokens.var(1, keepdims=True) + 1e-5)
        for i, token in enumerate(tokens):
            attention = np.exp(tokens @ token / math.sqrt(len(token)))
            attention[i] = 0  # a token does not attend to itself
            received[b] += attention / attention.sum() / len(tokens)
    return received


def rank(student: np.ndarray, teacher: np.ndarray, top_k: float = 0.25, flat: float = 0.999) -> float:
    """Minus the discounted log-probability of drawing the teacher's top k without replacement."""
    values = []
    for student_importance, teacher_importance in zip(student, teacher, strict=True):
        p = teacher_importance / teacher_importance.sum()
        if -(p * np.log(p)).sum() / math.log(len(p)) > flat:
            continue
        remaining, total, weights = sorted(range(len(p)), key=lambda i: -p[i]), 0.0, 0.0
        for i in range(max(1, round(top_k * len(p)))):
            total += math.log(student_importance[remaining].sum() / student_importance[remaining[0]]) / math.log2(2 + i)
            weights += 1 / math.log2(2 + i)
            remaining.pop(0)
        values.append(total / weights)
    return float(np.mean(values)) if values else 0.0


@pytest.fixture(scope="session")
def reference(on_common_grid: Callable[..., list[np.ndarray]]) -> Callable[..., float]:
    """The docstring's formula in float64."""

    def compute(student: Tensor, teacher: Tensor, grid: int = 6, **options: Any) -> float:
        return rank(*(importance(m) for m in on_common_grid(student, teacher, grid)), **options)

    return compute


def test_four_tokens_give_the_closed_form():
    # The teacher's first token is drawn with probability 0.1, its second with probability 0.2 / 0.9.
    loss = TokenRankingLoss(top_k=0.5).ranking(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), DESCENDING)
    assert loss.item() == pytest.approx((math.log(10) + W2 * math.log(4.5)) / (1 + W2), abs=1e-6)


def test_three_tokens_of_two_directions_give_the_closed_form():
    # Layer norm makes the tokens +-(1, -1). The scores are +-sqrt(2), with exponentials e and f. Token 0 is the
    # teacher's first. The student's token 0 is the only one of its direction: both others score it -sqrt(2).
    e, f = math.exp(math.sqrt(2)), math.exp(-math.sqrt(2))
    base = 100 * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    teacher = base * torch.tensor([1.0, 1.0, -1.0])
    student = base * torch.tensor([1.0, -1.0, -1.0])
    expected = -math.log(2 * f / (e + f) / 3)
    assert TokenRankingLoss(1 / 3, flat=1.0)(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "grid"),
    [((4, 4), (4, 4), 3), ((7, 5), (3, 6), 4), ((3, 3, 3), (3, 3, 3), 6), ((5, 2, 4), (4, 6, 2), 3)],
)
@pytest.mark.parametrize("top_k", [0.25, 1.0])
def test_random_features_agree_with_numpy(normal, reference, student_grid, teacher_grid, grid, top_k):
    student, teacher = normal((3, 4, *student_grid), 0), normal((3, 5, *teacher_grid), 1)
    expected = reference(student, teacher, grid, top_k=top_k, flat=1.0)
    assert TokenRankingLoss(top_k, grid, 1.0)(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_the_defaults_are_top_k_0_25_and_grid_6(normal, reference):
    student, teacher = normal((2, 3, 8, 7), 0), normal((2, 4, 12, 12), 1)
    expected = reference(student, teacher)
    assert expected > 0
    assert TokenRankingLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_by_default_a_teacher_above_0_999_of_the_largest_entropy_is_flat():
    # Entropy of (p, 1 - p) in bits: 0.9994 at p = 0.515, 0.9988 at p = 0.52.
    loss = TokenRankingLoss(top_k=0.5)
    loss.ranking(torch.tensor([[0.9, 0.1]] * 2), torch.tensor([[0.515, 0.485], [0.52, 0.48]]))
    assert loss.logged["flat_teachers"] == 0.5


def test_on_the_default_grid_noise_is_flat_and_a_common_direction_is_not(normal):
    noise = normal((8, 64, 6, 6, 6), 0)
    ordered = noise.clone()
    ordered[:, :, :2] += 2 * normal((1, 64, 1, 1, 1), 1)
    loss = TokenRankingLoss()
    for features, flat in ((noise, 1.0), (ordered, 0.0)):
        loss(noise, features)
        assert loss.logged["flat_teachers"] == flat


def test_a_tokens_score_with_itself_plays_no_part(normal):
    # With 512 channels a token's own score is sqrt(512) = 22.6, and those with others are at most a few: a softmax
    # with the diagonal gives every token the importance 1 / N.
    features = normal((1, 512, 3, 3, 3), 0)
    features[:, :, 0] += normal((1, 512, 1, 1), 1)
    received = TokenRankingLoss.importance(features)[0].view(3, 9)
    assert received[0].min() > 1.5 * received[1:].max()


def test_a_single_token_has_the_importance_1():
    features = torch.ones(2, 3, 1, 1, 1, requires_grad=True)
    assert TokenRankingLoss.importance(features).tolist() == [[1.0], [1.0]]


def test_importance_sums_to_one(normal, pooled):
    features = normal((2, 3, 3, 4, 2), 0)
    received = TokenRankingLoss.importance(features)
    assert received.shape == (2, 24)
    np.testing.assert_allclose(received.numpy(), importance(pooled(features.double().numpy(), [3, 4, 2])), atol=1e-6)
    np.testing.assert_allclose(received.sum(1).numpy(), 1.0, atol=1e-6)


def test_the_teachers_order_gives_the_lowest_value_of_all_orders():
    loss = TokenRankingLoss(top_k=0.5)
    best = loss.ranking(DESCENDING, DESCENDING).item()
    for order in permutations(range(4)):
        value = loss.ranking(DESCENDING[:, list(order)], DESCENDING).item()
        # The order of the tokens after the top k does not matter.
        assert value == pytest.approx(best, abs=1e-6) if order[:2] == (0, 1) else value > best + 0.01


def test_at_agreement_the_value_is_not_0_and_the_gradient_does_not_vanish():
    log_importance = DESCENDING.log().requires_grad_()
    loss = TokenRankingLoss(top_k=0.5).ranking(log_importance.exp(), DESCENDING)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(1 / 0.4) + W2 * math.log(2)) / (1 + W2), abs=1e-6)
    assert log_importance.grad[0, 0].item() == pytest.approx(-0.6 / (1 + W2), abs=1e-6)


@pytest.mark.parametrize("ratio", [10.0, 100.0, 1000.0])
def test_value_and_gradient_vanish_as_the_importances_separate_in_the_teachers_order(ratio):
    # Relative to the first remaining token, the sum of all others is at most 1 / ratio + 1 / ratio^2 + ...
    log_importance = (-math.log(ratio) * torch.arange(4.0)).view(1, 4).requires_grad_()
    loss = TokenRankingLoss(top_k=0.75).ranking(log_importance.exp(), DESCENDING)
    loss.backward()
    assert 0 < loss.item() <= math.log(ratio / (ratio - 1)) + 1e-6
    assert 0 < log_importance.grad.abs().sum().item() <= 2 / (ratio - 1)


@pytest.mark.parametrize("top_k", [0.25, 0.5, 1.0])
def test_the_gradient_is_the_sum_over_successive_draws(normal, top_k):
    # d/ds_m of the i-th draw: the probability of token m, minus 1 if m is the teacher's i-th token.
    log_importance, teacher = normal((1, 8), 0).requires_grad_(), normal((1, 8), 1).exp()
    TokenRankingLoss(top_k).ranking(log_importance.exp(), teacher).backward()
    order = np.argsort(-teacher[0].double().numpy())
    student, gradient, weights = np.exp(log_importance[0].detach().double().numpy()), np.zeros(8), 0.0
    for i in range(round(top_k * 8)):
        remaining, w = order[i:], 1 / math.log2(2 + i)
        gradient[remaining] += w * student[remaining] / student[remaining].sum()
        gradient[order[i]] -= w
        weights += w
    np.testing.assert_allclose(log_importance.grad[0].numpy(), gradient / weights, atol=1e-6)


def test_the_gradient_through_the_features_agrees_with_finite_differences(normal, reference, numerical_gradient):
    student, teacher = normal((1, 3, 2, 3), 0).requires_grad_(), normal((1, 3, 2, 3), 1)
    TokenRankingLoss(0.5, flat=1.0)(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher, top_k=0.5, flat=1.0), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


def test_a_teacher_above_the_flatness_threshold_is_skipped():
    # Entropy of (p, 1 - p) in bits: 0.9954 at p = 0.54, 0.9941 at p = 0.545.
    student = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).requires_grad_()
    loss = TokenRankingLoss(top_k=0.5, flat=0.995)
    value = loss.ranking(student, torch.tensor([[0.54, 0.46], [0.545, 0.455]]))
    value.backward()
    assert value.item() == pytest.approx(-math.log(0.2), abs=1e-6)
    assert loss.logged["flat_teachers"] == 0.5
    assert student.grad[0].tolist() == [0.0, 0.0]
    assert student.grad[1].abs().sum() > 0


def test_only_flat_teachers_give_0_and_a_zero_gradient(normal):
    student, loss = normal((2, 3, 3, 3, 3), 0).requires_grad_(), TokenRankingLoss()
    value = loss(student, torch.ones(2, 5, 3, 3, 3))
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().sum() == 0.0
    assert loss.logged == {"top_k_overlap": 0.0, "flat_teachers": 1.0}


def test_a_constant_student_draws_all_remaining_tokens_with_equal_probability(normal):
    student = torch.full((1, 3, 4, 4), 2.0, requires_grad=True)
    teacher, weights = 3 * normal((1, 2, 4, 4), 1), [1 / math.log2(2 + i) for i in range(4)]
    value = TokenRankingLoss(flat=1.0)(student, teacher)
    value.backward()
    expected = sum(w * math.log(16 - i) for i, w in enumerate(weights)) / sum(weights)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(student.grad).all()


def test_an_importance_of_0_gives_a_finite_value_and_gradient():
    student = torch.tensor([[0.0, 0.0, 1.0, 0.0]], requires_grad=True)
    value = TokenRankingLoss(top_k=0.5).ranking(student, DESCENDING)
    value.backward()
    assert value.item() == pytest.approx(math.log(1e12), rel=1e-6)
    assert torch.isfinite(student.grad).all()


def test_the_logged_overlap_is_the_mean_over_the_samples_that_are_not_skipped():
    teacher = torch.cat([DESCENDING, DESCENDING, torch.full((1, 4), 0.25)])
    student = torch.tensor([[0.2, 0.4, 0.3, 0.1], [0.3, 0.4, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
    loss = TokenRankingLoss(top_k=0.5)
    loss.ranking(student.requires_grad_(), teacher)
    assert loss.logged == pytest.approx({"top_k_overlap": 0.75, "flat_teachers": 1 / 3})
    assert all(type(value) is float for value in loss.logged.values())


def test_at_least_one_token_is_ranked():
    value = TokenRankingLoss(top_k=0.01).ranking(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), DESCENDING)
    assert value.item() == pytest.approx(math.log(10), abs=1e-6)


def test_only_importance_ratios_and_the_teachers_order_count(normal):
    student = normal((1, 8), 0).exp()
    teacher, loss = normal((1, 8), 1).exp(), TokenRankingLoss()
    expected = loss.ranking(student, teacher).item()
    assert loss.ranking(100 * student, teacher.square() / 7).item() == pytest.approx(expected, abs=1e-6)


def test_the_order_of_channels_and_cells_does_not_change_the_value(normal):
    student, teacher = normal((2, 4, 3, 4), 0), normal((2, 4, 3, 4), 1)
    loss = TokenRankingLoss(flat=1.0)
    moved = loss(student[:, [2, 0, 3, 1]].flip(2), teacher[:, [1, 3, 2, 0]].flip(2))
    assert moved.item() == pytest.approx(loss(student, teacher).item(), abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (2, 3, 3, 3, 3)])
def test_repeating_every_voxel_does_not_change_the_value(normal, shape):
    student, teacher, loss = normal(shape, 0), normal(shape, 1), TokenRankingLoss(grid=3, flat=1.0)
    fine = [torch.kron(x, torch.ones([1, 1, *[2] * (len(shape) - 2)])) for x in (student, teacher)]
    assert loss(*fine).item() == pytest.approx(loss(student, teacher).item(), abs=1e-6)


@pytest.mark.parametrize("shapes", [((2, 5), (2, 6)), ((2, 3, 4), (2, 3, 4))])
def test_importances_of_other_shapes_are_refused_with_both_shapes(shapes):
    with pytest.raises(ValueError, match="must") as error:
        TokenRankingLoss().ranking(*(torch.ones(s) for s in shapes))
    assert all(str(s) in str(error.value) for s in shapes)


@pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("top_k", 1.5), ("grid", 0), ("flat", 0), ("flat", 1.1)])
def test_the_error_names_the_invalid_option(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .* got {value}"):
        TokenRankingLoss(**{name: value})
