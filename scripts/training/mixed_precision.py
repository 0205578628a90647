# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on any device: networks run in bfloat16 or float16, losses get float32."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.inferers import SimpleInferer

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AutocastInferer(SimpleInferer):
    """Call the network under autocast and return its output, a tensor or a list or dict of tensors, in float32.

    Args:
        device: device of the network. MONAI's trainers use autocast on CUDA only.
        precision: one of ``PRECISIONS``; ``float32`` changes nothing.

    Raises:
        ValueError: an unknown precision, or bfloat16 on the CPU: PyTorch 2.13's weight gradients of convolutions on
            small grids (seen at 2 x 2 x 1 and 2 x 2 x 2 cells, in the student's deepest stage) read uninitialised
            memory there, so that they are sometimes NaN or infinite.
    """

    def __init__(self, device: str | torch.device, precision: str = "float32") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"Unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}.")
        self.device, self.dtype = torch.device(device), PRECISIONS[precision]
        if self.device.type == "cpu" and precision == "bfloat16":
            raise ValueError("bfloat16 can give NaN or infinite gradients on the CPU: train in float32, or on a GPU.")

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        enabled = self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            outputs = network(inputs, *args, **kwargs)
        if isinstance(outputs, dict):
            return {name: _float32(value) for name, value in outputs.items()}
        return [_float32(each) for each in outputs] if isinstance(outputs, list) else _float32(outputs)


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
