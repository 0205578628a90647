# SPDX-License-Identifier: Apache-2.0
"""Distillation of which regions of the image matter most, and in which order."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import EPS, check_maps, check_same_shape, pool


class TokenRankingLoss(nn.Module):
    """Likelihood of the teacher's order of its most important tokens under the student's importance.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) ranks the top k tokens by importance, at several layers, by a
    ranking loss; [ours] the formula, a top-k ListMLE (Xia et al., ICML 2008) with the discount of DCG::

        X = LayerNorm over C, without affine, of the N tokens that adaptive average pooling leaves, N x C
        A = softmax(X X^T / sqrt(C)) over each row's N entries,    I = mean over the rows of A, sums to 1
        pi = the tokens by falling I_teacher,  s = log I_student,  w_i = 1 / log2(1 + i),  k = round(top_k * N)
        L = -1 / (sum of w_i) * sum over i <= k of w_i * [s_pi(i) - log sum over j >= i of exp s_pi(j)]

    Each bracket is the log-probability that the student, drawing tokens by their worth I_student, draws the teacher's
    i-th token next. L is positive: 0 is its infimum, approached with a vanishing gradient as the worths separate in
    the teacher's order (s_pi(1) >> .. >> s_pi(k) >> the rest) and reached only at N = 1. At student == teacher it is
    therefore neither 0 nor stationary. Importance may be scaled: only ratios of worths count. Averaged over those
    samples of the batch whose teacher has an order to teach: where its importance is flat (entropy / log N > ``flat``)
    a sample is skipped, and with all of them skipped L is 0. Channel counts may differ.

    ``logged`` holds the last call's ``top_k_overlap``, the share of the teacher's top k that is in the student's top k
    (mean over the samples that count, 0 without any), and ``flat_teachers``, the share of skipped samples.

    Config::

        "loss#terms#rank": {"tap": "deep", "weight": 0.1, "loss": {"_target_": "scripts.losses.TokenRankingLoss"}}

    Args:
        top_k: share of the tokens that is ranked, above 0 and up to 1; at least one token is.
        grid: cells per axis, fewer on an axis where either map is smaller.
        flat: entropy / log N above which a teacher's importance is flat; watch ``flat_teachers`` when choosing it.

    Raises:
        ValueError: ``top_k`` or ``flat`` outside (0, 1], ``grid`` below 1.
    """

    def __init__(self, top_k: float = 0.25, grid: int = 6, flat: float = 0.995) -> None:
        super().__init__()
        if not 0 < top_k <= 1:
            raise ValueError(f"top_k must be above 0 and up to 1, got {top_k}.")
        if grid < 1:
            raise ValueError(f"grid must be at least 1, got {grid}.")
        if not 0 < flat <= 1:
            raise ValueError(f"flat must be above 0 and up to 1, got {flat}.")
        self.top_k, self.grid, self.flat = top_k, grid, flat
        self.logged: dict[str, float] = {}

    @staticmethod
    def importance(features: torch.Tensor) -> torch.Tensor:
        """Attention that each token of ``B C H W [D]`` receives, ``B N``; rows sum to 1."""
        tokens = features.float().flatten(2).transpose(1, 2)
        tokens = functional.layer_norm(tokens, tokens.shape[-1:])
        with torch.autocast(tokens.device.type, enabled=False):
            scores = tokens @ tokens.transpose(1, 2) / math.sqrt(tokens.shape[-1])
        return scores.softmax(dim=-1).mean(dim=1)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Features of both, ``B C H W [D]`` (C and the grid may differ), to a scalar.

        Raises:
            ValueError: the maps are not two batches of one size and dimension; both shapes are named.
        """
        check_maps(student, teacher)
        cells = [min(self.grid, s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        tokens = (pool(x.float(), cells) for x in (student, teacher.detach()))
        return self.ranking(*(self.importance(x) for x in tokens))

    def ranking(self, student_importance: torch.Tensor, teacher_importance: torch.Tensor) -> torch.Tensor:
        """Importance of both, ``B N`` and not negative (a transformer's own attention, say), to a scalar.

        Raises:
            ValueError: the shapes differ or are not ``B N``; both are named.
        """
        student, teacher = student_importance.float(), teacher_importance.detach().float()
        check_same_shape(student, teacher)
        if student.dim() != 2:
            raise ValueError(f"Student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be B N.")
        count = student.shape[1]
        k = max(1, round(self.top_k * count))
        order = teacher.argsort(dim=1, descending=True, stable=True)
        worth = student.clamp_min(EPS).log().gather(1, order)
        remaining = worth.flip(1).logcumsumexp(dim=1).flip(1)
        weights = 1 / torch.arange(2, k + 2, device=worth.device, dtype=torch.float32).log2()
        values = ((remaining - worth)[:, :k] * weights).sum(dim=1) / weights.sum()
        entropy = torch.special.entr(teacher / teacher.sum(dim=1, keepdim=True).clamp_min(EPS)).sum(dim=1)
        kept = (entropy <= self.flat * math.log(count)).float()
        ranked = kept.sum().clamp_min(1)
        # A token is in the student's top k where fewer than k tokens come before it in the student's own order.
        place = student.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        overlap = (place.gather(1, order[:, :k]) < k).float().mean(dim=1)
        self.logged = {
            "top_k_overlap": float((overlap * kept).sum() / ranked),
            "flat_teachers": float(1 - kept.mean()),
        }
        return (values * kept).sum() / ranked
