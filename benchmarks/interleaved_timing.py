# SPDX-License-Identifier: Apache-2.0
"""Time several candidates in interleaved rounds, each in its own process.

One candidate runs at a time, while the processes of all others wait at a pipe. Other load on the machine therefore
affects all candidates alike.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from tqdm import tqdm

from scripts.cli.bundle_run import protected
from scripts.cli.config import CONFIGS


@dataclass(frozen=True)
class Candidate:
    """One of the alternatives that are compared.

    Args:
        name: name in the tables.
        configs: names of configs of the bundle, which are merged in this order.
        overrides: config ids and their values, which must be picklable.
    """

    name: str
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]


# Seconds of a whole step, and one detail: the seconds spent loading its batch, or its results.
Step = tuple[float, Any]
Worker = Callable[[Candidate, Connection], None]


@dataclass
class Timings:
    """The steps of one candidate and the peak memory of its process in MiB."""

    steps: list[Step] = field(default_factory=list)
    peak_mib: float = 0.0


def compose(candidate: Candidate) -> ConfigParser:
    """Merge the configs and overrides of a candidate."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in candidate.configs])
    parser.update(protected(dict(candidate.overrides)))
    return parser


def memory_mib(entry: str = "VmHWM") -> float:
    """Resident memory of this process in MiB.

    It is read from ``/proc`` where there is one. ``ru_maxrss`` is only the fallback, because a process inherits that
    value from its parent.

    Args:
        entry: ``VmHWM`` for the peak so far, ``VmRSS`` for the current value.
    """
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class StepTimer:
    """Handler that times every iteration of an engine and waits for the parent process between rounds.

    The parent sends the number of steps of a round, 0 to end the run. After a round, the handler sends the round's
    steps (seconds, seconds spent loading the batch) and the peak memory of the process in MiB.

    Args:
        pipe: connection to the parent process.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.steps_left = 0
        self.step_start = 0.0
        self.batch_loaded = 0.0
        self.steps: list[Step] = []

    def attach(self, engine: Engine) -> None:
        """Register the handler with a trainer or an evaluator."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_step)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.record_batch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.record_step)

    def start_step(self, engine: Engine) -> None:
        """Start the clock, after waiting for the next round if the last one is over."""
        if self.steps_left == 0:
            self.steps_left = self.pipe.recv()
            if self.steps_left == 0:
                engine.terminate()
        self.step_start = self.batch_loaded = time.perf_counter()

    def record_batch(self, engine: Engine) -> None:
        """Record when the batch was loaded."""
        self.batch_loaded = time.perf_counter()

    def record_step(self, engine: Engine) -> None:
        """Record the step. At the end of a round, send all its steps to the parent.

        A GPU works behind the program, so a step is over when the GPU has finished it.
        """
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.steps.append((time.perf_counter() - self.step_start, self.batch_loaded - self.step_start))
        self.steps_left -= 1
        if self.steps_left == 0:
            self.pipe.send((self.steps, memory_mib()))
            self.steps = []


def time_interleaved(
    candidates: Sequence[Candidate],
    worker: Worker,
    rounds: Mapping[str, int],
    steps_per_round: int,
    warm_up_steps: int,
    start_method: str = "fork",
) -> dict[str, Timings]:
    """Time all candidates, one round of each after the other.

    Args:
        candidates: in the order in which they run within a round.
        worker: runs in each candidate's process: it attaches a ``StepTimer`` to an engine and runs the engine.
        rounds: number of rounds by candidate name. A candidate with fewer rounds is left out of the last ones.
        steps_per_round: steps of one candidate in one round.
        warm_up_steps: steps before the first round, which are not counted.
        start_method: ``"fork"`` (modules are already imported) or ``"spawn"`` (memory is not shared with the parent).

    Raises:
        RuntimeError: the process of a candidate has ended; it printed the reason.
    """
    timings = {candidate.name: Timings() for candidate in candidates}
    order = [
        index
        for number in range(max(rounds.values()))
        for index, candidate in enumerate(candidates)
        if number < rounds[candidate.name]
    ]
    with (
        _worker_processes(candidates, worker, warm_up_steps, start_method) as pipes,
        tqdm(order, desc="rounds", unit="round") as bar,
    ):
        for index in bar:
            candidate = candidates[index]
            bar.set_postfix_str(candidate.name)
            steps, timings[candidate.name].peak_mib = _run_steps(pipes[index], candidate, steps_per_round)
            timings[candidate.name].steps += steps
    return timings


@contextmanager
def _worker_processes(
    candidates: Sequence[Candidate], worker: Worker, warm_up_steps: int, start_method: str
) -> Iterator[list[Connection]]:
    """Start and warm up one process per candidate; yields their pipes. All processes end with the context."""
    context: Any = multiprocessing.get_context(start_method)
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for candidate in tqdm(candidates, desc="starting", unit="process"):
            own_end, worker_end = context.Pipe()
            process = context.Process(target=worker, args=(candidate, worker_end), daemon=False)
            process.start()
            worker_end.close()
            processes.append(process)
            pipes.append(own_end)
            _run_steps(own_end, candidate, warm_up_steps)
        yield pipes
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(0)
            process.join()
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            process.kill()  # has no effect on a process that has ended
            process.join()
            pipe.close()


def _run_steps(pipe: Connection, candidate: Candidate, steps: int) -> tuple[list[Step], float]:
    """Let one candidate run some steps; returns them and the peak memory of its process in MiB."""
    try:
        pipe.send(steps)
        return pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"The process of {candidate.name!r} has ended. See its error message above.") from error
