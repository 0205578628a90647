# SPDX-License-Identifier: Apache-2.0
"""Skip training steps whose loss or gradient is NaN or infinite, and stop the run after a few of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys

logger = logging.getLogger(__name__)

DIVERGED = "Loss or gradient was NaN or infinite in"  # begins the error that ends a training


class FiniteSteps:
    """Handler: skip steps whose loss or gradient is NaN or infinite, and stop the run at the third such step.

    A skipped step changes nothing: the weights, their average, the network's buffers (running means of normalisation
    layers) and the optimizer keep their values, so no later checkpoint contains NaN. If gradients are accumulated, the
    parts of the step before it are lost, too; parts after it are used alone. ``engine.state.skipped`` says whether the
    current iteration was skipped. With a gradient scaler (float16) infinite
    gradients are normal and the scaler skips them; the handler then checks only the loss.

    Args:
        most: number of skipped steps that stops the run.
        checkpoint: file of the training state; if it exists, the error that stops the run mentions it.
    """

    def __init__(self, most: int = 3, checkpoint: str = "") -> None:
        self.most, self.checkpoint = most, checkpoint
        self.cases: list[str] = []
        self.steps = 0
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self.copy_buffers)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def copy_buffers(self, engine: Any) -> None:
        """Copy the buffers, because the forward pass changes them before its result can be checked."""
        engine.state.skipped = False
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in engine.network.buffers()]

    def __call__(self, engine: Any) -> None:
        """Check the step after its gradients are computed and before the optimizer uses them.

        Raises:
            ValueError: this was the last step that may be skipped; the message names the cases of all of them.
        """
        loss = engine.state.output[CommonKeys.LOSS].detach()
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(loss.isfinite().all())
        if finite and engine.scaler is None:
            finite = bool(torch.nn.utils.get_total_norm([p.grad for p in parameters]).isfinite())
        if finite:
            return
        engine.state.skipped = True
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        if engine.scaler is None:
            for parameter in parameters:
                parameter.grad = None
        batch = engine.state.batch
        cases = [str(case) for case in batch.get("case_id", [])] if isinstance(batch, dict) else []
        self.cases += cases
        self.steps += 1
        where = f"epoch {engine.state.epoch}, step {engine.state.iteration}: {', '.join(cases) or 'unnamed cases'}"
        logger.warning("skipped a training step with a NaN or infinite loss or gradient (%s)", where)
        if self.steps >= self.most:
            names = ", ".join(dict.fromkeys(self.cases)) or "unnamed"
            saved = " The last checkpoint is not affected." if Path(self.checkpoint).is_file() else ""
            raise ValueError(
                f"{DIVERGED} {self.steps} training steps (cases: {names}): check "
                f"these images and labels, and lower the learning rate.{saved}"
            )
