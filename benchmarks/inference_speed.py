# SPDX-License-Identifier: Apache-2.0
"""Time inference from files to a written mask: the student's engines, stock MONAI, three teachers, nnU-Net.

Each candidate runs the bundle's real evaluator over a data list that repeats one case, in its own process and in
interleaved rounds of one case. The time of a case starts before its files are read and ends after its mask is written.

nnU-Net is in requirements-benchmark.txt; install it with ``make bench-env``. It accepts any torch and torchvision, so
that pip would install builds with CUDA: on a CPU name both versions as well.

Example: python -m benchmarks inference --dataset-dir DATA --plot inference.png --json inference.json
"""

from __future__ import annotations

import argparse
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

from benchmarks import lower_bound
from benchmarks.inference_candidates import (
    MAIN,
    PATIENT,
    PLOT_SIZES,
    SLOW,
    WEIGHTS,
    InferencePlan,
    Volume,
    all_candidates,
    is_engine,
    mask_path,
    prepare_volume,
    require_student_modalities,
    select_candidates,
    teacher_scale,
)
from benchmarks.interleaved_timing import Candidate, StepTimer, Timings, compose, time_interleaved
from benchmarks.options import add_data_options, add_json_option, add_output_options
from scripts.cli.config import read_config
from scripts.cli.main import main
from scripts.cli.options import positive_int
from scripts.runtime.engines import UnavailableError
from scripts.runtime.exported_files import read_export
from scripts.runtime.grids import network_grid
from scripts.utils.atomic_files import atomic_file, write_json
from scripts.utils.markdown import markdown_table

logger = logging.getLogger(__name__)
Row = dict[str, Any]
DISABLED_HANDLERS = ("Progress", "ManifestWriter")  # progress bars, and files other than the mask
PLOT_ROUNDS = 3  # maximal rounds of the volumes that only the plot shows
LOWER_BOUND = "floor: "  # before the name of a part; as in the recorded results of docs/results/performance


def _segment(candidate: Candidate, pipe: Connection) -> None:
    """Worker process: run the bundle's evaluator without ``DISABLED_HANDLERS``."""
    warnings.filterwarnings("ignore")
    parser = compose(candidate)
    handlers = [each for each in parser["handlers"] if each["_target_"].rsplit(".", 1)[-1] not in DISABLED_HANDLERS]
    parser["handlers"] = handlers
    parser.get_parsed_content("initialize")
    evaluator = parser.get_parsed_content("evaluator")
    logging.getLogger("ignite").setLevel(logging.ERROR)
    StepTimer(pipe).attach(evaluator)
    evaluator.run()


def time_candidates(candidates: Sequence[Candidate], volume: str, rounds: int, slow_rounds: int) -> list[Row]:
    """Time candidates on one volume in interleaved rounds of one case. The first case of each is not counted.

    Args:
        candidates: in the order in which they run within a round.
        volume: name of the volume, for the rows.
        rounds: rounds of the fast candidates.
        slow_rounds: rounds of the slow candidates.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "peak_mib", "n"}``; ``ratio`` is to the student's fastest engine.

    Raises:
        RuntimeError: the process of a candidate has ended; it printed the reason.
    """
    counts = {each.name: slow_rounds if each.name in SLOW else rounds for each in candidates}
    timings = time_interleaved(candidates, _segment, counts, 1, 1, start_method="spawn")
    return _rows(timings, volume)


def _rows(timings: Mapping[str, Timings], volume: str) -> list[Row]:
    medians = {name: statistics.median(total for total, _ in each.steps) for name, each in timings.items()}
    base = medians[fastest(medians)]
    return [
        _row(name, volume, medians[name], base, round(each.peak_mib), len(each.steps)) for name, each in timings.items()
    ]


def _row(name: str, volume: str, seconds: float, base: float, peak_mib: int | None, count: int) -> Row:
    return {
        "side": name,
        "what": volume,
        "median_s": round(seconds, 4),
        "ratio": round(seconds / base, 3),
        "peak_mib": peak_mib,
        "n": count,
    }


def fastest(medians: Mapping[str, float]) -> str:
    """Name of the student's fastest engine, or of the fastest candidate if no engine was timed.

    Args:
        medians: name -> median seconds.
    """
    engines = [name for name in medians if is_engine(name)]
    return min(engines or medians, key=lambda name: medians[name])


