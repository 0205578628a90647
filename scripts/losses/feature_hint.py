# SPDX-License-Identifier: Apache-2.0
"""Distil the features themselves."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import check_channels, to_common_grid


class FeatureHintLoss(nn.Module):
    """Mean squared error between two feature maps.

    Source: FitNets (Romero et al., ICLR 2015, arXiv 1412.6550), a baseline:
    [paper] the teacher's intermediate features are hints, and additional parameters map the student's features to
    them; [ours] the 3D form and the common grid. Here ``scripts.networks.ChannelAdapter`` is that mapping and trains
    with the student::

        L = mean over batch, channels and voxels of (student - teacher)^2

    Both maps are pooled to their common (smaller) grid first. L scales with the square of the teacher's features, so a
    suitable weight depends on the layer.

    Config::

        "taps#hint": {"layer": "middle"},
        "adapters#hint": {"_target_": "scripts.networks.ChannelAdapter", "_mode_": "callable"},
        "loss#terms#hint": {"tap": "hint", "weight": 0.5, "loss": {"_target_": "scripts.losses.FeatureHintLoss"}}
    """

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the features.

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
        student, teacher = to_common_grid(student.float(), teacher.detach().float())
        return (student - teacher).square().mean()
