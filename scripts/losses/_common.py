# SPDX-License-Identifier: Apache-2.0
"""Functions shared by the losses: checks of options and shapes, pooling to a common grid, small tensor operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

EPS = 1e-12


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Raise ValueError with the list of valid values if ``value`` is not one of them."""
    if value not in valid:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(valid)}.")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError if ``value`` is not greater than 0."""
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}.")


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raise ValueError if ``value`` is less than ``minimum``."""
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def shapes_text(student: torch.Tensor, teacher: torch.Tensor) -> str:
    """Both shapes, as the beginning of an error message."""
    return f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"


def check_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raise ValueError with both shapes if they differ."""
    if student.shape != teacher.shape:
        raise ValueError(f"{shapes_text(student, teacher)} must have the same shape.")


def check_maps(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raise ValueError with both shapes unless both are ``B C H W [D]`` with equal B and equal number of dimensions."""
    if student.dim() != teacher.dim() or student.dim() not in (4, 5) or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{shapes_text(student, teacher)} must both be B C H W [D] with the same batch size and number of "
            "dimensions."
        )


def check_channels(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raise ValueError with both shapes unless ``check_maps`` passes and the numbers of channels are equal."""
    check_maps(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{shapes_text(student, teacher)} must have the same number of channels: add a ChannelAdapter for this tap."
        )


def to_common_grid(
    student: torch.Tensor, teacher: torch.Tensor, max_cells: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool both maps to the smaller size along each axis by adaptive average pooling.

    Neither map is ever up-sampled: interpolated detail would be distilled as if the teacher had produced it.

    Args:
        student: ``B C H W [D]``.
        teacher: ``B C H W [D]``; C and the grid may differ from the student's.
        max_cells: upper limit of the cells along each axis, or None.

    Returns:
        Both maps on the common grid.

    Raises:
        ValueError: the batch sizes or the numbers of dimensions differ, or the maps are not 2D or 3D.
    """
    check_maps(student, teacher)
    grid = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    if max_cells is not None:
        grid = [min(max_cells, cells) for cells in grid]
    return pool(student, grid), pool(teacher, grid)


def pool(x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Adaptive average pooling of ``B C H W [D]`` to ``grid``."""
    if list(x.shape[2:]) == list(grid):
        return x
    adaptive: Callable[..., torch.Tensor] = (
        functional.adaptive_avg_pool3d if x.dim() == 5 else functional.adaptive_avg_pool2d
    )
    return adaptive(x, tuple(grid))


def unit_vectors(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Scale the vectors along ``dim`` to length 1. A zero vector stays zero and gets no gradient.

    Division by the clamped norm alone would give a zero vector a gradient of 1 / EPS.
    """
    norm = x.norm(dim=dim, keepdim=True)
    return x * (norm > EPS) / norm.clamp_min(EPS)


def matmul_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product of two float32 tensors that autocast does not lower to half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def kl_divergence(log_teacher: torch.Tensor, log_student: torch.Tensor, dim: int) -> torch.Tensor:
    """KL(teacher || student) of two log-probabilities, summed over ``dim``."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=dim)


def two_class_logits(logits: torch.Tensor) -> torch.Tensor:
    """Convert a single-channel (sigmoid) head z to the two-class logits (0, z), which have the same probabilities.

    Logits with more than one channel are returned unchanged.
    """
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
