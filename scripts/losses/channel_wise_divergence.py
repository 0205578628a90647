# SPDX-License-Identifier: Apache-2.0
"""Distillation of where each channel has its mass."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import check_channels, to_common_grid


class ChannelWiseDivergence(nn.Module):
    """Kullback-Leibler divergence of the channels' distributions over space.

    Source: a baseline beside the papers, CWD (Shu et al., ICCV 2021, arXiv 2011.13256): [paper] a softmax turns each
    channel into a probability map, and the KL divergence of corresponding channels is minimised; [ours] in 3D, and
    the common grid::

        p_c = softmax over voxels of (channel c / temperature)
        L = temperature^2 * mean over batch and channels of KL(p_teacher || p_student)

    The KL is a SUM over voxels: repeating the same voxels changes nothing. Nor does the offset of a channel; its gain
    does. Both maps are pooled to the smaller grid before the softmax. Not to be confused with SoftPredictionLoss, whose
    softmax runs over channels.

    Config::

        "loss#terms#cwd": {"tap": "logits", "weight": 0.1, "loss": {"_target_": "scripts.losses.ChannelWiseDivergence"}}

    Args:
        temperature: softening; a larger one looks at more of the voxels.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Logits or features of both, ``B C H W [D]`` (one C, the grid may differ), to a scalar, 0 where they agree.

        Raises:
            ValueError: the maps are not two batches of one size and dimension, or their channel counts differ; both
                shapes are named.
        """
        check_channels(student, teacher)
        maps = to_common_grid(student.float(), teacher.detach().float())
        log_s, log_t = (functional.log_softmax(m.flatten(2) / self.temperature, dim=2) for m in maps)
        divergence = (log_t.exp() * (log_t - log_s)).sum(dim=2)
        return self.temperature**2 * divergence.mean()
