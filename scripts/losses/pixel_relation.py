# SPDX-License-Identifier: Apache-2.0
"""Distil how similar the features of any two places are."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import check_at_least, matmul_float32, to_common_grid, unit_vectors


class PixelRelationLoss(nn.Module):
    """Mean squared difference of the pair-wise cosines between cells.

    Source: [paper] CPKD (Xiong and Yu, ICIPAI 2024, doi 10.1117/12.3035260) distils the correlation between pixels
    and the correlation between channels (see ChannelRelationLoss); [ours] the formula. It is also the pair-wise loss of
    SKD (Liu et al., CVPR 2019, arXiv 1903.04197), so this class serves as that baseline too::

        F = C x N: adaptive average pooling to N cells,  q_i = F_i / ||F_i|| over channels
        G = q^T q,  N x N, cosines in [-1, 1]
        L = mean over batch and N^2 of (G_student - G_teacher)^2

    The range of L is [0, 4]. Each axis has ``grid`` cells, or as many as the smaller map has voxels if that is fewer;
    no map is up-sampled. Neither the length of a cell's feature nor a rotation of the channels changes L. A zero
    feature has cosine 0 with every cell, including itself, and gets no gradient. The numbers of channels may differ.

    Memory does not depend on the patch size: N <= grid^3, so a matrix G has at most grid^6 numbers. That is 12 MB per
    sample in float32 for the default; a grid of twice the size takes 64 times as much.

    Config::

        "loss#terms#pairs": {"tap": "deep", "weight": 1.0, "loss": {"_target_": "scripts.losses.PixelRelationLoss"}}

    Args:
        grid: maximum number of cells per axis.

    Raises:
        ValueError: ``grid`` is less than 2 (a single cell has no pair).
    """

    def __init__(self, grid: int = 12) -> None:
        super().__init__()
        check_at_least("grid", grid, 2)
        self.grid = grid

    def relations(self, features: torch.Tensor) -> torch.Tensor:
        """Compute G, ``B N N``, from pooled features ``B C H W [D]``."""
        cells = unit_vectors(features.flatten(2), dim=1)
        return matmul_float32(cells.transpose(1, 2), cells)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the cosines between cells.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; C and the grid may differ from the student's.

        Returns:
            Scalar, 0 if the cosines agree.

        Raises:
            ValueError: the batch sizes or numbers of dimensions differ. The message contains both shapes.
        """
        student, teacher = to_common_grid(student.float(), teacher.detach().float(), self.grid)
        return (self.relations(student) - self.relations(teacher)).square().mean()
