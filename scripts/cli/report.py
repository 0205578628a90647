# SPDX-License-Identifier: Apache-2.0
"""Write one report of several evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.cli.bundle_run import resolved_config
from scripts.cli.options import Parser, add_common_options, add_single_file_option, context_configs, image_rules

EXAMPLE = (
    "python -m scripts report --data sts --dataset-dir DATA --evaluations OUT/alone OUT/distilled --output-dir OUT"
)


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--evaluations", nargs="+", required=True, metavar="DIR", help="folders that `evaluate` wrote")
    parser.add_argument(
        "--average-seeds",
        action="store_true",
        help="average evaluations of one --name case by case, as seeds of one network",
    )
    parser.add_argument("--curves", nargs="+", default=[], metavar="FILE", help="curves.csv files to draw")
    parser.add_argument("--baseline", default="", metavar="NAME", help="evaluation that the others are compared with")
    parser.add_argument("--title", default="Comparison", help="title of the page")
    add_single_file_option(parser)
    add_common_options(parser, output="runs/report")


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    from scripts.data import datalist
    from scripts.evaluation.compare import compare
    from scripts.evaluation.records import evaluated_task
    from scripts.runtime.regions import region_values

    task = {} if args.data else evaluated_task(args.evaluations[0])
    config = resolved_config(args, ["inference", *context_configs(args)], task)
    if args.dry_run:
        return
    cases = datalist(
        config["cohort"],
        args.dataset_dir,
        *(config[key] for key in ("data_list", "modalities", "allow_outside", "layout")),
    )
    output = args.output_dir or "runs/report"
    table = compare(
        args.evaluations,
        output,
        cases,
        {key: config["intensity"][key] for key in config["modalities"]},  # channels of a 4D file have this order
        args.curves,
        args.title,
        config["labels"],
        image_rules(config),
        region_values(config["labels"], config["classes"], config["regions"]),
        config["ignore"],
        config["mask_values"],
        args.baseline,
        args.average_seeds,
        args.single_file,
    )
    print(f"{table}\nreport: {Path(output) / 'report.html'}")
    if not cases:
        print("It shows no images of the cases. For them, name the folder of the data set with --dataset-dir.")
