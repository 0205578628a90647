# SPDX-License-Identifier: Apache-2.0
"""Distil the direction of a teacher's features at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scripts.losses._common import check_channels, pool, shapes_text, unit_vectors


class MultiScalePriorLoss(nn.Module):
    """Cosine distance between two feature maps, averaged over regions from small to the whole patch.

    Source: [paper] dual distillation (Cui et al., Med Phys 2024, 10.1002/mp.17506) distils multi-scale prior knowledge
    of transformer features; [ours] the formula::

        L = sum over s in scales of w_s * mean over cells of [1 - cos(P_s(student), P_s(teacher))] / sum of w_s

    P_s is adaptive average pooling of each map to s cells per axis. cos is taken over channels, the mean over batch and
    cells. The weight of the i-th scale, counted from 0, is 2^-i: 1, 1/2, 1/4, 1/8. A scale larger than the shortest
    axis of either map is left out of both sums; the other weights stay as they are. The range of L is [0, 2].

    A cell whose feature is zero in one map contributes 1/2; a cell that is zero in both maps contributes 0. Neither
    gives a gradient. The numbers of channels must be equal: add an adapter if they differ.

    Config::

        "adapters#context": {"_target_": "scripts.networks.ChannelAdapter", "_mode_": "callable"},
        "loss#terms#prior": {
          "tap": "context", "weight": 0.5, "loss": {"_target_": "scripts.losses.MultiScalePriorLoss"}
        }

    Args:
        scales: cells per axis of each scale, the most important scale first.

    Raises:
        ValueError: ``scales`` is empty or contains a number less than 1.
    """

    def __init__(self, scales: Sequence[int] = (8, 4, 2, 1)) -> None:
        super().__init__()
        if not scales or min(scales) < 1:
            raise ValueError(f"scales must be one or more numbers of cells of at least 1, got {tuple(scales)}.")
        self.scales = tuple(scales)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the directions of the features.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; the grid may differ from the student's, C must not.

        Returns:
            Scalar, 0 if the directions agree.

        Raises:
            ValueError: the batch sizes, numbers of dimensions or numbers of channels differ, or all scales are larger
                than the maps. The message contains both shapes.
        """
        check_channels(student, teacher)
        shortest_axis = min(*student.shape[2:], *teacher.shape[2:])
        weights = [(scale, 2.0**-i) for i, scale in enumerate(self.scales) if scale <= shortest_axis]
        if not weights:
            raise ValueError(
                f"{shapes_text(student, teacher)} are smaller than all scales {self.scales}: add a smaller scale or "
                "choose layers with a larger grid."
            )
        s, t = student.float(), teacher.detach().float()
        total = s.new_zeros(())
        for scale, weight in weights:
            grid = [scale] * (s.dim() - 2)
            difference = unit_vectors(pool(s, grid), dim=1) - unit_vectors(pool(t, grid), dim=1)
            # Half the squared distance of two unit vectors equals 1 - cos, but does not cancel where they nearly agree.
            total = total + weight * difference.square().sum(dim=1).mean() / 2
        return total / sum(weight for _, weight in weights)
