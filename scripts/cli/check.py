# SPDX-License-Identifier: Apache-2.0
"""Validate a data set: list every problem in every file."""

from __future__ import annotations

import argparse

from scripts.cli.bundle_run import resolved_config
from scripts.cli.config import read_config
from scripts.cli.options import Parser, add_common_options, context_configs, image_rules, positive_int

EXAMPLE = "python -m scripts check --data sts --dataset-dir DATA"


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--json", metavar="FILE", help="also write all findings as JSON")
    parser.add_argument("--workers", type=positive_int, default=2, metavar="N", help="processes (default: 2)")
    add_common_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check the data set and print the findings.

    Raises:
        ValueError: no data set is named, or there are errors in it.
    """
    if not args.dataset_dir and not args.data_list:
        raise ValueError("No data to check. Name a folder with --dataset-dir, or a table with --data-list.")
    config = resolved_config(args, ["train", *context_configs(args)], {})
    if args.dry_run:
        return
    from scripts.data.cohort_check import ERROR, Criteria, check_cohort, findings_table, write_findings
    from scripts.data.settings_check import check_settings

    names = (name for name in read_config("train")["settings_check"] if name != "_target_")
    check_settings(**{name: config[name] for name in names})
    criteria = Criteria(
        config["modalities"],
        config["labels"],
        image_rules(config),
        () if config["data_list"] else config.get("naming", ()),
        config["allow_missing"],
        config["stacked"],
        config["intensity"],
        config["spacing"],
        config["classes"],
        config["ignore"],
        config["splits_file"] == read_config("train")["splits_file"],
    )
    findings, cases = check_cohort(
        config["cohort"],
        args.dataset_dir or "",
        criteria,
        config["data_list"],
        config["allow_outside"],
        args.workers,
        config["layout"],
    )
    print(findings_table(findings, cases))
    if args.json:
        write_findings(findings, cases, args.json)
    errors = sum(finding.level == ERROR for finding in findings)
    if errors:
        raise ValueError(f"{errors} error{'s'[: errors > 1]} found. Correct the files, or remove their cases.")
