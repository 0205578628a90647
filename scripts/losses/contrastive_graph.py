# SPDX-License-Identifier: Apache-2.0
"""Distillation of how the codes of an image and of its augmented views relate to each other."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import unit


class ContrastiveGraphLoss(nn.Module):
    """Kullback-Leibler divergence of two graphs over the codes of an image and its K views.

    Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995 (dual contrastive graph distillation): the intra graph is a
    star from the image to its augmented versions, the inter graph is complete over the vectors; [ours] the formula,
    with z_0 the image's code, z_1 .. z_K its views', each of length 1::

        intra = mean over batch of KL(softmax_k(<z_0, z_k> / temperature) of the teacher || of the student), k >= 1
        inter = mean over batch and views i of KL(softmax_j(<z_i, z_j> / temperature) of the teacher || of the
                student), j >= 1, j != i
        L     = intra + inter

    A softmax over one edge is constant: K = 1 gives 0, K = 2 has an intra graph only, and the inter graph teaches from
    K = 3 views on. Only similarities inside one network are used, so the lengths of the codes may differ. A code of
    zeros has cosine 0. ``logged`` holds intra and inter of the last call.

    Config::

        "loss#terms#graphs": {
          "tap": "codes", "weight": 1.0, "loss": {"_target_": "scripts.losses.ContrastiveGraphLoss"}
        }

    Args:
        temperature: of the softmax over the similarities.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature
        self.logged: dict[str, float] = {}

    def _graphs(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``B K+1 M`` to the edges' log-probabilities: the star's ``B K``, the complete graph's ``B K K-1``."""
        codes = unit(codes, dim=2)
        with torch.autocast(codes.device.type, enabled=False):
            cosines = codes @ codes.transpose(1, 2) / self.temperature
        views = codes.shape[1] - 1
        other = ~torch.eye(views, dtype=torch.bool, device=codes.device)
        complete = cosines[:, 1:, 1:][:, other].view(len(codes), views, views - 1)
        return cosines[:, 0, 1:].log_softmax(dim=1), complete.log_softmax(dim=2)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Codes of both, ``B K+1 M`` with the image's at index 0 (M may differ), to a scalar, 0 where the graphs agree.

        Raises:
            ValueError: not two such batches with one B and one K >= 1; both shapes are named.
        """
        if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2] or student.shape[1] < 2:
            raise ValueError(
                f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be codes (B, K + 1, M) "
                "with one B and one K >= 1."
            )
        graphs = zip(self._graphs(student.float()), self._graphs(teacher.detach().float()), strict=True)
        intra, inter = ((log_t.exp() * (log_t - log_s)).sum(dim=-1).mean() for log_s, log_t in graphs)
        self.logged = {"intra": intra.item(), "inter": inter.item()}
        return intra + inter
