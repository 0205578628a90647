# SPDX-License-Identifier: Apache-2.0
"""Handlers of a training: progress, seeds per epoch, gradient clipping, the manifest."""

from __future__ import annotations

import time
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.utils import manual_seed
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from tqdm import tqdm

from scripts.data.sampling import mixed_seed
from scripts.training.accumulation import completes_step
from scripts.utils.run_manifest import torch_usage, write_manifest


class Progress:
    """One progress bar for the whole run, with the remaining time: epochs of a training, or cases of an inference.

    ignite's ``ProgressBar`` does not fit: it opens only after the first epoch, and after resuming it counts the earlier
    epochs as done in this run, so that the remaining time is far too short.

    Args:
        name: text before the bar.
        epochs: count epochs instead of iterations.
    """

    def __init__(self, name: str, epochs: bool = False) -> None:
        self.name, self.epochs = name, epochs
        self.bar: Any = None

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED if self.epochs else Events.ITERATION_COMPLETED, self.step)
        engine.add_event_handler(Events.COMPLETED, lambda: self.bar.close())
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def fail(self, engine: Engine, error: Exception) -> None:
        """Close the bar, so that the error starts on a line of its own, and raise the error again."""
        if self.bar is not None:
            self.bar.close()
        raise error

    def start(self, engine: Engine) -> None:
        """Open the bar at the epoch where the run starts or resumes."""
        total = engine.state.max_epochs if self.epochs else engine.state.epoch_length
        completed = engine.state.epoch if self.epochs else 0
        self.bar = tqdm(total=total, initial=completed, desc=self.name, unit="epoch" if self.epochs else "case")

    def step(self, engine: Engine) -> None:
        """Advance the bar and, in a training, show the last loss."""
        output: Any = engine.state.output
        output = output[0] if isinstance(output, list) else output
        if isinstance(output, dict) and CommonKeys.LOSS in output:
            self.bar.set_postfix(loss=f"{float(output[CommonKeys.LOSS]):.3f}", refresh=False)
        self.bar.update()


class SeedEpochs:
    """Seed every global random generator at the start of each epoch from the run's seed, the epoch and the process.

    Dropout and random masks of an epoch then do not depend on how often the training was resumed. Processes get
    different seeds.

    Args:
        seed: seed of the run.
        earlier_epochs: see ``scripts.data.CaseSampler``.
    """

    def __init__(self, seed: int, earlier_epochs: int = 0) -> None:
        self.seed, self.earlier_epochs = seed, earlier_epochs

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Seed the generators."""
        manual_seed(mixed_seed(self.seed, self.earlier_epochs + engine.state.epoch, engine.state.rank))


class GradientClipping:
    """Handler: scale the gradients of a step down to a norm, where they are larger.

    Gradients that are accumulated over several iterations are scaled once, as a sum.

    Args:
        norm: largest norm of all gradients together.
    """

    def __init__(self, norm: float) -> None:
        self.norm = norm

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Clip the gradients after they are computed and before the optimizer uses them."""
        if not completes_step(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.norm)


class ManifestWriter:
    """Write a manifest when a run ends, see ``scripts.utils.run_manifest.write_manifest``.

    Args:
        output_dir: folder of the manifest.
        cases: the data list, or data lists by name.
        teachers: name -> teacher; the manifest holds the checksums of their weights.
        name: file name.
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
        self.start_time = time.perf_counter()

    def write(self, engine: Engine) -> None:
        """Write the file."""
        seconds = time.perf_counter() - self.start_time
        write_manifest(self.output_dir, self.cases, self.checksums, seconds, self.name, **torch_usage())
