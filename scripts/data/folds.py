# SPDX-License-Identifier: Apache-2.0
"""Seeded k-fold splits by patient: all studies of a patient are in one fold."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from scripts.data.case_list import TEST, Item
from scripts.utils.atomic_files import write_text
from scripts.utils.file_names import nfc

logger = logging.getLogger(__name__)

CASES = ("training", "validation", "all")
ADVICE = {  # where there are no such cases
    "training": "The validation fold holds all patients. Choose another fold, or give at least two.",
    "validation": "Choose another fold, or other cases (--cases).",
}
FOLDS = 5


def too_few_patients(patients: Collection[str], folds: int = FOLDS) -> str:
    """Why patients cannot be divided into folds, and what to do; empty if they can."""
    if len(patients) >= folds:
        return ""
    problem = f"{len(patients)} patient(s) cannot fill {folds} folds."
    if len(patients) < 2:
        return f"{problem} Add cases of other patients: one validates, the others train."
    example = json.dumps({"seed": 0, "folds": [[patient] for patient in sorted(patients)]}, ensure_ascii=False)
    return f"{problem} Write the folds to a file, such as {example}, and name it: --set splits_file=FILE."


def make_splits(patient_ids: Iterable[str], folds: int = FOLDS, seed: int = 0) -> list[list[str]]:
    """Divide patients into folds whose sizes differ by at most one, independent of the order of the ids.

    Raises:
        ValueError: fewer than 2 folds, or fewer patients than folds.
    """
    patients = sorted(set(patient_ids))
    if folds < 2:
        raise ValueError(f"Cross-validation needs at least 2 folds, got {folds}.")
    problem = too_few_patients(patients, folds)
    if problem:
        raise ValueError(problem)
    from monai.data import partition_dataset  # here, so that listing cases does not load MONAI

    parts = partition_dataset(patients, num_partitions=folds, shuffle=True, seed=seed)
    return [sorted(part) for part in parts]


def fold_split(
    cases: Sequence[Item],
    fold: int | None = 0,
    folds: int = FOLDS,
    seed: int = 0,
    file: str | Path | None = None,
    named: bool = False,
    training: bool = True,
) -> tuple[list[Item], list[Item]]:
    """Divide the cases into training and validation; validation has the patients of one fold.

    If the data set itself gives the folds (items with `fold`), they are used; a case without one then always trains,
    unless its patient is in the validation. Cases of the `partition` `TEST` take part in neither.

    If only some cases have a label, the folds are made of their patients, so that they do not depend on the other
    cases. A case without a label trains, unless its patient is in the validation; no such case validates.

    Args:
        cases: items with `patient_id`, and optionally `fold` and `partition`.
        fold: index of the validation fold, from 0; None uses all cases for training, except those of `TEST`.
        folds: number of folds, if `file` does not exist.
        seed: of the shuffle, if `file` does not exist.
        file: JSON `{"name"?, "seed", "folds": [[patient ids], ...]}`: read if it exists, else written.
        named: whether the user named the file: a training then warns before it writes it.
        training: whether the run trains, or prepares a training. Other runs need the file, if they name one.

    Raises:
        FileNotFoundError: the file does not exist, and the run does not train.
        ValueError: the fold does not exist or has no case, there are fewer patients than folds, or the data set puts a
            patient into two folds. Or the file is not such a JSON, lists a patient twice, lists patients without a
            case, or does not list patients that have one.
    """
    listed = len(cases)
    cases = [case for case in cases if case.get("partition") != TEST]
    if len(cases) < listed:
        logger.info("%d of %d cases are test cases: they neither train nor validate", listed - len(cases), listed)
    if not cases or fold is None:
        return list(cases), []
    labelled = _labelled(cases)
    if len(labelled) < len(cases):
        without = len(cases) - len(labelled)
        logger.info("%d of %d cases have no label: they train, but do not validate", without, len(cases))
    own_folds = _own_folds(labelled)
    patients = {patient for part in own_folds for patient in part} or _patients(labelled)
    path = Path(file) if file else None
    if path is not None and path.is_dir():
        raise ValueError(f"The split file {path} is a folder. Name a JSON file.")
    if path is not None and not path.exists() and not training:
        raise FileNotFoundError(f"There is no split file at {path}. Check splits_file, or leave it out.")
    if path is not None and not path.exists() and named:
        logger.warning("There is no split file at %s: new folds are written there. Check splits_file", path)
    if path is not None and path.is_file():
        splits = _read_splits(path)
        _check_patients(splits, patients, _patients(cases), path)
    else:
        splits = own_folds or make_splits(patients, folds, seed)
    if not 0 <= fold < len(splits):
        raise ValueError(f"Fold {fold} does not exist. Choose one of 0 to {len(splits) - 1}.")
    if not splits[fold]:
        raise ValueError(f"Fold {fold} has no patient. Choose another fold, or correct the data set's folds.")
    if path is not None and not path.exists():
        write_text(json.dumps({"seed": seed, "folds": splits}, indent=1) + "\n", path)
    validation_patients = set(splits[fold])
    train = [case for case in cases if nfc(str(case["patient_id"])) not in validation_patients]
    return train, [case for case in labelled if nfc(str(case["patient_id"])) in validation_patients]


def smallest_training(cases: Sequence[Item], file: str | Path | None = None) -> int:
    """The number of training cases of the fold that has the fewest, at least 1.

    Args:
        cases: as for ``fold_split``, without those of the partition `TEST`.
        file: of the folds, if there is one.
    """
    labelled = _labelled(cases)
    splits = _read_splits(Path(file)) if file and Path(file).is_file() else _own_folds(labelled)
    if not splits:
        patients = _patients(labelled)
        splits = [[patient] for patient in patients] if too_few_patients(patients) else make_splits(patients)
    return max(1, min(sum(nfc(str(case["patient_id"])) not in part for case in cases) for part in splits))


def fold_problem(cases: Sequence[Item]) -> str:
    """Why the labelled cases of a data set cannot be divided into folds, as a sentence; empty if they can.

    Raises:
        ValueError: the data set puts a patient into two folds.
    """
    labelled = [case for case in cases if case.get("label") and case.get("partition") != TEST]
    return too_few_patients(_patients(labelled)) if labelled and not _own_folds(labelled) else ""


def _labelled(cases: Sequence[Item]) -> Sequence[Item]:
    """The cases that are divided into folds: those with a label, or all if none has one."""
    return [case for case in cases if case.get("label")] or cases


def _own_folds(cases: Iterable[Item]) -> list[list[str]]:
    """The patients of each fold that the data set gives itself; [] if it gives none.

    Raises:
        ValueError: a patient is in two folds.
    """
    fold_by_patient: dict[str, int] = {}
    for case in cases:
        if case.get("fold") is not None:
            patient = nfc(str(case["patient_id"]))
            fold = fold_by_patient.setdefault(patient, case["fold"])
            if fold != case["fold"]:
                raise ValueError(
                    f"The data set puts patient {patient} into the folds {fold} and {case['fold']}. Put all cases of a "
                    "patient into one fold."
                )
    count = max(fold_by_patient.values(), default=-1) + 1
    return [sorted(patient for patient, own in fold_by_patient.items() if own == fold) for fold in range(count)]


def _patients(cases: Iterable[Item]) -> set[str]:
    return {nfc(str(case["patient_id"])) for case in cases}


def chosen_cases(split: Sequence[list[Item]], which: str) -> list[Item]:
    """The training or the validation cases of a split, or all.

    Args:
        split: training and validation cases, see ``fold_split``.
        which: ``training``, ``validation`` or ``all``.

    Raises:
        ValueError: ``which`` is unknown, or there are no such cases.
    """
    if which not in CASES:
        raise ValueError(f"Unknown cases {which!r}: choose one of {', '.join(CASES)}.")
    cases = [case for name, part in zip(CASES, split, strict=False) for case in part if which in (name, "all")]
    if not cases and any(split):
        raise ValueError(f"The split has no {which} cases. {ADVICE[which]}")
    return cases


def _read_splits(path: Path) -> list[list[str]]:
    expected = 'Expected JSON such as {"seed": 0, "folds": [["patient 1"], ["patient 2"]]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"The split file {path} cannot be read ({error}). {expected}.") from error
    folds = content.get("folds") if isinstance(content, dict) else None
    if not isinstance(folds, list) or not folds or not all(isinstance(part, list) for part in folds):
        raise ValueError(f"The split file {path} has no list 'folds' of lists of patient ids. {expected}.")
    return [[nfc(str(patient)) for patient in part] for part in folds]


def _check_patients(splits: list[list[str]], patients: set[str], known: set[str], path: Path) -> None:
    """Raise ValueError if the folds do not list every patient exactly once, or list others than the known ones."""
    folds_by_patient: dict[str, list[int]] = {}
    for fold, part in enumerate(splits):
        for patient in part:
            folds_by_patient.setdefault(patient, []).append(fold)
    repeated = [
        f"{patient} (folds {', '.join(map(str, folds))})"
        for patient, folds in sorted(folds_by_patient.items())
        if len(folds) > 1
    ]
    if repeated:
        raise ValueError(f"The split file {path} lists patients more than once: {', '.join(repeated)}. Keep one each.")
    without_case = sorted(set(folds_by_patient) - known)
    if without_case:
        raise ValueError(
            f"The split file {path} lists patients without a case on disk: {', '.join(without_case)}. "
            "Restore their data, or remove them from the file."
        )
    unlisted = sorted(patients - set(folds_by_patient))
    if unlisted:
        raise ValueError(
            f"The split file {path} does not list these patients on disk: {', '.join(unlisted)}. "
            "Add each to one fold, or delete the file to create new folds."
        )
