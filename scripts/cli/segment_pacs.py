# SPDX-License-Identifier: Apache-2.0
"""Segment studies of a PACS by DICOMweb, and store the results there. For research pipelines."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from scripts.cli.segment_dicom import (
    DEFAULT_OUTPUT,
    OBJECTS,
    StudyTask,
    choose,
    print_command,
    segment_chosen,
    study_task,
)
from scripts.image_io.checks import DICOM_MODALITIES
from scripts.image_io.dicom_rules import matches
from scripts.image_io.dicom_study import Series, series_named
from scripts.image_io.dicomweb import Pacs
from scripts.utils.output_lock import hold

IMAGES = ".images-"  # folder of the fetched images, while they are needed


def segment_from_pacs(args: argparse.Namespace) -> None:
    """Segment the study ``args.study_uid``, or those of ``args.study_list``.

    Raises:
        ValueError: options contradict each other; see ``segment_study`` of ``segment_dicom`` and ``PacsError``.
    """
    if args.data_list:
        raise ValueError("dicom segments the studies of a server. Remove --data-list, or name UIDs with --study-list.")
    if not args.study_uid and not args.study_list:
        raise ValueError("Which study of the server? Give --study-uid UID, or --study-list FILE.")
    if args.dry_run:  # without the server
        print_command(args, args.study_uid or "STUDY_UID")
        return
    task, pacs = study_task(args), Pacs(args.dicomweb)
    if args.study_list:
        from scripts.cli.segment_study_list import segment_studies

        segment_studies(args, task, pacs)
        return
    output = Path(args.output_dir or DEFAULT_OUTPUT)
    segment_one(args, task, pacs, args.study_uid, output)
    if args.store and not args.list_series:
        store(pacs, args.study_uid, written_objects(args, output))


def segment_one(args: argparse.Namespace, task: StudyTask, pacs: Pacs, study: str, output: Path) -> dict[str, Series]:
    """Find, fetch and segment one study; with ``args.list_series`` only find.

    Only the chosen series are fetched, into a folder below ``output`` that is removed afterwards.

    Returns:
        The chosen series by modality.

    Raises:
        ValueError: see ``segment_from_pacs``.
    """
    kinds = [kind for kind in DICOM_MODALITIES.values() if any(_may_be(kind, rule) for rule in task.rules.values())]
    chosen = choose(args, task, pacs.find_series(study, kinds, task.keywords), f"The study {study}")
    if args.list_series:
        return chosen
    with hold(output), _fetched(args, pacs, study, chosen, output) as local:
        segment_chosen(args, task, local, output)
    return chosen


def _may_be(kind: str, rule: Mapping[str, str | float]) -> bool:
    return "Modality" not in rule or matches({"Modality": (kind,)}, {"Modality": rule["Modality"]})


@contextmanager
def _fetched(
    args: argparse.Namespace, pacs: Pacs, study: str, chosen: Mapping[str, Series], output: Path
) -> Iterator[dict[str, Series]]:
    """The chosen series with the folders of their files, which exist inside the block; a killed run's are removed."""
    for left in output.glob(f"{IMAGES}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=IMAGES, dir=output) as images:
        local = {}
        for key, series in chosen.items():
            start = time.monotonic()
            count = pacs.fetch_series(study, series.uid, Path(images) / key)
            print(f"fetched {key}: {count} objects in {time.monotonic() - start:.1f} s")
            local[key] = series._replace(folder=Path(images) / key)
        with series_named({key: series.folder.absolute() for key, series in local.items()}, chosen, args.debug):
            yield local


def written_objects(args: argparse.Namespace, output: Path) -> list[Path]:
    """The DICOM objects that a run with these options has written; an RTSTRUCT of an empty mask is none."""
    wanted = [name for name, option in OBJECTS.items() if option is None or vars(args).get(option)]
    return [output / name for name in wanted if (output / name).is_file()]


def store(pacs: Pacs, study: str, files: list[Path]) -> list[str]:
    """Store DICOM objects in their study and return their UIDs.

    Raises:
        PacsError: the server refused some; the message says where they lie.
    """
    try:
        uids = pacs.store(study, files)
    except ValueError as error:
        folder = files[0].parent if files else ""
        error.args = (f"{error} The results lie in {folder}.",)
        raise
    print(f"stored in the study {study}: {', '.join(file.name for file in files)}")
    return uids
