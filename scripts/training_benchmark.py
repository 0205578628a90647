# SPDX-License-Identifier: Apache-2.0
"""The cost of a training step: plain, with cached teachers, with online teachers, with every method.

Each side is a process of its own that runs the bundle's real trainer on real samples; the sides take turns, so that
whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from tqdm import tqdm

from scripts.arguments import CONFIGS
from scripts.comparison import own_bars

WARM_UP, TURN = 3, 5  # steps before the first turn; steps per turn
LEAST_ROUNDS = 4  # 20 steps
TEACHERS = ("unetr", "hdenseformer", "swinunetr", "uxnet", "dynunet")  # the first one, three or five of them
COUNTS = (1, 3, 5)
PLAIN = "plain"


@dataclass(frozen=True)
class Side:
    """One thing that is timed: configs and overrides of a training."""

    name: str
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]


class _Turns:
    """Handler: time every step, and wait for the next turn whenever one is over."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.left, self.steps, self.began, self.loaded = pipe, 0, [], 0.0, 0.0  # type: ignore[var-annotated]

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
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
            self.pipe.send((self.steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            self.steps = []


def _train(side: Side, pipe: Connection) -> None:
    """A side's process: the bundle's own trainer, without its handlers (validation, files)."""
    from monai.bundle import ConfigParser

    own_bars()
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in side.configs])
    parser.update(dict(side.overrides))
    parser["train#handlers"] = []
    parser["max_epochs"] = 10**6
    parser.get_parsed_content("initialize")
    trainer = parser.get_parsed_content("train#trainer")
    _Turns(pipe).attach(trainer)
    trainer.run()


def alternate(sides: Sequence[Side], rounds: int) -> list[dict[str, Any]]:
    """Time the sides in turns; one row per side, with its ratio to the first.

    Args:
        sides: the first is what the others are compared with.
        rounds: turns of each side, of ``TURN`` steps.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "peak_mib", "data_share", "steps"}``.

    Raises:
        RuntimeError: a side's process has ended; its own message is above.
    """
    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    peaks = {}
    with _started(sides) as pipes:
        for _ in tqdm(range(rounds), desc="turns", unit="round"):
            for side, pipe in zip(sides, pipes, strict=True):
                steps, peaks[side.name] = _turn(pipe, side, TURN)
                times[side.name] += steps
    base = statistics.median(step for step, _ in times[sides[0].name])
    return [_row(side.name, times[side.name], base, peaks[side.name]) for side in sides]


@contextmanager
def _started(sides: Sequence[Side]) -> Iterator[list[Connection]]:
    """A process per side, warmed up, by its pipe; none of them outlives the body, however it ends."""
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    processes: list[ForkProcess] = []
    try:
        for side in tqdm(sides, desc="starting", unit="side"):
            here, there = context.Pipe()
            process = context.Process(target=_train, args=(side, there), daemon=False)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
            _turn(here, side, WARM_UP)
        yield pipes
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(0)
            process.join()
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            process.kill()  # nothing where it has ended
            process.join()
            pipe.close()


def _turn(pipe: Connection, side: Side, steps: int) -> tuple[list[tuple[float, float]], float]:
    """Let a side do its steps while all others wait."""
    try:
        pipe.send(steps)
        return pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"The side {side.name!r} has ended: see its message above.") from error


def _row(name: str, steps: Sequence[tuple[float, float]], base: float, peak: float) -> dict[str, Any]:
    median = statistics.median(step for step, _ in steps)
    return {
        "side": name,
        "what": "training step",
        "median_s": round(median, 4),
        "ratio": round(median / base, 3),
        "peak_mib": round(peak),
        "data_share": round(sum(data for _, data in steps) / sum(step for step, _ in steps), 3),
        "steps": len(steps),
    }


def specs(names: Sequence[str], modalities: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Teachers with random weights: what they say does not change what they cost."""
    return {name: {"architecture": name, "modalities": list(modalities), "weights": None} for name in names}


def cost_sides(base: Sequence[str], common: Mapping[str, Any], modalities: Sequence[str], cache: Path) -> list[Side]:
    """Plain, then one, three and five teachers from the cache and online, all with soft predictions."""
    sides, soft = [Side(PLAIN, tuple(base), common)], (*base, "distill", "methods/hinton")
    for count in COUNTS:
        chosen = {**common, "teacher_specs": specs(TEACHERS[:count], modalities)}
        word = "teacher" if count == 1 else "teachers"
        sides.append(Side(f"{count} cached {word}", (*soft, "cached"), {**chosen, "cache_dir": str(cache)}))
        sides.append(Side(f"{count} online {word}", soft, chosen))
    return sides


def method_sides(
    base: Sequence[str], common: Mapping[str, Any], modalities: Sequence[str], methods: Sequence[str]
) -> list[Side]:
    """Plain, then every method online, with the teachers that the comparison of all methods gives it."""
    sides = [Side(PLAIN, tuple(base), common)]
    for method in methods:
        own = {"teacher_specs": specs(("dynunet", "hdenseformer") if method == "dual" else ("dynunet",), modalities)}
        extra: dict[str, Any] = {"selective_fusion": True} if method == "dual" else {}
        if method == "gkd":
            extra = {"headers_dir": None}  # untrained headers cost what trained ones do
        sides.append(Side(method, (*base, "distill", f"methods/{method}"), {**common, **own, **extra}))
    return sides


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| side | median s per step | ratio to plain | data share | peak MiB | steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["side"], f"{row['median_s']:.3f}", f"{row['ratio']:.2f}", f"{row['data_share']:.0%}"]
        lines.append("| " + " | ".join([*cells, str(row["peak_mib"]), str(row["steps"])]) + " |")
    return "\n".join(lines)


def prepare(folder: Path, args: Sequence[str], main: Callable[[Sequence[str]], int]) -> None:
    """Cache the five teachers, in a process of its own; what is there is not made again."""
    weights = [x for name in TEACHERS for x in ("--teacher", f"{name}=random")]
    process = multiprocessing.get_context("fork").Process(
        target=lambda: exit(main(["cache-teachers", *args, *weights, "--output-dir", str(folder)]))
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("The teachers could not be cached: see the message above.")
