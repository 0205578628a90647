# SPDX-License-Identifier: Apache-2.0
"""Learning curves of a training, as a table."""

from __future__ import annotations

import csv
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.utils import CommonKeys

from scripts.report.curves import Row, read_curves
from scripts.utils.atomic_files import atomic_file


class CurveWriter:
    """Write one row per epoch: every loss term by its name, learning rate, seconds per step, validation Dice.

    The row is also in ``engine.state.metrics``, from where MONAI's handlers take what they track. So attach it after
    the ``ValidationHandler``, whose validation is in the epoch's row, and before those handlers.

    Args:
        path: CSV file, rewritten whole each time, so that new columns and resumed runs fit.
        loss: loss function; where it has ``logged`` (name -> value), these values become columns.
        optimizer: whose learning rate is noted.
        evaluator: whose key metric is noted as ``val_dice``.
    """

    def __init__(self, path: str, loss: Any, optimizer: Any, evaluator: Engine | None = None) -> None:
        self.path, self.loss, self.optimizer, self.evaluator = Path(path), loss, optimizer, evaluator
        self.rows: list[Row] = []
        self.sums: dict[str, float] = defaultdict(float)
        self.steps, self.began, self.validated, self.first = 0, 0.0, False, True

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self.note_validation)

    def start(self, engine: Engine) -> None:
        """Begin a run, whose checkpoint may be loaded by a later handler: its first epoch tells where it goes on."""
        self.first = True

    def start_epoch(self, engine: Engine) -> None:
        """Empty the sums; in a run's first epoch, keep the rows of the epochs before it."""
        if self.first:
            earlier = read_curves(self.path) if engine.state.epoch > 1 and self.path.is_file() else []
            self.rows, self.first = [row for row in earlier if (row["epoch"] or 0) < engine.state.epoch], False
        self.sums.clear()
        for name in self.rows[-1] if self.rows else ():  # a validation's value is of its own epoch only
            engine.state.metrics.pop(name, None)
        self.rate = self.optimizer.param_groups[0]["lr"]  # this epoch's: the scheduler steps at its end
        self.steps, self.began, self.validated = 0, time.perf_counter(), False

    def note(self, engine: Engine) -> None:
        """Add a step's values; the clock stops here, so that validation is not counted."""
        output: Any = engine.state.output
        self.sums["loss"] += float(output[CommonKeys.LOSS])
        for name, value in getattr(self.loss, "logged", {}).items():
            self.sums[name if "/" in name else f"loss/{name}"] += value
        self.steps += 1
        self.elapsed = time.perf_counter() - self.began

    def note_validation(self, evaluator: Engine) -> None:
        """Remember that this epoch has a validation of its own."""
        self.validated = True

    def write(self, engine: Engine) -> None:
        """Add the epoch's row and write the file."""
        row: Row = {"epoch": engine.state.epoch, **{name: total / self.steps for name, total in self.sums.items()}}
        row["learning_rate"] = self.rate
        row["seconds_per_step"] = self.elapsed / self.steps
        if self.validated and self.evaluator is not None:
            state: Any = self.evaluator.state
            row["val_dice"] = float(state.metrics[state.key_metric_name])
        self.rows.append(row)
        engine.state.metrics.update({k: v for k, v in row.items() if k != "epoch" and not _undefined(v)})
        columns = list(dict.fromkeys(name for each in self.rows for name in each))
        with atomic_file(self.path, text=True) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({k: None if _undefined(v) else v for k, v in each.items()} for each in self.rows)


def _undefined(value: float | int | None) -> bool:
    return value is None or not math.isfinite(value)
