# SPDX-License-Identifier: Apache-2.0
"""What every loss shares: the checks of its inputs and the common grid of two feature maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

EPS = 1e-12


def check_option(name: str, value: str, valid: Sequence[str]) -> None:
    """Raise ValueError that lists the valid options where ``value`` is none of them."""
    if value not in valid:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(valid)}.")


def check_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raise ValueError naming both shapes where they differ."""
    if student.shape != teacher.shape:
        raise ValueError(f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape.")


def check_maps(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raise ValueError naming both shapes where they are not ``B C H W [D]`` of one batch size and dimension."""
    if student.dim() != teacher.dim() or student.dim() not in (4, 5) or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be B C H W [D] with one B."
        )


def check_channels(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raise ValueError naming both shapes where they are not maps (see ``check_maps``) of one number of channels."""
    check_maps(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one C: put an adapter "
            "before the loss."
        )


def unit(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Vectors along ``dim`` at length 1; a zero vector has no direction: it stays zero and gets no gradient.

    Division by the clamped norm alone would give it a gradient of 1 / EPS.
    """
    norm = x.norm(dim=dim, keepdim=True)
    return x * (norm > EPS) / norm.clamp_min(EPS)


def to_common_grid(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring both maps (``B C H W [D]``) to the element-wise smaller grid by adaptive average pooling.

    Neither is ever up-sampled: invented detail would be distilled as if it were the teacher's.

    Raises:
        ValueError: the batch sizes or the numbers of dimensions differ, or the maps are not 2D or 3D.
    """
    check_maps(student, teacher)
    grid = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return pool(student, grid), pool(teacher, grid)


def pool(x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Adaptive average pooling of ``B C H W [D]`` to ``grid``."""
    if list(x.shape[2:]) == list(grid):
        return x
    adaptive: Callable[..., torch.Tensor] = (
        functional.adaptive_avg_pool3d if x.dim() == 5 else functional.adaptive_avg_pool2d
    )
    return adaptive(x, tuple(grid))
