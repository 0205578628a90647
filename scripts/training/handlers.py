# SPDX-License-Identifier: Apache-2.0
"""Handlers that MONAI does not have: learning curves as a table, one progress bar per run, the manifest."""

from __future__ import annotations

import time
from typing import Any

from ignite.engine import Engine, Events
from ignite.utils import manual_seed
from monai.utils import CommonKeys
from tqdm import tqdm

from scripts.data.sampling import mixed_seed
from scripts.utils.run_manifest import write_manifest


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
