# SPDX-License-Identifier: Apache-2.0
"""Distil how the channels of a feature map correlate over space."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import EPS, check_channels, matmul_float32, to_common_grid

# A channel counts as constant if its deviation from the mean is below this share of its norm: in float32 such a small
# deviation may be nothing but the rounding error of the mean.
CONSTANT_TOLERANCE = 1e-5


class ChannelRelationLoss(nn.Module):
    """Mean squared difference of the channel correlation matrices.

    Source: [paper] CPKD (Xiong and Yu, ICIPAI 2024, doi 10.1117/12.3035260) distils the correlation between channels
    and the correlation between pixels (see PixelRelationLoss); [ours] the formula::

        F = C x N, row c is channel c over the N voxels, centred: q_c = (F_c - mean F_c) / ||F_c - mean F_c||
        G = q q^T, C x C, Pearson correlations in [-1, 1]
        L = mean over batch and C^2 of (G_student - G_teacher)^2

    Both maps are pooled to their common (smaller) grid before they are centred. The range of L is [0, 4]. Scaling a
    channel by a positive factor or adding a constant to it does not change L. A constant channel has only zeros in its
    row and column of G, the diagonal included, and gets no gradient.

    Do not use two-class SOFTMAX outputs: they sum to 1, so G is [[1, -1], [-1, 1]] for every network, and value and
    gradient vanish. Use raw logits or, better, features: two logits give a single free number of G, near -1 in a
    trained head. A single channel always has G = 1 and gives no gradient either.

    Config::

        "taps#relation": {"layer": "middle"},
        "adapters#relation": {"_target_": "scripts.networks.ChannelAdapter", "_mode_": "callable"},
        "loss#terms#channels": {
          "tap": "relation", "weight": 1.0, "loss": {"_target_": "scripts.losses.ChannelRelationLoss"}
        }
    """

    def _relations(self, features: torch.Tensor) -> torch.Tensor:
        rows = features.flatten(2)
        centred = rows - rows.mean(dim=2, keepdim=True)
        norm = centred.norm(dim=2, keepdim=True)
        varies = norm > CONSTANT_TOLERANCE * rows.norm(dim=2, keepdim=True)
        directions = centred * varies / norm.clamp_min(EPS)
        return matmul_float32(directions, directions.transpose(1, 2))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the channel correlations.

        Args:
            student: features or logits, ``B C H W [D]``.
            teacher: features or logits, ``B C H W [D]``; the grid may differ from the student's, C must not.

        Returns:
            Scalar, 0 if the correlation matrices agree.

        Raises:
            ValueError: the batch sizes, numbers of dimensions or numbers of channels differ. The message contains both
                shapes.
        """
        check_channels(student, teacher)
        student, teacher = to_common_grid(student.float(), teacher.detach().float())
        return (self._relations(student) - self._relations(teacher)).square().mean()
