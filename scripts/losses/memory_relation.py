# SPDX-License-Identifier: Apache-2.0
"""Distil how similar the features are to those of earlier images, which a memory keeps by class."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._class_regions import class_means, class_shares, occurring_classes
from scripts.losses._common import (
    check_at_least,
    check_channels,
    check_choice,
    check_positive,
    kl_divergence,
    matmul_float32,
    to_common_grid,
    unit_vectors,
)

# Sizes of the authors' released code: entries kept per class, and entries drawn per step for all classes together.
RELEASED_SIZES = {"pixel": (20000, 4096), "region": (2000, 1024)}


class MemoryRelationLoss(nn.Module):
    """Kullback-Leibler divergence of the similarities between cells and a memory of the teacher's features.

    Source: [paper] the memory-based pixel-to-pixel and pixel-to-region distillation of CIRKD (Yang et al., CVPR 2022,
    arXiv 2204.06986, section 3.3): for every class a first-in-first-out queue keeps unit features of the teacher from
    earlier images, of single pixels or of whole regions, and both networks are compared by their similarities to the
    same entries. The sizes are those of the released code::

        P = softmax over the drawn entries v of cos(f_i, v) / temperature
        L = mean over batch and cells i of KL(P of the teacher || P of the student)

    [ours] The 3D form: cells of adaptive average pooling, at most ``grid`` per axis, instead of pixels. Of each image
    and class, ``"pixel"`` keeps up to ``cells`` cells, drawn with a probability proportional to the class's share of
    the cell, and ``"region"`` keeps the mean of the features weighted by these shares (``scripts.losses
    ._class_regions``). The queues begin empty, not with random vectors, and a ``ChannelAdapter`` takes the place of the
    published projection head.

    The first step compares the batch with itself. Every teacher has queues of its own (``source``). They are part of
    ``state_dict``, so that a resumed training continues with them; in eval() they do not change. Features that are NaN
    or infinite are not kept. With several processes, each keeps the features of its own images.

    Config::

        "loss#terms#memory": {
          "tap": "memory",
          "weight": 0.1,
          "loss": {"_target_": "scripts.losses.MemoryRelationLoss", "kind": "pixel"}
        }

    Args:
        kind: what is kept, ``"pixel"`` or ``"region"``.
        temperature: of the softmax over the similarities.
        grid: maximum number of cells per axis. If a map has fewer voxels along an axis, the smaller map's size is used.
        cells: cells kept per image and class, for ``"pixel"``.
        size: entries kept per class; None: 20000 cells or 2000 regions.
        draws: entries drawn per step for all classes together; None: 4096 cells or 1024 regions.

    Raises:
        ValueError: ``kind`` is unknown, ``temperature`` is not positive, or a number is less than 1.
    """

    def __init__(
        self,
        kind: str = "pixel",
        temperature: float = 0.1,
        grid: int = 4,
        cells: int = 16,
        size: int | None = None,
        draws: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, tuple(RELEASED_SIZES))
        check_positive("temperature", temperature)
        released_size, released_draws = RELEASED_SIZES[kind]
        self.size = released_size if size is None else size
        self.draws = released_draws if draws is None else draws
        for name, value in {"grid": grid, "cells": cells, "size": self.size, "draws": self.draws}.items():
            check_at_least(name, value, 1)
        self.kind, self.temperature, self.grid, self.cells = kind, temperature, grid, cells
        self.queues: dict[str, dict[int, torch.Tensor]] = {}

    def get_extra_state(self) -> dict[str, dict[int, torch.Tensor]]:
        """Return the queues: teacher -> class -> ``entries C``."""
        return self.queues

    def set_extra_state(self, state: dict[str, dict[int, torch.Tensor]]) -> None:
        """Restore the queues."""
        self.queues = state

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor, source: str = ""
    ) -> torch.Tensor:
        """Compare the similarities to the memory of this teacher.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; the grid may differ from the student's, C must not.
            label: class indices, ``B 1 H W [D]``, at the image's resolution.
            source: name of the teacher.

        Returns:
            Scalar, 0 if the similarities agree.

        Raises:
            ValueError: the batch sizes, numbers of dimensions or numbers of channels differ, or the label is coarser
                than the features. The message contains both shapes.
        """
        check_channels(student, teacher)
        maps = to_common_grid(student.float(), teacher.detach().float(), self.grid)
        cells_s, cells_t = (unit_vectors(m.flatten(2), dim=1) for m in maps)
        queues = self.queues.setdefault(source, {})
        for klass, queue in queues.items():
            queues[klass] = queue.to(cells_t)  # a resumed training reads them on the CPU
        if self.training:
            shares = class_shares(label, maps[0])
            for k, klass in enumerate(occurring_classes(label).tolist()):
                new = torch.cat([self._entries(c, share) for c, share in zip(cells_t, shares[:, k], strict=True)])
                new = new[new.isfinite().all(dim=1)]  # a NaN would stay for many steps
                kept = [queues[int(klass)]] if int(klass) in queues else []
                queues[int(klass)] = torch.cat([*kept, new])[-self.size :]
        if not queues:
            return (student * 0.0).sum()
        memory = self._draw(queues)
        cosines = (matmul_float32(cells.transpose(1, 2), memory.T) for cells in (cells_s, cells_t))
        log_s, log_t = ((cosine / self.temperature).log_softmax(dim=2) for cosine in cosines)
        return kl_divergence(log_t, log_s, dim=2).mean()

    def _entries(self, cells: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Return what is kept of one image's ``C N`` cells for a class with these shares ``N``: ``entries C``."""
        occupied = int((share > 0).sum())
        if not occupied:
            return cells.T[:0]
        if self.kind == "region":
            return unit_vectors(class_means(cells.unsqueeze(0), share.view(1, 1, -1))[0], dim=1)
        if occupied <= self.cells:
            return cells.T[share > 0]
        return cells.T[torch.multinomial(share, self.cells)]

    def _draw(self, queues: dict[int, torch.Tensor]) -> torch.Tensor:
        """Draw the same number of entries of every class, without repetition; a shorter queue is used whole."""
        number = self.draws // len(queues) + 1
        return torch.cat(
            [q if len(q) <= number else q[torch.randperm(len(q), device=q.device)[:number]] for q in queues.values()]
        )
