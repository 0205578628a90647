# SPDX-License-Identifier: Apache-2.0
"""Data lists: one dictionary of paths per case.

An item has `case_id`, `patient_id`, `image` (path of the reference modality), one key per modality that exists on disk
(`ct`, `pet`, ...), and `label` if its file exists. Paths are strings. No image is opened here. Where the data set
divides its cases itself, an item also has `fold` (the fold that it validates) or `partition` (`TEST`: it neither trains
nor validates).
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.case_table import ID_COLUMNS, read_case_table
from scripts.runtime.modalities import GatherModalities, modalities_used, stack_advice

logger = logging.getLogger(__name__)

FIXED = ("phantom", "sts", "hecktor21", "picai22")  # data sets whose layout is known
GENERAL = ("files", "nnunet", "decathlon", "bids", "table")  # layouts of any data set
DATASETS = (*FIXED, *GENERAL)
TEST = "test"  # the partition of cases that take part in no training and no validation

Item = dict[str, Any]


def datalist(
    name: str,
    root: str | Path | None,
    file: str | Path | None = None,
    modalities: Sequence[str] = (),
    allow_outside: bool = False,
    layout: Mapping[str, str] | None = None,
) -> list[Item]:
    """List the cases of a data set, sorted by `case_id`.

    Args:
        name: one of `DATASETS`: the module of `scripts.data.cohorts` that knows the layout.
        root: folder of the data set. Empty or None returns [], so that a config can be inspected without data.
        file: a table of the cases instead of a known layout, see `scripts.data.case_table`.
        modalities: those of the task, the reference first.
        allow_outside: accept paths in tables and lists that lead out of `root`.
        layout: what the readers in `GENERAL` need to know of the files, see their modules.

    Raises:
        ValueError: `name` is unknown, the layout does not fit it, two cases have the same id, or the files contradict
            each other (``ContradictionError``).
        FileNotFoundError: `root` does not exist, contains no case, or a case has no reference modality
            (``IncompleteError``).
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set '{name}'. Choose one of {', '.join(DATASETS)}.")
    if file:
        return read_case_table(file, root or "", [*modalities, "image", "label"], allow_outside)
    if root is None or str(root) == "":
        return []
    if layout and name in FIXED:
        raise ValueError(f"The layout of the data set '{name}' is fixed. Remove layout, or use the cohort 'files'.")
    reader = importlib.import_module(f"scripts.data.cohorts.{name}")
    items: list[Item] = reader.datalist(Path(root), modalities, layout or {}, allow_outside)
    return items


class CohortError(Exception):
    """Some cases of a data set cannot be used.

    Attributes:
        cases: items of the cases that can be read.
        problems: one sentence per problem.
    """

    def __init__(self, message: str, cases: list[Item], problems: list[str]) -> None:
        super().__init__(message, cases, problems)  # all of them, so that a process can send the error to another
        self.cases, self.problems = cases, problems

    def __str__(self) -> str:
        return str(self.args[0])


class IncompleteError(CohortError, FileNotFoundError):
    """Files of a data set are missing."""


class ContradictionError(CohortError, ValueError):
    """Files of a data set contradict each other."""


