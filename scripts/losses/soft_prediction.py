# SPDX-License-Identifier: Apache-2.0
"""Distil the final predictions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import check_positive, check_same_shape, kl_divergence, two_class_logits


def softening(temperature: float | None, channels: int) -> float:
    """Return ``temperature``, or its default for this number of channels: 1 for up to two classes, 4 for more."""
    return temperature or (1.0 if channels <= 2 else 4.0)


class SoftPredictionLoss(nn.Module):
    """Kullback-Leibler divergence of the softened predictions.

    Source: [paper] Teach-Former (Hossain et al., Sci Rep 2025;15:15948) distils final predictions, according to its
    abstract; [ours] the formula, which is that of Hinton et al., arXiv 1503.02531::

        L = temperature^2 * mean over batch and voxels of KL(p_teacher || p_student),  p = softmax(logits / temperature)

    The softmax runs over channels. A single-channel (sigmoid) head uses the Bernoulli KL of the softened logits.

    A high temperature shows the similarities between the wrong classes. With two classes there are none: it only gives
    confident voxels more of the gradient, so that a patch without tumour gets about as much as a patch with tumour. The
    default temperature is therefore 1 for two classes, or a single channel, and 4 for more.

    Config::

        "loss#terms#soft": {"tap": "logits", "weight": 0.5, "loss": {"_target_": "scripts.losses.SoftPredictionLoss"}}

    Args:
        temperature: softening of the softmax; the factor temperature^2 keeps the gradient at the same magnitude. None:
            1 for up to two channels, 4 for more.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    of_probabilities = True  # see DistillationLoss
    voxels_of = "batch"

    def __init__(self, temperature: float | None = None) -> None:
        super().__init__()
        if temperature is not None:
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
        temperature = softening(self.temperature, student.shape[1])
        logits = (two_class_logits(z.float() / temperature) for z in (student, teacher.detach()))
        log_s, log_t = (functional.log_softmax(z, dim=1) for z in logits)
        return temperature**2 * kl_divergence(log_t, log_s, dim=1).mean()
