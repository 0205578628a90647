# SPDX-License-Identifier: Apache-2.0
"""Data lists: one dictionary of paths per case, made by the reader of each data set.

An item holds `case_id`, `patient_id`, `image` (path of the reference modality), one key per modality that lies on disk
(`ct`, `pet`, ...), and `label` where its file exists. Paths are strings; nothing is opened here.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.case_table import read_list
from scripts.data.modalities import GatherModalitiesd, modalities_used

logger = logging.getLogger(__name__)

DATASETS = ("phantom", "sts", "hecktor21", "picai22")

NAMES = ("case_id", "patient_id", "centre")  # of an item, which are no paths

Item = dict[str, Any]


def datalist(
    name: str,
    root: str | Path | None,
    file: str | Path | None = None,
    modalities: Sequence[str] = (),
    allow_outside: bool = False,
) -> list[Item]:
    """List the cases of a data set, sorted by `case_id`.

    Args:
        name: one of `DATASETS`, the module of this package that knows the layout.
        root: folder of the data set. Empty or None returns [], since a config that is only inspected has no data.
        file: a table of the cases in place of a known layout, see `scripts.data.case_table`.
        modalities: columns of that table, the reference first.
        allow_outside: accept paths in that table that lead out of `root`.

    Raises:
        ValueError: `name` is unknown, or two cases share an id.
        FileNotFoundError: `root` does not exist, holds no case, or a case lacks its reference modality.
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set '{name}': choose one of {', '.join(DATASETS)}.")
    if file:
        return read_list(file, root or "", [*modalities, "image", "label"], allow_outside)
    if root is None or str(root) == "":
        return []
    items: list[Item] = importlib.import_module(f"scripts.data.cohorts.{name}").datalist(Path(root))
    return items


class IncompleteError(FileNotFoundError):
    """Files of a cohort are missing; `cases` are the items of those that can be read, `lost` the missing files."""

    def __init__(self, message: str, cases: list[Item], lost: list[str]) -> None:
        super().__init__(message)
        self.cases, self.lost = cases, lost


def require_folder(root: str | Path, name: str, layout: str) -> Path:
    """Return `root` as a path.

    Raises:
        FileNotFoundError: it is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"The folder {root} of the data set '{name}' does not exist: expected {layout}.")
    return root


def make_item(case_id: str, patient_id: str, files: dict[str, Path], label: Path) -> Item:
    """Build one item from the expected files, reference modality first; those that do not exist are left out."""
    present = {key: str(path) for key, path in files.items() if path.is_file()}
    reference = next(iter(files.values()))
    item: Item = {"case_id": case_id, "patient_id": patient_id, "image": str(reference), **present}
    if label.is_file():
        item["label"] = str(label)
    return item


def check_cases(cases: Sequence[tuple[Item, dict[str, Path]]], root: Path, name: str, layout: str) -> list[Item]:
    """Check a cohort as a whole and return its items sorted by `case_id`.

    Args:
        cases: each item with the image files that it should have, reference modality first.

    Raises:
        FileNotFoundError: no case, or a case lacks its reference modality; every missing image file of the cohort is
            named, so that one run tells all. Other modalities may be absent.
        ValueError: two cases share an id.
    """
    if not cases:
        raise FileNotFoundError(f"No case of the data set '{name}' found in {root}: expected {layout}.")
    seen: dict[str, str] = {}
    for item, _ in cases:
        case_id, image = item["case_id"], item["image"]
        if case_id in seen:
            raise ValueError(f"The case {case_id} occurs twice, as {seen[case_id]} and {image}: remove one of them.")
        seen[case_id] = image
    missing = [[str(path) for path in files.values() if not path.is_file()] for _, files in cases]
    if any(item["image"] in lost for (item, _), lost in zip(cases, missing, strict=True)):
        names = sorted(path for lost in missing for path in lost)
        raise IncompleteError(
            f"{len(names)} image file(s) of the data set '{name}' are missing, at least one of them of the reference "
            f"modality, without which a case cannot be read (expected {layout}): {', '.join(names)}.",
            [item for (item, _), lost in zip(cases, missing, strict=True) if item["image"] not in lost],
            names,
        )
    return sorted((item for item, _ in cases), key=lambda item: item["case_id"])


def source_files(case: Mapping[str, Any]) -> dict[str, Path]:
    """The files that a case names, by key; those of a folder of DICOM files by key and name."""
    paths = {key: Path(case[key]) for key in sorted(case) if isinstance(case[key], str) and key not in NAMES}
    found = {key: path for key, path in paths.items() if path.is_file()}
    for key, folder in paths.items():
        if folder.is_dir():
            found |= {f"{key}/{path.name}": path for path in sorted(folder.iterdir()) if path.is_file()}
    return found


def deal(cases: Sequence[Item], rank: int, world: int) -> list[Item]:
    """One process's share of the validation cases: each case goes to one process, whatever their number.

    Raises:
        ValueError: there are cases, but fewer than processes: one without any would leave the others waiting.
    """
    if 0 < len(cases) < world:
        raise ValueError(f"{len(cases)} validation case(s) cannot be dealt to {world} processes: start fewer of them.")
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
    """Refuse to start on nothing, or on cases that lack files; all of the cohort's are named at once.

    Args:
        cases: the data list.
        root: folder that it was read from.
        modalities: those that every case should have.
        naming: rules by which absent keys are looked for, see ``GatherModalitiesd``.
        allow_missing: accept absent modalities, and say which.
        reference: the modality that may stand under ``image``; by default the first.
        present: the modalities to use, by default all; a case need not have any other.
        stacked: each case's ``image`` is one 4D file of all modalities.
        labelled: every case needs a label.

    Raises:
        ValueError: there is no case to work on, modalities or labels are absent, or an unknown one is asked for.
        FileNotFoundError: the data list names files that do not exist.
    """
    if not cases:
        where = f"{root} holds no case" if root else "no folder of data was given"
        raise ValueError(f"There is nothing to work on, because {where}: pass --dataset_dir (--dataset-dir).")
    used = modalities_used(modalities, present)
    gather: Callable[[Any], Any] = (
        GatherModalitiesd(modalities, naming, True, reference, present, stacked) if modalities else dict
    )
    lost: list[Exception] = []
    absent, unlabelled = [], []
    for case in cases:
        name, label = case.get("case_id"), case.get("label")
        if label is None:
            unlabelled.append(str(name))
        elif not Path(label).exists():
            lost.append(FileNotFoundError(f"Case {name}: no such file: {label}."))
        try:
            item = gather(case)
        except (FileNotFoundError, ValueError) as error:
            lost.append(error)
            continue
        absent += [f"{item.get('case_id')}: {key}" for key in used if key not in item]
    told = [*map(str, lost)] + (["Add the files, or take these cases out."] if lost else [])
    option = "--allow_missing True (--allow-missing)"
    if absent and not allow_missing:
        told.append(f"Modalities are absent ({'; '.join(absent)}): add the files, or allow it by {option}.")
    if unlabelled and labelled:
        told.append(f"Labels are absent ({'; '.join(unlabelled)}): add the files, or take these cases out.")
    if told:
        raise (FileNotFoundError if any(isinstance(each, OSError) for each in lost) else ValueError)(" ".join(told))
    if absent:
        logger.warning("absent modalities, read as zeros: %s", "; ".join(absent))
