# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the loss tests: random tensors, and the float64 NumPy functions behind the reference values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """``normal(shape, seed)`` returns standard normal values."""

    def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)

    return draw


@pytest.fixture(scope="session")
def random_label() -> Callable[..., Tensor]:
    """``random_label(shape, classes)`` returns a random one-channel label for features of this shape."""

    def draw(shape: Sequence[int], classes: int, seed: int = 9) -> Tensor:
        return torch.randint(classes, (shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def pooled() -> Callable[[Array, Sequence[int]], Array]:
    """``pooled(x, grid)``: adaptive average pooling of the last axes. Cell i covers floor(i n/m) to ceil((i+1) n/m)."""

    def pool(x: Array, grid: Sequence[int]) -> Array:
        for axis, cells in enumerate(grid, start=x.ndim - len(grid)):
            size = x.shape[axis]
            edges = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
            x = np.stack([x.take(range(a, b), axis).mean(axis) for a, b in edges], axis)
        return x

    return pool


@pytest.fixture(scope="session")
def on_common_grid(pooled: Callable[[Array, Sequence[int]], Array]) -> Callable[..., list[Array]]:
    """``on_common_grid(student, teacher, max_cells)``: both maps in float64, pooled to their common grid."""

    def pool(student: Tensor, teacher: Tensor, max_cells: float = float("inf")) -> list[Array]:
        grid = [min(max_cells, a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        return [pooled(x.detach().double().numpy(), grid) for x in (student, teacher)]

    return pool


@pytest.fixture(scope="session")
def by_class(
    pooled: Callable[[Array, Sequence[int]], Array], on_common_grid: Callable[..., list[Array]]
) -> Callable[[Tensor, Tensor, Tensor], list[tuple[Array, Array, list[Array]]]]:
    """For each sample: the N x C cells of both maps on the common grid, and the share of each class in the cells."""

    def split(student: Tensor, teacher: Tensor, label: Tensor) -> list[tuple[Array, Array, list[Array]]]:
        samples = []
        for s, t, y in zip(*on_common_grid(student, teacher), label.numpy(), strict=True):
            shares = [pooled((y == k).astype(float), s.shape[1:]).reshape(-1) for k in np.unique(y)]
            samples.append((s.reshape(len(s), -1).T, t.reshape(len(t), -1).T, shares))
        return samples

    return split


@pytest.fixture(scope="session")
def cosine() -> Callable[[Array, Array], float]:
    """Cosine between two vectors; 0 if one of them is zero."""

    def compute(a: Array, b: Array) -> float:
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths else 0.0

    return compute


@pytest.fixture(scope="session")
def numerical_gradient() -> Callable[..., Array]:
    """Derivative of ``value`` with respect to every element of a tensor, by central differences in float64."""

    def gradient(value: Callable[[Tensor], float], x: Tensor, step: float = 1e-5) -> Array:
        result = np.zeros(x.shape)
        for index in np.ndindex(*x.shape):
            moved = [x.detach().double().clone() for _ in range(2)]
            moved[0][index] += step
            moved[1][index] -= step
            result[index] = (value(moved[0]) - value(moved[1])) / (2 * step)
        return result

    return gradient
