# SPDX-License-Identifier: Apache-2.0
"""Time the validation of a case by ``python -m scripts check``, relative to reading the same files once.

Both run in one process, case by case in turn, on one thread as in ``check``. The first round is not counted.

Example: python -m benchmarks check --data sts --dataset-dir DATA
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.options import add_data_options, add_json_option
from scripts.cli.config import read_config
from scripts.data import Rules, datalist
from scripts.data.case_list import Item
from scripts.data.cohort_check import Criteria, check_case
from scripts.image_io.reader import header_of, read_volume
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table


def read_case(case: Item, keys: Sequence[str], rules: Rules) -> None:
    """Read the files of a case one after the other, without keeping them."""
    for key in keys:
        if key in case:
            read_volume(header_of(case[key], rules), rules)


def measure(
    cases: Sequence[Item], modalities: list[str], labels: list[list[float]], rounds: int
) -> list[dict[str, Any]]:
    """Time reading and checking.

    Args:
        cases: the cases of the data set.
        modalities: of the data set.
        labels: values of each class in the label files.
        rounds: rounds after one to warm up.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "peak_mib"}``: medians over cases and rounds; ``ratio`` is the
        median of the ratios to reading the same case in the same round, ``peak_mib`` is None.
    """
    criteria, keys = Criteria(modalities, labels), [*modalities, "label"]
    candidates = {
        "read once": lambda case: read_case(case, keys, criteria.rules),
        "check": lambda case: check_case(case, criteria),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for case in cases:
            for name, process_case in candidates.items():
                start = time.perf_counter()
                process_case(case)
                if number:
                    seconds[name].append(time.perf_counter() - start)
    reading = seconds["read once"]
    return [
        {
            "side": name,
            "what": f"{len(cases)} cases, {rounds} rounds, {torch.get_num_threads()} threads",
            "median_s": round(statistics.median(times), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(times, reading, strict=True)), 2),
            "peak_mib": None,
        }
        for name, times in seconds.items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser, required=True)
    parser.add_argument("--cases", type=int, default=12, help="number of cases (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts (default %(default)s)")
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Time reading and checking and return the table."""
    torch.set_num_threads(1)
    config = read_config(f"data/{args.data}")
    cases = datalist(args.data, args.dataset_dir)[: args.cases]
    rows = measure(cases, config["modalities"], config["labels"], args.rounds)
    if args.json:
        write_json(rows, args.json)
    cells = [(row["side"], row["median_s"], row["ratio"], row["what"]) for row in rows]
    return markdown_table(("candidate", "median s per case", "ratio to reading once", "data"), cells)
