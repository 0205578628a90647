# SPDX-License-Identifier: Apache-2.0
"""Distil the similarities between the cells of all images of a batch."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import (
    check_at_least,
    check_positive,
    kl_divergence,
    matmul_float32,
    to_common_grid,
    unit_vectors,
)


class CrossImageRelationLoss(nn.Module):
    """Kullback-Leibler divergence of the similarities between cells, across the images of a batch.

    Source: [paper] CIRKD (Yang et al., CVPR 2022, arXiv 2204.06986) transfers pixel-to-pixel relations among whole
    images; its released mini-batch loss uses all ordered pairs of images, including an image with itself. The memory
    queues of that paper are ``MemoryRelationLoss``; [ours] the pooled cells and the 3D form. Adaptive average pooling
    gives N cells, at most ``grid`` per axis. For the images i and j of a batch, R_ij has one row per cell of image i
    and one column per cell of image j::

        R_ij = softmax over columns of cos(f_i, f_j) / temperature
        L = mean over ordered pairs (i, j) and rows of KL(R_ij of the teacher || R_ij of the student)

    Because pairs with i == j are included, a batch of one image also has a value, but it compares no images with each
    other. ``DistillationLoss`` passes single images if the samples of a batch have different teacher weights: for the
    cross-image part, use a batch of at least 2 and equal weights. The loss stores B^2 N^2 similarities with
    N <= grid^3, independent of the patch size. A zero feature has cosine 0. A map of one cell gives 0. The numbers of
    channels may differ.

    Config::

        "loss#terms#cir": {"tap": "fine", "weight": 1.0, "loss": {"_target_": "scripts.losses.CrossImageRelationLoss"}}

    Args:
        temperature: of the softmax over the similarities.
        grid: maximum number of cells per axis. If a map has fewer voxels along an axis, the smaller map's size is used.

    Raises:
        ValueError: ``temperature`` is not positive, or ``grid`` is less than 1.
    """

    def __init__(self, temperature: float = 0.1, grid: int = 4) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_at_least("grid", grid, 1)
        self.temperature, self.grid = temperature, grid

    def _log_relations(self, features: torch.Tensor) -> torch.Tensor:
        """Compute log R from ``B C H W [D]``, with one row per cell of the batch: ``B*N B N``."""
        batch, channels = features.shape[:2]
        cells = features.flatten(2).transpose(1, 2).reshape(-1, channels)
        cells = unit_vectors(cells, dim=1)
        cosines = matmul_float32(cells, cells.T)
        return (cosines.view(len(cells), batch, -1) / self.temperature).log_softmax(dim=2)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the similarities.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; C and the grid may differ from the student's.

        Returns:
            Scalar, 0 if the similarities agree.

        Raises:
            ValueError: the batch sizes or numbers of dimensions differ. The message contains both shapes.
        """
        maps = to_common_grid(student.float(), teacher.detach().float(), self.grid)
        log_s, log_t = (self._log_relations(m) for m in maps)
        return kl_divergence(log_t, log_s, dim=2).mean()
