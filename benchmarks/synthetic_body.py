# SPDX-License-Identifier: Apache-2.0
"""A body of any size in CT, PET and MR on one grid, to time inference on: seeded, with the noise of real scanners.

Noise decides how well a file compresses, and so how long it takes to read. Nothing here is anatomy: see
``scripts.data.cohorts.phantom`` for images to learn from.
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
FORMAT = 1  # raised when the same seed gives other voxels
GZIP_LEVEL = 6  # gzip's own, and that of the usual converters
COUNTS = 40.0  # Poisson counts per SUV and voxel
Draw = Callable[[np.random.Generator, Array, Array], Array]


def _smooth(rng: np.random.Generator, shape: Sequence[int], cell: int = 16) -> Array:
    """A random field of mean 0 and standard deviation 1 that varies over some ``cell`` voxels."""
    coarse = rng.normal(size=[size // cell + 3 for size in shape]).astype(np.float32)
    field = zoom(coarse, [size / (cells - 1) for size, cells in zip(shape, coarse.shape, strict=True)], order=1)
    field = field[tuple(slice(size) for size in shape)]
    return (field - field.mean()) / field.std()


def _body(shape: Sequence[int]) -> Array:
    """Whether a voxel lies in the ellipsoid that fills most of the field of view."""
    axes = [((np.arange(size) - (size - 1) / 2) / (0.45 * size)) ** 2 for size in shape]
    return axes[0][:, None, None] + axes[1][:, None] + axes[2] < 1  # type: ignore[no-any-return]


def _ct(rng: np.random.Generator, body: Array, tissue: Array) -> Array:
    """HU: soft tissue, fat and some bone in air, with noise."""
    inside = np.where(tissue > 1.8, 700, np.where(tissue < -0.7, -100, 40 + 12 * tissue))
    noisy = np.where(body, inside, -1000) + rng.normal(0, 15, body.shape).astype(np.float32)
    return np.clip(np.rint(noisy), -1024, 3071).astype(np.int16)


def _pet(rng: np.random.Generator, body: Array, tissue: Array) -> Array:
    """SUV: some hot spots, Poisson noise, scaled as reconstruction scales it; float32."""
    uptake = np.where(body, np.where(tissue > 2.2, 7.0, np.exp(0.4 * tissue)), 0.01)
    gain = 1 + 0.05 * _smooth(rng, body.shape, 32)
    return (rng.poisson(uptake * COUNTS) / COUNTS * gain).astype(np.float32)


def _mr(rng: np.random.Generator, body: Array, tissue: Array) -> Array:
    """Arbitrary units: Rician noise over a bias field."""
    signal = np.where(body, 450 + 150 * tissue, 0) * np.exp(0.08 * _smooth(rng, body.shape, 64))
    noise = rng.normal(0, 25, (2, *body.shape)).astype(np.float32)
    return np.rint(np.hypot(np.maximum(signal, 0) + noise[0], noise[1])).astype(np.int16)


DRAWN: dict[str, Draw] = {"ct": _ct, "pet": _pet, "mr": _mr}


def make_volume(shape: Sequence[int], modality: str, seed: int = 0) -> Array:
    """One modality's voxels; the tissue is the same in all, the noise is each one's own."""
    tissue = _smooth(np.random.default_rng([seed, *shape]), shape)
    rng = np.random.default_rng([seed, *shape, 1 + list(DRAWN).index(modality)])
    return DRAWN[modality](rng, _body(shape), tissue)


def write_case(folder: Path, shape: Sequence[int], seed: int = 0) -> dict[str, str]:
    """Write a case of 1 mm voxels as ``<modality>.nii.gz`` and return its data list's item; what is there is kept."""
    files = {modality: folder / f"{modality}.nii.gz" for modality in DRAWN}
    claim, told = folder / "volume.json", json.dumps({"format": FORMAT, "shape": list(shape), "seed": seed})
    if not claim.is_file() or claim.read_text(encoding="utf-8") != told:
        folder.mkdir(parents=True, exist_ok=True)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # axes as in files that come from DICOM
        for modality, path in files.items():
            _write(nib.Nifti1Image(make_volume(shape, modality, seed), affine), path)
        write_text(told, claim)
    name = "x".join(map(str, shape))
    return {"case_id": name, "image": str(files["ct"]), **{key: str(path) for key, path in files.items()}}


def _write(image: nib.Nifti1Image, path: Path) -> None:
    """The same bytes for the same voxels: no name and no time in the gzip header."""
    image.set_qform(image.affine, code="scanner")
    with atomic_file(path) as file:
        file.write(gzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0))
