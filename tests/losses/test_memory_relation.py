# SPDX-License-Identifier: Apache-2.0
"""MemoryRelationLoss against a float64 NumPy computation, and what its memory keeps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses import MemoryRelationLoss

SHAPE = (2, 4, 2, 3, 2)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cells(features: Tensor) -> np.ndarray:
    """Unit features of every image, B N C in float64."""
    return unit(features.detach().double().numpy().reshape(*features.shape[:2], -1).transpose(0, 2, 1))


def reference(student: Tensor, teacher: Tensor, memory: np.ndarray, temperature: float = 0.1) -> float:
    """Mean over all cells of the KL of the softmaxed cosines to the memory."""
    p, q = (np.exp(cells(x) @ memory.T / temperature) for x in (teacher, student))
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (p, q))
    return float((p * np.log(p / q)).sum(axis=-1).mean())


def label_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """A label of 2 x 3 x 2 voxels per image, in order."""
    return torch.tensor(rows).view(len(rows), 1, 2, 3, 2)


LABEL = label_of([[0] * 9 + [1] * 3, [0] * 12])


def region(teacher: Tensor, image: int, klass: int, label: Tensor = LABEL) -> np.ndarray:
    inside = label[image].flatten().numpy() == klass
    return unit(cells(teacher)[image][inside].mean(axis=0))


@pytest.fixture
def pair(normal: Any) -> tuple[Tensor, Tensor]:
    return normal(SHAPE, 0), normal(SHAPE, 1)


def test_the_first_step_compares_with_all_cells_of_the_batch(pair):
    memory = cells(pair[1]).reshape(-1, 4)
    assert MemoryRelationLoss()(*pair, LABEL).item() == pytest.approx(reference(*pair, memory), rel=1e-5)


def test_later_steps_compare_with_the_cells_of_earlier_batches_too(pair, normal):
    loss, earlier = MemoryRelationLoss(temperature=0.5), normal(SHAPE, 2)
    loss(normal(SHAPE, 3), earlier, LABEL)
    memory = np.concatenate([cells(earlier).reshape(-1, 4), cells(pair[1]).reshape(-1, 4)])
    assert loss(*pair, LABEL).item() == pytest.approx(reference(*pair, memory, 0.5), rel=1e-5)


@pytest.mark.parametrize(("kind", "kept"), [("pixel", 23), ("region", 1)])
def test_features_that_are_not_finite_are_not_kept(kind, kept, pair, normal):
    loss, broken = MemoryRelationLoss(kind), normal(SHAPE, 2)
    broken[0, 1, 0, 0, 0] = float("nan")  # the first cell of the first image
    assert loss(normal(SHAPE, 3), broken, LABEL * 0).isnan()  # FiniteSteps skips this step
    memory = loss.queues[""][0]
    assert len(memory) == kept
    expected = cells(broken).reshape(-1, 4)[1:] if kind == "pixel" else region(broken, 1, 0)[None]
    # From the second cell on, all of them; of the regions that of the second image.
    np.testing.assert_allclose(memory.numpy(), expected, atol=1e-6)
    loss.eval()
    assert loss(*pair, LABEL).item() == pytest.approx(reference(*pair, memory.double().numpy()), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["pixel", "region"])
def test_a_memory_without_a_finite_feature_compares_nothing(kind, pair):
    loss = MemoryRelationLoss(kind)
    loss(pair[0], pair[1] * float("inf"), LABEL)
    assert loss.eval()(*pair, LABEL).item() == 0


def test_a_region_is_the_mean_of_the_unit_features_of_a_class_in_an_image(pair):
    memory = np.stack([region(pair[1], 0, 0), region(pair[1], 1, 0), region(pair[1], 0, 1)])
    assert MemoryRelationLoss("region")(*pair, LABEL).item() == pytest.approx(reference(*pair, memory), rel=1e-5)


def test_a_cell_with_several_classes_counts_for_each_by_its_share(pair):
    # The label is twice as fine: the first cell has class 1 in two of its eight voxels, the second in all of them.
    label = torch.zeros(2, 1, 4, 6, 4)
    label[0, 0, 0, 0, 0:2] = 1
    label[0, 0, 0:2, 0:2, 2:4] = 1
    loss = MemoryRelationLoss("region")
    loss(*pair, label)
    features = cells(pair[1])[0]
    np.testing.assert_allclose(loss.queues[""][1][0], unit(0.25 * features[0] + features[1]), atol=1e-6)


def test_the_oldest_entries_leave_a_full_queue(pair, normal):
    loss, earlier = MemoryRelationLoss("region", size=3), normal(SHAPE, 2)
    loss(pair[0], earlier, LABEL)
    loss(*pair, LABEL)
    kept = np.stack([region(earlier, 1, 0), region(pair[1], 0, 0), region(pair[1], 1, 0)])
    np.testing.assert_allclose(loss.queues[""][0], kept, atol=1e-6)
    assert len(loss.queues[""][1]) == 2


def test_only_some_cells_of_a_class_are_kept_and_only_some_entries_drawn(pair):
    torch.manual_seed(0)
    loss = MemoryRelationLoss(cells=2, draws=2)
    loss(*pair, LABEL)
    kept = loss.queues[""]
    assert {klass: len(queue) for klass, queue in kept.items()} == {0: 4, 1: 2}
    tumour = {tuple(row) for row in cells(pair[1])[0][9:].round(5)}
    assert {tuple(row) for row in kept[1].double().numpy().round(5)} <= tumour
    # 2 // 2 + 1 entries of each class.
    drawn = loss._draw(kept)
    assert drawn.shape == (4, 4)
    assert len(torch.unique(drawn, dim=0)) == 4


def test_every_teacher_has_a_memory_of_its_own(pair, normal):
    loss, other = MemoryRelationLoss(), normal((2, 6, 2, 3, 2), 4)
    loss(normal((2, 6, 2, 3, 2), 5), other, LABEL, source="wide")
    value = loss(*pair, LABEL, source="narrow").item()
    assert value == pytest.approx(reference(*pair, cells(pair[1]).reshape(-1, 4)), rel=1e-5)


def test_in_eval_the_memory_does_not_change_and_an_empty_one_gives_0(pair):
    loss = MemoryRelationLoss().eval()
    student = pair[0].requires_grad_()
    value = loss(student, pair[1], LABEL)
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().max() == 0
    assert loss.queues == {"": {}}


def test_a_saved_memory_is_restored_from_a_file_of_plain_values(pair, normal):
    loss, restored, file = MemoryRelationLoss(), MemoryRelationLoss(), io.BytesIO()
    loss(normal(SHAPE, 2), normal(SHAPE, 3), LABEL, source="one")
    torch.save(loss.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored(*pair, LABEL, source="one").item() == loss(*pair, LABEL, source="one").item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "voxel"}, "Unknown kind 'voxel': choose one of pixel, region"),
        ({"grid": 0}, "grid must be at least 1"),
        ({"cells": 0}, "cells must be at least 1"),
        ({"size": 0}, "size must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryRelationLoss(**options)


def test_every_class_of_a_restored_memory_moves_to_the_features(pair):
    """A checkpoint is read on the CPU; a batch without a class must not leave its entries there. Here: other types."""
    loss = MemoryRelationLoss()
    loss.set_extra_state({"": {klass: torch.eye(4, dtype=torch.float64)[: 2 + klass] for klass in (0, 1)}})
    loss(*pair, label_of([[0] * 12, [0] * 12]))
    assert {klass: queue.dtype for klass, queue in loss.queues[""].items()} == dict.fromkeys((0, 1), torch.float32)
    loss.set_extra_state({"": {0: torch.eye(4, dtype=torch.float64)}})
    loss.eval()(*pair, LABEL)
    assert loss.queues[""][0].dtype == torch.float32
