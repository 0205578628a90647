# SPDX-License-Identifier: Apache-2.0
"""The inferer of the bundle's evaluator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from scripts.runtime.sliding_window import WindowPlan, predict_volume

Network = Callable[[torch.Tensor], torch.Tensor]


class WholeVolumeInferer(SlidingWindowInferer):
    """Run the network on the whole volume at once, or on as few large parts as the memory allows.

    Memory grows linearly up to ``memory_gib`` and stays there. The image and the logits are additional:
    4 (modalities + classes) bytes per voxel. See ``scripts.runtime.sliding_window``, which `segment` runs without
    PyTorch.

    Args:
        roi_size: window in voxels, see ``WindowPlan.window``.
        overlap: see ``WindowPlan``.
        whole: see ``WindowPlan``.
        memory_gib: see ``WindowPlan``.
        divisor: one number or one per axis, see ``WindowPlan``.
        skip_air: see ``WindowPlan``.
        sw_batch_size: see ``monai.inferers.SlidingWindowInferer``.
        mode: see ``monai.inferers.SlidingWindowInferer``.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        whole: bool = True,
        memory_gib: float = 1.25,
        divisor: int | Sequence[int] = 16,
        skip_air: bool = True,
        sw_batch_size: int = 1,
        mode: str = "gaussian",
    ) -> None:
        super().__init__(roi_size, sw_batch_size, overlap, mode)
        divisors = (divisor,) * 3 if isinstance(divisor, int) else tuple(divisor)
        self.plan = WindowPlan(
            tuple(roi_size), overlap, whole, memory_gib, divisors, skip_air, sw_batch_size, mode == "gaussian"
        )

    def __call__(self, inputs: torch.Tensor, network: Network, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Logits ``B classes H W D`` of a volume ``B M H W D``; see ``predict_volume``.

        Raises:
            ValueError: the network runs on another window size than ``roi_size``.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        logits: torch.Tensor = predict_volume(image, network, self.plan)
        return logits