def require_folder(root: str | Path, name: str, layout: str) -> Path:
    """Return `root` as a path.

    Raises:
        FileNotFoundError: it is not a folder.
        PermissionError: see ``require_readable``.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"The folder {root} of the data set '{name}' does not exist. Expected: {layout}.")
    require_readable(root)
    return root


def refuse_unknown_keys(layout: Mapping[str, str], known: Sequence[str], name: str) -> None:
    """Refuse keys of a layout that its reader does not know.

    Raises:
        ValueError: there is such a key, or a value that is no text.
    """
    unknown = [key for key in layout if key not in known]
    if unknown:
        expected = f"Use {', '.join(known)}" if known else "It needs none"
        raise ValueError(f"layout has the key {unknown[0]}, which the cohort '{name}' does not know. {expected}.")
    for key, value in layout.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f'layout["{key}"] is {value!r}. Give text.')


def require_patterns(layout: Mapping[str, str], modalities: Sequence[str], name: str, example: str) -> None:
    """Refuse a layout that does not have one pattern for each modality and at most one for the label.

    Raises:
        ValueError: a pattern is absent, or a key unknown.
    """
    refuse_unknown_keys(layout, (*modalities, "label"), name)
    absent = [key for key in modalities if key not in layout]
    if absent or not modalities:
        raise ValueError(
            f"layout has no pattern for {', '.join(absent) or 'any modality'}. Add one, such as {example}."
        )


def make_item(case_id: str, patient_id: str, files: Mapping[str, Path], label: Path | None = None) -> Item:
    """Build one item from the expected files, reference modality first; files that do not exist are left out."""
    present = {key: str(path) for key, path in files.items() if path.exists()}
    reference = next(iter(files.values()))
    item: Item = {"case_id": case_id, "patient_id": patient_id, "image": str(reference), **present}
    if label is not None and label.exists():
        item["label"] = str(label)
    return item


def require_readable(folder: Path) -> None:
    """Refuse a data set with a folder that cannot be read: its cases would be left out without a word.

    Raises:
        PermissionError: there is one; the message names it.
    """

    def refuse(error: OSError) -> None:
        raise PermissionError(
            f"The folder {error.filename} cannot be read ({error.strerror}). Correct its permissions."
        )

    for _ in os.walk(folder, onerror=refuse):
        pass


def is_file_name(case_id: str) -> bool:
    """Whether an id can name a file: masks are named by it, and must not lie in other folders."""
    return not re.search(r"[/\\\0]", case_id) and case_id[:1] not in ("", ".")


def missing_file(path: object) -> str:
    """The sentence about a file of a case that does not exist."""
    return f"{path} is missing. Add it, or remove the case."


def check_cases(
    cases: Sequence[tuple[Item, Mapping[str, Path]]], root: Path, name: str, layout: str, problems: Sequence[str] = ()
) -> list[Item]:
    """Check a cohort as a whole and return its items sorted by `case_id`.

    Args:
        cases: each item with the image files that it should have, reference modality first.
        root: folder of the data set.
        name: of the data set.
        layout: the expected file names, for error messages.
        problems: other problems that the reader found, one sentence each.

    Raises:
        FileNotFoundError: no case, or a case without its reference modality. The message names every missing image file
            of the cohort. Other modalities may be absent.
        ValueError: two cases have the same id, an id is no name of a file, or there are other problems. The message
            names all of them.
    """
    if not cases and not problems:
        raise FileNotFoundError(f"No cases of the data set '{name}' found in {root}. Expected: {layout}.")
    problems = list(problems)
    first: dict[str, Item] = {}
    for item, _ in cases:
        case_id, image = item["case_id"], item["image"]
        if not is_file_name(case_id):
            problems.append(
                f"The id {case_id!r} of the case of {image} cannot be a file name: it holds / or \\, or begins with "
                "a dot."
            )
        other = first.setdefault(case_id, item)
        if other is not item:
            problems.append(f"Case {case_id} occurs twice, as {other['image']} and {image}. Remove one of them.")
    owners: dict[str, str] = {}
    for item, files in cases:
        case_id, label = item["case_id"], item.get("label")
        images = {os.path.realpath(path) for path in files.values() if path.is_file()}
        if label and os.path.realpath(label) in images:
            problems.append(f"Case {case_id} has {label} as image and as label. Name the file of each.")
        if label:  # two labels may be links to one, as of two empty masks in git-annex
            label = os.path.join(os.path.realpath(os.path.dirname(label)), os.path.basename(label))
        for path in images | ({label} if label else set()):
            owner = owners.setdefault(path, case_id)
            if owner != case_id:
                kind = "a label" if path == label else "an image"
                problems.append(f"{path} is {kind} of two cases, {owner} and {case_id}. Remove one of them.")
    missing = [[str(path) for path in files.values() if not path.exists()] for _, files in cases]
    without_reference = [item["image"] in paths for (item, _), paths in zip(cases, missing, strict=True)]
    readable = [item for (item, _), lacks in zip(cases, without_reference, strict=True) if not lacks]
    readable = sorted((item for item in readable if first[item["case_id"]] is item), key=lambda item: item["case_id"])
    if any(without_reference):
        paths = sorted({path for paths in missing for path in paths})
        message = (
            f"{len(paths)} image file(s) of the data set '{name}' are missing, at least one of them of the reference "
            f"modality, which every case needs (expected: {layout}): {', '.join(paths)}."
        )
        raise IncompleteError(" ".join([message, *problems]), readable, [*map(missing_file, paths), *problems])
    if problems:
        raise ContradictionError(" ".join(problems), readable, problems)
    return readable


def source_files(case: Mapping[str, Any]) -> dict[str, Path]:
    """The existing files of a case by key; files of a DICOM folder by key and file name."""
    no_files = (*ID_COLUMNS, "partition")
    paths = {key: Path(case[key]) for key in sorted(case) if isinstance(case[key], str) and key not in no_files}
    files = {key: path for key, path in paths.items() if path.is_file()}
    for key, folder in paths.items():
        if folder.is_dir():
            files |= {f"{key}/{path.name}": path for path in sorted(folder.iterdir()) if path.is_file()}
    return files


def cases_of_rank(cases: Sequence[Item], rank: int, world: int) -> list[Item]:
    """The validation cases of one process: every case goes to exactly one process.

    Raises:
        ValueError: there are cases, but fewer than processes. A process without any would make the others wait forever.
    """
    if 0 < len(cases) < world:
        raise ValueError(f"There are {len(cases)} validation case(s) for {world} processes. Start fewer processes.")
    return list(cases[rank::world])


def require_cases(
    cases: Sequence[Item],
    root: str | Path | None,
    modalities: Sequence[str] = (),
    naming: Sequence[Mapping[str, str]] = (),
    allow_missing: bool = False,
    reference: str | None = None,
    present: Sequence[str] | None = None,
    stacked: bool = False,
    labelled: bool = False,
) -> None:
    """Refuse a cohort without cases or with missing files; the message names all missing files of the cohort.

    Args:
        cases: the data list.
        root: folder that it was read from.
        modalities: those that every case should have.
        naming: rules that find modalities which the data list does not name, see ``GatherModalities``.
        allow_missing: accept absent modalities, and log them.
        reference: the modality that ``image`` may name; by default the first.
        present: the modalities to use, by default all; a case need not have any other.
        stacked: each case's ``image`` is one 4D file of all modalities.
        labelled: every case needs a label.

    Raises:
        ValueError: there are no cases, modalities or labels are absent, or ``present`` names an unknown modality.
        FileNotFoundError: the data list names files that do not exist.
    """
    if not cases:
        if root:
            raise ValueError(f"No cases found in {root}. Check --dataset_dir (--dataset-dir).")
        raise ValueError("No data folder was given. Use --dataset_dir (--dataset-dir).")
    used = modalities_used(modalities, present)
    gather: Callable[[Any], Any] = (
        GatherModalities(modalities, naming, True, reference, present, stacked) if modalities else dict
    )
    errors: list[Exception] = []
    absent, unlabelled = [], []
    for case in cases:
        case_id, label = case.get("case_id"), case.get("label")
        if label is None:
            unlabelled += [str(case_id)] * (case.get("partition") != TEST)
        elif not Path(label).exists():
            errors.append(FileNotFoundError(f"Case {case_id}: no such file: {label}."))
        try:
            item = gather(case)
        except (FileNotFoundError, ValueError) as error:
            errors.append(error)
            continue
        absent += [f"{item.get('case_id')}: {key}" for key in used if key not in item]
    messages = [*map(str, errors)] + (["Add the files, or remove these cases from the list."] if errors else [])
    if absent and not allow_missing:
        option = "--allow_missing True (--allow-missing)"
        advice = next(filter(None, (stack_advice(case, modalities) for case in cases)), "")
        messages.append(f"Modalities are absent ({'; '.join(absent)}). Add the files, or use {option}.{advice}")
    if unlabelled and labelled:
        messages.append(
            f"Labels are absent ({'; '.join(unlabelled)}). Add the files, or remove these cases; distill takes them "
            "with --unlabelled."
        )
    if messages:
        is_missing_file = any(isinstance(error, OSError) for error in errors)
        raise (FileNotFoundError if is_missing_file else ValueError)(" ".join(messages))
    if absent:
        logger.warning("absent modalities, read as zeros: %s", "; ".join(absent))
