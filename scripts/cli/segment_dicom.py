# SPDX-License-Identifier: Apache-2.0
"""Segment a DICOM study: the mask as NIfTI, as DICOM SEG and, on request, as RTSTRUCT. For research pipelines."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.cli.bundle_run import resolved_config
from scripts.cli.options import context_configs
from scripts.cli.segment_case import segment_case
from scripts.cli.trained_task import with_trained_settings
from scripts.image_io.checks import WARNING, Finding, report_findings
from scripts.image_io.dicom_codes import Property, segment_properties
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_rules import Rule, rule_text, series_rules
from scripts.image_io.dicom_series import series_files
from scripts.image_io.dicom_study import Series, choose_series, find_series
from scripts.image_io.dicom_writer import RefusedError, Regions, read_slices, write_rtstruct, write_seg
from scripts.runtime.regions import region_mask_values
from scripts.utils.output_lock import hold
from scripts.utils.run_manifest import code_version


def segment_study(args: argparse.Namespace) -> None:
    """Segment a study onto the grid of its reference series.

    Writes ``mask.nii.gz``, ``seg.dcm`` and, with ``args.rtstruct``, ``rtstruct.dcm`` into ``args.output_dir``.

    Raises:
        ValueError: the study lacks a series, holds several for a modality, or mixes patients or frames of reference;
            the reference series is missing, or is multi-frame and an RTSTRUCT is wanted; the task's rules or codes are
            wrong; an optional package is not installed; a table of cases is given.
    """
    if args.data_list:
        raise ValueError("dicom segments one --study. Remove --data-list.")
    configs = ["inference", *context_configs(args)]
    task = resolved_config(args, configs, with_trained_settings(args, configs, {}))
    modalities = task["modalities"]
    output = Path(args.output_dir or "runs/dicom")
    mask = output / "mask.nii.gz"
    if args.dry_run:  # as if one folder held every series
        images = [(key, args.study) for key in modalities]
        segment_case(argparse.Namespace(**{**vars(args), "image": images, "output": str(mask)}))
        return
    for name in ("pydicom", "highdicom", *(["rt_utils"] if args.rtstruct else [])):
        dicom_package(name)  # before anything is segmented
    rules = series_rules(modalities, task["dicom"])
    regions = region_mask_values(task["labels"], task["classes"], task["regions"], task["mask_values"])
    properties = segment_properties(regions, task["codes"])
    keywords = {keyword for rule in rules.values() for keyword in rule}
    chosen = choose_series(find_series(args.study, sorted(keywords)), rules, args.series_uid or ())
    _require_series(args, chosen, rules)
    reference = chosen[modalities[0]]
    if args.rtstruct and reference.enhanced:
        raise ValueError(
            f"The series {reference.uid} is multi-frame (enhanced) DICOM, for which no RTSTRUCT can be written. Leave "
            "out --rtstruct: the mask is written as NIfTI and DICOM SEG."
        )
    uids = [series.uid for series in chosen.values()]
    with hold(output):  # until the last file is written: another study's mask must not come between
        with tempfile.TemporaryDirectory(prefix="series-") as links:
            folders = _series_folders(chosen, Path(links))
            images = [*folders.items()]
            segment_case(argparse.Namespace(**{**vars(args), "image": images, "output": str(mask), "series_uid": uids}))
        write_dicom(mask, reference, regions, properties, output, args.rtstruct, args.debug)


def _require_series(args: argparse.Namespace, chosen: Mapping[str, Series], rules: Mapping[str, Rule]) -> None:
    missing = [key for key in rules if key not in chosen]
    reference = next(iter(rules))
    if missing and (reference in missing or not args.allow_missing):
        names = " and none for ".join(f"{key} ({rule_text(rules[key])})" for key in missing)
        advice = "Add it" if reference in missing else "Add it, use --allow-missing"
        raise ValueError(f"{args.study} has no series for {names}. {advice}, or correct the rules in the task's dicom.")


def _series_folders(chosen: Mapping[str, Series], links: Path) -> dict[str, str]:
    """A folder for each modality that holds only its series; of series that share a folder, links to their files."""
    counts = Counter(series.folder for series in chosen.values())
    folders = {}
    for key, series in chosen.items():
        folder = series.folder
        if counts[folder] > 1:
            folder = links / key
            folder.mkdir()
            files = series_files(series.folder, [series.uid])
            report_findings(Finding(WARNING, text) for text in files.warnings)
            for number, file in enumerate(files.heads):
                (folder / f"{number:05d}").symlink_to(Path(file).resolve())
            print(f"{key}: series {series.uid} of {series.folder}")
        folders[key] = str(folder)
    return folders


def write_dicom(
    mask: Path,
    reference: Series,
    regions: Regions,
    properties: Mapping[str, Property],
    output: Path,
    rtstruct: bool,
    debug: bool = False,
) -> None:
    """Write the mask as DICOM SEG and, on request, as RTSTRUCT.

    Args:
        mask: the NIfTI mask on the grid of ``reference``.
        reference: series that the objects refer to.
        regions: name -> values of the mask.
        properties: what each region is.
        output: folder of ``seg.dcm`` and ``rtstruct.dcm``.
        rtstruct: also write the structure set.
        debug: let the errors of the DICOM packages through, which may quote the patient's data.
    """
    path = output / "seg.dcm"
    with _without_patient_data(path, reference, mask, debug):
        slices = read_slices(list(series_files(reference.folder, [reference.uid]).heads))
        write_seg(mask, slices, regions, properties, code_version(), path)
    print(f"DICOM SEG: {path}")
    if rtstruct:
        path = output / "rtstruct.dcm"
        with _without_patient_data(path, reference, mask, debug):
            written = write_rtstruct(mask, slices, regions, path)
        print(_rtstruct_line(path, regions, written))


def _rtstruct_line(path: Path, regions: Regions, written: Sequence[str]) -> str:
    if not written:
        return "RTSTRUCT: not written, because the mask is empty"
    empty = [name for name in regions if name not in written]
    return f"RTSTRUCT: {path}" + (f" (without {', '.join(empty)}, empty in this mask)" if empty else "")


@contextmanager
def _without_patient_data(path: Path, series: Series, mask: Path, debug: bool) -> Iterator[None]:
    """Replace errors of the DICOM packages, whose text may quote the patient's data."""
    try:
        yield
    except (RefusedError, OSError):
        raise
    except Exception as error:
        if debug:
            raise
        raise ValueError(
            f"{path} was not written ({type(error).__name__}): the headers of the series {series.uid} do not fit. "
            f"The mask was written to {mask}. Use --debug to see why; the traceback may show patient data."
        ) from None
