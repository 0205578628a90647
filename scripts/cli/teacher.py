# SPDX-License-Identifier: Apache-2.0
"""Train one teacher."""

from __future__ import annotations

import argparse

from scripts.cli.bundle_run import run_training
from scripts.cli.options import (
    Parser,
    add_common_options,
    add_network_options,
    add_training_options,
    context_configs,
    multi_gpu_configs,
    training_overrides,
)
from scripts.cli.student_options import refuse_settings, student_ids

EXAMPLE = (
    "python -m scripts teacher --data sts --dataset-dir DATA --architecture unetr --modalities ct "
    "--output-dir RUNS/teacher_ct"
)


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    add_network_options(parser, architecture="unetr")
    add_training_options(parser)
    add_common_options(parser, output="runs/teacher_MODALITIES in the bundle's folder")


def run(args: argparse.Namespace) -> None:
    """Train."""
    # A script may share its settings between the verbs: student_features says by its name that it is not for a teacher.
    unnamed = {key for key in student_ids() if not key.startswith("student")}
    refuse_settings(args, unnamed, "train the student by train or distill")
    network = {"architecture": args.architecture}
    if args.modalities:
        network["teacher_modalities"] = args.modalities
    configs = ["train", *context_configs(args), "teacher", *multi_gpu_configs(args)]
    run_training(args, configs, {**training_overrides(args), **network})
