# SPDX-License-Identifier: Apache-2.0
"""A teacher's own intensity windows, computed from the task's normalised input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

Rule = Sequence[float] | str  # [low, high], which is scaled to [0, 1] and clipped, or "zscore"


def differing_rules(own: Mapping[str, Rule], task: Mapping[str, Rule]) -> dict[str, tuple[Rule, Rule]]:
    """The modalities of the task with another rule than the task's: modality -> own rule, the task's rule."""
    pairs = {key: (rule, task[key]) for key, rule in own.items() if key in task}
    return {key: (one, two) for key, (one, two) in pairs.items() if _plain(one) != _plain(two)}


def can_rescale(own: Rule, task: Rule) -> bool:
    """Whether the own window is linear and lies within the task's, so that no value that it needs was clipped."""
    if isinstance(own, str) or isinstance(task, str):
        return False
    return task[0] <= own[0] < own[1] <= task[1]


def _plain(rule: Rule) -> Rule:
    return rule if isinstance(rule, str) else [float(value) for value in rule]


class Rescale(nn.Module):
    """From the task's normalised input to a teacher's: ``B m H W D`` in [0, 1] -> ``B m H W D`` in [0, 1].

    With the task's window [L, H] and the teacher's [l, h] a value x stands for v = L + x (H - L), and becomes
    (v - l) / (h - l), clipped. An absent modality is 0 and stays 0.

    Args:
        modalities: of the input, in the order of its channels.
        own: modality -> the teacher's [low, high], in the units of the files (HU, SUV, a.u.).
        task: modality -> the task's [low, high]; it holds the teacher's.
    """

    gain: torch.Tensor
    offset: torch.Tensor

    def __init__(self, modalities: Sequence[str], own: Mapping[str, Rule], task: Mapping[str, Rule]) -> None:
        super().__init__()
        windows = [(own.get(key, task[key]), task[key]) for key in modalities]
        linear = [(1.0, 0.0) if one == two else _gain_and_offset(one, two) for one, two in windows]
        for i, name in enumerate(("gain", "offset")):
            values = torch.tensor([pair[i] for pair in linear]).view(1, -1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        # Only the rescaled channels are clipped: those of a z-score lie outside of [0, 1].
        changed = torch.tensor([one != two for one, two in windows]).view(1, -1, 1, 1, 1)
        self.register_buffer("changed", changed, persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Rescale."""
        return torch.where(self.changed, (image * self.gain + self.offset).clamp(0, 1), image)  # type: ignore[arg-type]


def _gain_and_offset(own: Rule, task: Rule) -> tuple[float, float]:
    low, high, task_low, task_high = map(float, (*own, *task))
    return (task_high - task_low) / (high - low), (task_low - low) / (high - low)
