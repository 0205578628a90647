# SPDX-License-Identifier: Apache-2.0
"""Write synthetic cases: CT, PET and MR of a body with a lesion, and its mask."""

from __future__ import annotations

import argparse

from scripts.cli.options import Parser, add_common_options, positive_int

EXAMPLE = "python -m scripts phantom --cases 24 --output-dir runs/phantom/data"


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--cases", type=positive_int, default=24, metavar="N", help="number of cases (default: 24)")
    parser.add_argument(
        "--first", type=positive_int, default=1, metavar="N", help="number of the first case: PHANTOM_<N> (default: 1)"
    )
    add_common_options(parser, output="runs/phantom/data")


def run(args: argparse.Namespace) -> None:
    """Write the cases."""
    if args.dry_run:
        return
    from scripts.data.cohorts.phantom import write_phantoms

    output = args.output_dir or "runs/phantom/data"
    write_phantoms(output, cases=args.cases, seed=args.seed or 0, first=args.first)
    print(f"phantoms: {output}")
