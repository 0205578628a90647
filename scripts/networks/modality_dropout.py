# SPDX-License-Identifier: Apache-2.0
"""Random loss of whole modalities while training, so that a student learns to do without any of them."""

from __future__ import annotations

import torch
from torch import nn


class ModalityDropout(nn.Module):
    """Zeros for randomly chosen channels in train(), the identity in eval(): ``B M H W [D]`` -> the same shape.

    Source: [ours], after ModDrop (Neverova et al., arXiv 1501.00102). It is the student's first layer and not an
    augmentation of the data: teachers (and predictions of theirs that are cached) still see every modality, and the
    student learns to answer as if nothing was missing. The kept channels are not rescaled, since an absent modality
    is zeros at inference too.

    A modality is present where its channel is not all zeros. Each sample draws ``u_m ~ U[0, 1)`` for each of its n
    present modalities and keeps those with ``u_m >= p``, and the one of the greatest ``u_m`` in any case. So a set S
    of k >= 1 present modalities is what remains with probability::

        P(S) = (1 - p)^k p^(n - k)            for k > 1
        P(S) = (1 - p) p^(n - 1) + p^n / n    for k = 1: all were to be lost, and one of them, any alike, stays

    and a given modality is kept with probability ``1 - p + p^n / n``. A modality that is absent stays absent.

    Args:
        probability: p, in [0, 1); 0 is the identity.

    Raises:
        ValueError: a probability outside of [0, 1).
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"The probability of losing a modality must be in [0, 1), got {probability}.")
        self.probability = float(probability)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``B M H W [D]`` to the image with channels lost; the draws are from PyTorch's global generator."""
        if not self.training or self.probability == 0.0:
            return image
        present = image.ne(0).flatten(2).any(dim=2)
        drawn = torch.rand(present.shape, device=image.device).masked_fill(~present, -1.0)
        lost = (drawn < self.probability) & (drawn < drawn.amax(dim=1, keepdim=True))
        return torch.where(lost.view(list(lost.shape) + [1] * (image.dim() - 2)), 0.0, image)

    def extra_repr(self) -> str:
        """Shown by ``print(network)``."""
        return f"probability={self.probability}"
