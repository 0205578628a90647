# SPDX-License-Identifier: Apache-2.0
"""Answers of the study's teachers: one small file per pair of folds, kept with the results.

A file holds, for each patient, the logit of the tumour's mean probability over both teachers and all flips, on the
network's grid. Logits are rounded to 0.1 and clipped to +-12.7, so that they fit in a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy.special import expit, logit

from scripts.data import preprocessing
from scripts.data.case_io import SaveMaskd
from scripts.data.resampling import RestoreGridd
from scripts.utils.atomic_files import atomic_file

STEP, LIMIT = 0.1, 127
Array = np.ndarray[Any, Any]


def tumour_logit(logits: torch.Tensor) -> Array:
    """The logit of the second of two classes, from logits ``2 H W D``."""
    return (logits[1].float() - logits[0].float()).numpy()


def mean_logit(logits: Sequence[Array]) -> Array:
    """The logit of the mean probability of several answers on one grid, within what an answer file can hold."""
    mean = np.mean([expit(np.float64(each)) for each in logits], axis=0)
    return np.clip(logit(mean), -STEP * LIMIT, STEP * LIMIT)


def write_answers(path: Path, answers: Mapping[str, tuple[Array, Array]]) -> None:
    """Write an answer file.

    Args:
        path: file to write.
        answers: case -> logits (H W D) and the affine (4 x 4, mm) of their grid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Array] = {}
    for case, (logits, affine) in answers.items():
        arrays[f"{case}/logit"] = np.clip(np.rint(logits / STEP), -LIMIT, LIMIT).astype(np.int8)
        arrays[f"{case}/affine"] = np.asarray(affine, dtype=np.float64)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_answer(path: Path, case: str) -> tuple[Array, Array]:
    """A case's logits (H W D) and the affine of their grid."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[f"{case}/logit"].astype(np.float32) * STEP, arrays[f"{case}/affine"]


def write_predictions(folder: Path, answers: Mapping[str, Sequence[Path]]) -> None:
    """Write the mean answers as ``<case>.nii.gz``, as ``cache-teachers --predictions`` reads them.

    They are probabilities (H W D 2): the logits of a poor teacher may all lie between 0 and 1, which is refused.

    Args:
        folder: folder of the files.
        answers: case -> the answer files whose mean probability it gets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for case, paths in answers.items():
        read = [read_answer(path, case) for path in paths]
        tumour = mean_logit([logits for logits, _ in read])
        probabilities = np.stack([expit(-tumour), expit(tumour)], axis=-1).astype(np.float32)
        image = nib.Nifti1Image(probabilities, read[0][1])
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / f"{case}.nii.gz")


def write_masks(folder: Path, cases: Iterable[tuple[Mapping[str, Any], Array]], settings: Mapping[str, Any]) -> None:
    """Write the masks of some answers on the cases' own grids.

    Args:
        folder: folder of the masks.
        cases: case of the data list, and its logits (H W D).
        settings: ``modalities``, ``intensity``, ``spacing`` and ``naming``, which decide on the networks' grid.
    """
    pipeline = preprocessing(mode="infer", **settings)
    restore, save = RestoreGridd("pred", "image"), SaveMaskd("pred", str(folder))
    for case, logits in cases:
        tumour = torch.as_tensor(np.asarray(logits, dtype=np.float32))
        save(restore({**pipeline(dict(case)), "pred": torch.stack([torch.zeros_like(tumour), tumour])}))


def without_padding(volume: Array, shape: Sequence[int]) -> Array:
    """Cut off what MONAI's ``SpatialPadd`` added around a volume of ``shape``."""
    starts = [(padded - size) // 2 for padded, size in zip(volume.shape, shape, strict=True)]
    return volume[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]
