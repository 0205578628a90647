# SPDX-License-Identifier: Apache-2.0
"""What a teacher of a cache is, without building it: what its manifest says, and what each answer was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.case_list import source_files
from scripts.networks.teacher_spec import join_checksums, spec_files, teacher_identity
from scripts.utils.checksums import sha256
from scripts.utils.file_names import nfc
from scripts.utils.task_file import case_ids, read_task, seen_ids, task_path

ENDINGS = (".npz", ".nii.gz", ".nii", ".mha", ".nrrd")  # of predictions
NAMES_SHOWN = 5  # cases that a sentence names
Case = Mapping[str, Any]


def origin_of(name: str, spec: Mapping[str, Any], out_of_fold: bool = False) -> Origin:
    """The origin of a teacher.

    Args:
        name: of the teacher, for errors.
        spec: its specification, which ``scripts.networks.teacher_spec.check_spec`` has checked.
        out_of_fold: see ``OutOfFold``.
    """
    if spec.get("predictions"):
        return PredictionFiles(name, spec)
    if spec.get("nnunet") and out_of_fold:
        raise ValueError(
            f"The nnU-Net of the teacher {name} cannot answer out of fold here. Use the probabilities of its own "
            "cross-validation, by --predictions."
        )
    if spec.get("nnunet"):
        return NNUNetFolder(name, spec)
    return OutOfFold(name, spec) if out_of_fold else Origin(spec)


class Origin:
    """A teacher that answers every case by the same weights.

    Args:
        spec: its specification.

    Attributes:
        identity: its architecture, bundle or network class, its modalities, and its own settings.
        sha256: checksum of its weights; None for random weights.
        ingredients: the files that ``sources`` describes, in words.
    """

    ingredients = "image files"

    def __init__(self, spec: Mapping[str, Any] | None = None) -> None:
        spec = spec or {}
        self.identity: dict[str, Any] = teacher_identity(spec)
        self.digests = [sha256(file) for file in spec_files(spec)]
        self.sha256 = join_checksums(self.digests)

    def require_answers(self, cases: Sequence[Case]) -> None:
        """Raise an error that names all cases that this teacher cannot answer."""

    def members(self, case: Case) -> list[int]:
        """The indices of the networks that answer a case."""
        return [0]

    def sources(self, case: Case, checksums: bool = True) -> dict[str, Any]:
        """What an answer is made of; see ``source_fingerprint`` for the arguments."""
        return source_fingerprint(case, checksums)


class OutOfFold(Origin):
    """A teacher whose networks were trained on different folds: each answers the cases that did not train it.

    A network counts as trained on a case if its ``model.task.json`` lists the case or another one of its patient.

    Args:
        name: of the teacher, for errors.
        spec: its specification, with the weights of every fold.

    Raises:
        ValueError: there are no weights, or weights without a list of training cases.
    """

    ingredients = "image files or the out-of-fold weights"

    def __init__(self, name: str, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self.name, self.identity["out_of_fold"] = name, True
        self.seen = [_training_ids(name, file) for file in spec_files(spec)]
        if not self.seen:
            raise ValueError(f"The teacher {name} has random weights, which no fold trained. Remove --out-of-fold.")

    def require_answers(self, cases: Sequence[Case]) -> None:
        """Raise a ValueError that names all cases that every network was trained on."""
        seen = [str(case["case_id"]) for case in cases if not self.members(case)]
        if seen:
            more = f" and {len(seen) - NAMES_SHOWN} more" if len(seen) > NAMES_SHOWN else ""
            raise ValueError(
                f"Every network of the teacher {self.name} was trained on {', '.join(seen[:NAMES_SHOWN])}{more}. Add "
                "the run of a fold that left them out, or leave these cases out."
            )

    def members(self, case: Case) -> list[int]:
        """The indices of the networks that were not trained on a case."""
        return [index for index, seen in enumerate(self.seen) if not case_ids(case) & seen]

    def sources(self, case: Case, checksums: bool = True) -> dict[str, Any]:
        """As for every teacher, and the checksums of the weights that answer the case."""
        return {**super().sources(case, checksums), "weights_sha256": [self.digests[i] for i in self.members(case)]}


def _training_ids(name: str, weights: str) -> set[tuple[str, str]]:
    """The cases and patients that weights were trained on, and those of the networks that they learned from."""
    record = read_task(weights) or {}
    if not record.get("training_cases"):
        raise ValueError(
            f"The teacher {name} cannot answer out of fold: {task_path(weights)}, which lists the training cases of "
            "its weights, is missing or lists none. Train it with this program, or remove --out-of-fold."
        )
    return seen_ids(record)


class PredictionFiles(Origin):
    """A teacher whose predictions lie in a folder, ``CASE`` with one of ``ENDINGS``; the first of them counts.

    Args:
        name: of the teacher, for errors.
        spec: its specification, with the folder as ``predictions``.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    ingredients = "image files or the prediction"

    def __init__(self, name: str, spec: Mapping[str, Any]) -> None:
        super().__init__({**spec, "architecture": "predictions"})
        self.name, self.folder = name, Path(spec["predictions"])
        if not self.folder.is_dir():
            raise FileNotFoundError(f"No folder of predictions at {self.folder}. Check the teacher {name}.")
        self.files = {nfc(path.name): path for path in sorted(self.folder.iterdir()) if path.is_file()}

    def path(self, case: Case) -> Path:
        """The file of a case."""
        return next(self._candidates(case))

    def _candidates(self, case: Case) -> Iterator[Path]:
        names = (f"{nfc(str(case['case_id']))}{ending}" for ending in ENDINGS)
        return (self.files[name] for name in names if name in self.files)

    def mask_beside(self, path: Path) -> Path | None:
        """The mask that nnU-Net wrote beside its probabilities."""
        names = (f"{nfc(path.stem)}{ending}" for ending in ENDINGS[1:])
        return next((self.files[name] for name in names if name in self.files), None)

    def require_answers(self, cases: Sequence[Case]) -> None:
        """Raise a FileNotFoundError that names all cases without a file."""
        missing = [str(case["case_id"]) for case in cases if next(self._candidates(case), None) is None]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} lacks the predictions of {len(missing)} of {len(cases)} cases: {', '.join(missing)}. "
                f"Name the files such as {missing[0]}.npz or {missing[0]}.nii.gz."
            )

    def sources(self, case: Case, checksums: bool = True) -> dict[str, Any]:
        """As for every teacher, and the prediction's size and checksum."""
        self.require_answers([case])
        prediction = {**case, "prediction": str(self.path(case))}
        return source_fingerprint(prediction, checksums)


