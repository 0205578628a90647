# SPDX-License-Identifier: Apache-2.0
"""``dicom``: a study in, a mask as NIfTI, as DICOM SEG and, on request, as RTSTRUCT out. For research pipelines."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

from scripts.arguments import CONFIGS
from scripts.data.dicom import series_slices
from scripts.dicom_out import read_slices, write_rtstruct, write_seg
from scripts.manifest import code_version
from scripts.study import KINDS, Series, choose_series, find_series


def segment_study(args: argparse.Namespace, segment: Callable[[argparse.Namespace], None]) -> None:
    """Segment a study onto the grid of its reference series.

    Writes into ``args.output_dir``: ``mask.nii.gz``, ``seg.dcm`` and, with ``args.rtstruct``, ``rtstruct.dcm``.

    Args:
        args: of the verb.
        segment: the verb that segments one case.

    Raises:
        ValueError: the study lacks a series, holds several of a kind, or mixes patients or frames of reference; the
            reference series is absent; an optional package is not installed.
    """
    spec = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text(encoding="utf-8"))
    modalities = spec["modalities"]
    if args.dry_run:  # what it would print where one folder held every series
        where = str(Path(args.output_dir or "runs/dicom") / "mask.nii.gz")
        segment(argparse.Namespace(**{**vars(args), **dict.fromkeys(modalities, args.study), "output": where}))
        return
    chosen = choose_series(find_series(args.study), modalities, args.series_uid or ())
    lost = [key for key in modalities if key not in chosen]
    if lost and (modalities[0] in lost or not args.allow_missing):
        names = ", ".join(KINDS[key] for key in lost)
        advice = "" if modalities[0] in lost else ", or allow it by --allow-missing"
        raise ValueError(f"{args.study} has no series of {names}: add it{advice}.")
    output = Path(args.output_dir or "runs/dicom")
    mask, reference = output / "mask.nii.gz", chosen[modalities[0]]
    folders = {key: str(series.folder) for key, series in chosen.items()}
    uids = [series.uid for series in chosen.values()]
    segment(argparse.Namespace(**{**vars(args), **folders, "output": str(mask), "series_uid": uids}))
    _write(mask, reference, _segment_name(), output, args.rtstruct)


def _write(mask: Path, reference: Series, label: str, output: Path, rtstruct: bool) -> None:
    for name in ("pydicom", "highdicom"):  # they would tell of names and ids that are not as the standard wants them
        logging.getLogger(name).setLevel(logging.ERROR)
    slices = read_slices(list(series_slices(reference.folder, [reference.uid])))
    write_seg(mask, slices, label, code_version(), output / "seg.dcm")
    print(f"DICOM SEG: {output / 'seg.dcm'}")
    if rtstruct:
        write_rtstruct(mask, reference.folder, slices, label, output / "rtstruct.dcm")
        print(f"RTSTRUCT: {output / 'rtstruct.dcm'}")


def _segment_name() -> str:
    """What the metadata call the foreground."""
    formats = json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))["network_data_format"]
    return str(formats["outputs"]["pred"]["channel_def"]["1"])
