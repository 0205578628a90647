# SPDX-License-Identifier: Apache-2.0
"""Write the learning curves of a training to a CSV table."""

from __future__ import annotations

import csv
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys

from scripts.report.curves import Row, read_curves
from scripts.utils.atomic_files import atomic_file


class CurveWriter:
    """Write one row per epoch: every loss term by its name, learning rate, seconds per step, validation Dice.

    The row is also stored in ``engine.state.metrics``, which MONAI's tracking handlers read. Attach this handler after
    the ``ValidationHandler``, so that the row contains the epoch's validation, and before the tracking handlers.

    Args:
        path: CSV file. It is rewritten after each epoch, because a resumed run may add columns.
        loss: loss function; if it has ``logged`` (name -> value), these values become columns.
        optimizer: its learning rate is recorded.
        evaluator: its key metric is recorded as ``val_dice``; the cell stays empty if it is undefined for every case.
        regions: names of the channels of the key metric. Of several, the mean of each over the cases is recorded as
            ``val_dice/<region>``.
    """

    def __init__(
        self, path: str, loss: Any, optimizer: Any, evaluator: Engine | None = None, regions: Sequence[str] = ()
    ) -> None:
        self.regions = list(regions)
        self.path, self.loss, self.optimizer, self.evaluator = Path(path), loss, optimizer, evaluator
        self.rows: list[Row] = []
        self.values: dict[str, list[float]] = defaultdict(list)
        self.steps, self.start_time, self.validated, self.is_first_epoch = 0, 0.0, False, True

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add_step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self.mark_validated)

    def start(self, engine: Engine) -> None:
        """Prepare for a run. Earlier rows are read in its first epoch, since a later handler may load a checkpoint."""
        self.is_first_epoch = True

    def start_epoch(self, engine: Engine) -> None:
        """Reset the sums; in a run's first epoch, keep the table's rows of earlier epochs."""
        if self.is_first_epoch:
            earlier = read_curves(self.path) if engine.state.epoch > 1 and self.path.is_file() else []
            self.rows = [row for row in earlier if (row["epoch"] or 0) < engine.state.epoch]
            self.is_first_epoch = False
        self.values.clear()
        for name in self.rows[-1] if self.rows else ():  # a validation's value belongs to its own epoch only
            engine.state.metrics.pop(name, None)
        self.learning_rate = self.optimizer.param_groups[0]["lr"]  # the scheduler changes it when the epoch ends
        self.steps, self.start_time, self.validated = 0, time.perf_counter(), False

    def add_step(self, engine: Engine) -> None:
        """Add a step's values. The clock stops at the last step, so that validation is not counted."""
        output: Any = engine.state.output
        self.values["loss"].append(float(output[CommonKeys.LOSS]))
        for name, value in getattr(self.loss, "logged", {}).items():
            self.values[name if "/" in name else f"loss/{name}"].append(value)
        self.steps += 1
        self.seconds = time.perf_counter() - self.start_time

    def mark_validated(self, evaluator: Engine) -> None:
        """Remember that this epoch was validated."""
        self.validated = True

    def write(self, engine: Engine) -> None:
        """Add the epoch's row and write the file."""
        # The mean over the steps that had a value: a batch without labels has no segmentation loss, and a step whose
        # loss was not finite was skipped.
        finite = {name: [value for value in values if math.isfinite(value)] for name, values in self.values.items()}
        means = {name: sum(values) / len(values) if values else math.nan for name, values in finite.items()}
        row: Row = {"epoch": engine.state.epoch, **means}
        row["learning_rate"] = self.learning_rate
        row["seconds_per_step"] = self.seconds / self.steps
        if self.validated and self.evaluator is not None:
            row |= self._validation(self.evaluator.state)
        self.rows.append(row)
        engine.state.metrics.update({k: v for k, v in row.items() if k != "epoch" and not _is_undefined(v)})
        columns = list(dict.fromkeys(name for each in self.rows for name in each))
        with atomic_file(self.path, text=True) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({k: None if _is_undefined(v) else v for k, v in each.items()} for each in self.rows)

    def _validation(self, state: Any) -> Row:
        """The key metric of the evaluator, over all regions and over each of several ones."""
        name = state.key_metric_name
        details = getattr(state, "metric_details", {}).get(name)  # cases x regions
        if not isinstance(details, torch.Tensor):
            return {"val_dice": float(state.metrics[name])}
        # MONAI gives 0 if the Dice of every case is undefined, because their labels are empty.
        values: Row = {"val_dice": math.nan if details.isnan().all() else float(state.metrics[name])}
        if len(self.regions) > 1:
            means = details.nanmean(dim=0).tolist()
            values |= {f"val_dice/{region}": mean for region, mean in zip(self.regions, means, strict=True)}
        return values


def _is_undefined(value: float | int | None) -> bool:
    return value is None or not math.isfinite(value)
