# SPDX-License-Identifier: Apache-2.0
"""Teachers' weights compared with a calculation by hand and with NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.distillation.teacher_weighting import MODES, available_teachers, teacher_weights

ALL = torch.ones(2, 3, dtype=torch.bool)


def answers(k: int = 3, classes: int = 2, batch: int = 2, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(batch, classes, 2, 3, 2, generator=generator) for _ in range(k)]
    return logits, torch.randint(0, max(classes, 2), (batch, 1, 2, 3, 2), generator=generator)


def probabilities(logits: Tensor) -> np.ndarray:
    z = logits.double().numpy()
    if z.shape[1] == 1:
        z = np.concatenate([np.zeros_like(z), z], axis=1)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropies(logits: list[Tensor], label: Tensor) -> np.ndarray:
    """B x K: minus the mean over voxels of log p of the labelled class."""
    chosen = [np.take_along_axis(probabilities(z), label.numpy(), axis=1) for z in logits]
    return np.stack([-np.log(p).reshape(len(p), -1).mean(axis=1) for p in chosen], axis=1)


def entropies(logits: list[Tensor]) -> np.ndarray:
    p = [probabilities(z) for z in logits]
    return np.stack([-(x * np.log(x)).sum(axis=1).reshape(len(x), -1).mean(axis=1) for x in p], axis=1)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def constant(*probability: float) -> list[Tensor]:
    """One teacher per argument, which gives the first of two classes that probability everywhere."""
    odds = [torch.tensor([math.log(p / (1 - p)), 0.0]).view(1, 2, 1, 1, 1) for p in probability]
    return [z.expand(1, 2, 2, 2, 2) for z in odds]


def test_mean_gives_every_teacher_the_same():
    np.testing.assert_allclose(teacher_weights("mean", answers()[0], ALL).numpy(), np.full((2, 3), 1 / 3), atol=1e-7)


def test_static_weights_are_normalised_to_sum_one():
    weights = teacher_weights("static", answers()[0], ALL, static=[1, 2, 5])
    np.testing.assert_allclose(weights.numpy(), [[0.125, 0.25, 0.625]] * 2, atol=1e-7)


def test_confidence_of_one_of_two_teachers_is_the_others_share_of_the_softmax():
    # CE = -log p, so softmax(CE)_k = (1 / p_k) / sum(1 / p): with p = 0.8 and 0.2 it is 0.2 and 0.8.
    label = torch.zeros(1, 1, 2, 2, 2, dtype=torch.long)
    weights = teacher_weights("confidence", constant(0.8, 0.2), torch.ones(1, 2, dtype=torch.bool), label)
    np.testing.assert_allclose(weights.numpy(), [[0.8, 0.2]], atol=1e-6)


def test_entropy_gives_the_more_certain_teacher_more_weight():
    # A coin toss has the entropy log 2; 0.9 has -0.9 log 0.9 - 0.1 log 0.1.
    sure = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    expected = math.exp(-sure) / (math.exp(-sure) + 0.5)
    weights = teacher_weights("entropy", constant(0.9, 0.5), torch.ones(1, 2, dtype=torch.bool))
    np.testing.assert_allclose(weights.numpy(), [[expected, 1 - expected]], atol=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_confidence_agrees_with_numpy_per_sample(classes):
    logits, label = answers(classes=classes)
    expected = (1 - softmax(cross_entropies(logits, label))) / 2
    np.testing.assert_allclose(teacher_weights("confidence", logits, ALL, label).numpy(), expected, atol=1e-6)
    assert not np.allclose(expected[0], expected[1])


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_entropy_agrees_with_numpy_per_sample(classes):
    logits, _ = answers(classes=classes)
    expected = softmax(-entropies(logits))
    np.testing.assert_allclose(teacher_weights("entropy", logits, ALL).numpy(), expected, atol=1e-6)


def test_two_dimensional_images_are_weighted_the_same_way():
    logits, label = answers()
    flat = [z[..., 0] for z in logits]
    expected = (1 - softmax(cross_entropies(flat, label[..., 0]))) / 2
    weights = teacher_weights("confidence", flat, ALL, label[..., 0])
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)


def test_absent_teachers_get_zero_and_the_rest_renormalises():
    logits, label = answers()
    available = torch.tensor([[True, False, True], [False, True, True]])
    kept = [[0, 2], [1, 2]]
    ce, entropy = cross_entropies(logits, label), entropies(logits)
    expected = {mode: np.zeros((2, 3)) for mode in MODES}
    for sample, columns in enumerate(kept):
        expected["mean"][sample, columns] = 0.5
        expected["static"][sample, columns] = np.array([1, 2, 5])[columns] / np.array([1, 2, 5])[columns].sum()
        expected["confidence"][sample, columns] = 1 - softmax(ce[sample, columns])  # K - 1 = 1
        expected["entropy"][sample, columns] = softmax(-entropy[sample, columns])
    for mode in MODES:
        weights = teacher_weights(mode, logits, available, label, [1, 2, 5])
        np.testing.assert_allclose(weights.numpy(), expected[mode], atol=1e-6, err_msg=mode)


@pytest.mark.parametrize("mode", MODES)
def test_rows_sum_to_one_and_no_weight_is_negative(mode):
    logits, label = answers(k=4, batch=5, seed=3)
    available = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]]).bool()
    weights = teacher_weights(mode, logits, available, label, [1, 2, 3, 4])
    assert weights.shape == (5, 4)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    assert (weights[~available] == 0).all()
    np.testing.assert_allclose(weights.sum(dim=1).numpy(), np.ones(5), atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_teacher_gets_one(mode):
    logits, label = answers(k=1)
    weights = teacher_weights(mode, logits, torch.ones(2, 1, dtype=torch.bool), label, [0.3])
    np.testing.assert_allclose(weights.numpy(), [[1.0], [1.0]], atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_the_only_available_teacher_gets_one(mode):
    logits, label = answers()
    available = torch.tensor([[False, True, False], [True, True, True]])
    weights = teacher_weights(mode, logits, available, label, [1, 2, 5])
    np.testing.assert_allclose(weights[0].numpy(), [0.0, 1.0, 0.0], atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_no_available_teacher_gives_a_row_of_zeros(mode):
    logits, label = answers()
    available = torch.tensor([[False] * 3, [True] * 3])
    weights = teacher_weights(mode, logits, available, label, [1, 2, 5])
    assert weights[0].tolist() == [0.0, 0.0, 0.0]
    assert weights[1].sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_logits_of_an_unavailable_teacher_have_no_influence(mode):
    logits, label = answers()
    available = torch.tensor([[True, False, True]] * 2)
    clean = teacher_weights(mode, logits, available, label, [1, 2, 5])
    spoilt = [logits[0], torch.full_like(logits[1], float("nan")), logits[2]]
    assert torch.equal(teacher_weights(mode, spoilt, available, label, [1, 2, 5]), clean)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_flows_into_the_weights(mode):
    logits, label = answers()
    weights = teacher_weights(mode, [z.requires_grad_() for z in logits], ALL, label, [1, 2, 5])
    assert not weights.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_logits_are_computed_in_float32(dtype):
    logits, label = answers()
    halves = [z.to(dtype) for z in logits]
    expected = (1 - softmax(cross_entropies(halves, label))) / 2
    weights = teacher_weights("confidence", halves, ALL, label)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)


def test_a_teacher_is_available_where_all_of_its_modalities_are():
    presence = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    available = available_teachers(presence, [[0], [1], [0, 2], [2, 1, 0]])
    assert available.tolist() == [[True, True, True, True], [True, False, True, False], [False] * 4]
    assert available.dtype == torch.bool


def test_an_unknown_mode_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'median': choose one of mean, static, confidence, entropy"):
        teacher_weights("median", answers()[0], ALL)


@pytest.mark.parametrize("static", [None, [1.0, 2.0], [1.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
def test_static_weights_that_do_not_fit_are_refused(static):
    with pytest.raises(ValueError, match="static weighting needs 3 weights >= 0"):
        teacher_weights("static", answers()[0], ALL, static=static)


def test_confidence_without_a_label_is_refused():
    with pytest.raises(ValueError, match="confidence weighting needs the label"):
        teacher_weights("confidence", answers()[0], ALL)
