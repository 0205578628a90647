# SPDX-License-Identifier: Apache-2.0
"""Sides of a benchmark that take turns: each is a process of its own that waits for its turn over a pipe.

Whatever else the machine does then falls on all of them.
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

from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from tqdm import tqdm

from scripts.cli.bundle_run import protected
from scripts.cli.config import CONFIGS


@dataclass(frozen=True)
class Side:
    """One thing that is timed: configs and overrides of the bundle, which must be plain values."""

    name: str
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]


Step = tuple[
    float, Any
]  # seconds of the whole step, and what more is known: those of waiting for its batch, or results
Work = Callable[[Side, Connection], None]


@dataclass
class Measured:
    """What a side's turns gave."""

    steps: list[Step] = field(default_factory=list)
    peak_mib: float = 0.0


def compose(side: Side) -> ConfigParser:
    """A side's configs and overrides, merged."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in side.configs])
    parser.update(protected(dict(side.overrides)))
    return parser


def memory_mib(entry: str = "VmHWM") -> float:
    """Resident memory of this process in MiB: at most so far (``VmHWM``) or now (``VmRSS``).

    Not ``ru_maxrss`` where it can be helped: a process takes it over from the one that started it.
    """
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Turns:
    """Handler: time every iteration, and wait for the next turn whenever one is over."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.left, self.began, self.loaded = pipe, 0, 0.0, 0.0
        self.steps: list[Step] = []

    def attach(self, engine: Engine) -> None:
        """Register with a trainer or an evaluator."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.wait)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.note_batch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note_step)

    def wait(self, engine: Engine) -> None:
        """Wait for the next turn where one is over; a turn of 0 steps ends the run."""
        if self.left == 0:
            self.left = self.pipe.recv()
            if self.left == 0:
                engine.terminate()
        self.began = self.loaded = time.perf_counter()

    def note_batch(self, engine: Engine) -> None:
        """The batch is there."""
        self.loaded = time.perf_counter()

    def note_step(self, engine: Engine) -> None:
        """The step is done; at the end of a turn its times are handed in, with the peak memory in MiB so far."""
        self.steps.append((time.perf_counter() - self.began, self.loaded - self.began))
        self.left -= 1
        if self.left == 0:
            self.pipe.send((self.steps, memory_mib()))
            self.steps = []


def take_turns(
    sides: Sequence[Side], work: Work, rounds: Mapping[str, int], turn: int, warm_up: int, start: str = "fork"
) -> dict[str, Measured]:
    """Let every side do its turns while all others wait.

    Args:
        sides: in the order of their turns.
        work: what a side's process does: attach ``Turns`` to an engine and run it.
        rounds: how many turns each side gets, by name; those with fewer are done earlier.
        turn: steps of a turn.
        warm_up: steps before the first turn, not counted.
        start: how a process is started: ``"fork"`` (modules are there) or ``"spawn"`` (its memory is its own).

    Raises:
        RuntimeError: a side's process has ended; its own message is above.
    """
    measured = {side.name: Measured() for side in sides}
    order = [
        index
        for number in range(max(rounds.values()))
        for index, side in enumerate(sides)
        if number < rounds[side.name]
    ]
    with _started(sides, work, warm_up, start) as pipes, tqdm(order, desc="turns", unit="turn") as bar:
        for index in bar:
            side = sides[index]
            bar.set_postfix_str(side.name)
            steps, measured[side.name].peak_mib = _turn(pipes[index], side, turn)
            measured[side.name].steps += steps
    return measured


@contextmanager
def _started(sides: Sequence[Side], work: Work, warm_up: int, start: str) -> Iterator[list[Connection]]:
    """A process per side, warmed up, by its pipe; none of them outlives the body, however it ends."""
    context: Any = multiprocessing.get_context(start)
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for side in tqdm(sides, desc="starting", unit="side"):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(side, there), daemon=False)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
            _turn(here, side, warm_up)
        yield pipes
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(0)
            process.join()
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            process.kill()  # nothing where it has ended
            process.join()
            pipe.close()


def _turn(pipe: Connection, side: Side, steps: int) -> tuple[list[Step], float]:
    """Let a side do its steps while all others wait."""
    try:
        pipe.send(steps)
        return pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"The side {side.name!r} has ended: see its message above.") from error
