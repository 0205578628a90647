# SPDX-License-Identifier: Apache-2.0
"""Train the student with its teachers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scripts import bundle_root
from scripts.cli.bundle_run import Overrides, resolved_config, run_bundle, run_training
from scripts.cli.config import config_names, read_config
from scripts.cli.options import (
    Parser,
    add_common_options,
    add_teachers_options,
    add_training_options,
    context_configs,
    multi_gpu_configs,
    teacher_specs,
    teachers_overrides,
    training_overrides,
)
from scripts.cli.student_options import (
    add_student_options,
    layers_overrides,
    loss_overrides,
    network_overrides,
    require_own_loss_fits,
)

EXAMPLE = (
    "python -m scripts distill --list\n"
    "python -m scripts distill --data sts --dataset-dir DATA --teachers-dir RUNS --output-dir RUNS/distilled\n"
    "python -m scripts distill --data sts --dataset-dir DATA --method dist --teacher dynunet=RUNS/teacher/model.pt "
    "--output-dir RUNS/dist"
)
DEFAULT_METHOD = "teachformer"
STAGED_METHOD = "gkd"  # trains headers for the student and every teacher before it distils


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--method",
        action="append",
        choices=config_names("methods"),
        help=f"repeatable, the losses add up (default: {DEFAULT_METHOD})",
    )
    parser.add_argument("--list", action="store_true", help="list the methods with their terms, and stop")
    add_teachers_options(parser)
    parser.add_argument("--cache-dir", metavar="DIR", help="read the predictions that cache-teachers stored")
    parser.add_argument(
        "--balance",
        type=float,
        metavar="SHARE",
        help="choose the weights of the terms in training, so that their gradients are together SHARE times that of "
        "L_seg (default: the weights of the papers)",
    )
    parser.add_argument("--stages-dir", metavar="DIR", help="gkd: folder of its stages (default: OUTPUT_DIR/stages)")
    add_student_options(parser)
    add_training_options(parser)
    add_common_options(parser, output="runs/distilled in the bundle's folder")


def run(args: argparse.Namespace) -> None:
    """Distil, or list the methods."""
    if args.list:
        print(method_list())
        return
    methods = args.method or [DEFAULT_METHOD]
    configs = ["train", *context_configs(args), "distill", *(f"methods/{method}" for method in methods)]
    if args.cache_dir:
        configs.append("cached")
    student = {**training_overrides(args), **network_overrides(args), **loss_overrides(args)}
    config = resolved_config(args, configs, student)
    require_own_loss_fits(args, config)
    overrides = {**student, **layers_overrides(args), **teachers_overrides(args, config["modalities"])}
    if STAGED_METHOD in methods:
        overrides = _train_stages(args, config, overrides)
    if args.cache_dir:
        overrides["cache_dir"] = args.cache_dir
    if args.balance is not None:
        configs.append("balanced")
        overrides["balance"] = args.balance
    configs += multi_gpu_configs(args)
    run_training(args, configs, overrides)


def method_list() -> str:
    """One line per method: its name and its terms, each as loss(tap)."""
    lines = []
    for name in config_names("methods"):
        terms = [value for key, value in read_config(f"methods/{name}").items() if key.startswith("loss#terms#")]
        losses = (f"{term['loss']['_target_'].rsplit('.', 1)[-1]}({term['tap']})" for term in terms)
        lines.append(f"{name:<12} {', '.join(losses)}")
    return "\n".join(lines)


def _train_stages(args: argparse.Namespace, config: dict[str, Any], overrides: Overrides) -> Overrides:
    """Train the stages of gkd that are not finished; returns the overrides of the distillation itself."""
    if args.cache_dir or args.multi_gpu:
        raise ValueError("gkd needs the teachers' features and several stages. Remove --cache-dir and --multi-gpu.")
    if args.unlabelled:
        raise ValueError("The stages of gkd need the label of every case. Remove --unlabelled.")
    teachers = teacher_specs(args, config["modalities"])
    if not teachers:
        raise ValueError("gkd trains a header for each teacher. Name them with --teacher ARCHITECTURE=WEIGHTS.")
    from scripts.distillation.staged_training import gkd_stages, is_finished

    epochs = int(config["max_epochs"])
    folder = Path(args.stages_dir or Path(args.output_dir or Path(bundle_root()) / "runs" / "distilled") / "stages")
    shared = {key: value for key, value in training_overrides(args).items() if key not in ("max_epochs", "resume")}
    shared.pop("pretrained", None)
    shared |= loss_overrides(args)
    for stage in gkd_stages(folder, teachers, epochs, str(config["head"])):
        output = folder / stage.name
        if is_finished(output):
            continue
        print(f"stage: {stage.name}", flush=True)
        resume = {"resume": True} if (output / "checkpoint.pt").is_file() else {}
        stage_args = argparse.Namespace(**{**vars(args), "output_dir": str(output)})
        stage_configs = ["train", *context_configs(args), *stage.configs]
        network = network_overrides(args) if stage.of_student else {}
        run_bundle(stage_args, stage_configs, {**shared, **network, **stage.overrides, **resume})
    start = {"pretrained": str(folder / "student" / "model.pt"), "headers_dir": str(folder)}
    return {**overrides, **start, "max_epochs": epochs - epochs // 2}
