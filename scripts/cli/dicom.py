# SPDX-License-Identifier: Apache-2.0
"""Segment a DICOM study, from a folder or a PACS: mask as NIfTI, SEG, RTSTRUCT and SR, measures as CSV."""

from __future__ import annotations

import argparse

from scripts.cli.options import Parser, add_common_options, add_engine_options, add_export_option, add_weights_option
from scripts.cli.student_options import add_network_option
from scripts.runtime.suv_options import add_suv_options

EXAMPLE = (
    "python -m scripts dicom --study STUDY --output-dir OUT --rtstruct --sr\n"
    "python -m scripts dicom --dicomweb https://pacs.example/dicom-web --study-uid UID --output-dir OUT --store\n"
    "python -m scripts dicom --dicomweb https://pacs.example/dicom-web --study-list studies.csv --output-dir OUT"
)


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--study", metavar="DIR", help="folder of one DICOM study, with its sub folders")
    source.add_argument("--dicomweb", metavar="URL", help="DICOMweb service of a PACS, such as https://HOST/dicom-web")
    group = parser.add_argument_group("with --dicomweb (login: DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN)")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--study-uid", metavar="UID", help="Study Instance UID")
    which.add_argument(
        "--study-list", metavar="FILE", help="many studies: one UID a line, or a .csv with a column study_uid"
    )
    group.add_argument("--store", action="store_true", help="store SEG and RTSTRUCT in the study on the server")
    parser.add_argument(
        "--list-series", action="store_true", help="print the series, which are chosen and why, and stop"
    )
    parser.add_argument("--rtstruct", action="store_true", help="also write an RT structure set")
    parser.add_argument(
        "--sr", action="store_true", help="also write the measures as a DICOM structured report (TID 1500)"
    )
    add_weights_option(parser)
    add_network_option(parser)
    add_engine_options(parser)
    add_export_option(parser)
    add_suv_options(parser)
    add_common_options(parser, output="runs/dicom")
    # Options of `segment`, which segments the chosen series.
    parser.set_defaults(stacked=None, bbox_mm=None, report=False, bids=False, no_measures=False)


def run(args: argparse.Namespace) -> None:
    """Segment the study, or the studies."""
    if args.dicomweb:
        from scripts.cli.segment_pacs import segment_from_pacs

        segment_from_pacs(args)
        return
    used = [name for name in ("study_uid", "study_list", "store") if getattr(args, name)]
    if used:
        option = f"--{used[0].replace('_', '-')}"
        raise ValueError(f"{option} is an option of a server. Add --dicomweb URL, or remove it.")
    from scripts.cli.segment_dicom import segment_study

    segment_study(args)
