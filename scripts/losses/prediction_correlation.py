# SPDX-License-Identifier: Apache-2.0
"""Distillation of the correlations of the final predictions, which leaves their scale free."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import EPS, check_maps, check_same_shape

# Below this relative amplitude the variation of a float32 map is the rounding of its mean.
CONSTANT = 1e-6


def _directions(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (last dimension) centred at length 1, and which of them vary; a constant row is zero without gradient."""
    centred = x - x.mean(dim=-1, keepdim=True)
    varies = centred.abs().amax(dim=-1) > CONSTANT * x.abs().amax(dim=-1)
    norm = centred.norm(dim=-1, keepdim=True)
    return centred * varies.unsqueeze(-1) / norm.clamp_min(EPS), varies


def _distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``B M K`` to B: 1 - Pearson of the rows, mean over those that vary in the teacher."""
    s, s_varies = _directions(student)
    t, t_varies = _directions(teacher)
    # |s - t|^2 / 2 is 1 - <s, t> of two unit vectors, without its cancellation where they agree.
    distance = ((s - t).square().sum(dim=-1) + (~s_varies).float()) / 2
    return (distance * t_varies).sum(dim=1) / t_varies.sum(dim=1).clamp_min(1)


class DISTLoss(nn.Module):
    """One minus the Pearson correlation of the probabilities, over classes and over voxels.

    Source: [paper] DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536) matches predictions by their correlation,
    between the classes of an instance (inter-class) and between the instances of a class (intra-class), rather than
    exactly; [ours] its instances are the voxels of one sample, and what is constant is left out::

        p = softmax(logits / temperature)
        L = mean over batch of
            inter * mean over voxels of (1 - Pearson over classes of p_student and p_teacher)
          + intra * mean over classes of (1 - Pearson over voxels of p_student and p_teacher)

    Each part lies in [0, 2]. Where the teacher is constant (a class over all voxels, a voxel over all classes) there
    is nothing to correlate with: it is left out of the mean, which is 0 if nothing remains. A constant student has
    correlation 0 and gets no gradient. Correlations know no scale, so the gradient of a student whose predictions
    hardly vary yet is large, as 1 / their spread: warm the term up.

    With two classes the correlation over classes is 1 or -1 whatever the probabilities: the inter-class part counts
    the voxels whose larger class differs (times 2) and has no gradient; only the intra-class part teaches. A
    single-channel (sigmoid) head is read as the two-class logits (0, z).

    Config::

        "loss#terms#dist": {"tap": "logits", "weight": 1.0, "loss": {"_target_": "scripts.losses.DISTLoss"}}

    Args:
        inter: factor of the inter-class part.
        intra: factor of the intra-class part.
        temperature: softening; no factor temperature^2, because correlations do not shrink with the probabilities.

    Raises:
        ValueError: ``inter`` or ``intra`` is negative, or ``temperature`` is not positive.
    """

    def __init__(self, inter: float = 1.0, intra: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if inter < 0 or intra < 0:
            raise ValueError(f"inter and intra must not be negative, got {inter} and {intra}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.inter, self.intra, self.temperature = inter, intra, temperature

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """``B C H W [D]`` to ``B C N``."""
        z = logits.float().flatten(2) / self.temperature
        if z.shape[1] == 1:
            z = torch.cat([torch.zeros_like(z), z], dim=1)
        return z.softmax(dim=1)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Logits of both, ``B C H W [D]``, to a scalar, 0 where they agree.

        Raises:
            ValueError: the shapes differ, or are not ``B C H W [D]``; both are named.
        """
        check_same_shape(student, teacher)
        check_maps(student, teacher)
        s, t = self._probabilities(student), self._probabilities(teacher.detach())
        inter = _distance(s.transpose(1, 2), t.transpose(1, 2))
        if s.shape[1] == 2:
            # Its gradient is zero up to rounding, which the division by a small norm makes large where p is near 1/2.
            inter = inter.detach()
        return (self.inter * inter + self.intra * _distance(s, t)).mean()
