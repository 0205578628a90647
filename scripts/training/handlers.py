# SPDX-License-Identifier: Apache-2.0
"""Handlers that MONAI does not have: learning curves as a table, one progress bar per run, the manifest."""

from __future__ import annotations

import csv
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from ignite.utils import manual_seed
from monai.utils import CommonKeys
from tqdm import tqdm

from scripts.data.sampling import mixed_seed
from scripts.utils.atomic_files import atomic_file
from scripts.utils.run_manifest import write_manifest

Row = dict[str, float | int | None]


def read_curves(path: str | Path) -> list[Row]:
    """Rows of a curves file; an empty cell is None."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"] or 0)} for row in rows]


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


class Progress:
    """One bar for the whole run, with the time left: epochs of a training, cases of an inference.

    Args:
        name: text before the bar.
        epochs: count epochs rather than iterations.
    """

    def __init__(self, name: str, epochs: bool = False) -> None:
        self.name, self.epochs = name, epochs

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED if self.epochs else Events.ITERATION_COMPLETED, self.step)
        engine.add_event_handler(Events.COMPLETED, lambda: self.bar.close())

    def start(self, engine: Engine) -> None:
        """Open the bar where the run (or its resumption) begins."""
        total = engine.state.max_epochs if self.epochs else engine.state.epoch_length
        done = engine.state.epoch if self.epochs else 0
        self.bar = tqdm(total=total, initial=done, desc=self.name, unit="epoch" if self.epochs else "case")

    def step(self, engine: Engine) -> None:
        """Move the bar on, with the last loss of a training."""
        output: Any = engine.state.output
        output = output[0] if isinstance(output, list) else output
        if isinstance(output, dict) and CommonKeys.LOSS in output:
            self.bar.set_postfix(loss=f"{float(output[CommonKeys.LOSS]):.3f}", refresh=False)
        self.bar.update()


class SeedEpochs:
    """Seed every global generator at the start of each epoch by the run's seed, the epoch and the process.

    So an epoch's dropout and masks do not depend on how many runs it took to come to it, and processes differ.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Seed them."""
        manual_seed(mixed_seed(self.seed, engine.state.epoch, engine.state.rank))


class ManifestWriter:
    """Write a manifest when a run ends, see ``scripts.utils.run_manifest.write_manifest``.

    Args:
        output_dir: folder of the manifest.
        cases: the data list, or lists by name.
        teachers: name -> teacher, whose checksums are noted.
        name: of the file.
    """

    def __init__(
        self, output_dir: str, cases: Any, teachers: dict[str, Any] | None = None, name: str = "manifest.json"
    ) -> None:
        self.output_dir, self.cases, self.name = output_dir, cases, name
        self.checksums = {name: teacher.sha256 for name, teacher in (teachers or {}).items()}

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def write(self, engine: Engine) -> None:
        """Write the file."""
        write_manifest(self.output_dir, self.cases, self.checksums, time.perf_counter() - self.began, self.name)
