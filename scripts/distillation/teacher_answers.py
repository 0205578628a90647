# SPDX-License-Identifier: Apache-2.0
"""What the networks of a teacher answer for a whole case: logits, and attention maps of tapped layers.

An answer is the mean over several predictions where there are several: over the flips of test-time augmentation, and
over the networks of an out-of-fold teacher. Probabilities are averaged, not logits, and so are attention maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, combinations
from typing import Any, cast

import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional

from scripts.distillation.feature_taps import Tap, record_outputs, teacher_layer
from scripts.distillation.own_grid import OwnGrid
from scripts.distillation.teacher_cache import LOGITS
from scripts.distillation.teacher_origin import Case, Origin
from scripts.losses.attention_map import attention_map

Inferer = Callable[[torch.Tensor, nn.Module], torch.Tensor]
TTA = ("none", "flips")
ALL_AXES = (0, 1, 2)


def cached_map(features: torch.Tensor, size: Sequence[int], power: float) -> torch.Tensor:
    """The power-th root of the attention map of features, interpolated to ``size``: ``B 1 size``.

    ``AttentionMapLoss`` of the same power has the same value on this map as on the features, except for the
    interpolation.

    Args:
        features: ``B C H W [D]``.
        size: grid of the result.
        power: of the attention map, at least 1.
    """
    root = attention_map(features, power).pow(1 / power)
    mode = "trilinear" if features.dim() == 5 else "bilinear"
    return functional.interpolate(root, size=tuple(size), mode=mode, align_corners=False)


class _LogitsAndMaps(nn.Module):
    """Return a teacher's logits and attention maps as one tensor on the window's grid, for the sliding window."""

    def __init__(self, name: str, teacher: nn.Module, taps: Mapping[str, Mapping[str, Any]], power: float) -> None:
        super().__init__()
        network = cast(nn.Module, teacher.network)
        layers = {tap: teacher_layer(name, teacher, tap, definition) for tap, definition in taps.items()}
        self.taps = {tap: Tap(name, network, layer) for tap, layer in layers.items() if layer}
        self.teacher, self.power = teacher, power

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        with record_outputs(self.taps.values()) as recorded:
            logits = self.teacher(window)
        maps = [cached_map(tap.output(recorded), window.shape[2:], self.power) for tap in self.taps.values()]
        return torch.cat([logits, *maps], dim=1)


class NetworkAnswers:
    """The answers of a teacher of one or several networks.

    Args:
        name: of the teacher, for errors.
        teachers: ``scripts.networks.teacher.Teacher``, all of the same classes and layers.
        inferer: sliding window, called with image and network.
        channels: number of channels of the logits: classes, including the background, or regions.
        taps: tap name -> its definition (``feature_taps.tap_layers``), for attention maps; by default only logits.
        attention_power: of the attention maps.
        tta: ``"none"``, or ``"flips"``: the mean over all flips of the image along ``flips``, 8 for three axes.
        origin: what the teacher is.
        own: the teacher's own input, where it cannot use the task's (``scripts.distillation.own_grid``).
        sigmoid: whether each channel has a sigmoid of its own; a single channel always has.
        flips: the axes that may be flipped.

    Attributes:
        outputs: names of the outputs: ``logits`` and taps.
        settings: what the manifest of a cache says about them.

    Raises:
        ValueError: ``tta`` is unknown, a teacher is the label, or it has no layer for a tap.
    """

    def __init__(
        self,
        name: str,
        teachers: Sequence[nn.Module],
        inferer: Inferer,
        channels: int,
        taps: Mapping[str, Mapping[str, Any]] | None = None,
        attention_power: float = 2.0,
        tta: str = "none",
        origin: Origin | None = None,
        own: OwnGrid | None = None,
        sigmoid: bool = False,
        flips: Sequence[int] = ALL_AXES,
    ) -> None:
        if tta not in TTA:
            raise ValueError(f"Unknown tta {tta!r}: choose one of {', '.join(TTA)}.")
        if any(getattr(teacher, "uses_label", False) for teacher in teachers):
            raise ValueError(f"The teacher {name} is the label, which needs no cache: leave it out.")
        self.networks = [_LogitsAndMaps(name, teacher.eval(), taps or {}, attention_power) for teacher in teachers]
        self.inferer, self.own, self.origin = own.inferer if own else inferer, own, origin or Origin()
        self.channels, self.sigmoid = channels, sigmoid or channels == 1
        self.flips = list(flips) if tta == "flips" else []
        maps = list(self.networks[0].taps)
        self.outputs = [LOGITS, *maps]
        self.settings: dict[str, Any] = {"tta": tta} if tta != "none" else {}
        if tta == "flips" and tuple(flips) != ALL_AXES:
            self.settings["tta_axes"] = self.flips
        if maps:
            self.settings["attention_power"] = float(attention_power)

    def check(self, cases: Sequence[Case]) -> None:
        """See ``Origin.require_answers``."""
        self.origin.require_answers(cases)

    def predict(self, case: Case, image: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The answer to a case, ``outputs H W [D]``: logits of every channel, then one channel per attention map.

        Args:
            case: item of a data list.
            image: returns the preprocessed image, ``1 M H W [D]``.
        """
        networks, own = [self.networks[index] for index in self.origin.members(case)], self._own_image(case)
        whole = image() if own is None else own.as_tensor()[None].to(next(networks[0].parameters()).device)
        flips = _subsets([2 + axis for axis in self.flips if 2 + axis < whole.dim()])
        with torch.no_grad():
            predictions = (self.inferer(whole.flip(axes), network).flip(axes) for network in networks for axes in flips)
            answer = _mean(predictions, len(networks) * len(flips), self.channels, self.sigmoid)[0]
        return answer if self.own is None or own is None else self.own.onto_task_grid(answer, own, case)

    def _own_image(self, case: Case) -> MetaTensor | None:
        return None if self.own is None else self.own.image(case)


def _subsets(axes: Sequence[int]) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(axes, size) for size in range(len(axes) + 1)))


def _mean(predictions: Iterable[torch.Tensor], count: int, channels: int, sigmoid: bool) -> torch.Tensor:
    """Logits of the mean probability in the first ``channels``, and the mean of the others; one stays as it is."""
    if count == 1:
        return next(iter(predictions))
    log_inside, log_outside, maps = None, None, torch.zeros(())
    for prediction in predictions:
        logits = prediction[:, :channels].float()
        log_inside = _log_sum(log_inside, functional.logsigmoid(logits) if sigmoid else logits.log_softmax(dim=1))
        if sigmoid:
            log_outside = _log_sum(log_outside, functional.logsigmoid(-logits))
        maps = maps + prediction[:, channels:].float() / count
    assert log_inside is not None
    mean = log_inside - math.log(count) if log_outside is None else log_inside - log_outside
    return torch.cat([mean, maps], dim=1)


def _log_sum(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if total is None else torch.logaddexp(total, value)
