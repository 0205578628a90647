# SPDX-License-Identifier: Apache-2.0
"""Distillation of features at every voxel and of their means over ever larger regions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import check_channels, pool, to_common_grid

LEVELS = {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}


class HierarchicalContextLoss(nn.Module):
    """Mean squared error of two feature maps and of their pooled grids.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) fuses several stages before it compares them; [ours] the loss,
    after the hierarchical context loss of Chen et al., arXiv 2104.09044::

        L = (MSE(S, T) + sum over l in (4, 2, 1) of w_l * MSE(pool_l(S), pool_l(T))) / (1 + sum of w_l)
        w_4 = 1/2, w_2 = 1/4, w_1 = 1/8

    S and T are the maps on their common grid, pool_l is adaptive average pooling to l cells per axis, MSE is the mean
    over batch, channels and cells. A level that is not smaller than the map's smallest axis is left out of both sums;
    the weights of the others stay. Equal channel counts are needed: put an adapter before it.

    Config::

        "adapters#cascade": {"_target_": "scripts.networks.CascadeFusion", "_mode_": "callable"},
        "loss#terms#context": {
          "tap": "cascade", "weight": 0.5, "loss": {"_target_": "scripts.losses.HierarchicalContextLoss"}
        }
    """

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (the grid may differ), to a scalar, 0 where the maps agree.

        Raises:
            ValueError: the channels differ, or the maps are not two batches of one size and dimension; both shapes
                are named.
        """
        check_channels(student, teacher)
        s, t = to_common_grid(student.float(), teacher.detach().float())
        levels = {level: weight for level, weight in LEVELS.items() if level < min(s.shape[2:])}
        total = functional.mse_loss(s, t)
        for level, weight in levels.items():
            grid = [level] * (s.dim() - 2)
            total = total + weight * functional.mse_loss(pool(s, grid), pool(t, grid))
        return total / (1 + sum(levels.values()))
