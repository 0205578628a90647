# SPDX-License-Identifier: Apache-2.0
"""Train the student without teachers."""

from __future__ import annotations

import argparse

from scripts.cli.bundle_run import resolved_config, run_training
from scripts.cli.options import (
    Parser,
    add_common_options,
    add_training_options,
    context_configs,
    multi_gpu_configs,
    training_overrides,
)
from scripts.cli.student_options import add_student_options, loss_overrides, network_overrides, require_own_loss_fits

EXAMPLE = (
    "python -m scripts train --data sts --dataset-dir DATA --output-dir RUNS/alone\n"
    "python -m scripts train --data sts --dataset-dir DATA --network unet.json --output-dir RUNS/unet"
)


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    add_student_options(parser)
    add_training_options(parser)
    add_common_options(parser, output="runs/student in the bundle's folder")


def run(args: argparse.Namespace) -> None:
    """Train."""
    overrides = {**training_overrides(args), **network_overrides(args), **loss_overrides(args)}
    configs = ["train", *context_configs(args), *multi_gpu_configs(args)]
    require_own_loss_fits(args, resolved_config(args, configs, overrides))
    run_training(args, configs, overrides)
