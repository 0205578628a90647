# SPDX-License-Identifier: Apache-2.0
"""Distil where in space each channel is active."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import check_channels, check_positive, kl_divergence, to_common_grid


class ChannelWiseDivergence(nn.Module):
    """Kullback-Leibler divergence between the spatial distributions of corresponding channels.

    Source: CWD (Shu et al., ICCV 2021, arXiv 2011.13256), a baseline:
    [paper] a softmax turns each channel into a probability map, and the KL divergence of corresponding channels is
    minimised; [ours] the 3D form and the common grid::

        p_c = softmax over voxels of (channel c / temperature)
        L = temperature^2 * mean over batch and channels of KL(p_teacher || p_student)

    Both maps are pooled to their common (smaller) grid before the softmax. The KL is a SUM over voxels, so repeating
    the same voxels does not change L. Adding a constant to a channel does not change L; scaling it does. Unlike here,
    the softmax of SoftPredictionLoss runs over channels.

    Config::

        "loss#terms#cwd": {"tap": "logits", "weight": 0.1, "loss": {"_target_": "scripts.losses.ChannelWiseDivergence"}}

    Args:
        temperature: softening of the softmax; a higher temperature takes more voxels into account.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    voxels_of = "sample"  # see DistillationLoss

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the spatial distributions.

        Args:
            student: logits or features, ``B C H W [D]``.
            teacher: logits or features, ``B C H W [D]``; the grid may differ from the student's, C must not.

        Returns:
            Scalar, 0 if the distributions agree.

        Raises:
            ValueError: the batch sizes, numbers of dimensions or numbers of channels differ. The message contains both
                shapes.
        """
        check_channels(student, teacher)
        maps = to_common_grid(student.float(), teacher.detach().float())
        log_s, log_t = (functional.log_softmax(m.flatten(2) / self.temperature, dim=2) for m in maps)
        return self.temperature**2 * kl_divergence(log_t, log_s, dim=2).mean()
