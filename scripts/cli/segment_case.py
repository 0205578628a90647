# SPDX-License-Identifier: Apache-2.0
"""``segment`` of one case: what its arguments mean, and which cannot be."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def one_case(
    args: argparse.Namespace, modalities: Sequence[str], allow_missing: bool
) -> tuple[Path, dict[str, str], str]:
    """Where the mask goes, the files by modality, and the modality on whose grid it lies.

    Args:
        args: of the verb.
        modalities: of the network, the reference first.
        allow_missing: another one may be the reference where the first is absent.

    Raises:
        ValueError: no mask or no image is named, the mask has no name or takes an image's place, options that are of a
            table, or the reference is absent.
    """
    if not args.output:
        raise ValueError("Name the mask by --output, or a table of cases by --data-list.")
    if args.bids:
        raise ValueError("--bids names the masks of a table: give it by --data-list, or leave --bids out.")
    output = Path(args.output)
    if not output.name.endswith(".nii.gz") or output.name == ".nii.gz":
        raise ValueError(f"--output is {output}: give a file name that ends in .nii.gz.")
    files = {key: getattr(args, key) for key in modalities if getattr(args, key)}
    if args.stacked:
        files = dict.fromkeys(modalities, args.stacked)
    if not files:
        raise ValueError(f"There is no image to segment: name it by --{' or --'.join(modalities)}.")
    for key, path in files.items():
        if Path(path).resolve() == output.resolve():
            raise ValueError(f"--output is {output}, which is the {key} itself: name another file.")
    reference = next(iter(files))
    if reference != modalities[0]:
        absent = [key for key in modalities if key not in files]
        if not allow_missing:
            lost = ", ".join(f"--{key} is missing" for key in absent)
            raise ValueError(
                f"{lost}: add the files, or allow it by --allow-missing (the mask gets --{reference}'s grid)."
            )
        print(f"The mask is written on the grid of --{reference}, since {absent[0]} is absent.")
    return output, files, reference
