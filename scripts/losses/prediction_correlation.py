# SPDX-License-Identifier: Apache-2.0
"""Distil the correlations of the final predictions, independent of their scale."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import EPS, check_maps, check_positive, check_same_shape, two_class_logits

# A row counts as constant if its largest deviation from the mean is below this share of its largest value: in float32
# such a small deviation may be nothing but the rounding error of the mean.
CONSTANT_TOLERANCE = 1e-6


def _centred_directions(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre the rows (last dimension) and scale them to length 1.

    Returns:
        The rows; a constant row is zero and has no gradient. And a mask of the rows that vary.
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    varies = centred.abs().amax(dim=-1) > CONSTANT_TOLERANCE * x.abs().amax(dim=-1)
    # On a CPU this is much faster than PyTorch 2.13's norm, most of all for rows of two classes.
    length = centred.square().sum(dim=-1, keepdim=True).clamp_min(EPS**2).sqrt()
    return centred * varies.unsqueeze(-1) / length, varies


def _correlation_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute 1 - Pearson of the rows of ``G M K``, and its mean over the rows that vary in the teacher: ``G``."""
    s, s_varies = _centred_directions(student)
    t, t_varies = _centred_directions(teacher)
    # |s - t|^2 / 2 equals 1 - <s, t> for two unit vectors, but does not cancel where they nearly agree.
    distance = ((s - t).square().sum(dim=-1) + (~s_varies).float()) / 2
    return (distance * t_varies).sum(dim=1) / t_varies.sum(dim=1).clamp_min(1)


class DISTLoss(nn.Module):
    """One minus the Pearson correlation of the probabilities, over classes and over voxels.

    Source: [paper] DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536) matches the correlations of predictions instead
    of the predictions: between the classes of an instance (inter-class) and between the instances of a class
    (intra-class). The instances are all voxels of all samples of the batch, as in the authors' released segmentation
    code; [ours] the 3D form, and constant rows are left out::

        p = softmax(logits / temperature)
        L = inter * mean over voxels of (1 - Pearson over classes of p_student and p_teacher)
          + intra * mean over classes of (1 - Pearson over all voxels of the batch of p_student and p_teacher)

    With ``per_sample`` each sample has its own correlations, and L is the mean over the samples. A patch without tumour
    then counts as much as a patch with tumour, and because its predictions hardly vary, its gradient is larger: do not
    use it on patches of which many are empty. ``DistillationLoss`` passes single samples if the samples of a batch have
    different teacher weights: for correlations over the batch, use equal weights.

    Each part is in [0, 2]. A teacher that is constant (a class over all voxels, or a voxel over all classes) has no
    correlation: that row is left out of the mean, and the mean of no rows is 0. A constant row of the student has
    correlation 0 and gets no gradient. Correlations are independent of scale, so the gradient grows as 1 / spread for a
    student whose predictions hardly vary yet: warm this term up.

    With two classes the correlation over classes is 1 or -1 for any probabilities. The inter-class part then counts the
    voxels whose most likely class differs (times 2) and has no gradient: only the intra-class part trains the student.
    A single-channel (sigmoid) head is treated as the two-class logits (0, z).

    Config::

        "loss#terms#dist": {"tap": "logits", "weight": 1.0, "loss": {"_target_": "scripts.losses.DISTLoss"}}

    Args:
        inter: factor of the inter-class part.
        intra: factor of the intra-class part.
        temperature: softening of the softmax. There is no factor temperature^2, because correlations do not shrink with
            the probabilities.
        per_sample: correlate the voxels of each sample instead of those of the batch.

    Raises:
        ValueError: ``inter`` or ``intra`` is negative, or ``temperature`` is not positive.
    """

    of_probabilities = True  # see DistillationLoss

    def __init__(
        self, inter: float = 1.0, intra: float = 1.0, temperature: float = 1.0, per_sample: bool = False
    ) -> None:
        super().__init__()
        if inter < 0 or intra < 0:
            raise ValueError(f"inter and intra must not be negative, got {inter} and {intra}.")
        check_positive("temperature", temperature)
        self.inter, self.intra, self.temperature, self.per_sample = inter, intra, temperature, per_sample
        self.voxels_of = "sample" if per_sample else "batch"  # see DistillationLoss

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax of ``B C H W [D]``, as ``1 C B*N``, or ``B C N`` per sample."""
        p = two_class_logits(logits.float().flatten(2) / self.temperature).softmax(dim=1)
        return p if self.per_sample else p.transpose(0, 1).flatten(1).unsqueeze(0)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the predictions.

        Args:
            student: logits, ``B C H W [D]``.
            teacher: logits of the same shape.

        Returns:
            Scalar, 0 if the predictions agree.

        Raises:
            ValueError: the shapes differ or are not ``B C H W [D]``. The message contains both shapes.
        """
        check_same_shape(student, teacher)
        check_maps(student, teacher)
        s, t = self._probabilities(student), self._probabilities(teacher.detach())
        inter = _correlation_distance(s.transpose(1, 2), t.transpose(1, 2))
        if s.shape[1] == 2:
            # The exact gradient is zero. Near p = 1/2, division by a small norm would amplify its rounding errors.
            inter = inter.detach()
        return (self.inter * inter + self.intra * _correlation_distance(s, t)).mean()
