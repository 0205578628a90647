# SPDX-License-Identifier: Apache-2.0
"""Export the student for OpenVINO, ONNX Runtime and TorchScript; each model is verified against PyTorch."""

from __future__ import annotations

import argparse

from scripts.cli.bundle_run import run_bundle
from scripts.cli.options import Parser, add_common_options, add_weights_option, context_configs
from scripts.cli.student_options import add_network_option, network_overrides
from scripts.cli.trained_task import with_trained_task
from scripts.export import FORMATS
from scripts.inference import EXPORT_PRECISIONS

EXAMPLE = "python -m scripts export --data sts --dataset-dir DATA"


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    add_weights_option(parser)
    add_network_option(parser)
    parser.add_argument("--fold", type=int, metavar="N", help="fold whose validation cases are compared (default: 0)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="formats to write (default: all)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=EXPORT_PRECISIONS,
        help="precisions of the OpenVINO model (default: fp32 bf16); int8 needs --dataset-dir",
    )
    add_common_options(parser)


def run(args: argparse.Namespace) -> None:
    """Export."""
    options = {"weights": args.weights, "fold": args.fold, "formats": args.formats, "precisions": args.precisions}
    overrides = {key: value for key, value in options.items() if value is not None} | network_overrides(args)
    configs = ["inference", *context_configs(args), "export"]
    run_bundle(args, configs, with_trained_task(args, configs, overrides))
