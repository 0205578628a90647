# SPDX-License-Identifier: Apache-2.0
"""Seconds to segment one preprocessed case, for each network of configs/scale/small.json.

All networks run in one process and in turn, so that whatever else the machine does falls on all of them::

    python benchmarks/network_speed.py [--json FILE]

The case is random (the time does not depend on the values), of a typical sarcoma's size at 3 mm, with the sliding
window of configs/inference.json. Prints medians and the ratio to the student.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from monai.inferers import SlidingWindowInferer

from scripts.networks import Student
from scripts.networks.teacher import Teacher

CONFIGS = Path(__file__).parents[1] / "configs"
MODALITIES = ["ct", "pet", "mr"]
CASE = (66, 66, 64)


def networks(patch: list[int]) -> dict[str, torch.nn.Module]:
    """The five networks of docs/results.md and the student with batch normalisation, with random weights."""
    options = json.loads((CONFIGS / "scale/small.json").read_text(encoding="utf-8"))["architectures"]
    teachers = {"ct": "unetr", "pet": "hdenseformer", "mr": "swinunetr"}
    found: dict[str, torch.nn.Module] = {"student": Student(3, 2), "student, batch norm": Student(3, 2, norm="batch")}
    for modality, architecture in teachers.items():
        found[f"{architecture} ({modality})"] = Teacher(architecture, [modality], MODALITIES, 2, patch, options)
    return {name: net.eval().to(memory_format=torch.channels_last_3d) for name, net in found.items()}


def measure(repeats: int) -> list[dict[str, object]]:
    """One row per network: median seconds over ``repeats`` rounds after one for warming up."""
    settings = json.loads((CONFIGS / "inference.json").read_text(encoding="utf-8"))
    inferer = SlidingWindowInferer(settings["patch"], overlap=settings["overlap"], mode="gaussian")
    image = torch.rand(1, 3, *CASE, generator=torch.Generator().manual_seed(0))
    nets = networks(settings["patch"])
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, net in nets.items():
                began = time.perf_counter()
                inferer(image, net)
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    what = f"sliding window over {CASE}, {torch.get_num_threads()} threads"
    return [
        {
            "side": name,
            "what": what,
            "median_s": round(m, 3),
            "ratio": round(m / medians["student"], 2),
            "peak_mib": None,
        }
        for name, m in medians.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.repeats)
    for row in rows:
        print(f"{row['side']:24} {row['median_s']:8} s  {row['ratio']:6} x the student's  ({row['what']})")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
