# SPDX-License-Identifier: Apache-2.0
"""Parameters, operations and CPU seconds of the networks of the study."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNETR
from torch import nn

from benchmarks.lower_bound import cpu_name
from benchmarks.study_students import STUDENTS
from benchmarks.study_teachers import VIT_SMALL
from scripts.evaluation.network_cost import network_cost
from scripts.networks import HDenseFormer, Student
from scripts.utils.atomic_files import write_json, write_text
from scripts.utils.run_manifest import git_commit

Cost = Mapping[str, Any]

CHANNELS, CLASSES = 3, 2
PATCH, VOLUME, OVERLAP = (48, 48, 48), (64, 64, 64), 0.25  # voxels of 4 mm
ENSEMBLE = "ensemble"
THIN = "0.9M, 4 channels at full resolution"  # the plan's first choice
ENSEMBLE_MEMBERS = ("H-DenseFormer", "UNETR ViT-small")
COST_COLUMNS = ("network", "parameters", "gflops", "cpu_seconds_per_case")


def study_networks() -> dict[str, nn.Module]:
    """The students, named by their size, and the teachers, with random weights."""
    unetr: dict[str, Any] = {"img_size": PATCH, "feature_size": 16}
    small: dict[str, Any] = {**unetr, **VIT_SMALL}
    return {
        **{size: Student(CHANNELS, CLASSES, features) for size, features in STUDENTS.items()},
        THIN: Student(CHANNELS, CLASSES, (12, 24, 48, 96), 4, norm=("group", {"num_groups": 4})),
        "H-DenseFormer": HDenseFormer(CHANNELS, CLASSES, img_size=PATCH, features=16, depth=24),
        "UNETR ViT-small": UNETR(CHANNELS, CLASSES, **small),
        "UNETR ViT-base": UNETR(CHANNELS, CLASSES, **unetr, hidden_size=768, mlp_dim=3072, num_heads=12),
    }


def time_networks(networks: Mapping[str, nn.Module], repeats: int) -> dict[str, float]:
    """Median CPU seconds of a sliding-window pass over a random volume, on one thread.

    These are seconds of this process only, equal to the elapsed time on an idle machine. The networks take turns, so
    that a slow moment of the machine meets all of them.

    Args:
        networks: name -> network, ``B M H W D`` to logits.
        repeats: rounds, after one to warm up.
    """
    inferer = SlidingWindowInferer(PATCH, overlap=OVERLAP, mode="gaussian")
    image = torch.rand(1, CHANNELS, *VOLUME, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(repeats + 1):
                for name, network in networks.items():
                    start = time.process_time()
                    inferer(image, network)
                    seconds[name].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure_costs(folder: Path, repeats: int = 5, members: Sequence[str] = ENSEMBLE_MEMBERS) -> list[dict[str, Any]]:
    """Measure all networks and write ``costs.json``. Run nothing else on the machine meanwhile.

    Args:
        folder: of the study.
        repeats: timed passes per network.
        members: the teachers of the ensemble.

    Returns:
        The rows of the file: ``COST_COLUMNS`` and how it was measured. The last is the teachers' ensemble, the sum of
        its members without flips.
    """
    networks = study_networks()
    costs = {name: network_cost(network, PATCH, CHANNELS) for name, network in networks.items()}
    fast_networks = {
        name: network.eval().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        for name, network in networks.items()
    }
    for name, median in time_networks(fast_networks, repeats).items():
        costs[name]["cpu_seconds_per_case"] = round(median, 4)
    costs[ENSEMBLE] = {key: round(sum(costs[name][key] for name in members), 4) for key in COST_COLUMNS[1:]}
    conditions = {
        "processor": cpu_name(1),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "commit": git_commit(),
        "threads": 1,
        "volume": list(VOLUME),
        "patch": list(PATCH),
        "overlap": OVERLAP,
        "repeats": repeats,
        "torch": torch.__version__,
    }
    rows = [{"network": name, **cost, **conditions} for name, cost in costs.items()]
    write_json(rows, folder / "costs.json")
    return rows


def read_costs(folder: Path) -> list[Cost]:
    """Read ``costs.json``; empty if nothing has been measured yet.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "costs.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            float(row["parameters"]), float(row["gflops"]), float(row["cpu_seconds_per_case"])
            str(row["network"]), str(row["processor"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged. Delete it and measure the costs again.") from error
    return list(rows)


def write_costs(costs: Sequence[Cost], path: Path) -> None:
    """Write the costs as CSV with the columns ``COST_COLUMNS``."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COST_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(costs)
    write_text(buffer.getvalue(), path)
