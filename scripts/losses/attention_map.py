# SPDX-License-Identifier: Apache-2.0
"""Distillation of where a network looks: activation-based attention maps."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import EPS, check_maps, check_option, to_common_grid


class AttentionMapLoss(nn.Module):
    """Distance of the normalised attention maps of two feature maps; their channel counts may differ.

    Source: [paper] Teach-Former (Hossain et al., Sci Rep 2025;15:15948) distils a coarse map of an encoder stage and
    a fine one of a decoder stage by an attention similarity with L1/L2 normalisation; [ours] the formula, after
    activation-based attention (Zagoruyko and Komodakis, arXiv 1612.03928)::

        A(f)_i = mean over channels of |f_(c,i)|^p,  q = vec(A) / ||vec(A)||_r,  r = 2 for "l2", 1 for "l1"
        l2: sum over i of (q_student - q_teacher)^2       l1: sum over i of |q_student - q_teacher|,  in [0, 2]

    Summed over voxels (a mean would vanish on large grids), averaged over the batch. Both maps are pooled to the
    smaller grid before they are normalised.

    Config::

        "loss#terms#coarse": {"tap": "coarse", "weight": 0.9, "loss": {"_target_": "scripts.losses.AttentionMapLoss"}}

    Args:
        p: power of the activations, from 1 (below, the gradient at an inactive feature is not finite).
        norm: ``"l2"`` or ``"l1"``.

    Raises:
        ValueError: an unknown ``norm``, or ``p`` below 1.
    """

    def __init__(self, p: float = 2, norm: str = "l2") -> None:
        super().__init__()
        check_option("norm", norm, ("l1", "l2"))
        if p < 1:
            raise ValueError(f"p must be at least 1, got {p}.")
        self.p, self.norm = p, norm

    def _attention(self, features: torch.Tensor) -> torch.Tensor:
        return features.float().abs().pow(self.p).mean(dim=1, keepdim=True)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (C and the grid may differ), to a scalar, 0 where the maps agree.

        Raises:
            ValueError: the maps are not two batches of one size and dimension; both shapes are named.
        """
        check_maps(student, teacher)
        maps = to_common_grid(self._attention(student), self._attention(teacher.detach()))
        r = 1 if self.norm == "l1" else 2
        q_student, q_teacher = (m.flatten(1) / m.flatten(1).norm(r, dim=1, keepdim=True).clamp_min(EPS) for m in maps)
        difference = q_student - q_teacher
        distance = difference.abs() if self.norm == "l1" else difference.square()
        return distance.sum(dim=1).mean()
