# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and the config overrides that they stand for."""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import Any

from scripts.cli.config import config_names
from scripts.cli.task import is_file, task_name
from scripts.runtime.suv_options import suv_values
from scripts.utils.task_file import read_task

Parser = argparse.ArgumentParser
MULTI_GPU = "multi_gpu_train"  # the config of several processes
DEFAULT_DATA, DEFAULT_SCALE = "sts", "small"
SCALES = "small: CPU (default); full: one GPU; demo and compare: smaller, of `make demo` and `benchmarks methods`"


def positive_int(text: str) -> int:
    """An option's whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small, use at least 1")
    return number


def device_name(text: str) -> str:
    """An option's device; whether the machine has it is seen when it is used."""
    if re.fullmatch(r"cpu|(cuda|mps|xpu)(:\d+)?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text} is no device, use cpu, cuda, cuda:1, mps or xpu")


def add_common_options(parser: Parser, output: str = "") -> None:
    """Options of every verb; ``output`` is the default folder of its results, in words, where it writes any."""
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--data",
        type=task_name,
        metavar="TASK",
        help=f"{', '.join(config_names('data'))}, or a FILE.json that describes your data (docs/how_to/own_data.md; "
        f"default: that of the weights where a verb uses weights, else {DEFAULT_DATA})",
    )
    group.add_argument("--dataset-dir", metavar="DIR", help="folder of the data set, as downloaded")
    group.add_argument(
        "--data-list", metavar="FILE", help="table of cases (.csv, .tsv, .json) instead of a known layout"
    )
    default = f" (default: {output})" if output else ""
    group.add_argument("--output-dir", metavar="DIR", help=f"folder for all results{default}")
    group.add_argument("--allow-outside", action="store_true", help="accept paths outside the folder of --data-list")
    group.add_argument("--allow-missing", action="store_true", help="accept cases without some modalities (zeros)")
    group.add_argument(
        "--max-voxels", type=positive_int, metavar="N", help="reject images with more voxels (default: 2^30)"
    )
    group.add_argument("--replace-nonfinite", type=float, metavar="VALUE", help="replace NaN and infinite voxels")
    group.add_argument(
        "--voxel-size",
        choices=("affine", "pixdim"),
        help="voxel sizes to believe where a header contradicts itself (default: reject such images)",
    )
    group.add_argument(
        "--series-uid", action="append", metavar="UID", help="DICOM series to read where a folder holds several"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--scale", choices=config_names("scale"), help=SCALES)
    group.add_argument(
        "--device",
        type=device_name,
        help="such as cpu or cuda:0 (default: the first GPU, or the CPU; exported files always run on the CPU)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of weights and augmentation (default: 0)")
    group.add_argument("--set", action="append", default=[], metavar="ID=VALUE", help="override any config id")
    group.add_argument("--dry-run", action="store_true", help="print the monai.bundle command, if any, and stop")
    group.add_argument("--verbose", action="store_true", help="print the monai.bundle command, if any, and the log")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_training_options(parser: Parser) -> None:
    """Options of every training."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, metavar="N", help="length of the training")
    group.add_argument("--fold", type=int, metavar="N", help="validation fold (default: 0)")
    group.add_argument("--pretrained", metavar="FILE", help="weights to start from, with a fresh schedule")
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    group.add_argument("--volumes-dir", metavar="DIR", help="keep preprocessed cases on disk, for large cohorts")
    group.add_argument("--multi-gpu", action="store_true", help="one process per GPU, started by torchrun")
    group.add_argument("--tracking", choices=["mlflow"], help="track with MLflow beside TensorBoard")


def add_network_options(parser: Parser, architecture: str | None) -> None:
    """Options that name a teacher's network."""
    names = ", ".join(config_names("teachers"))
    default = f" (default: {architecture})" if architecture else ""
    parser.add_argument(
        "--architecture",
        type=architecture_name,
        default=architecture,
        metavar="NAME",
        help=f"{names}, or a FILE.json{default}",
    )
    parser.add_argument(
        "--modalities", nargs="+", metavar="MODALITY", help="input of the network, such as ct pet (default: all)"
    )


def architecture_name(text: str) -> str:
    """An option's architecture: the name of a file in configs/teachers, or the path of one."""
    names = config_names("teachers")
    if text in names or text.endswith(".json"):
        return text
    raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(names)}, and no FILE.json")


def add_weights_option(parser: Parser) -> None:
    """The option that names a network's weights."""
    parser.add_argument("--weights", metavar="FILE", help="weights of the network (default: models/model.pt)")


