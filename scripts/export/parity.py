# SPDX-License-Identifier: Apache-2.0
"""Compare engines with PyTorch on whole cases, and decide which exported models are accepted.

The mask Dice compares an engine's mask with PyTorch's, the validation Dice compares it with the reference mask, both on
the network's grid and for each foreground class. Both are means over the cases and classes in which at least one of the
two masks is not empty; None where there is no such case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from scripts.data.decision import decide_classes
from scripts.metrics import dice
from scripts.runtime.regions import IGNORED, own_classes

REFERENCE_ENGINE = "torch fp32"

Inferer = Callable[[torch.Tensor, nn.Module], torch.Tensor]
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Gate:
    """Limits that an exported model must keep.

    Args:
        mask: smallest mask Dice.
        logits: largest difference of the logits; None for no limit.
        validation: largest difference of the validation Dice from PyTorch's; None for no limit.
    """

    mask: float
    logits: float | None = None
    validation: float | None = None


GATES = {"fp32": Gate(0.9999, logits=1e-3), "bf16": Gate(0.999), "int8": Gate(0.99, validation=0.005)}


def mean_of_defined(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None where there are none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


@dataclass
class Comparison:
    """Measurements of one engine, one value per case; of the Dice one per case and class."""

    logits_differences: list[float] = field(default_factory=list)
    mask_dice: list[float | None] = field(default_factory=list)
    validation_dice: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float | None]:
        """``logits_max_abs``, ``mask_dice``, ``validation_dice`` and ``seconds_per_case`` (median).

        ``logits_max_abs`` is None where a logit is NaN or infinite.
        """
        largest = max((math.inf if math.isnan(x) else x for x in self.logits_differences), default=math.inf)
        return {
            "logits_max_abs": largest if math.isfinite(largest) else None,
            "mask_dice": mean_of_defined(self.mask_dice),
            "validation_dice": mean_of_defined(self.validation_dice),
            "seconds_per_case": round(float(torch.tensor(self.seconds).median()), 3) if self.seconds else None,
        }


def compare_engines(
    network: nn.Module,
    engines: Mapping[str, nn.Module],
    cases: Iterable[Mapping[str, Any]],
    inferer: Inferer,
    case_count: int,
    regions: Sequence[Sequence[int]] | None = None,
) -> dict[str, Comparison]:
    """Run the network and every engine on the same cases.

    Args:
        network: on the CPU, in eval().
        engines: name -> module, image ``B M H W D`` to logits.
        cases: ``image`` (M H W D) and ``label`` (1 H W D, class indices) per case.
        inferer: sliding window, called with (image, network).
        case_count: number of cases, for the progress bar.
        regions: the classes of each channel of a sigmoid head; None for a softmax over the classes.

    Returns:
        Name -> measurements; those of the network itself are ``torch fp32``.
    """
    comparisons = {name: Comparison() for name in (REFERENCE_ENGINE, *engines)}
    for case in tqdm(cases, total=case_count, desc="comparing", unit="case"):
        image, label = (torch.as_tensor(case[key]).as_subclass(torch.Tensor) for key in ("image", "label"))
        expected: torch.Tensor | None = None
        for name, engine in {REFERENCE_ENGINE: network, **engines}.items():
            began = time.perf_counter()
            with torch.no_grad():
                logits = inferer(image[None].float(), engine)
            comparison = comparisons[name]
            comparison.seconds.append(time.perf_counter() - began)
            expected = logits if expected is None else expected
            mask, expected_mask = (decide_classes(each[0], regions) for each in (logits, expected))
            comparison.logits_differences.append(float((logits - expected).abs().max()))
            counted = label[0] != IGNORED
            for index in range(1, logits.shape[1]) if regions is None else own_classes(regions):
                comparison.mask_dice.append(dice(mask == index, expected_mask == index))
                comparison.validation_dice.append(dice((mask == index) & counted, label[0] == index))
    return comparisons


def gate_failures(precision: str, figures: Figures, torch_figures: Figures) -> list[str]:
    """The reasons why a model is refused; empty where it is accepted.

    Args:
        precision: key of the gate.
        figures: `Comparison.figures` of the model.
        torch_figures: those of PyTorch.
    """
    gate, reasons = GATES[precision], []
    difference, mask_dice, score = (figures[key] for key in ("logits_max_abs", "mask_dice", "validation_dice"))
    if difference is None:
        reasons.append("its logits are not finite")
    elif gate.logits is not None and difference > gate.logits:
        reasons.append(f"its logits differ by {difference:.2g} (at most {gate.logits:g})")
    if mask_dice is None and gate.logits is None:
        reasons.append("all masks are empty, so there is nothing to compare")
    elif mask_dice is not None and mask_dice < gate.mask:
        reasons.append(f"its mask Dice is {mask_dice:.5f} (at least {gate.mask:g})")
    if gate.validation is not None:
        expected = torch_figures["validation_dice"]
        if score is None or expected is None or abs(score - expected) > gate.validation:
            reasons.append(f"its validation Dice is {score}, PyTorch's {expected} (at most {gate.validation:g} apart)")
    return reasons
