# SPDX-License-Identifier: Apache-2.0
"""Seconds that ``check`` takes to judge one case, against those to read the same files once.

Both sides run in one process and in turn, case by case, so that whatever else the machine does falls on both::

    python benchmarks/cohort_check_speed.py [--data sts] [--dataset-dir ../shared/data/sts] [--cases 12]
        [--rounds 5] [--json FILE]

Prints the medians over all cases and rounds, after one round for warming up, and the median of each case's ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from scripts.data import Rules, datalist
from scripts.data.case_list import Item
from scripts.data.cohort_check import Criteria, check_case
from scripts.image_io.reader import header_of, read_volume

ROOT = Path(__file__).parents[1]


def read_case(case: Item, keys: list[str], rules: Rules) -> None:
    """Read a case's files, one after the other, and let go of them."""
    for key in keys:
        if key in case:
            read_volume(header_of(case[key], rules), rules)


def measure(
    cases: list[Item], modalities: list[str], labels: list[list[float]], rounds: int
) -> list[dict[str, object]]:
    """One row per side: the median seconds, and the median ratio to reading the same case in the same round."""
    criteria, keys = Criteria(modalities, labels), [*modalities, "label"]
    sides = {
        "read once": lambda case: read_case(case, keys, criteria.rules),
        "check": lambda case: check_case(case, criteria),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for case in cases:
            for name, work in sides.items():
                began = time.perf_counter()
                work(case)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    reading = seconds["read once"]
    return [
        {
            "side": name,
            "what": f"{len(cases)} cases, {rounds} rounds, {torch.get_num_threads()} threads",
            "median_s": round(statistics.median(times), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(times, reading, strict=True)), 2),
        }
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="sts")
    parser.add_argument("--dataset-dir", type=Path, default=ROOT.parent / "shared/data/sts")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as every process of `check`
    spec = json.loads((ROOT / "configs/data" / f"{arguments.data}.json").read_text(encoding="utf-8"))
    listed = datalist(arguments.data, arguments.dataset_dir)[: arguments.cases]
    rows = measure(listed, spec["modalities"], spec["labels"], arguments.rounds)
    for row in rows:
        print(f"{row['side']:10} {row['median_s']:8} s per case  {row['ratio']:5} x reading once  ({row['what']})")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
