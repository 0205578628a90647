# SPDX-License-Identifier: Apache-2.0
"""Distillation of how alike the features of any two places are."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import check_maps, pool, unit


class PixelRelationLoss(nn.Module):
    """Mean squared difference of the pair-wise cosines between cells; the channel counts may differ.

    Source: [paper] CPKD (Xiong and Yu, ICIPAI 2024, doi 10.1117/12.3035260) distils the correlation between pixels
    beside that between channels (ChannelRelationLoss); [ours] the formula. It is also the pair-wise loss of SKD (Liu
    et al., CVPR 2019, arXiv 1903.04197), so this class is the baseline PairwiseSimilarity too::

        F = C x N: adaptive average pooling to N cells, q_i = F_i / ||F_i|| over channels
        G = q^T q,  N x N, cosines in [-1, 1]
        L = mean over batch and N^2 of (G_student - G_teacher)^2,  in [0, 4]

    Cells per axis: ``grid``, or the size of the smaller map where that has fewer voxels; neither map is up-sampled.
    The length of a cell's feature and a rotation of the channels change nothing. A zero feature has cosine 0 with
    all cells, itself included, and gets no gradient.

    Memory is bounded whatever the patch: N <= grid^3, so a matrix G has at most grid^6 numbers, 12 MB per sample in
    float32 for the default; twice the grid takes 64 times as much.

    Config::

        "taps#pairs": "@layers#deep",
        "loss#terms#pairs": {"tap": "pairs", "weight": 1.0, "loss": {"_target_": "scripts.losses.PixelRelationLoss"}}

    Args:
        grid: most cells per axis.

    Raises:
        ValueError: ``grid`` is below 2 (one cell relates to nothing).
    """

    def __init__(self, grid: int = 12) -> None:
        super().__init__()
        if grid < 2:
            raise ValueError(f"grid must be at least 2, got {grid}.")
        self.grid = grid

    def _relations(self, features: torch.Tensor) -> torch.Tensor:
        cells = unit(features.flatten(2), dim=1)
        with torch.autocast(cells.device.type, enabled=False):
            return cells.transpose(1, 2) @ cells

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (C and the grid may differ), to a scalar, 0 where the relations agree.

        Raises:
            ValueError: the maps are not two batches of one size and dimension; both shapes are named.
        """
        check_maps(student, teacher)
        cells = [min(self.grid, s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = pool(student.float(), cells), pool(teacher.detach().float(), cells)
        return (self._relations(student) - self._relations(teacher)).square().mean()
