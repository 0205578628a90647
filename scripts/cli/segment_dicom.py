# SPDX-License-Identifier: Apache-2.0
"""Segment a DICOM study: the mask as NIfTI, as DICOM SEG and, on request, as RTSTRUCT and SR. For research only."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib

from scripts.cli.bundle_run import resolved_config
from scripts.cli.finished_masks import decisive_settings
from scripts.cli.options import context_configs, engine_overrides
from scripts.cli.segment_case import segment_case
from scripts.cli.series_table import series_table
from scripts.cli.trained_task import with_trained_settings
from scripts.image_io.dicom_codes import Property, segment_properties
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_rtstruct import write_rtstruct
from scripts.image_io.dicom_rules import Rule, series_rules
from scripts.image_io.dicom_series import series_files
from scripts.image_io.dicom_sr import write_sr
from scripts.image_io.dicom_study import (
    Series,
    choose_series,
    find_series,
    require_series,
    series_folders,
    series_named,
)
from scripts.image_io.dicom_writer import Regions, read_slices, without_patient_data, write_seg
from scripts.image_io.series_preference import preferences
from scripts.metrics.lesion_measures import Measures
from scripts.runtime.regions import region_mask_values
from scripts.utils.output_lock import hold
from scripts.utils.run_manifest import code_version

DEFAULT_OUTPUT, MASK, MEASURES = "runs/dicom", "mask.nii.gz", "measures.csv"
OBJECTS = {"seg.dcm": None, "rtstruct.dcm": "rtstruct", "sr.dcm": "sr"}  # and the option that each needs
DEBUG_HINT = "Use --debug to see why; the traceback may show patient data."
MAX_LESIONS = 50  # with a segment of their own
MAX_SEGMENT_BYTES = 2**30  # of these segments, a byte per voxel


class StudyTask(NamedTuple):
    """What a task says of a study: how its series are chosen, and what becomes of the mask's regions.

    ``settings`` are those that decide about its mask and DICOM objects.
    """

    rules: dict[str, Rule]
    preferences: dict[str, tuple[str, ...]]
    regions: Regions
    properties: Mapping[str, Property]
    settings: Mapping[str, Any]

    @property
    def allow_missing(self) -> bool:
        """Whether modalities may be missing."""
        return bool(self.settings["allow_missing"])

    @property
    def keywords(self) -> list[str]:
        """The DICOM elements that the rules read."""
        return sorted({keyword for rule in self.rules.values() for keyword in rule})


def segment_study(args: argparse.Namespace) -> None:
    """Segment a study onto the grid of its reference series.

    Writes ``mask.nii.gz``, ``measures.csv``, ``seg.dcm`` and, with ``args.rtstruct``, ``rtstruct.dcm`` and, with
    ``args.sr``, ``sr.dcm`` into ``args.output_dir``.

    Raises:
        ValueError: the study lacks a series, holds several for a modality, or mixes patients or frames of reference;
            the reference series is missing, or is multi-frame and an RTSTRUCT is wanted; the task's rules or codes are
            wrong; an optional package is not installed; a table of cases is given.
    """
    if args.data_list:
        raise ValueError("dicom segments one --study. Remove --data-list.")
    if args.dry_run:
        print_command(args, args.study)
        return
    task, output = study_task(args), Path(args.output_dir or DEFAULT_OUTPUT)
    chosen = choose(args, task, find_series(args.study, task.keywords), args.study)
    if not args.list_series:
        segment_chosen(args, task, chosen, output)


def print_command(args: argparse.Namespace, study: str) -> None:
    """Print the ``monai.bundle`` command with ``--dry-run``, as if one folder held every series of the study."""
    configs = ["inference", *context_configs(args)]
    modalities = resolved_config(args, configs, with_trained_settings(args, configs, {}))["modalities"]
    mask = Path(args.output_dir or DEFAULT_OUTPUT) / MASK
    images = [(key, study) for key in modalities]
    segment_case(argparse.Namespace(**{**vars(args), "image": images, "output": str(mask), "output_dir": None}))


def study_task(args: argparse.Namespace) -> StudyTask:
    """The rules and regions of the task, before anything is read.

    Raises:
        ValueError: they are wrong, or an optional package is not installed.
    """
    for name in ("pydicom", "highdicom"):
        dicom_package(name)
    configs = ["inference", *context_configs(args)]
    task = resolved_config(args, configs, with_trained_settings(args, configs, engine_overrides(args)))
    rules = series_rules(task["modalities"], task["dicom"])
    regions = region_mask_values(task["labels"], task["classes"], task["regions"], task["mask_values"])
    properties = segment_properties(regions, task["codes"])
    wanted = preferences(task["modalities"], task["dicom"])
    settings = decisive_settings(args, task, "dicom", "codes")
    return StudyTask(rules, wanted, regions, properties, settings)


def choose(args: argparse.Namespace, task: StudyTask, study: Sequence[Series], name: str) -> dict[str, Series]:
    """Choose a series for each modality, and print all series of the study with what was chosen, and why.

    Args:
        args: parsed options.
        task: of the weights.
        study: its series.
        name: of the study, for errors.

    Raises:
        ValueError: see ``choose_series``; or a modality has no series.
    """
    choice = choose_series(study, task.rules, args.series_uid or (), task.preferences)
    print(series_table(study, choice))
    require_series(choice.series, task.rules, task.allow_missing, name)
    return choice.series


def segment_chosen(args: argparse.Namespace, task: StudyTask, chosen: Mapping[str, Series], output: Path) -> None:
    """Segment chosen series, whose files are on this machine, and write the mask and the DICOM objects into a folder.

    Raises:
        ValueError: see ``segment_study``.
    """
    mask, regions, properties = output / MASK, task.regions, task.properties
    reference = chosen[next(iter(task.rules))]
    if args.rtstruct and reference.enhanced:
        raise ValueError(
            f"The series {reference.uid} is multi-frame (enhanced) DICOM, for which no RTSTRUCT can be written. Leave "
            "out --rtstruct: the mask is written as NIfTI and DICOM SEG."
        )
    uids = [series.uid for series in chosen.values()]
    with hold(output):  # until the last file is written: another study's mask must not come between
        for name in (MASK, MEASURES, *OBJECTS):
            (output / name).unlink(missing_ok=True)  # of an earlier run, maybe of another patient
        with tempfile.TemporaryDirectory(prefix="series-") as links:
            folders = series_folders(chosen, Path(links))
            own = {"image": [*folders.items()], "output": str(mask), "output_dir": None, "series_uid": uids}
            measures = (output.resolve().name, output / MEASURES)
            with series_named(folders, chosen, args.debug):
                measured = segment_case(argparse.Namespace(**{**vars(args), **own, "measures": measures}))
        report = measured if args.sr else None
        write_dicom(mask, reference, regions, properties, output, args.rtstruct, args.debug, report)


def write_dicom(
    mask: Path,
    reference: Series,
    regions: Regions,
    properties: Mapping[str, Property],
    output: Path,
    rtstruct: bool,
    debug: bool = False,
    measured: Sequence[Measures] | None = None,
) -> None:
    """Write the mask as DICOM SEG and, on request, as RTSTRUCT and its measures as SR.

    Args:
        mask: the NIfTI mask on the grid of ``reference``.
        reference: series that the objects refer to.
        regions: name -> values of the mask.
        properties: what each region is.
        output: folder of ``seg.dcm`` and ``rtstruct.dcm``.
        rtstruct: also write the structure set.
        debug: let the errors of the DICOM packages through, which may quote the patient's data.
        measured: of the mask, to be written as ``sr.dcm``; its lesions get segments of their own then.
    """
    lesions = largest_lesions(measured or (), mask)
    path = output / "seg.dcm"
    with without_patient_data(path, reference.uid, mask, DEBUG_HINT, debug):
        slices = read_slices(list(series_files(reference.folder, [reference.uid]).heads))
        write_seg(mask, slices, regions, properties, code_version(), path, lesions)
    print(f"DICOM SEG: {path}")
    if measured is not None:
        report = output / "sr.dcm"
        with without_patient_data(report, reference.uid, mask, DEBUG_HINT, debug):
            write_sr(measured, path, slices, properties, code_version(), report)
        print(_sr_line(report, measured, lesions))
    if rtstruct:
        path = output / "rtstruct.dcm"
        with without_patient_data(path, reference.uid, mask, DEBUG_HINT, debug):
            written = write_rtstruct(mask, slices, regions, code_version(), path)
        print(_rtstruct_line(path, regions, written))


def largest_lesions(measured: Sequence[Measures], mask: Path) -> list[tuple[str, int]]:
    """The lesions that get a segment of their own, the largest of all regions.

    Args:
        measured: of the mask.
        mask: its file; fewer lesions of larger masks get a segment, because each takes a byte per voxel.
    """
    lesions = [each for each in measured if each.lesion is not None]
    largest = sorted(lesions, key=lambda each: -each.volume_ml)[: _max_lesions(mask)] if lesions else []
    return [(each.region, each.lesion) for each in lesions if each in largest and each.lesion is not None]


def _max_lesions(mask: Path) -> int:
    voxels = math.prod(nib.Nifti1Image.from_filename(mask).shape)
    return min(MAX_LESIONS, max(1, MAX_SEGMENT_BYTES // voxels))


def _sr_line(path: Path, measured: Sequence[Measures], lesions: Sequence[tuple[str, int]]) -> str:
    count = sum(each.lesion is not None for each in measured)
    left_out = f" (the {len(lesions)} largest of {count} lesions; measures.csv has all)" if len(lesions) < count else ""
    return f"SR: {path}{left_out}"


def _rtstruct_line(path: Path, regions: Regions, written: Sequence[str]) -> str:
    if not written:
        return "RTSTRUCT: not written, because the mask is empty"
    empty = [name for name in regions if name not in written]
    return f"RTSTRUCT: {path}" + (f" (without {', '.join(empty)}, empty in this mask)" if empty else "")
