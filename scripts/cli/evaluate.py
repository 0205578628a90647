# SPDX-License-Identifier: Apache-2.0
"""Segment a data set and score it, or score masks made elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import bundle_root
from scripts.cli.bundle_run import Expression, Overrides, command_line, protected, resolved_config, run_bundle
from scripts.cli.exported_run import READ, check_config, unread_setting
from scripts.cli.options import (
    Parser,
    add_common_options,
    add_engine_options,
    add_network_options,
    add_single_file_option,
    add_weights_option,
    context_configs,
    engine_overrides,
    image_rules,
    parse_set,
    profile_configs,
)
from scripts.cli.student_options import add_network_option, network_overrides
from scripts.cli.trained_task import with_trained_settings, with_trained_task

SCORED = {"name", "curves", "fold", "splits_file", "single_file"}  # config ids that scoring masks reads besides
EXAMPLE = (
    "python -m scripts evaluate --data sts --dataset-dir DATA --output-dir OUT\n"
    "python -m scripts evaluate --data sts --dataset-dir DATA --predictions MASKS --output-dir OUT"
)


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--predictions", metavar="DIR", help="score the masks <case_id>.nii.gz (.nii, .mha, .nrrd) here"
    )
    add_weights_option(parser)
    add_network_option(parser)
    add_network_options(parser, architecture=None)
    parser.add_argument(
        "--name", help="display name in tables and reports (default: student; of --predictions their folder)"
    )
    parser.add_argument("--fold", type=int, metavar="N", help="only the validation cases of this fold (default: all)")
    parser.add_argument(
        "--present", nargs="+", metavar="MODALITY", help="use only these modalities of each case (default: all)"
    )
    parser.add_argument("--curves", nargs="+", metavar="FILE", help="curves.csv files to draw in the report")
    add_single_file_option(parser)
    add_engine_options(parser)
    add_common_options(parser, output="runs/evaluation in the bundle's folder")


def run(args: argparse.Namespace) -> None:
    """Evaluate.

    Raises:
        ValueError: options of the engine beside masks that already exist, or two networks.
    """
    if args.network and args.architecture:
        raise ValueError("--network and --architecture both name the network. Remove one of them.")
    if args.modalities and not args.architecture:
        raise ValueError(
            "--modalities names what a teacher reads, and needs its --architecture. To leave modalities out, use "
            "--present."
        )
    options: dict[str, Any] = {
        "weights": args.weights,
        "fold": args.fold,
        "name": args.name,
        "curves": args.curves,
        "present": args.present,
    }
    overrides = {key: value for key, value in options.items() if value is not None} | engine_overrides(args)
    overrides |= network_overrides(args)
    overrides |= {"single_file": True} if args.single_file else {}
    has_weights = bool(args.weights or "weights" in parse_set(args.set))
    if args.predictions:
        if args.profile or engine_overrides(args):
            raise ValueError("--predictions scores existing masks. Remove --engine, --precision and --profile.")
        overrides |= {
            "predictions": args.predictions,
            "run": Expression("@score"),
            "score#network": Expression("$None"),
        }
        if not has_weights:  # the network that made the masks is unknown
            overrides["score#weights"] = Expression("$None")
            overrides.setdefault("name", Path(args.predictions).resolve().name)
    configs = ["inference", *context_configs(args)]
    if args.architecture:
        configs.append("teacher")
        overrides["architecture"] = args.architecture
        if args.modalities:
            overrides["teacher_modalities"] = args.modalities
        overrides.setdefault("engine", "torch")  # only students are exported
    configs += ["score", *profile_configs(args)]
    if args.predictions:
        overrides = with_trained_settings(args, configs, overrides) if has_weights else overrides
        if not (args.verbose or args.dry_run or unread_setting(args, READ | SCORED)):
            score_masks(args, configs, overrides)
            return
    else:
        overrides = with_trained_task(args, configs, overrides)
    run_bundle(args, configs, overrides)


def score_masks(args: argparse.Namespace, configs: Sequence[str], overrides: Overrides) -> None:
    """Score masks that exist, as ``run_bundle`` would, without loading MONAI; arguments as there."""
    from scripts.data.case_list import datalist
    from scripts.data.folds import fold_split
    from scripts.evaluation.score import score
    from scripts.runtime.regions import region_values
    from scripts.utils.output_lock import hold
    from scripts.utils.run_manifest import described_run

    config = resolved_config(args, configs, overrides)
    check_config(config)
    output = args.output_dir or str(Path(bundle_root()) / "runs" / "evaluation")
    cases = datalist(
        config["cohort"],
        config["dataset_dir"],
        config["data_list"],
        config["modalities"],
        config["allow_outside"],
        config["layout"],
    )
    if config["fold"] is not None:
        cases = fold_split(cases, config["fold"], file=config["splits_file"], training=False)[1]
    texts = {key: str(text) for key, text in config["score"].items() if key != "_target_"}  # "@KEY"
    settings: dict[str, Any] = {key: config.get(text[1:]) for key, text in texts.items()}
    settings |= {
        "cases": cases,
        "output_dir": output,
        "checks": image_rules(config),
        "regions": region_values(config["labels"], config["classes"], config["regions"]),
        "network": None,
        "weights": config["weights"] if args.weights or "weights" in parse_set(args.set) else None,
    }
    with hold(output), described_run(command_line(configs, protected(overrides)), config):
        score(**settings)
