# SPDX-License-Identifier: Apache-2.0
"""Segment one case, or every case of a table or of a data set."""

from __future__ import annotations

import argparse
from functools import partial

from scripts.cli.options import (
    Parser,
    add_common_options,
    add_engine_options,
    add_export_option,
    add_weights_option,
    positive_int,
)
from scripts.cli.student_options import add_network_option
from scripts.cli.task import is_file
from scripts.runtime.suv_options import add_suv_options

EXAMPLE = (
    "python -m scripts segment --ct ct.nii.gz --pet pet_suv.nii.gz --mr mr_t1.nii.gz --output mask.nii.gz\n"
    "python -m scripts segment --data-list cases.csv --output-dir MASKS --workers 2\n"
    "python -m scripts segment --data sts --dataset-dir DATA --output-dir MASKS --bids"
)


def add_options(parser: Parser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--image",
        action="append",
        type=image_of,
        metavar="MODALITY=FILE",
        help="image file or DICOM folder; --MODALITY FILE is the same, for each modality of the task",
    )
    parser.add_argument("--stacked", metavar="FILE", help="one 4D file with the modalities on its last axis, in order")
    parser.add_argument("--output", metavar="FILE", help="the mask to write, .nii.gz")
    parser.add_argument("--report", action="store_true", help="also write an HTML report beside the mask")
    parser.add_argument(
        "--no-measures", action="store_true", help="do not write the table of volumes, diameters and SUV of each lesion"
    )
    add_weights_option(parser)
    add_network_option(parser)
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="how many cases at a time (default: 2 with exported files, else 1)",
    )
    parser.add_argument("--bids", action="store_true", help="with several cases: write a data set of BIDS derivatives")
    add_engine_options(parser)
    add_export_option(parser)
    add_suv_options(parser)
    add_common_options(parser, output="runs/segment, for several cases")
    parser.set_defaults(measures=None, bbox_mm=None)


def image_of(text: str) -> tuple[str, str]:
    """The modality and the path of ``--image``."""
    modality, equals, path = text.partition("=")
    if not equals or not modality or not path:
        raise argparse.ArgumentTypeError(f"{text} is no MODALITY=FILE, such as ct=ct.nii.gz")
    return modality, path


def take_images(args: argparse.Namespace, others: list[str]) -> tuple[list[str], str]:
    """Take ``--MODALITY FILE`` for each modality of the task from arguments that the verb does not know.

    Args:
        args: parsed options; ``image`` gets the images.
        others: the unknown arguments.

    Returns:
        The arguments that are still unknown, and a sentence about the options of images where there are such.

    Raises:
        FileNotFoundError: there are unknown arguments, and no weights, which would name the modalities.
    """
    if "image" not in args:
        return others, ""
    from scripts.cli.trained_task import images_sentence, task_of, weights_path
    from scripts.utils.task_file import task_path

    modalities = task_of(args)["modalities"]
    parser = argparse.ArgumentParser("python -m scripts segment", add_help=False, allow_abbrev=False)
    for modality in modalities:
        parser.add_argument(f"--{modality}", dest="image", action="append", type=partial(_named_image, modality))
    unknown, weights = parser.parse_known_args(others, args)[1], weights_path(args)
    if unknown and not (args.data or weights.is_file() or task_path(weights).is_file()):
        raise FileNotFoundError(f"No weights at {weights}. Check --weights.")
    return unknown, images_sentence(args, modalities)


def _named_image(modality: str, path: str) -> tuple[str, str]:
    return modality, path


def run(args: argparse.Namespace) -> None:
    """Segment.

    Raises:
        ValueError: ``--workers`` for one case.
    """
    # A task file of one case may need the data set for its classes (scripts.cli.task).
    of_task = is_file(args.data) and (args.output or args.image or args.stacked)
    if args.data_list or (args.dataset_dir and not of_task):
        from scripts.cli.segment_cohort import segment_cohort

        segment_cohort(args)
        return
    if args.workers:
        raise ValueError(
            "--workers is how many cases are segmented at a time. Add --data-list or --dataset-dir, or remove it "
            "(--threads sets the threads of one case)."
        )
    from scripts.cli.segment_case import segment_case

    segment_case(args)
