# SPDX-License-Identifier: Apache-2.0
"""Randomly drop whole modalities in training, so that a student also works if some are missing."""

from __future__ import annotations

import torch
from torch import nn


class ModalityDropout(nn.Module):
    """Set randomly chosen channels to zero in train(); the identity in eval(). Shape: ``B M H W [D]`` -> the same.

    Source: [ours], after ModDrop (Neverova et al., arXiv 1501.00102). This is the first layer of the student, not a
    data augmentation. Teachers and their cached predictions therefore still see every modality, and the student learns
    to predict as if no modality were missing. The remaining channels are not rescaled, because at inference an absent
    modality is zeros as well.

    A modality is present if its channel is not all zeros. For each of the n present modalities of a sample,
    ``u_m ~ U[0, 1)`` is drawn. A modality is kept if ``u_m >= p``. The modality with the largest ``u_m`` is always
    kept. So the probability that exactly the set S of k >= 1 present modalities is kept is::

        P(S) = (1 - p)^k p^(n - k)            for k > 1
        P(S) = (1 - p) p^(n - 1) + p^n / n    for k = 1 (p^n: no u_m reaches p, and each modality is equally likely)

    A given modality is kept with probability ``1 - p + p^n / n``. An absent modality stays absent.

    Args:
        probability: p, in [0, 1); 0 gives the identity.

    Raises:
        ValueError: ``probability`` is not in [0, 1).
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"The modality dropout probability must be in [0, 1), got {probability}.")
        self.probability = float(probability)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Drop channels of an image ``B M H W [D]``. The numbers are drawn from PyTorch's global generator."""
        if not self.training or self.probability == 0.0:
            return image
        present = image.ne(0).flatten(2).any(dim=2)
        drawn = torch.rand(present.shape, device=image.device).masked_fill(~present, -1.0)
        dropped = (drawn < self.probability) & (drawn < drawn.amax(dim=1, keepdim=True))
        return torch.where(dropped.view(list(dropped.shape) + [1] * (image.dim() - 2)), 0.0, image)

    def extra_repr(self) -> str:
        """Show the probability in ``print(network)``."""
        return f"probability={self.probability}"
