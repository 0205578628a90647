# SPDX-License-Identifier: Apache-2.0
"""Distillation of the direction of a teacher's features at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scripts.losses._common import check_channels, pool, unit


class MultiScalePriorLoss(nn.Module):
    """Cosine distance of two feature maps, averaged over regions from small to the whole patch.

    Source: [paper] dual distillation (Cui et al., Med Phys 2024, 10.1002/mp.17506) distils multi-scale prior knowledge
    of transformer features; [ours] the formula::

        L = sum over s in scales of w_s * mean over cells of [1 - cos(P_s(student), P_s(teacher))] / sum of w_s

    P_s is adaptive average pooling of each map to s cells per axis, cos is taken over channels, the mean over batch
    and cells, and w_s = 2^-i for the i-th scale from 0: 1, 1/2, 1/4, 1/8. A scale larger than the smallest axis of
    either map is left out of both sums; the weights of the others stay. A cell that is silent in one map costs 1/2, in
    both 0, and neither pulls. Equal channel counts are needed: put an adapter before it. Range [0, 2].

    Config::

        "adapters#context": {"_target_": "scripts.networks.ChannelAdapter", "_mode_": "callable"},
        "loss#terms#prior": {
          "tap": "context", "weight": 0.5, "loss": {"_target_": "scripts.losses.MultiScalePriorLoss"}
        }

    Args:
        scales: cells per axis, the most important scale first.

    Raises:
        ValueError: no scale, or one below 1.
    """

    def __init__(self, scales: Sequence[int] = (8, 4, 2, 1)) -> None:
        super().__init__()
        if not scales or min(scales) < 1:
            raise ValueError(f"scales must be one or more numbers of cells from 1, got {tuple(scales)}.")
        self.scales = tuple(scales)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (the grid may differ), to a scalar, 0 where the directions agree.

        Raises:
            ValueError: the channels differ, no scale fits, or the maps are not two batches of one size and dimension;
                both shapes are named.
        """
        check_channels(student, teacher)
        smallest = min(*student.shape[2:], *teacher.shape[2:])
        weights = [(s, 2.0**-i) for i, s in enumerate(self.scales) if s <= smallest]
        if not weights:
            shapes = f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
            raise ValueError(f"{shapes} are smaller than each of the scales {self.scales}.")
        s, t = student.float(), teacher.detach().float()
        total = s.new_zeros(())
        for scale, weight in weights:
            grid = [scale] * (s.dim() - 2)
            difference = unit(pool(s, grid), dim=1) - unit(pool(t, grid), dim=1)
            # Half the squared distance of unit vectors is 1 - cos, without its cancellation near agreement.
            total = total + weight * difference.square().sum(dim=1).mean() / 2
        return total / sum(weight for _, weight in weights)
