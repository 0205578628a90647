# SPDX-License-Identifier: Apache-2.0
"""Segment the studies of a list from a PACS, one after the other: what is done is skipped, what failed is listed."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from scripts.cli.finished_masks import add_to_record, has_suv_values, is_complete, read_record, start_record
from scripts.cli.segment_cohort import MAX_WARNINGS, SEGMENTED, SKIPPED, Outcome, report_outcomes
from scripts.cli.segment_dicom import DEFAULT_OUTPUT, MASK, OBJECTS, StudyTask
from scripts.cli.segment_pacs import segment_one, store, written_objects
from scripts.cli.trained_task import weights_path
from scripts.data.table_files import TEXT_TABLES, read_rows
from scripts.image_io.dicomweb import Pacs, is_uid
from scripts.image_io.dicomweb_errors import PacsError
from scripts.image_io.suv_values import QUANTITIES, checked_suv_values
from scripts.runtime.suv_options import refuse_values_of_one_patient, suv_values
from scripts.utils.checksums import sha256
from scripts.utils.errors import EXPECTED_ERRORS, error_sentence
from scripts.utils.output_lock import hold

RECORD = "dicom.json"  # what became of each study, in the output folder
COLUMN = "study_uid"
INTERRUPTED = "interrupted"


def segment_studies(args: argparse.Namespace, task: StudyTask, pacs: Pacs) -> None:
    """Segment the studies of ``args.study_list``, each into a folder named by its UID, and write ``dicom.json``.

    Raises:
        ValueError: the list cannot be read; the folder contains masks of other weights or settings; some studies failed
            (all others are done); or the server cannot be used at all.
    """
    refuse_values_of_one_patient(args, "--study-list")
    if args.series_uid:
        raise ValueError("--series-uid names series of one study. Remove it, or write a rule into the task's dicom.")
    studies = read_study_list(Path(args.study_list))
    output = Path(args.output_dir or DEFAULT_OUTPUT)
    if args.list_series:
        _list_series(args, task, pacs, studies, output)
        return
    with hold(output):
        masks = [output / uid / MASK for uid in studies]
        start_record(output / RECORD, masks, sha256(weights_path(args)), task.settings)
        record = _studies_of(output / RECORD)
        outcomes = {}

        def save() -> None:
            add_to_record(output / RECORD, {"studies": record})

        for number, (uid, values) in enumerate(studies.items(), start=1):
            print(f"study {number} of {len(studies)}: {uid}")
            try:
                entry = record.setdefault(uid, {})
                outcomes[uid] = _do_study(_with(args, values), task, pacs, uid, output / uid, entry, save)
            finally:
                save()
        report_outcomes(outcomes, "studies")


def read_study_list(path: Path) -> dict[str, dict[str, Any]]:
    """The UIDs of a list, each with its values for SUV.

    Args:
        path: one UID a line (``#`` begins a comment), or a table with the column ``study_uid``; of its other columns
            only those of ``scripts.image_io.suv_values`` are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no study, something that is no UID, or a study twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no list of studies at {path}.")
    rows = _lines(path) or read_rows(path, (COLUMN, *QUANTITIES))
    studies: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        where, uid = f"{path}, study {number}", str(row.get(COLUMN) or "").strip()
        if not is_uid(uid):
            found = f"{uid[:80]!r} is no DICOM UID" if uid else f"there is no {COLUMN}"
            raise ValueError(f"{where}: {found}. Give the Study Instance UID (0020,000D).")
        if uid in studies:
            raise ValueError(f"{where}: the study {uid} is listed twice. Keep one.")
        values = {key: row[key] for key in QUANTITIES if row.get(key) not in (None, "")}
        studies[uid] = checked_suv_values(values, {key: f"{where}: {key}" for key in values})
    if not studies:
        raise ValueError(f"{path} lists no studies.")
    return studies


def _lines(path: Path) -> list[dict[str, str]]:
    """The rows of a file with one UID a line; none if its first line is no UID: then it is a table."""
    if path.suffix.lower() not in (*TEXT_TABLES, ""):
        return []
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line for line in lines if line]
    return [{COLUMN: line} for line in lines] if lines and is_uid(lines[0]) else []