def grid_shape(volume: Volume, spacing: Sequence[float]) -> list[int]:
    """Shape of the volume on the network's grid (H W D)."""
    from monai.transforms import LoadImage

    image = LoadImage(ensure_channel_first=True)(volume.case["image"])
    return list(network_grid(np.asarray(image.affine), image.shape[1:], spacing)[1])


class _VoxelCounter:
    """Takes the place of a network: counts its inputs (B C H W D) and returns zeros."""

    def __init__(self, network: Any) -> None:
        self.window, self.bytes_per_voxel = network.window, network.bytes_per_voxel
        self.passes, self.voxels = 0, 0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.passes += len(image)
        self.voxels += image[:, 0].numel()
        return image.new_zeros(len(image), 1, *image.shape[2:])


def time_network(candidate: Candidate, volume: Volume) -> dict[str, Any]:
    """Time the network alone, on random voxels of the volume's grid.

    Returns:
        ``seconds``; ``gflops`` and ``passes`` of the network for the volume; ``rates`` of the machine, see
        ``lower_bound.matrix_rates``.
    """
    warnings.filterwarnings("ignore")
    parser = compose(candidate)
    parser.get_parsed_content("initialize")
    names = ("predictor", "inferer", "modalities", "spacing", "patch", "network_def")
    predictor, infer, modalities, spacing, window, network = (parser.get_parsed_content(name) for name in names)
    image = torch.rand(1, len(modalities), *grid_shape(volume, spacing), generator=torch.Generator().manual_seed(0))
    engine = predictor.choose().eval()  # not compared with PyTorch's network, which has random weights here
    counter = _VoxelCounter(engine)
    flops = lower_bound.network_flops(network.eval(), len(modalities), window)
    infer(image, counter)
    return {
        "seconds": lower_bound.median_seconds(lambda: infer(image, engine)),
        "gflops": flops * counter.voxels / math.prod(window) / 1e9,
        "passes": float(counter.passes),
        "rates": lower_bound.matrix_rates(),
    }