class NNUNetFolder(Origin):
    """A teacher that is a trained nnU-Net: the folder of its ``plans.json``, with ``fold_N/checkpoint_final.pth``.

    Args:
        name: of the teacher, for errors.
        spec: its specification, with the folder as ``nnunet``, and ``folds`` to use; by default all that are there.

    Raises:
        FileNotFoundError: a checkpoint is missing.
    """

    def __init__(self, name: str, spec: Mapping[str, Any]) -> None:
        self.name, self.folder = name, Path(spec["nnunet"])
        found = sorted(path.parent.name[len("fold_") :] for path in self.folder.glob("fold_*/checkpoint_final.pth"))
        folds = [str(fold) for fold in spec.get("folds") or found]
        missing = [fold for fold in folds if fold not in found]
        if missing or not folds:
            which = f"fold_{missing[0]}" if missing else "fold_0"
            raise FileNotFoundError(
                f"No checkpoint at {self.folder / which / 'checkpoint_final.pth'}. Give the folder of a finished "
                f"nnU-Net training for the teacher {name}, and its folds."
            )
        self.paths = [self.folder / f"fold_{fold}" / "checkpoint_final.pth" for fold in folds]
        weights = [str(path) for path in self.paths]
        super().__init__({"architecture": "nnunet", "modalities": spec["modalities"], "weights": weights})


def source_fingerprint(case: Case, checksums: bool = True) -> dict[str, Any]:
    """Return what identifies a case's images: size and checksum of every file, and values such as ``bbox_mm``.

    Args:
        case: item of a data list.
        checksums: include the files' checksums, which means reading them.
    """
    files = {key: path for key, path in source_files(case).items() if key != "label"}
    fingerprint: dict[str, Any] = {f"{key} bytes": path.stat().st_size for key, path in files.items()}
    if checksums:
        fingerprint |= {f"{key} sha256": sha256(path) for key, path in files.items()}
    others = {key: value for key, value in case.items() if not isinstance(value, str)}
    return {**fingerprint, **json.loads(json.dumps(others, sort_keys=True, default=str))}
