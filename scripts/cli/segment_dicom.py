# SPDX-License-Identifier: Apache-2.0
"""``dicom``: a study in, a mask as NIfTI, as DICOM SEG and, on request, as RTSTRUCT out. For research pipelines."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.cli.options import CONFIGS
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_series import series_slices
from scripts.image_io.dicom_study import KINDS, Series, choose_series, find_series
from scripts.image_io.dicom_writer import RefusedError, read_slices, write_rtstruct, write_seg
from scripts.utils.run_manifest import code_version


def segment_study(args: argparse.Namespace, segment: Callable[[argparse.Namespace], None]) -> None:
    """Segment a study onto the grid of its reference series.

    Writes into ``args.output_dir``: ``mask.nii.gz``, ``seg.dcm`` and, with ``args.rtstruct``, ``rtstruct.dcm``.

    Args:
        args: of the verb.
        segment: the verb that segments one case.

    Raises:
        ValueError: the study lacks a series, holds several of a kind, or mixes patients or frames of reference; the
            reference series is absent; an optional package is not installed; a table of cases is given.
    """
    if args.data_list:
        raise ValueError(f"dicom takes one --study, not the table {args.data_list}: leave out --data-list.")
    spec = json.loads((CONFIGS / "data" / f"{args.data}.json").read_text(encoding="utf-8"))
    modalities = spec["modalities"]
    if args.dry_run:  # what it would print where one folder held every series
        where = str(Path(args.output_dir or "runs/dicom") / "mask.nii.gz")
        segment(argparse.Namespace(**{**vars(args), **dict.fromkeys(modalities, args.study), "output": where}))
        return
    for name in ("pydicom", "highdicom", *(["rt_utils"] if args.rtstruct else [])):
        dicom_package(name)  # rather now than when the mask has been made
    chosen = choose_series(find_series(args.study), modalities, args.series_uid or ())
    lost = [key for key in modalities if key not in chosen]
    if lost and (modalities[0] in lost or not args.allow_missing):
        names = ", ".join(KINDS[key] for key in lost)
        advice = "" if modalities[0] in lost else ", or allow it by --allow-missing"
        raise ValueError(f"{args.study} has no series of {names}: add it{advice}.")
    output = Path(args.output_dir or "runs/dicom")
    mask, reference = output / "mask.nii.gz", chosen[modalities[0]]
    uids = [series.uid for series in chosen.values()]
    with tempfile.TemporaryDirectory(prefix="series-") as linked:
        folders = _folders(chosen, Path(linked))
        segment(argparse.Namespace(**{**vars(args), **folders, "output": str(mask), "series_uid": uids}))
    _write(mask, reference, _segment_name(), output, args.rtstruct)


def _folders(chosen: dict[str, Series], linked: Path) -> dict[str, str]:
    """A folder per modality that holds no other's images: where series share one, links to the files of each."""
    shared = Counter(series.folder for series in chosen.values())
    folders = {}
    for key, series in chosen.items():
        own = series.folder
        if shared[own] > 1:
            own = linked / key
            own.mkdir()
            for number, file in enumerate(series_slices(series.folder, [series.uid])):
                (own / f"{number:05d}").symlink_to(Path(file).resolve())
            print(f"{key}: series {series.uid} of {series.folder}, linked for this run into {own}")
        folders[key] = str(own)
    return folders


def _write(mask: Path, reference: Series, label: str, output: Path, rtstruct: bool) -> None:
    path = output / "seg.dcm"
    with _nameless(path, reference, mask):
        slices = read_slices(list(series_slices(reference.folder, [reference.uid])))
        write_seg(mask, slices, label, code_version(), path)
    print(f"DICOM SEG: {path}")
    if rtstruct:
        path = output / "rtstruct.dcm"
        with _nameless(path, reference, mask):
            written = write_rtstruct(mask, slices, label, path)
        print(f"RTSTRUCT: {path}" if written else f"RTSTRUCT: {path} was not written, no structure: the mask is empty")


@contextmanager
def _nameless(path: Path, series: Series, mask: Path) -> Iterator[None]:
    """Tells what failed in the packages for DICOM without their words, which may quote the patient's data.

    With ``DEBUG`` in the environment their errors are let through.
    """
    try:
        yield
    except (RefusedError, OSError):
        raise
    except Exception as error:
        if os.environ.get("DEBUG"):
            raise
        raise ValueError(
            f"{path} was not written ({type(error).__name__}): the headers of the series {series.uid} do not go into "
            f"it; DEBUG=1 shows why, and may show the patient's data. The mask is there: {mask}."
        ) from None


def _segment_name() -> str:
    """What the metadata call the foreground."""
    formats = json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))["network_data_format"]
    return str(formats["outputs"]["pred"]["channel_def"]["1"])
