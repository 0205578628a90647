# SPDX-License-Identifier: Apache-2.0
"""The time of inference from files to a written mask: the student's engines, stock MONAI, teachers, nnU-Net.

Each side is a process of its own that runs the bundle's real evaluator over a data list that repeats one case; the
sides take turns of one case. A case counts from before its files are read until after its mask is written.

nnU-Net is in requirements-benchmark.txt. It asks for any torch and torchvision, and so for builds with CUDA: on a CPU
name them as well, ``pip install -e ".[benchmark,fast]" torch==2.13.0 torchvision==0.28.0`` (``make bench-env``).
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import hardware_floor as floor
from benchmarks.inference_candidates import (
    MAIN,
    SIZES,
    SLOW,
    Plan,
    Volume,
    all_sides,
    choose,
    is_engine,
    make_volume,
    mask_path,
    teachers_scale,
)
from benchmarks.turn_taking import Measured, Side, Turns, compose, take_turns
from scripts.data.resampling import network_grid
from scripts.utils.atomic_files import atomic_file

Row = dict[str, Any]
NO_HANDLER = ("Progress", "ManifestWriter")  # bars and files of a run that are not the mask
PLOT_ROUNDS = 3  # of the volumes that only the plot shows, at most


def _segment(side: Side, pipe: Connection) -> None:
    """A side's process: the bundle's own evaluator, without the handlers that do not segment."""
    warnings.filterwarnings("ignore")
    parser = compose(side)
    handlers = [each for each in parser["handlers"] if each["_target_"].rsplit(".", 1)[-1] not in NO_HANDLER]
    parser["handlers"] = handlers
    parser.get_parsed_content("initialize")
    evaluator = parser.get_parsed_content("evaluator")
    logging.getLogger("ignite").setLevel(logging.ERROR)
    Turns(pipe).attach(evaluator)
    evaluator.run()


def time_sides(sides: Sequence[Side], volume: str, rounds: int, slow_rounds: int) -> list[Row]:
    """Time sides on one volume in turns of one case; the first case of each is not counted.

    Args:
        sides: in the order of their turns.
        volume: its name, for the rows.
        rounds, slow_rounds: cases of the fast and of the slow sides.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "peak_mib", "n"}``; ``ratio`` is to the student's fastest engine.

    Raises:
        RuntimeError: a side's process has ended; its own message is above.
    """
    turns = {side.name: slow_rounds if side.name in SLOW else rounds for side in sides}
    measured = take_turns(sides, _segment, turns, turn=1, warm_up=1, start="spawn")
    return _rows(measured, volume)


def _rows(measured: Mapping[str, Measured], volume: str) -> list[Row]:
    medians = {name: statistics.median(total for total, _ in found.steps) for name, found in measured.items()}
    base = medians[fastest(medians)]
    return [
        _row(name, volume, medians[name], base, round(found.peak_mib), len(found.steps))
        for name, found in measured.items()
    ]


def _row(side: str, volume: str, seconds: float, base: float, peak: int | None, count: int) -> Row:
    ratio = round(seconds / base, 3)
    return {"side": side, "what": volume, "median_s": round(seconds, 4), "ratio": ratio, "peak_mib": peak, "n": count}


def fastest(medians: Mapping[str, float]) -> str:
    """The student's fastest engine; where none was timed, the fastest side."""
    engines = [name for name in medians if is_engine(name)]
    return min(engines or medians, key=lambda name: medians[name])


def grid_shape(volume: Volume, spacing: Sequence[float]) -> list[int]:
    """The volume's voxels on the network's grid."""
    from monai.transforms import LoadImage

    image = LoadImage(ensure_channel_first=True)(volume.case["image"])
    return list(network_grid(np.asarray(image.affine), image.shape[1:], spacing)[1])


class _Count:
    """In place of a network: counts what it is given, and answers zeros."""

    def __init__(self, network: Any) -> None:
        self.window, self.bytes_per_voxel = network.window, network.bytes_per_voxel
        self.passes, self.voxels = 0, 0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.passes += len(image)
        self.voxels += image[:, 0].numel()
        return image.new_zeros(len(image), 1, *image.shape[2:])