def add_single_file_option(parser: Parser) -> None:
    """The option that writes a report as one file."""
    parser.add_argument(
        "--single-file",
        action="store_true",
        help="write the report as one file; by default its cases lie in report_files/ beside it and load when opened",
    )


def add_engine_options(parser: Parser) -> None:
    """Options of the inference engine."""
    from scripts.runtime import ENGINES, PRECISIONS

    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", choices=ENGINES, help="default: auto, which takes OpenVINO where exported files exist"
    )
    group.add_argument("--precision", choices=PRECISIONS, help="default: auto, which takes bf16 where the CPU has it")
    group.add_argument("--profile", action="store_true", help="print the time of each stage")


def add_export_option(parser: Parser) -> None:
    """The option of verbs that export the weights at their first run."""
    parser.add_argument(
        "--no-export",
        action="store_true",
        help="do not export the weights for OpenVINO at the first run (half a minute)",
    )


def common_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The config overrides of the options that every verb has, without ``--device`` and ``--set``."""
    values = {
        "dataset_dir": args.dataset_dir,
        "output_dir": args.output_dir,
        "threads": args.threads,
        "seed": args.seed,
        "data_list": os.path.abspath(args.data_list) if args.data_list else None,
        "allow_outside": args.allow_outside or None,
        "allow_missing": args.allow_missing or None,
        "checks#max_voxels": args.max_voxels,
        "checks#replace_nonfinite": args.replace_nonfinite,
        "checks#series_uids": args.series_uid or None,
        "checks#voxel_size": args.voxel_size,
        "checks#suv": suv_values(args) or None,
    }
    return {key: value for key, value in values.items() if value is not None}


def parse_set(pairs: list[str]) -> dict[str, Any]:
    """The pairs of ``--set``: id -> value, parsed as JSON where it is JSON, else text.

    Raises:
        ValueError: a pair without ``=`` or without an id.
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip("+"):
            raise ValueError(f"--set {pair}: write ID=VALUE, such as --set overlap=0.5.")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def image_rules(config: dict[str, Any]) -> Any:
    """The ``scripts.data.Rules`` of a merged config."""
    from scripts.data import Rules

    return Rules(**{key: value for key, value in config["checks"].items() if key != "_target_"})


def training_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The config overrides of the training options that a verb has."""
    options = vars(args)
    if options.get("tracking") and not args.dry_run:  # before the cases are loaded
        from scripts.training.tracking import require_mlflow

        require_mlflow()
    ids = {
        "fold": "fold",
        "epochs": "max_epochs",
        "resume": "resume",
        "pretrained": "pretrained",
        "volumes_dir": "volumes_dir",
        "modality_dropout": "modality_dropout",
        "tracking": "experiment_tracking",
    }
    # An unused option is None and an unused switch False; fold 0 counts.
    values = {key: options.get(name) for name, key in ids.items()}
    return {key: value for key, value in values.items() if value is not None and value is not False}


def data_set(args: argparse.Namespace) -> str:
    """The data set of ``--data``, or the one that the weights of a verb of inference were trained on."""
    if args.data:
        return str(args.data)
    if "weights" in args:
        from scripts.cli.trained_task import weights_path

        cohort = (read_task(weights_path(args)) or {}).get("cohort")
        return cohort if cohort in config_names("data") else DEFAULT_DATA
    return DEFAULT_DATA


def context_configs(args: argparse.Namespace) -> list[str]:
    """The configs of the data set and the scale; a task in a file is no config, but a set of overrides."""
    scale = f"scale/{args.scale or DEFAULT_SCALE}"
    return [scale] if is_file(args.data) else [f"data/{data_set(args)}", scale]


def multi_gpu_configs(args: argparse.Namespace) -> list[str]:
    """The config of several processes with ``--multi-gpu``, else none.

    Raises:
        ValueError: the process was not started by torchrun.
    """
    if not args.multi_gpu:
        return []
    if "RANK" not in os.environ and not args.dry_run:
        raise ValueError("--multi-gpu needs one process per GPU. Start it with torchrun --nproc_per_node=N -m scripts")
    return [MULTI_GPU]


def engine_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The config overrides of ``--engine`` and ``--precision``."""
    values = {"engine": args.engine, "engine_precision": args.precision}
    return {key: value for key, value in values.items() if value}


def profile_configs(args: argparse.Namespace) -> list[str]:
    """The config of ``--profile``."""
    return ["profile"] if args.profile else []
