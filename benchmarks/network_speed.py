# SPDX-License-Identifier: Apache-2.0
"""Time the segmentation of one preprocessed case by each network of configs/scale/small.json.

All networks run in one process, in interleaved rounds. The case is random, because the time does not depend on the
values. It has the size of a typical sarcoma at 3 mm, and the sliding window is that of configs/inference.json.

Example: python -m benchmarks networks --json networks.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer

from benchmarks.options import add_json_option
from benchmarks.synthetic_body import MODALITIES
from scripts.cli.config import read_config
from scripts.networks import Student
from scripts.networks.teacher import Teacher
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table

CASE_SHAPE = (66, 66, 64)
TEACHER_ARCHITECTURES = {"ct": "unetr", "pet": "hdenseformer", "mr": "swinunetr"}
STUDENT = "student"


def networks(patch: Sequence[int]) -> dict[str, torch.nn.Module]:
    """The networks of docs/results.md and the student with batch normalisation, all with random weights."""
    channels = len(MODALITIES)
    built: dict[str, torch.nn.Module] = {
        STUDENT: Student(channels, 2),
        f"{STUDENT}, batch norm": Student(channels, 2, norm="batch"),
    }
    for modality, architecture in TEACHER_ARCHITECTURES.items():
        built[f"{architecture} ({modality})"] = Teacher(
            [modality], MODALITIES, 2, patch, architecture=architecture, scale="small"
        )
    return {
        name: network.eval().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        for name, network in built.items()
    }


def measure(repeats: int) -> list[dict[str, Any]]:
    """Time all networks.

    Args:
        repeats: rounds, after one to warm up.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "peak_mib"}``; ``ratio`` is to the student, ``peak_mib`` is None.
    """
    settings = read_config("inference")
    inferer = SlidingWindowInferer(settings["patch"], overlap=settings["overlap"], mode="gaussian")
    image = torch.rand(1, len(MODALITIES), *CASE_SHAPE, generator=torch.Generator().manual_seed(0))
    candidates = networks(settings["patch"])
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, network in candidates.items():
                start = time.perf_counter()
                inferer(image, network)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    what = f"sliding window over {CASE_SHAPE}, {torch.get_num_threads()} threads"
    return [
        {
            "side": name,
            "what": what,
            "median_s": round(median, 3),
            "ratio": round(median / medians[STUDENT], 2),
            "peak_mib": None,
        }
        for name, median in medians.items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median counts (default %(default)s)")
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Time all networks and return the table."""
    rows = measure(args.repeats)
    if args.json:
        write_json(rows, args.json)
    cells = [(row["side"], row["median_s"], row["ratio"], row["what"]) for row in rows]
    return markdown_table(("network", "median s", "ratio to the student", "case"), cells)