def network_floor(side: Side, volume: Volume) -> dict[str, Any]:
    """The network alone, on random voxels of the volume's grid: seconds, GFLOPs of the pass, the machine's rates."""
    warnings.filterwarnings("ignore")
    parser = compose(side)
    parser.get_parsed_content("initialize")
    names = ("predictor", "inferer", "modalities", "spacing", "patch", "network_def")
    predictor, infer, modalities, spacing, window, plain = (parser.get_parsed_content(name) for name in names)
    image = torch.rand(1, len(modalities), *grid_shape(volume, spacing), generator=torch.Generator().manual_seed(0))
    engine = predictor.choose().eval()  # not compared with PyTorch, which has random weights here
    count, flops = _Count(engine), floor.network_flops(plain.eval(), len(modalities), window)
    infer(image, count)
    return {
        "seconds": floor.median_seconds(lambda: infer(image, engine)),
        "gflops": flops * count.voxels / math.prod(window) / 1e9,
        "passes": float(count.passes),
        "rates": floor.matrix_rates(),
    }


def floor_rows(side: Side, volume: Volume, seconds: float, plan: Plan) -> tuple[list[Row], list[str]]:
    """What the fastest side cannot go below, as rows, and what that says."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(network_floor, side, volume).result()
    files = [Path(path) for key, path in volume.case.items() if key not in ("case_id", "image")]
    parts = floor.floor(files, found["seconds"], mask_path(side.name, volume, plan))
    rows = [_row(f"floor: {name}", volume.name, each, seconds, None, floor.REPEATS) for name, each in parts.items()]
    used = floor.shares(found["seconds"], found["gflops"], found["rates"])
    rates = ", ".join(f"{share:.0%} of {found['rates'][name]:.0f} GFLOP/s ({name})" for name, share in used.items())
    return rows, [
        f"{volume.name}, {side.name}: {seconds:.2f} s from files to mask are {seconds / parts['sum']:.2f} times the "
        f"floor of {parts['sum']:.2f} s.",
        f"Its network: {found['passes']:.0f} pass(es), {found['gflops']:.0f} GFLOPs in {found['seconds']:.2f} s: "
        f"{rates} that this machine reaches in products of matrices.",
    ]


def describe(names: Sequence[str], plan: Plan) -> list[str]:
    """A line per volume and side: what would be timed."""
    lines = []
    for name in names:
        volume = Volume(name, {"case_id": name}, {}, {}, teachers_scale(name))
        sides, words = choose(all_sides(volume, plan), name, plan)
        lines += [f"{name}: {side.name}: {', '.join(side.configs)}" for side in sides] + words
    return lines


def compare(names: Sequence[str], plan: Plan) -> Iterator[tuple[list[Row], list[str]]]:
    """Every volume's rows and what is to be said about them, volume by volume.

    Args:
        names: of the volumes; the main one is timed first, since it tells the student's fastest engine.
        plan: what they share.
    """
    best = ""
    for name in sorted(names, key=lambda each: each != MAIN):
        tqdm.write(f"volume {name}")
        volume = make_volume(name, plan)
        sides, words = choose(all_sides(volume, plan), name, plan, best)
        if not sides:
            yield [], words
            continue
        rounds = min(plan.rounds, PLOT_ROUNDS) if name in SIZES else plan.rounds
        rows = time_sides(sides, name, rounds, plan.slow_rounds)
        medians = {row["side"]: row["median_s"] for row in rows}
        first = fastest(medians)
        if is_engine(first):
            best = first if name == MAIN else best
            side = next(side for side in sides if side.name == first)
            more, said = floor_rows(side, volume, medians[first], plan)
            rows, words = [*rows, *more], [*words, *said]
        yield rows, words


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| side | volume | median s | ratio | peak MiB | cases |", "|---|---|---|---|---|---|"]
    for row in rows:
        peak = "" if row["peak_mib"] is None else row["peak_mib"]
        cells = (row["side"], row["what"], f"{row['median_s']:.3f}", f"{row['ratio']:.2f}", peak, row["n"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, machine: str = "") -> None:
    """Seconds against voxels of the synthetic volumes, a line per side; headed by the machine's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for side in dict.fromkeys(row["side"] for row in rows if not row["side"].startswith("floor: ")):
        points = sorted((_voxels(row["what"]), row["median_s"]) for row in rows if row["side"] == side)
        points = [point for point in points if point[0]]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=side)
    axes.set(xlabel="voxels", ylabel="seconds from files to mask", title=machine)
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def _voxels(volume: str) -> int:
    """Voxels of a synthetic volume by its name; 0 for any other."""
    sizes = volume.split("x")
    return int(sizes[0]) * int(sizes[1]) * int(sizes[2]) if len(sizes) == 3 else 0
