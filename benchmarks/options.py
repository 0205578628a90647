# SPDX-License-Identifier: Apache-2.0
"""Options that several benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.cli.config import config_names


def add_data_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add ``--data`` and ``--dataset-dir``.

    Args:
        parser: of the benchmark.
        required: whether the benchmark cannot do without a data set.
    """
    parser.add_argument("--data", default="sts", choices=config_names("data"), help="data set (default %(default)s)")
    parser.add_argument("--dataset-dir", required=required, help="folder of the data set")


def add_training_options(parser: argparse.ArgumentParser, scale: str) -> None:
    """Add ``--scale`` and ``--fold``.

    Args:
        parser: of the benchmark.
        scale: the default scale.
    """
    parser.add_argument(
        "--scale", default=scale, choices=config_names("scale"), help="size of the networks (default %(default)s)"
    )
    parser.add_argument("--fold", type=int, default=0, help="validation fold (default %(default)s)")


def add_output_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add ``--output-dir`` and ``--dry-run``.

    Args:
        parser: of the benchmark.
        folder: the default output folder.
    """
    parser.add_argument("--output-dir", type=Path, default=Path(folder), help="output folder (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be run")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON to this file")
