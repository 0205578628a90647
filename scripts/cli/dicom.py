# SPDX-License-Identifier: Apache-2.0
"""Segment a DICOM study and write the mask as NIfTI, DICOM SEG and RTSTRUCT, and its measures as CSV and DICOM SR."""

from __future__ import annotations

import argparse

from scripts.cli.options import Parser, add_common_options, add_engine_options, add_export_option, add_weights_option
from scripts.cli.student_options import add_network_option

EXAMPLE = "python -m scripts dicom --study STUDY --output-dir OUT --rtstruct --sr"


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--study", required=True, metavar="DIR", help="folder of one DICOM study, with its sub folders")
    parser.add_argument("--rtstruct", action="store_true", help="also write an RT structure set")
    parser.add_argument(
        "--sr", action="store_true", help="also write the measures as a DICOM structured report (TID 1500)"
    )
    add_weights_option(parser)
    add_network_option(parser)
    add_engine_options(parser)
    add_export_option(parser)
    add_common_options(parser)
    # Options of `segment`, which segments the chosen series.
    parser.set_defaults(stacked=None, report=False, bids=False, no_measures=False)


def run(args: argparse.Namespace) -> None:
    """Segment the study."""
    from scripts.cli.segment_dicom import segment_study

    segment_study(args)
