# SPDX-License-Identifier: Apache-2.0
"""Training steps that are not finite change nothing, and soon end the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys

logger = logging.getLogger(__name__)


class FiniteSteps:
    """Handler: leave out steps whose loss or gradient is NaN or infinite, and end the run at the third.

    The weights, the network's buffers (running means of normalisations) and the optimizer stay as they were before such
    a step, so that no later checkpoint holds what it would have made of them. With a gradient scaler (float16) infinite
    gradients are the scaler's own business; only the loss is looked at, and the scaler leaves the step out.

    Args:
        most: number of such steps that ends the run.
        checkpoint: file of the training state, which the end of the run points to where it is there.
    """

    def __init__(self, most: int = 3, checkpoint: str = "") -> None:
        self.most, self.checkpoint = most, checkpoint
        self.cases: list[str] = []
        self.steps = 0
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self.keep)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def keep(self, engine: Any) -> None:
        """Copy the buffers, which the forward pass writes to before anyone knows what it gives."""
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in engine.network.buffers()]

    def __call__(self, engine: Any) -> None:
        """Judge the step between its gradients and the optimizer.

        Raises:
            ValueError: the last of the steps that are allowed; the cases of all of them are named.
        """
        loss = engine.state.output[CommonKeys.LOSS].detach()
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(loss.isfinite().all())
        if finite and engine.scaler is None:
            finite = bool(torch.nn.utils.get_total_norm([p.grad for p in parameters]).isfinite())
        if finite:
            return
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
        logger.warning("a step that is not finite was left out (%s)", where)
        if self.steps >= self.most:
            names = ", ".join(dict.fromkeys(self.cases)) or "unnamed cases"
            saved = "; the last checkpoint is from before" if Path(self.checkpoint).is_file() else ""
            raise ValueError(
                f"Loss or gradient was not finite in {self.steps} steps, of the cases {names}: look at these images "
                f"and labels, and lower the learning rate{saved}."
            )