def lower_bound_rows(
    candidate: Candidate, volume: Volume, seconds: float, plan: InferencePlan
) -> tuple[list[Row], list[str]]:
    """Compare a candidate with the lower bound of its time.

    Args:
        candidate: the student's fastest engine.
        volume: the volume.
        seconds: its time from files to mask.
        plan: knows where the mask is.

    Returns:
        Rows as in ``time_candidates``, and sentences for the report.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        network = pool.submit(time_network, candidate, volume).result()
    files = [Path(path) for key, path in volume.case.items() if key not in ("case_id", "image")]
    mask = mask_path(candidate.name, volume, plan)
    parts = lower_bound.lower_bound(files, network["seconds"], mask)
    rows = [
        _row(f"{LOWER_BOUND}{name}", volume.name, part, seconds, None, lower_bound.REPEATS)
        for name, part in parts.items()
    ]
    shares = lower_bound.rate_shares(network["seconds"], network["gflops"], network["rates"])
    rates = " and ".join(
        f"{share:.0%} of {network['rates'][name]:.0f} GFLOP/s ({name})" for name, share in shares.items()
    )
    return rows, [
        f"{volume.name}, {candidate.name}: {seconds:.2f} s from files to mask, {seconds / parts['sum']:.2f} times the "
        f"lower bound of {parts['sum']:.2f} s ({LOWER_BOUND}sum).",
        f"Its network: {network['passes']:.0f} pass(es), {network['gflops']:.0f} GFLOPs in {network['seconds']:.2f} s. "
        f"It uses {rates}, the rates of this machine in matrix products.",
    ]


def list_candidates(names: Sequence[str], plan: InferencePlan) -> list[str]:
    """One line for each candidate that would be timed on each volume, and for each one that cannot run."""
    lines = []
    for name in names:
        volume = Volume(name, {"case_id": name}, {}, {}, teacher_scale(name))
        candidates, notes = select_candidates(all_candidates(volume, plan), name, plan)
        lines += [f"{name}: {each.name}: {', '.join(each.configs)}" for each in candidates] + notes
    return lines


def time_volumes(names: Sequence[str], plan: InferencePlan) -> Iterator[tuple[list[Row], list[str]]]:
    """Time all volumes; yields the rows and the notes of each.

    Args:
        names: of the volumes. The main one is timed first, because it decides which engine is the fastest.
        plan: the settings that they share.
    """
    fastest_engine = ""
    for name in sorted(names, key=lambda each: each != MAIN):
        tqdm.write(f"volume {name}")
        volume = prepare_volume(name, plan)
        candidates, notes = select_candidates(all_candidates(volume, plan), name, plan, fastest_engine)
        if not candidates:
            yield [], notes
            continue
        rounds = min(plan.rounds, PLOT_ROUNDS) if name in PLOT_SIZES else plan.rounds
        rows = time_candidates(candidates, name, rounds, plan.slow_rounds)
        medians = {row["side"]: row["median_s"] for row in rows}
        best = fastest(medians)
        if is_engine(best):
            fastest_engine = best if name == MAIN else fastest_engine
            candidate = next(each for each in candidates if each.name == best)
            bound_rows, bound_notes = lower_bound_rows(candidate, volume, medians[best], plan)
            rows, notes = [*rows, *bound_rows], [*notes, *bound_notes]
        yield rows, notes


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("candidate", "volume", "median s", "ratio", "peak MiB", "cases")
    cells = [
        (row["side"], row["what"], f"{row['median_s']:.3f}", f"{row['ratio']:.2f}", row["peak_mib"], row["n"])
        for row in rows
    ]
    return markdown_table(head, cells)


def write_plot(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Draw seconds against voxels of the synthetic volumes, one line per candidate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["side"] for row in rows if not row["side"].startswith(LOWER_BOUND)):
        points = sorted((_voxels(row["what"]), row["median_s"]) for row in rows if row["side"] == name)
        points = [point for point in points if point[0]]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="voxels", ylabel="seconds from files to mask", title=title)
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def _voxels(volume: str) -> int:
    """Number of voxels of a synthetic volume from its name; 0 for any other volume."""
    sizes = volume.split("x")
    return int(sizes[0]) * int(sizes[1]) * int(sizes[2]) if len(sizes) == 3 else 0


def export_if_missing(patients: Path) -> None:
    """Export the shipped weights unless this has been done.

    Args:
        patients: folder of the sts data set. Without it int8 is not exported, because its calibration needs the
            patients that the weights were trained on.
    """
    try:
        read_export(WEIGHTS)
    except UnavailableError as error:
        logger.info("%s", error)
        int8 = ["--dataset-dir", str(patients), "--precisions", "fp32", "bf16", "int8"] if patients.is_dir() else []
        main(["export", *int8])  # if an export fails, its candidate is left out with the reason


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    add_output_options(parser, "runs/benchmark")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="cases per candidate (default %(default)s)")
    parser.add_argument(
        "--slow-rounds", type=positive_int, default=1, help="cases of the teachers and nnU-Net (default %(default)s)"
    )
    parser.add_argument(
        "--volume", nargs="+", metavar="NAME", help=f"{PATIENT}, or a shape such as {MAIN} (default: all volumes)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="candidates, by a part of their names")
    parser.add_argument("--plot", metavar="FILE", help="draw the seconds against the voxels")
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Time all volumes and return the table."""
    require_student_modalities(read_config(f"data/{args.data}")["modalities"])
    output = args.output_dir / "inference"
    dataset_dir = args.dataset_dir or ""
    plan = InferencePlan(
        args.data, output, dataset_dir, args.threads, args.rounds, args.slow_rounds, only=tuple(args.only)
    )
    names = args.volume or [MAIN, *PLOT_SIZES, *([PATIENT] if dataset_dir else [])]
    if args.dry_run:
        return "\n".join(dict.fromkeys(list_candidates(names, plan)))
    export_if_missing(Path(dataset_dir) / "sts")
    rows: list[Row] = []
    cpu = lower_bound.cpu_name(args.threads)
    notes = [f"On {cpu}."]
    for volume_rows, volume_notes in time_volumes(names, plan):
        rows += volume_rows
        notes = list(dict.fromkeys([*notes, *volume_notes]))
        # Written after every volume, so that an interrupted benchmark keeps its results.
        write_json({"cpu": cpu, "rows": rows, "notes": notes}, args.json or output / "inference.json")
    if args.plot:
        write_plot(rows, Path(args.plot), cpu)
    return "\n".join([format_table(rows), "", *notes])
