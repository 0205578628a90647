# SPDX-License-Identifier: Apache-2.0
"""Seeded k-fold splits of patients: all studies of a patient fall into one fold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from monai.data import partition_dataset

from scripts.data.case_list import Item
from scripts.utils.atomic_files import write_text


def make_splits(patient_ids: Iterable[str], folds: int = 5, seed: int = 0) -> list[list[str]]:
    """Divide the patients into folds whose sizes differ by one at most; the order and number of studies do not matter.

    Raises:
        ValueError: fewer than 2 folds, or fewer patients than folds.
    """
    patients = sorted(set(patient_ids))
    if folds < 2:
        raise ValueError(f"Cross-validation needs at least 2 folds, got {folds}.")
    if len(patients) < folds:
        raise ValueError(f"{len(patients)} patient(s) cannot fill {folds} folds: lower the number of folds.")
    parts = partition_dataset(patients, num_partitions=folds, shuffle=True, seed=seed)
    return [sorted(part) for part in parts]


def fold_split(
    cases: Sequence[Item], fold: int | None = 0, folds: int = 5, seed: int = 0, file: str | Path | None = None
) -> tuple[list[Item], list[Item]]:
    """Divide the cases into training and validation, the latter being the patients of one fold.

    Args:
        cases: items with `patient_id`.
        fold: index of the validation fold, from 0; None takes all cases for training.
        folds: number of folds, where `file` does not say it.
        seed: of the shuffle, where `file` does not say it.
        file: JSON `{"name"?, "seed", "folds": [[patient ids], ...]}`: obeyed if it exists, else written.

    Raises:
        ValueError: the fold does not exist, there are fewer patients than folds, or the file is not such a JSON, names
            a patient twice, names patients without a case, or lacks patients that have one.
    """
    if not cases or fold is None:
        return list(cases), []
    patients = {str(case["patient_id"]) for case in cases}
    path = Path(file) if file else None
    if path is not None and path.is_file():
        splits = _read(path)
        _compare(splits, patients, path)
    else:
        splits = make_splits(patients, folds, seed)
    if not 0 <= fold < len(splits):
        raise ValueError(f"Fold {fold} does not exist: choose one of 0 to {len(splits) - 1}.")
    if path is not None and not path.exists():
        write_text(json.dumps({"seed": seed, "folds": splits}, indent=1) + "\n", path)
    held_out = set(splits[fold])
    training = [case for case in cases if str(case["patient_id"]) not in held_out]
    return training, [case for case in cases if str(case["patient_id"]) in held_out]


def _read(path: Path) -> list[list[str]]:
    form = 'expected JSON such as {"seed": 0, "folds": [["patient 1"], ["patient 2"]]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"The split file {path} cannot be read ({error}): {form}.") from error
    folds = content.get("folds") if isinstance(content, dict) else None
    if not isinstance(folds, list) or not folds or not all(isinstance(part, list) for part in folds):
        raise ValueError(f"The split file {path} has no list 'folds' of lists of patient ids: {form}.")
    return [[str(patient) for patient in part] for part in folds]


def _compare(splits: list[list[str]], patients: set[str], path: Path) -> None:
    places: dict[str, list[int]] = {}
    for fold, part in enumerate(splits):
        for patient in part:
            places.setdefault(patient, []).append(fold)
    twice = [f"{patient} (folds {', '.join(map(str, at))})" for patient, at in sorted(places.items()) if len(at) > 1]
    if twice:
        raise ValueError(f"The split file {path} names patients more than once: {', '.join(twice)}: keep one of each.")
    absent = sorted(set(places) - patients)
    if absent:
        raise ValueError(
            f"The split file {path} names patients without a case on disk: {', '.join(absent)}: "
            "restore their data, or take them out of the file."
        )
    unknown = sorted(patients - set(places))
    if unknown:
        raise ValueError(
            f"The split file {path} lacks patients that are on disk: {', '.join(unknown)}: "
            "add each to one fold, or delete the file to draw new folds."
        )
