# SPDX-License-Identifier: Apache-2.0
"""Distil the final predictions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import check_positive, check_same_shape, kl_divergence, two_class_logits


class SoftPredictionLoss(nn.Module):
    """Kullback-Leibler divergence of the softened predictions.

    Source: [paper] Teach-Former (Hossain et al., Sci Rep 2025;15:15948) distils final predictions, according to its
    abstract; [ours] the formula, which is that of Hinton et al., arXiv 1503.02531::

        L = temperature^2 * mean over batch and voxels of KL(p_teacher || p_student),  p = softmax(logits / temperature)

    The softmax runs over channels. A single-channel (sigmoid) head uses the Bernoulli KL of the softened logits.

    Config::

        "loss#terms#soft": {"tap": "logits", "weight": 0.5, "loss": {"_target_": "scripts.losses.SoftPredictionLoss"}}

    Args:
        temperature: softening of the softmax; the factor temperature^2 keeps the gradient at the same magnitude.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the predictions.

        Args:
            student: logits, ``B C H W [D]``.
            teacher: logits of the same shape.

        Returns:
            Scalar, 0 if the predictions agree.

        Raises:
            ValueError: the shapes differ. The message contains both shapes.
        """
        check_same_shape(student, teacher)
        logits = (two_class_logits(z.float() / self.temperature) for z in (student, teacher.detach()))
        log_s, log_t = (functional.log_softmax(z, dim=1) for z in logits)
        return self.temperature**2 * kl_divergence(log_t, log_s, dim=1).mean()
