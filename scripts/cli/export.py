# SPDX-License-Identifier: Apache-2.0
"""Export the student for OpenVINO, ONNX Runtime and TorchScript; each model is verified against PyTorch."""

from __future__ import annotations

import argparse

from scripts.cli.bundle_run import Overrides, resolved_config, run_bundle
from scripts.cli.config import SEPARATOR
from scripts.cli.exported_run import require_trained_settings
from scripts.cli.options import Parser, add_common_options, add_weights_option, context_configs, parse_set
from scripts.cli.student_options import add_network_option, network_overrides
from scripts.cli.trained_task import weights_path, with_trained_settings, with_trained_task
from scripts.export import FORMATS
from scripts.runtime import EXPORT_PRECISIONS
from scripts.utils.errors import error_sentence

# Ids of inference that a runtime folder does not keep.
NOT_KEPT = (
    *("inferer", "predictor", "preprocessing", "postprocessing", "naming", "reference", "allow_missing", "checks"),
    *("engine", "engine_precision"),
)
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
    parser.add_argument(
        "--runtime",
        metavar="DIR",
        help="also write a folder that segments without the bundle: program, network, task, requirements, Dockerfile",
    )
    add_common_options(parser, output="beside the weights")


def run(args: argparse.Namespace) -> None:
    """Export."""
    options = {"weights": args.weights, "fold": args.fold, "formats": args.formats, "precisions": args.precisions}
    overrides = {key: value for key, value in options.items() if value is not None} | network_overrides(args)
    configs = ["inference", *context_configs(args), "export"]
    if args.runtime:
        _write_runtime(args, configs, overrides)
    else:
        run_bundle(args, configs, with_trained_task(args, configs, overrides))


def _write_runtime(args: argparse.Namespace, configs: list[str], overrides: Overrides) -> None:
    """Export the weights for OpenVINO where that has not been done, and write the runtime folder.

    Raises:
        ValueError: a setting would have no effect, or contradicts the weights; the export failed; the folder holds
            other files.
    """
    from scripts.export.runtime_folder import write_runtime_folder
    from scripts.runtime.engines import UnavailableError
    from scripts.runtime.exported_files import read_export

    for key in parse_set(args.set):
        if key.removeprefix("+").partition(SEPARATOR)[0] in NOT_KEPT:
            raise ValueError(
                f"--set {key} would have no effect: the program of the runtime folder decides it itself. Remove it, "
                "and give the program its own options."
            )
    weights = weights_path(args)
    inference = ["inference", *context_configs(args)]
    config = resolved_config(args, inference, with_trained_settings(args, inference, {}))
    require_trained_settings(args, config)  # exported files fit their weights, but not yet these settings
    try:
        is_exported = "probe" in read_export(weights)
    except UnavailableError:
        is_exported = False
    if args.formats or args.precisions or not is_exported:
        formats = {"formats": args.formats or ["openvino"]}
        try:
            run_bundle(args, configs, with_trained_task(args, configs, {**overrides, **formats}))
        except (ValueError, RuntimeError) as error:  # one precision was refused, or all
            print(f"warning: {error_sentence(error)}")
    elif args.dry_run:
        print(f"{weights} is exported already: no monai.bundle command is needed to write {args.runtime}")
    if args.dry_run:
        return
    folder = write_runtime_folder(weights, config, args.runtime)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"runtime: {folder} ({size / 2**20:.1f} MiB). Its README.md says how to run it.")
