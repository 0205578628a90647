# SPDX-License-Identifier: Apache-2.0
"""Distillation of how the channels of a feature map correlate over space."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import EPS, check_channels, to_common_grid

# A row whose deviation is below this share of its size varies by nothing but the rounding of means in float32.
CONSTANT = 1e-5


class ChannelRelationLoss(nn.Module):
    """Mean squared difference of the channels' correlation matrices.

    Source: [paper] CPKD (Xiong and Yu, ICIPAI 2024, doi 10.1117/12.3035260) distils the correlation between channels
    beside that between pixels (PixelRelationLoss); [ours] the formula::

        F = C x N, row c is channel c over the N voxels, centred:  q_c = (F_c - mean F_c) / ||F_c - mean F_c||
        G = q q^T,  C x C, Pearson correlations in [-1, 1]
        L = mean over batch and C^2 of (G_student - G_teacher)^2,  in [0, 4]

    Both maps are pooled to the smaller grid before they are centred. Gain (> 0) and offset of a channel change
    nothing. A constant channel correlates with nothing, itself included: zeros in G, and no gradient.

    Of two-class SOFTMAX outputs G is [[1, -1], [-1, 1]] whatever the networks say, since they sum to 1: value and
    gradient vanish. Take raw logits or, better, features (two logits are one number of G, near -1 in a trained head).
    A single channel has G = 1 and teaches nothing either.

    Config::

        "taps#relation": "@layers#middle",
        "adapters#relation": {"_target_": "scripts.networks.ChannelAdapter", "_mode_": "callable"},
        "loss#terms#channels": {
          "tap": "relation", "weight": 1.0, "loss": {"_target_": "scripts.losses.ChannelRelationLoss"}
        }
    """

    def _relations(self, features: torch.Tensor) -> torch.Tensor:
        rows = features.flatten(2)
        centred = rows - rows.mean(dim=2, keepdim=True)
        norm = centred.norm(dim=2, keepdim=True)
        varies = norm > CONSTANT * rows.norm(dim=2, keepdim=True)
        unit = centred * varies / norm.clamp_min(EPS)
        with torch.autocast(unit.device.type, enabled=False):
            return unit @ unit.transpose(1, 2)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features or logits of both, ``B C H W [D]`` (one C, the grid may differ), to a scalar, 0 where G agrees.

        Raises:
            ValueError: the maps are not two batches of one size and dimension, or their channel counts differ; both
                shapes are named.
        """
        check_channels(student, teacher)
        student, teacher = to_common_grid(student.float(), teacher.detach().float())
        return (self._relations(student) - self._relations(teacher)).square().mean()
