# SPDX-License-Identifier: Apache-2.0
"""Distil how the codes of an image and of its augmented views relate to each other."""

from __future__ import annotations

import torch
from torch import nn

from scripts.losses._common import check_positive, kl_divergence, matmul_float32, shapes_text, unit_vectors


class ContrastiveGraphLoss(nn.Module):
    """Kullback-Leibler divergence of two graphs over the codes of an image and its K augmented views.

    Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995 (dual contrastive graph distillation): the intra graph is a
    star from the image to its augmented versions, the inter graph is complete over the vectors; [ours] the formula,
    where z_0 is the image's code and z_1 .. z_K are the codes of its views, each scaled to length 1::

        intra = mean over batch of KL(softmax_k(<z_0, z_k> / temperature) of the teacher || of the student), k >= 1
        inter = mean over batch and views i of KL(softmax_j(<z_i, z_j> / temperature) of the teacher || of the
                student), j >= 1, j != i
        L     = intra + inter

    A softmax over a single edge is constant. Therefore K = 1 gives 0, K = 2 uses the intra graph only, and the inter
    graph contributes from K = 3 views on. Similarities are computed within each network only, so student and teacher
    codes may have different lengths M. A zero code has cosine 0 with every other code.

    The attribute ``logged`` holds ``intra`` and ``inter`` of the last call.

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
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.logged: dict[str, float] = {}

    def _log_graphs(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the log-probabilities of the edges from codes ``B K+1 M``.

        Returns:
            The star, ``B K``; and the complete graph, ``B K K-1``.
        """
        codes = unit_vectors(codes, dim=2)
        similarities = matmul_float32(codes, codes.transpose(1, 2)) / self.temperature
        views = codes.shape[1] - 1
        off_diagonal = ~torch.eye(views, dtype=torch.bool, device=codes.device)
        complete = similarities[:, 1:, 1:][:, off_diagonal].view(len(codes), views, views - 1)
        return similarities[:, 0, 1:].log_softmax(dim=1), complete.log_softmax(dim=2)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the graphs.

        Args:
            student: codes, ``B K+1 M``, with the image's code at index 0.
            teacher: codes, ``B K+1 M``; M may differ from the student's.

        Returns:
            Scalar, 0 if the graphs agree.

        Raises:
            ValueError: the codes are not three-dimensional, B or K differs, or K is 0. The message contains both
                shapes.
        """
        if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2] or student.shape[1] < 2:
            raise ValueError(
                f"{shapes_text(student, teacher)} must both be codes (B, K + 1, M) with the same batch size and the "
                "same K >= 1."
            )
        graphs = zip(self._log_graphs(student.float()), self._log_graphs(teacher.detach().float()), strict=True)
        intra, inter = (kl_divergence(log_t, log_s, dim=-1).mean() for log_s, log_t in graphs)
        self.logged = {"intra": intra.item(), "inter": inter.item()}
        return intra + inter