def _with(args: argparse.Namespace, values: dict[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **values})


def _list_series(
    args: argparse.Namespace, task: StudyTask, pacs: Pacs, studies: Mapping[str, dict[str, Any]], output: Path
) -> None:
    """Print the series of each study.

    Raises:
        ValueError: some studies cannot be segmented; the others are listed, too.
        PacsError: the server cannot be used at all.
    """
    failed = {}
    for number, (uid, values) in enumerate(studies.items(), start=1):
        print(f"study {number} of {len(studies)}: {uid}")
        try:
            segment_one(_with(args, values), task, pacs, uid, output / uid)
        except EXPECTED_ERRORS as error:
            if args.debug or (isinstance(error, PacsError) and error.fatal):
                raise
            failed[uid] = error_sentence(error)
    if failed:
        listed = "; ".join(f"{uid}: {sentence}" for uid, sentence in failed.items())
        raise ValueError(f"{len(failed)} of {len(studies)} studies cannot be segmented. {listed}")


def _studies_of(path: Path) -> dict[str, Any]:
    """What an earlier run recorded of each study."""
    studies = read_record(path).get("studies")
    return studies if isinstance(studies, dict) else {}


def _do_study(
    args: argparse.Namespace,
    task: StudyTask,
    pacs: Pacs,
    uid: str,
    output: Path,
    entry: dict[str, Any],
    save: Callable[[], None],
) -> Outcome:
    """Segment and store a study, except for what is done; write into its ``entry`` what became of it.

    ``save`` writes the record: the run may be killed after each step.

    Raises:
        PacsError: the server cannot be used at all.
    """
    messages = BufferingHandler(MAX_WARNINGS)
    messages.setLevel(logging.WARNING)
    logging.getLogger("scripts").addHandler(messages)
    result = SKIPPED
    try:
        if not _is_done(args, task, output, entry):
            result = INTERRUPTED
            entry.clear()
            save()
            chosen = segment_one(args, task, pacs, uid, output)
            entry["series"] = {key: series.uid for key, series in chosen.items()}
            entry["objects"] = [path.name for path in written_objects(args, output)]
            entry["wanted"], entry["stored"], result = _wanted(args), {}, SEGMENTED
            save()
        missing = [path for path in written_objects(args, output) if path.name not in _stored(entry)]
        if args.store and missing:
            uids = store(pacs, uid, missing)
            entry["stored"] = {**_stored(entry), **{path.name: each for path, each in zip(missing, uids, strict=True)}}
    except EXPECTED_ERRORS as error:
        result = error_sentence(error)
        if isinstance(error, PacsError) and error.fatal:
            raise
        if args.debug:
            raise
    finally:
        logging.getLogger("scripts").removeHandler(messages)
        warnings = tuple(message.getMessage() for message in messages.buffer)
        entry["result"] = SEGMENTED if result == SKIPPED else result
        entry["warnings"] = [*warnings] if result != SKIPPED else entry.get("warnings", [])
    return Outcome(result, ())


def _wanted(args: argparse.Namespace) -> list[str]:
    return [name for name, option in OBJECTS.items() if option is None or vars(args).get(option)]


def _stored(entry: dict[str, Any]) -> dict[str, str]:
    """The objects that were stored, each with its UID. Up to 0.11.0 a record listed the UIDs of all objects."""
    stored = entry["stored"]
    return stored if isinstance(stored, dict) else dict(zip(entry["objects"], stored, strict=False))


def _is_done(args: argparse.Namespace, task: StudyTask, output: Path, entry: dict[str, Any]) -> bool:
    """Whether a study was segmented with these values and at least these objects, and all of its files are there."""
    if "objects" not in entry or not set(_wanted(args)) <= set(entry.get("wanted", [])):
        return False
    files_exist = all((output / name).is_file() for name in entry["objects"])
    suv = {**(task.settings["checks"].get("suv") or {}), **suv_values(args)}
    return files_exist and has_suv_values(output / MASK, suv) and is_complete(output / MASK)
