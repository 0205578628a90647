# SPDX-License-Identifier: Apache-2.0
"""How well other engines reproduce a network, on whole cases, and what is good enough to be written.

Dice of two masks A and B is 2 |A and B| / (|A| + |B|); foreground is every class but the first, as one mask. The mask
Dice compares an engine's mask with PyTorch's, the validation Dice with the reference mask, both on the network's grid.
Both are means over the cases in which at least one of the two masks holds a voxel; None where there is no such case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

Inferer = Callable[[torch.Tensor, nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Gate:
    """What an exported model must reach.

    Args:
        mask: least mask Dice.
        logits: largest difference of the logits, or None.
        validation: largest difference of the validation Dice from PyTorch's, or None.
    """

    mask: float
    logits: float | None = None
    validation: float | None = None


GATES = {"fp32": Gate(0.9999, logits=1e-3), "bf16": Gate(0.999), "int8": Gate(0.99, validation=0.005)}


def dice(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Dice of two masks (bool, any shape); None where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


@dataclass
class Figures:
    """What was measured of one engine over the cases."""

    differences: list[float] = field(default_factory=list)
    masks: list[float | None] = field(default_factory=list)
    references: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        """``logits_max_abs``, ``mask_dice``, ``validation_dice`` and ``seconds_per_case`` (median)."""
        worst = max((math.inf if math.isnan(x) else x for x in self.differences), default=math.inf)
        return {
            "logits_max_abs": worst if math.isfinite(worst) else None,
            "mask_dice": mean(self.masks),
            "validation_dice": mean(self.references),
            "seconds_per_case": round(float(torch.tensor(self.seconds).median()), 3) if self.seconds else None,
        }


def compare(
    network: nn.Module,
    engines: Mapping[str, nn.Module],
    cases: Iterable[Mapping[str, Any]],
    inferer: Inferer,
    count: int,
) -> dict[str, Figures]:
    """Run every engine and the network over the same cases.

    Args:
        network: what is to be reproduced, on the CPU, in eval().
        engines: name -> module, image ``B M H W D`` to logits.
        cases: ``image`` (M H W D) and ``label`` (1 H W D, class indices) of each.
        inferer: sliding window of (image, network).
        count: of cases, for the bar.

    Returns:
        name -> figures, the network's own under ``torch fp32``.
    """
    found = {name: Figures() for name in ("torch fp32", *engines)}
    for case in tqdm(cases, total=count, desc="comparing", unit="case"):
        image, label = (torch.as_tensor(case[key]).as_subclass(torch.Tensor) for key in ("image", "label"))
        expected: torch.Tensor | None = None
        for name, engine in {"torch fp32": network, **engines}.items():
            began = time.perf_counter()
            with torch.no_grad():
                logits = inferer(image[None].float(), engine)
            found[name].seconds.append(time.perf_counter() - began)
            expected = logits if expected is None else expected
            mask, other = (each[0].argmax(dim=0) > 0 for each in (logits, expected))
            found[name].differences.append(float((logits - expected).abs().max()))
            found[name].masks.append(dice(mask, other))
            found[name].references.append(dice(mask, label[0] > 0))
    return found


def failures(precision: str, figures: Mapping[str, float | None], reference: Mapping[str, float | None]) -> list[str]:
    """Why a model must not be written, as sentences; none where it may.

    Args:
        precision: whose gate it has to pass.
        figures: ``Figures.summary`` of the model.
        reference: the same of PyTorch.
    """
    gate, found = GATES[precision], []
    difference, masks, score = (figures[key] for key in ("logits_max_abs", "mask_dice", "validation_dice"))
    if difference is None:
        found.append("its logits are not finite")
    elif gate.logits is not None and difference > gate.logits:
        found.append(f"its logits differ by {difference:.2g} (at most {gate.logits:g})")
    if masks is None and gate.logits is None:
        found.append("all masks are empty, so that there is nothing to compare")
    elif masks is not None and masks < gate.mask:
        found.append(f"its mask Dice is {masks:.5f} (at least {gate.mask:g})")
    if gate.validation is not None:
        expected = reference["validation_dice"]
        if score is None or expected is None or abs(score - expected) > gate.validation:
            found.append(f"its validation Dice is {score}, PyTorch's {expected} (at most {gate.validation:g} apart)")
    return found
