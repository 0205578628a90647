# SPDX-License-Identifier: Apache-2.0
"""Distillation of the similarities between the voxels of a batch's images."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import check_maps, pool, unit


class CrossImageRelationLoss(nn.Module):
    """Kullback-Leibler divergence of the cells' similarities across a batch; the channel counts may differ.

    Source: [paper] CIRKD (Yang et al., CVPR 2022, arXiv 2204.06986) transfers pixel-to-pixel relations among whole
    images; its released mini-batch loss takes all ordered pairs of images, an image with itself among them. The
    memory queues of that paper are not part of this loss; [ours] the cells, in 3D. For the images i and j of a batch,
    with rows and columns over the cells of an adaptive average pooling to at most ``grid`` cells per axis::

        R_ij = softmax over columns of cos(f_i, f_j) / temperature
        L = mean over ordered pairs (i, j) and rows of KL(R_ij of the teacher || R_ij of the student)

    Pairs i == j are included, so that a batch of one image has a value: its relation to itself alone, nothing across
    images. ``DistillationLoss`` also passes single images, wherever the samples of a batch have different teacher
    weights; for the cross-image part take a batch of at least 2 and equal weights. Memory: B^2 N^2 similarities for
    N <= grid^3 cells, whatever the patch's size. A zero feature has cosine 0. A map of one cell has nothing to relate:
    the value is 0.

    Config::

        "loss#terms#cir": {"tap": "fine", "weight": 1.0, "loss": {"_target_": "scripts.losses.CrossImageRelationLoss"}}

    Args:
        temperature: of the softmax over the similarities.
        grid: most cells per axis; where a map has fewer voxels along an axis, those of the smaller map.

    Raises:
        ValueError: ``temperature`` is not positive, or ``grid`` is below 1.
    """

    def __init__(self, temperature: float = 0.1, grid: int = 4) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if grid < 1:
            raise ValueError(f"grid must be at least 1, got {grid}.")
        self.temperature, self.grid = temperature, grid

    def _log_relations(self, features: torch.Tensor) -> torch.Tensor:
        """``B C H W [D]`` to log R, one row per cell of the batch: ``B*N B N``."""
        batch, channels = features.shape[:2]
        cells = features.flatten(2).transpose(1, 2).reshape(-1, channels)
        cells = unit(cells, dim=1)
        with torch.autocast(cells.device.type, enabled=False):
            cosines = cells @ cells.T
        return (cosines.view(len(cells), batch, -1) / self.temperature).log_softmax(dim=2)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (C and the grid may differ), to a scalar, 0 where the relations agree.

        Raises:
            ValueError: the maps are not two batches of one size and dimension; both shapes are named.
        """
        check_maps(student, teacher)
        grid = [min(self.grid, s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        log_s, log_t = (self._log_relations(pool(x.float(), grid)) for x in (student, teacher.detach()))
        return (log_t.exp() * (log_t - log_s)).sum(dim=2).mean()
