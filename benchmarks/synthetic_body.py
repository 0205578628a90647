# SPDX-License-Identifier: Apache-2.0
"""A synthetic body of any size in CT, PET and MR on one grid, to time inference on.

It is seeded and has the noise of real scanners, because noise decides how well a file compresses and so how long it
takes to read. It has no anatomy: see ``scripts.data.cohorts.phantom`` for images to learn from.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom

from scripts.utils.atomic_files import atomic_file, write_text

Array = NDArray[Any]
FORMAT = 1  # increase it when the same seed gives other voxels
GZIP_LEVEL = 6  # the default of gzip and of the usual converters
COUNTS = 40.0  # Poisson counts per SUV and voxel
Draw = Callable[[np.random.Generator, Array, Array], Array]


def _smooth_field(rng: np.random.Generator, shape: Sequence[int], cell: int = 16) -> Array:
    """A random field of mean 0 and standard deviation 1, with a correlation length of about ``cell`` voxels."""
    coarse = rng.normal(size=[size // cell + 3 for size in shape]).astype(np.float32)
    field = zoom(coarse, [size / (cells - 1) for size, cells in zip(shape, coarse.shape, strict=True)], order=1)
    field = field[tuple(slice(size) for size in shape)]
    return (field - field.mean()) / field.std()


def _body_mask(shape: Sequence[int]) -> Array:
    """The voxels of an ellipsoid that fills most of the field of view."""
    axes = [((np.arange(size) - (size - 1) / 2) / (0.45 * size)) ** 2 for size in shape]
    return axes[0][:, None, None] + axes[1][:, None] + axes[2] < 1  # type: ignore[no-any-return]


def _draw_ct(rng: np.random.Generator, body: Array, tissue: Array) -> Array:
    """CT in HU: soft tissue, fat and some bone in air, with noise; int16."""
    inside = np.where(tissue > 1.8, 700, np.where(tissue < -0.7, -100, 40 + 12 * tissue))
    noisy = np.where(body, inside, -1000) + rng.normal(0, 15, body.shape).astype(np.float32)
    return np.clip(np.rint(noisy), -1024, 3071).astype(np.int16)


def _draw_pet(rng: np.random.Generator, body: Array, tissue: Array) -> Array:
    """PET in SUV: some hot spots, Poisson noise, scaled as reconstruction scales it; float32."""
    uptake = np.where(body, np.where(tissue > 2.2, 7.0, np.exp(0.4 * tissue)), 0.01)
    gain = 1 + 0.05 * _smooth_field(rng, body.shape, 32)
    return (rng.poisson(uptake * COUNTS) / COUNTS * gain).astype(np.float32)


def _draw_mr(rng: np.random.Generator, body: Array, tissue: Array) -> Array:
    """MR in arbitrary units: Rician noise and a bias field; int16."""
    signal = np.where(body, 450 + 150 * tissue, 0) * np.exp(0.08 * _smooth_field(rng, body.shape, 64))
    noise = rng.normal(0, 25, (2, *body.shape)).astype(np.float32)
    return np.rint(np.hypot(np.maximum(signal, 0) + noise[0], noise[1])).astype(np.int16)


_DRAW: dict[str, Draw] = {"ct": _draw_ct, "pet": _draw_pet, "mr": _draw_mr}
MODALITIES = tuple(_DRAW)


def synthetic_volume(shape: Sequence[int], modality: str, seed: int = 0) -> Array:
    """The voxels of one modality. The tissue is the same in all modalities, the noise is not."""
    tissue = _smooth_field(np.random.default_rng([seed, *shape]), shape)
    rng = np.random.default_rng([seed, *shape, 1 + MODALITIES.index(modality)])
    return _DRAW[modality](rng, _body_mask(shape), tissue)


def write_case(folder: Path, shape: Sequence[int], seed: int = 0) -> dict[str, str]:
    """Write a case with voxels of 1 mm as ``<modality>.nii.gz``. Files of the same shape and seed are kept.

    Returns:
        The item of the case for a data list.
    """
    files = {modality: folder / f"{modality}.nii.gz" for modality in MODALITIES}
    record = folder / "volume.json"
    content = json.dumps({"format": FORMAT, "shape": list(shape), "seed": seed})
    if not record.is_file() or record.read_text(encoding="utf-8") != content:
        folder.mkdir(parents=True, exist_ok=True)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # axes as in files that come from DICOM
        for modality, path in files.items():
            _write(nib.Nifti1Image(synthetic_volume(shape, modality, seed), affine), path)
        write_text(content, record)
    name = "x".join(map(str, shape))
    return {"case_id": name, "image": str(files["ct"]), **{key: str(path) for key, path in files.items()}}


def _write(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image without name and time in the gzip header: the same voxels give the same bytes."""
    image.set_qform(image.affine, code="scanner")
    with atomic_file(path) as file:
        file.write(gzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0))
