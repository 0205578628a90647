# SPDX-License-Identifier: Apache-2.0
"""Distil which voxels a network attends to: activation-based attention maps."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import EPS, check_at_least, check_choice, check_maps, to_common_grid


def attention_map(features: torch.Tensor, power: float) -> torch.Tensor:
    """The attention map A of ``AttentionMapLoss``: mean over channels of ``|f|^power``, ``B 1 H W [D]`` in float32.

    Args:
        features: ``B C H W [D]``.
        power: at least 1.
    """
    return features.float().abs().pow(power).mean(dim=1, keepdim=True)


class AttentionMapLoss(nn.Module):
    """Distance between the normalised attention maps of two feature maps.

    Source: [paper] Teach-Former (Hossain et al., Sci Rep 2025;15:15948) distils a coarse attention map of an encoder
    stage and a fine one of a decoder stage, by an attention similarity with L1/L2 normalisation; [ours] the formula,
    after activation-based attention (Zagoruyko and Komodakis, arXiv 1612.03928)::

        A(f)_i = mean over channels of |f_(c,i)|^p,  q = vec(A) / ||vec(A)||_r,  r = 2 for norm "l2", 1 for "l1"
        "l2": L = sum over i of (q_student - q_teacher)^2
        "l1": L = sum over i of |q_student - q_teacher|

    Both maps A are pooled to their common (smaller) grid before they are normalised. L is summed over voxels, because a
    mean would vanish on large grids, and averaged over the batch. Its range is [0, 2]. The numbers of channels may
    differ, so no adapter is needed. The p-th root of a teacher's map A may stand for its features, because the map of
    a single non-negative channel is its p-th power; ``cache-teachers --maps`` stores that root.

    Config::

        "loss#terms#coarse": {"tap": "coarse", "weight": 0.9, "loss": {"_target_": "scripts.losses.AttentionMapLoss"}}

    Args:
        p: power of the activations, at least 1. With a smaller power the gradient of a zero activation is not finite.
        norm: ``"l2"`` or ``"l1"``.

    Raises:
        ValueError: ``norm`` is unknown, or ``p`` is less than 1.
    """

    def __init__(self, p: float = 2, norm: str = "l2") -> None:
        super().__init__()
        check_choice("norm", norm, ("l1", "l2"))
        check_at_least("p", p, 1)
        self.p, self.norm = p, norm

    @property
    def attention_power(self) -> float:
        """The power p; a cached attention map must have been made with the same."""
        return float(self.p)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the attention maps.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; C and the grid may differ from the student's.

        Returns:
            Scalar, 0 if the attention maps agree.

        Raises:
            ValueError: the batch sizes or numbers of dimensions differ. The message contains both shapes.
        """
        check_maps(student, teacher)
        maps = to_common_grid(attention_map(student, self.p), attention_map(teacher.detach(), self.p))
        r = 1 if self.norm == "l1" else 2
        q_student, q_teacher = (m.flatten(1) / m.flatten(1).norm(r, dim=1, keepdim=True).clamp_min(EPS) for m in maps)
        difference = q_student - q_teacher
        distance = difference.abs() if self.norm == "l1" else difference.square()
        return distance.sum(dim=1).mean()
