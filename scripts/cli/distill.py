# SPDX-License-Identifier: Apache-2.0
"""Train the student with its teachers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scripts import bundle_root
from scripts.cli.bundle_run import Overrides, build_item, resolved_config, run_bundle, run_training
from scripts.cli.config import SEPARATOR, config_names, has_id, merge_configs, read_config
from scripts.cli.options import (
    Parser,
    add_common_options,
    add_training_options,
    context_configs,
    multi_gpu_configs,
    parse_set,
    training_overrides,
)
from scripts.cli.student_options import (
    add_student_options,
    layers_overrides,
    loss_overrides,
    network_overrides,
    require_own_loss_fits,
    student_ids,
)
from scripts.cli.teacher_options import add_teachers_options, teacher_specs, teachers_overrides

EXAMPLE = (
    "python -m scripts distill --list\n"
    "python -m scripts distill --data sts --dataset-dir DATA --teachers-dir RUNS --output-dir RUNS/distilled\n"
    "python -m scripts distill --data sts --dataset-dir DATA --method dist --teacher dynunet=RUNS/teacher/model.pt "
    "--output-dir RUNS/dist"
)
DEFAULT_METHOD = "teachformer"
STAGED_METHOD = "gkd"  # trains headers for the student and every teacher before it distils
# Config ids that the stages set themselves, and what to do instead of --set.
STAGED_IDS = {
    "max_epochs": "Use --epochs: it is divided among the stages.",
    "pretrained": "Remove it: the student starts from a stage of its own.",
    "headers_dir": "Use --stages-dir.",
    "output_dir": "Use --output-dir.",
    "checkpoint": "Remove it: each stage has its own.",
    "final_weights": "Remove it: each stage has its own.",
}


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
        "L_seg (default: the weights in the configs of the methods)",
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
        overrides = _train_stages(args, config, configs, overrides)
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


def _train_stages(
    args: argparse.Namespace, config: dict[str, Any], configs: list[str], overrides: Overrides
) -> Overrides:
    """Train the stages of gkd that are not finished; returns the overrides of the distillation itself.

    Args:
        args: parsed options.
        config: the merged config of the distillation.
        configs: their names.
        overrides: of the distillation, without those of its stages.

    Raises:
        ValueError: an option that gkd cannot follow, a teacher that it cannot use, or a finished stage of other data,
            settings or weights.
    """
    _require_options_of_stages(args)
    teachers = teacher_specs(args, config["modalities"])
    if not teachers:
        raise ValueError("gkd trains a header for each teacher. Name them with --teacher ARCHITECTURE=WEIGHTS.")
    from scripts.distillation.alignment_training import require_encoder
    from scripts.distillation.staged_training import gkd_stages, is_finished

    if args.network:  # before the first stage
        require_encoder(build_item(args, ["train", *context_configs(args)], network_overrides(args), "network"))
    epochs = int(config["max_epochs"])
    anew = bool(config["overwrite"]) and not config["resume"]
    output_dir = Path(args.output_dir or Path(bundle_root()) / "runs" / "distilled")  # as in distill.json
    folder = Path(args.stages_dir or output_dir / "stages")
    shared = {key: value for key, value in training_overrides(args).items() if key not in ("max_epochs", "resume")}
    shared |= loss_overrides(args)
    # Methods beside gkd may need the student otherwise, and its weights go on from stage to stage.
    of_methods = {key for name in configs if name.startswith("methods/") for key in read_config(name)}
    student = {key: config[key] for key in sorted(of_methods & student_ids())}
    student |= network_overrides(args)
    if str(config["splits_file"]).startswith("$"):  # the default, which is the folder of each training
        shared |= {"splits_file": str(output_dir / "splits.json"), "named_splits": False}
    stages = gkd_stages(folder, teachers, epochs, str(config["head"]))
    if not args.dry_run:
        _require_usable_teachers(args, configs, overrides)
    for stage in stages:
        output = folder / stage.name
        stage_configs = ["train", *context_configs(args), *stage.configs]
        own = {"output_dir": str(output), "set": _stage_settings(args.set, stage_configs)}
        stage_args = argparse.Namespace(**{**vars(args), **own})
        network = student if stage.of_student else {}
        stage_overrides = {**shared, **network, **stage.overrides}
        if is_finished(output) and not anew:
            if not args.dry_run:
                _require_same_stage(stage_args, stage_configs, stage_overrides, output)
            continue
        print(f"stage: {stage.name}", flush=True)
        resume = {"resume": True} if (output / "checkpoint.pt").is_file() and not anew else {}
        run_bundle(stage_args, stage_configs, {**stage_overrides, **resume})
    start = {"pretrained": str(folder / "student" / "model.pt"), "headers_dir": str(folder)}
    half = epochs // 2  # of the stage student
    return {**overrides, **start, "max_epochs": epochs - half, "earlier_epochs": half}


def _require_usable_teachers(args: argparse.Namespace, configs: list[str], overrides: Overrides) -> None:
    """Refuse teachers that the last stage could not use, before the first one.

    Raises:
        ValueError: there is such a teacher.
    """
    from scripts.distillation.alignment_training import require_encoder

    for teacher in build_item(args, configs, overrides, "teachers").values():
        require_encoder(teacher)


def _require_options_of_stages(args: argparse.Namespace) -> None:
    """Refuse options that the stages of gkd cannot follow."""
    if args.cache_dir or args.multi_gpu:
        raise ValueError("gkd needs the teachers' features and several stages. Remove --cache-dir and --multi-gpu.")
    if args.unlabelled:
        raise ValueError("The stages of gkd need the label of every case. Remove --unlabelled.")
    if args.pretrained:
        raise ValueError("gkd starts the student from a stage of its own. Remove --pretrained.")
    for key in parse_set(args.set):
        if (found := key.removeprefix("+")) in STAGED_IDS:
            raise ValueError(f"gkd sets {found} in each of its stages, so --set {key} cannot. {STAGED_IDS[found]}")


def _stage_settings(pairs: list[str], configs: list[str]) -> list[str]:
    """The pairs of ``--set`` that are for a stage with these configs; those of the distillation are left out."""
    known = merge_configs(configs)
    distillation = {key for key in read_config("distill") if SEPARATOR not in key}

    def is_for_stage(pair: str) -> bool:
        key = pair.partition("=")[0]
        root = key.removeprefix("+").partition(SEPARATOR)[0]
        return root not in distillation and (key.startswith("+") or has_id(known, key))

    return [pair for pair in pairs if is_for_stage(pair)]


def _require_same_stage(args: argparse.Namespace, configs: list[str], overrides: Overrides, folder: Path) -> None:
    """Refuse a finished stage that this run would train otherwise; the arguments are those of its run."""
    from scripts.training.checkpoint import require_same_stage

    require_same_stage(folder / "model.pt", build_item(args, configs, overrides, "record"))
