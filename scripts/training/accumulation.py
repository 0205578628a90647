# SPDX-License-Identifier: Apache-2.0
"""Which iterations of a training end with a step of its optimizer."""

from __future__ import annotations

from typing import Any


def completes_step(engine: Any) -> bool:
    """Return whether the optimizer steps in the current iteration of a trainer.

    As MONAI's ``SupervisedTrainer`` decides: after every ``accumulation_steps`` iterations of an epoch, and in its last
    one.
    """
    steps = getattr(engine, "accumulation_steps", 1)
    length = engine.state.epoch_length
    number = (engine.state.iteration - 1) % length + 1  # in this epoch, from 1
    return bool(number % steps == 0 or number == length)
