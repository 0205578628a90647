# SPDX-License-Identifier: Apache-2.0
"""Distillation of the features themselves."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import check_channels, to_common_grid


class FeatureHintLoss(nn.Module):
    """Mean squared error of two feature maps, the student's behind an adapter.

    Source: a baseline beside the papers, FitNets (Romero et al., ICLR 2015, arXiv 1412.6550): [paper] the teacher's
    intermediate features are hints, and additional parameters map the student's to them, here
    ``scripts.networks.ChannelAdapter``, which trains with the student; [ours] in 3D, and the common grid::

        L = mean over batch, channels and voxels of (student - teacher)^2

    Both maps are pooled to the smaller grid first. The value has the square of the teacher's unit, so its weight
    depends on the layer.

    Config::

        "taps#hint": "@layers#middle",
        "adapters#hint": {"_target_": "scripts.networks.ChannelAdapter", "_mode_": "callable"},
        "loss#terms#hint": {"tap": "hint", "weight": 0.5, "loss": {"_target_": "scripts.losses.FeatureHintLoss"}}
    """

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (one C, the grid may differ), to a scalar, 0 where they agree.

        Raises:
            ValueError: the maps are not two batches of one size and dimension, or their channel counts differ; both
                shapes are named.
        """
        check_channels(student, teacher)
        student, teacher = to_common_grid(student.float(), teacher.detach().float())
        return (student - teacher).square().mean()
