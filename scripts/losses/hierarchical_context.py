# SPDX-License-Identifier: Apache-2.0
"""Distil the features of every voxel and their means over increasingly large regions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import check_channels, pool, to_common_grid

# Cells per axis of each pooled level, and its weight.
LEVEL_WEIGHTS = {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}


class HierarchicalContextLoss(nn.Module):
    """Mean squared error between two feature maps at full resolution and on pooled grids.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) fuses several stages before it compares them; [ours] the loss,
    after the hierarchical context loss of Chen et al., arXiv 2104.09044::

        L = (MSE(S, T) + sum over l in (4, 2, 1) of w_l * MSE(pool_l(S), pool_l(T))) / (1 + sum of w_l)
        w_4 = 1/2, w_2 = 1/4, w_1 = 1/8

    S and T are student and teacher on their common (smaller) grid. pool_l is adaptive average pooling to l cells per
    axis. MSE is the mean over batch, channels and cells. A level is left out of both sums unless it is smaller than the
    shortest axis of the map; the other weights stay as they are. The numbers of channels must be equal: add an adapter
    if they differ.

    Config::

        "adapters#cascade": {"_target_": "scripts.networks.CascadeFusion", "_mode_": "callable"},
        "loss#terms#context": {
          "tap": "cascade", "weight": 0.5, "loss": {"_target_": "scripts.losses.HierarchicalContextLoss"}
        }
    """

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the features on all grids.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; the grid may differ from the student's, C must not.

        Returns:
            Scalar, 0 if the features agree.

        Raises:
            ValueError: the batch sizes, numbers of dimensions or numbers of channels differ. The message contains both
                shapes.
        """
        check_channels(student, teacher)
        s, t = to_common_grid(student.float(), teacher.detach().float())
        levels = {level: weight for level, weight in LEVEL_WEIGHTS.items() if level < min(s.shape[2:])}
        total = functional.mse_loss(s, t)
        for level, weight in levels.items():
            grid = [level] * (s.dim() - 2)
            total = total + weight * functional.mse_loss(pool(s, grid), pool(t, grid))
        return total / (1 + sum(levels.values()))
