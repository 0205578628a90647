# SPDX-License-Identifier: Apache-2.0
"""Choose the weights of a distillation's terms from the size of their gradients, while the student trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn

from scripts.distillation.distiller import SEGMENTATION
from scripts.distillation.loss import DistillationLoss

logger = logging.getLogger(__name__)

NEGLIGIBLE = 1e-3  # of the segmentation loss's gradient
MEASUREMENTS = 10  # per training
BATCHES = 8  # per measurement
LARGEST_CHANGE = 3.0  # of a weight, from one measurement to the next


def gradient_norms(
    student: nn.Module,
    loss: DistillationLoss,
    outputs: Mapping[str, torch.Tensor],
    label: torch.Tensor,
    scale: float = 1.0,
) -> dict[str, float]:
    """Measure the norm of each term's gradient, before its weight, on the student's weights.

    Args:
        student: nothing in it is changed.
        loss: the distillation's loss; a loss with a memory does not remember this batch.
        outputs: what ``Distiller.forward`` returned in train(); the graph is kept.
        label: class indices, ``B 1 H W [D]``.
        scale: common factor of all norms, against underflow in float16.

    Returns:
        Term name (and ``segmentation``) -> norm.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    training = loss.training
    values = loss.eval().terms(outputs, label)
    loss.train(training)
    for name, value in values.items():
        gradients = torch.autograd.grad(scale * value, parameters, retain_graph=True, allow_unused=True)
        squares = [g.double().square().sum() for g in gradients if g is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt())
    return norms


def shared_weights(norms: Mapping[str, float], share: float) -> dict[str, float]:
    """``weight_t = share / number of terms * norm of L_seg's gradient / norm of the term's``, to three digits.

    A term whose gradient is below ``NEGLIGIBLE`` times that of L_seg (a ranking whose teacher is flat, graphs that
    already agree) gets weight 0, and the other terms get its part. A weight large enough to make up for it would
    amplify rounding errors.
    """
    terms = {name: norm for name, norm in norms.items() if name != SEGMENTATION}
    negligible = {name for name, norm in terms.items() if norm < NEGLIGIBLE * norms[SEGMENTATION]}
    part = share / max(1, len(terms) - len(negligible)) * norms[SEGMENTATION]
    return {name: 0.0 if name in negligible else float(f"{part / norm:.3g}") for name, norm in terms.items()}


class GradientBalance:
    """Handler: set the weights of the terms so that together they give the student ``share`` times L_seg's gradient.

    Source: [ours]. The weights in the configs of the methods are the default; this rule is an option. It measures on
    the training's own batches: at the first step, and again at each tenth of the training, ``BATCHES`` steps each.
    While its adapter is random, or its student knows nothing, a term may be small or large by accident. Therefore:

    - the first measurement is of a fresh student, the second of one that trained for a tenth, with its adapters. Of the
      two weights the smaller is taken;
    - from then on, a measurement changes a weight by at most ``LARGEST_CHANGE``;
    - a term whose gradient was negligible so far (weight 0) takes the first weight that is measured.

    With several processes the norms are averaged over them. The weights of each step are logged as ``balance/<term>``.

    Args:
        student: the network that trains, without teachers and adapters.
        loss: the distillation's loss; its ``weights`` are set.
        share: gradient norm of all terms together, as a share of that of the segmentation loss.

    Raises:
        ValueError: ``share`` is not positive.
    """

    def __init__(self, student: nn.Module, loss: DistillationLoss, share: float) -> None:
        if share <= 0:
            raise ValueError(f"--balance must be positive, got {share}.")
        self.student, self.loss, self.share = student, loss, share
        self.measurement = 0
        self.before: dict[str, float] = {}
        self.norms: list[dict[str, float]] = []

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.log)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.require_gradient)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the measurement in progress, for a checkpoint."""
        state = {"weights": dict(self.loss.weights), "measurement": self.measurement}
        return {**state, "before": self.before, "norms": self.norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.loss.weights = dict(state["weights"])
        self.measurement, self.before, self.norms = state["measurement"], state["before"], list(state["norms"])

    def __call__(self, engine: Any) -> None:
        """Measure on this step's batch if a measurement is due, and set the weights."""
        period = max(1, engine.state.max_epochs * engine.state.epoch_length // MEASUREMENTS)
        number, step = divmod(engine.state.iteration - 1, period)
        if step >= BATCHES:
            return
        if number + 1 != self.measurement:
            self.measurement, self.before, self.norms = number + 1, dict(self.loss.weights), []
        output, scale = engine.state.output, 1.0 if engine.scaler is None else engine.scaler.get_scale()
        norms = gradient_norms(self.student, self.loss, output[CommonKeys.PRED], output[CommonKeys.LABEL], scale)
        norms = {name: float(idist.all_reduce(norm)) / idist.get_world_size() for name, norm in norms.items()}
        if not all(math.isfinite(norm) for norm in norms.values()) or norms[SEGMENTATION] == 0:
            return  # without a label in the batch there is nothing to compare with
        self.norms.append(norms)
        means = {name: sum(each[name] for each in self.norms) / len(self.norms) for name in norms}
        measured = shared_weights(means, self.share)
        if self.measurement == 1:
            self.loss.weights = measured
        else:
            self.loss.weights = {name: self._changed(self.before[name], new) for name, new in measured.items()}
        logger.info("gradient norms: %s", ", ".join(f"{name} {norm:.3g}" for name, norm in means.items()))

    def _changed(self, old: float, new: float) -> float:
        """Return a weight after a measurement that gave ``new``."""
        if old == 0 or new == 0:
            return new or old
        if self.measurement == 2:
            return min(old, new)
        return min(max(new, old / LARGEST_CHANGE), old * LARGEST_CHANGE)

    def log(self, engine: Engine) -> None:
        """Add the weights of this step to the logged values of the loss."""
        self.loss.logged |= {f"balance/{name}": weight for name, weight in self.loss.weights.items()}

    def require_gradient(self, engine: Engine) -> None:
        """Stop a training in which no term acts.

        Raises:
            ValueError: all gradients are negligible.
        """
        if not any(self.loss.weights.values()):
            raise ValueError(
                f"The terms {', '.join(self.loss.weights)} give the student no gradient on these batches: no weight "
                "can be chosen. Leave out --balance."
            )
