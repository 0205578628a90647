# SPDX-License-Identifier: Apache-2.0
"""Distillation of the final predictions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import check_same_shape


class SoftPredictionLoss(nn.Module):
    """Kullback-Leibler divergence of the softened predictions.

    Source: [ours] for Teach-Former (Hossain et al., Sci Rep 2025;15:15948), whose abstract says that final
    predictions are distilled; the formula is Hinton et al., arXiv 1503.02531::

        L = temperature^2 * mean over batch and voxels of KL(p_teacher || p_student),  p = softmax(logits / temperature)

    softmax over channels. A single-channel (sigmoid) head uses the Bernoulli KL of the same softened logits.

    Config::

        "loss#terms#soft": {"tap": "logits", "weight": 0.5, "loss": {"_target_": "scripts.losses.SoftPredictionLoss"}}

    Args:
        temperature: softening; the factor temperature^2 keeps the gradient's size.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Logits of both, ``B C H W [D]``, to a scalar, 0 where they agree.

        Raises:
            ValueError: the shapes differ; both are named.
        """
        check_same_shape(student, teacher)
        s = student.float() / self.temperature
        t = teacher.detach().float() / self.temperature
        if student.shape[1] == 1:
            # Two-class logits (0, z) have the Bernoulli probabilities of the single logit z.
            s, t = (torch.cat([torch.zeros_like(z), z], dim=1) for z in (s, t))
        log_s, log_t = functional.log_softmax(s, dim=1), functional.log_softmax(t, dim=1)
        divergence = (log_t.exp() * (log_t - log_s)).sum(dim=1)
        return self.temperature**2 * divergence.mean()
