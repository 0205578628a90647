# SPDX-License-Identifier: Apache-2.0
"""The cost of a training step: plain, with cached teachers, with online teachers, with every method.

Each side is a process of its own that runs the bundle's real trainer on real samples; the sides take turns, so that
whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.job_queue import own_bars
from benchmarks.turn_taking import Side, Turns, compose, take_turns

WARM_UP, TURN = 3, 5  # steps before the first turn; steps per turn
LEAST_ROUNDS = 4  # 20 steps
TEACHERS = ("unetr", "hdenseformer", "swinunetr", "uxnet", "dynunet")  # the first one, three or five of them
COUNTS = (1, 3, 5)
PLAIN = "plain"


def _train(side: Side, pipe: Connection) -> None:
    """A side's process: the bundle's own trainer, without its handlers (validation, files)."""
    own_bars()
    parser = compose(side)
    parser["train#handlers"] = []
    parser["max_epochs"] = 10**6
    parser["locked"] = ""  # nothing is written
    parser.get_parsed_content("initialize")
    trainer = parser.get_parsed_content("train#trainer")
    Turns(pipe).attach(trainer)
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
    measured = take_turns(sides, _train, {side.name: rounds for side in sides}, TURN, WARM_UP)
    base = statistics.median(step for step, _ in measured[sides[0].name].steps)
    return [_row(name, found.steps, base, found.peak_mib) for name, found in measured.items()]


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
