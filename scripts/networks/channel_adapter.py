# SPDX-License-Identifier: Apache-2.0
"""Trainable projection of a student's features to the channels of a teacher."""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from torch import nn


class ChannelAdapter(nn.Module):
    """1x1 convolution from the student's channels to the teacher's: ``B in H W [D]`` -> ``B out H W [D]``.

    Args:
        in_channels: number of channels of the student.
        out_channels: number of channels of the teacher.
        spatial_dims: 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.conv = Convolution(spatial_dims, in_channels, out_channels, kernel_size=1, conv_only=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project features ``B in H W [D]``; returns ``B out H W [D]``."""
        return self.conv(x)
