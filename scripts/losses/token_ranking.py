# SPDX-License-Identifier: Apache-2.0
"""Distil which regions of the image are most important, and in which order."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from scripts.losses._common import EPS, check_at_least, check_same_shape, matmul_float32, shapes_text, to_common_grid


class TokenRankingLoss(nn.Module):
    """Negative log-likelihood of the teacher's most important tokens, in order, under the student's importance.

    Source: [paper] RSKD (Knowledge-Based Systems 2024) ranks the top k tokens by importance, at several layers, by a
    ranking loss; [ours] the formula, a top-k ListMLE (Xia et al., ICML 2008) with the discount of DCG::

        X = the N x C tokens of adaptive average pooling, after LayerNorm over C without affine parameters
        A = softmax(X X^T / sqrt(C)) over each row's entries but its diagonal,    I = mean over the rows of A, sums to 1
        pi = the tokens in descending order of I_teacher,  s = log I_student,  w_i = 1 / log2(1 + i)
        L = -1 / (sum of w_i) * sum over i <= k of w_i * [s_pi(i) - log sum over j >= i of exp s_pi(j)]

    with k = round(top_k * N). Suppose that tokens are drawn one after the other, with probabilities proportional to
    I_student. Then each bracket is the log-probability that the teacher's i-th token is drawn next. The numbers of
    channels may differ. After the layer normalisation a token's score with itself is always the largest, sqrt(C): with
    the diagonal, every token would give almost all of its attention to itself, and all importances would be equal.

    L is positive. Its infimum 0 is reached only for N = 1; L and its gradient approach 0 as the student's importances
    separate in the teacher's order (s_pi(1) >> .. >> s_pi(k) >> the rest). At student == teacher L is therefore neither
    0 nor stationary. Only ratios of importances count. L is averaged over the samples of the batch whose teacher has a
    clear order: samples with flat importance (entropy / log N > ``flat``) are skipped. If all are skipped, L is 0.

    The attribute ``logged`` holds two values of the last call: ``top_k_overlap``, the share of the teacher's top k that
    is also in the student's top k (mean over the samples that were not skipped, or 0), and ``flat_teachers``, the share
    of skipped samples.

    Config::

        "loss#terms#rank": {"tap": "deep", "weight": 0.1, "loss": {"_target_": "scripts.losses.TokenRankingLoss"}}

    Args:
        top_k: share of the tokens that is ranked, in (0, 1]; at least one token is ranked.
        grid: cells per axis; fewer along an axis on which either map is smaller.
        flat: entropy / log N above which a teacher's importance counts as flat. The default is just below that of
            noise on the default grid of 216 tokens. With few tokens noise has an order by chance, and only nearly
            constant maps are found. Watch ``flat_teachers``.

    Raises:
        ValueError: ``top_k`` or ``flat`` is not in (0, 1], or ``grid`` is less than 1.
    """

    def __init__(self, top_k: float = 0.25, grid: int = 6, flat: float = 0.999) -> None:
        super().__init__()
        for name, value in {"top_k": top_k, "flat": flat}.items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}.")
        check_at_least("grid", grid, 1)
        self.top_k, self.grid, self.flat = top_k, grid, flat
        self.logged: dict[str, float] = {}

    @staticmethod
    def importance(features: torch.Tensor) -> torch.Tensor:
        """Compute the attention that each token of ``B C H W [D]`` receives from the others: ``B N``, rows sum to 1."""
        tokens = features.float().flatten(2).transpose(1, 2)
        tokens = functional.layer_norm(tokens, tokens.shape[-1:])
        scores = matmul_float32(tokens, tokens.transpose(1, 2)) / math.sqrt(tokens.shape[-1])
        if scores.shape[-1] == 1:  # there is no other token
            return scores.new_ones(scores.shape[:2])
        itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        return scores.masked_fill(itself, float("-inf")).softmax(dim=-1).mean(dim=1)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Compare the importance of the tokens of two feature maps.

        Args:
            student: features, ``B C H W [D]``.
            teacher: features, ``B C H W [D]``; C and the grid may differ from the student's.

        Returns:
            Scalar.

        Raises:
            ValueError: the batch sizes or numbers of dimensions differ. The message contains both shapes.
        """
        student, teacher = to_common_grid(student.float(), teacher.detach().float(), self.grid)
        return self.ranking(self.importance(student), self.importance(teacher))

    def ranking(self, student_importance: torch.Tensor, teacher_importance: torch.Tensor) -> torch.Tensor:
        """Compare importances that are already known, such as a transformer's own attention.

        Args:
            student_importance: ``B N``, not negative.
            teacher_importance: ``B N``, not negative.

        Returns:
            Scalar.

        Raises:
            ValueError: the shapes differ or are not ``B N``. The message contains both shapes.
        """
        student, teacher = student_importance.float(), teacher_importance.detach().float()
        check_same_shape(student, teacher)
        if student.dim() != 2:
            raise ValueError(f"{shapes_text(student, teacher)} must both be B N.")
        tokens = student.shape[1]
        k = max(1, round(self.top_k * tokens))
        teacher_order = teacher.argsort(dim=1, descending=True, stable=True)
        scores = student.clamp_min(EPS).log().gather(1, teacher_order)
        log_remaining = scores.flip(1).logcumsumexp(dim=1).flip(1)
        weights = 1 / torch.arange(2, k + 2, device=scores.device, dtype=torch.float32).log2()
        per_sample = ((log_remaining - scores)[:, :k] * weights).sum(dim=1) / weights.sum()
        entropy = torch.special.entr(teacher / teacher.sum(dim=1, keepdim=True).clamp_min(EPS)).sum(dim=1)
        ranked = (entropy <= self.flat * math.log(tokens)).float()
        ranked_count = ranked.sum().clamp_min(1)
        # The rank of each token in the student's own order: a token is in the student's top k if its rank is below k.
        ranks = student.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        overlap = (ranks.gather(1, teacher_order[:, :k]) < k).float().mean(dim=1)
        self.logged = {
            "top_k_overlap": float((overlap * ranked).sum() / ranked_count),
            "flat_teachers": float(1 - ranked.mean()),
        }
        return (per_sample * ranked).sum() / ranked_count
