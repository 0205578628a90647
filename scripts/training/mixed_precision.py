# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on any device: networks run in bfloat16 or float16, losses get float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from ignite.engine import Engine, Events
from monai.inferers import SimpleInferer
from torch import nn

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AutocastInferer(SimpleInferer):
    """Call the network under autocast and return its output, a tensor or a list or dict of tensors, in float32.

    On the CPU PyTorch 2.13 returns wrong weight gradients, sometimes NaN, for some bfloat16 convolutions whose kernel
    is larger than their grid, such as 3 x 3 x 3 on 2 x 2 x 1 cells. A training with such a convolution is refused.

    Args:
        device: device of the network. MONAI's trainers use autocast on CUDA only.
        precision: one of ``PRECISIONS``; ``float32`` changes nothing.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(self, device: str | torch.device, precision: str = "float32") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"Unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}.")
        self.device, self.dtype = torch.device(device), PRECISIONS[precision]
        self.watched: WeakSet[nn.Module] = WeakSet()

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Raises:
            ValueError: bfloat16 on the CPU, and a convolution with a kernel larger than its grid.
        """
        if self.device.type == "cpu" and self.dtype is torch.bfloat16 and network not in self.watched:
            self.watched.add(network)
            for module in network.modules():
                if isinstance(module, CONVOLUTIONS):
                    module.register_forward_pre_hook(_refuse_small_grid)
        enabled = self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            outputs = network(inputs, *args, **kwargs)
        if isinstance(outputs, dict):
            return {name: _float32(value) for name, value in outputs.items()}
        return [_float32(each) for each in outputs] if isinstance(outputs, list) else _float32(outputs)


def _refuse_small_grid(convolution: nn.Conv3d, inputs: tuple[torch.Tensor]) -> None:
    grid, kernel = inputs[0].shape[2:], convolution.kernel_size
    if torch.is_grad_enabled() and any(cells < size for cells, size in zip(grid, kernel, strict=True)):
        raise ValueError(
            f"bfloat16 gives wrong gradients on the CPU where a convolution of {_size(kernel)} gets {_size(grid)} "
            "cells. Train in float32, with larger patches, or on a GPU."
        )


def _size(lengths: Iterable[int]) -> str:
    return " x ".join(map(str, lengths))


def _float32(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


class GradientScaling:
    """Handler: scale the loss, so that float16 gradients do not underflow. Attach it before the checkpoint's handler.

    A MONAI trainer with ``amp`` scales the loss with its ``scaler``, which works on CUDA only. This handler replaces it
    by a scaler for the training's device.

    Args:
        device: device of the training.
        initial: first scale; it halves after each overflow and doubles after 2000 steps without one.
    """

    def __init__(self, device: str | torch.device, initial: float = 2.0**16) -> None:
        self.device, self.initial = torch.device(device), initial

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Replace the trainer's scaler."""
        engine.scaler = torch.amp.GradScaler(self.device.type, init_scale=self.initial)
