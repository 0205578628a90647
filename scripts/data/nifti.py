# SPDX-License-Identifier: Apache-2.0
"""NIfTI files in and out: read in parallel and without reordering voxels, written atomically.

Compressed files go through isal (Intel's storage library) where it is installed, Python's own zlib otherwise: the same
bytes come out of either, and both compare the checksum and the length at the end of the stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged, SaveImaged

from scripts.files import atomic_file

COMPRESSION = 1  # masks shrink a hundredfold at the lowest level already
READABLE = (np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64)  # what torch and SimpleITK both know


def gzip_module() -> ModuleType:
    """The fastest module that is installed, with ``compress`` and ``decompress``."""
    try:
        from isal import igzip
    except ImportError:
        import gzip

        return gzip
    return igzip  # type: ignore[no-any-return]


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes, decompressed where its name ends in .gz.

    Raises:
        ValueError: the gzip stream is cut off or damaged.
    """
    data = Path(path).read_bytes()
    if not str(path).endswith(".gz"):
        return data
    module = gzip_module()
    try:
        return module.decompress(data)  # type: ignore[no-any-return]
    except (EOFError, OSError, zlib.error, ValueError, getattr(module, "error", zlib.error)) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): copy or download it again.") from error


def read_nifti(path: str | Path) -> MetaTensor:
    """A NIfTI file as ``1 H W D`` in the file's own type, with slope and intercept applied.

    The voxels stay in the file's order (first axis fastest), so that the tensor is a view with such strides.

    Args:
        path: .nii or .nii.gz.

    Raises:
        ValueError: a damaged file, or one that is no NIfTI file.
    """
    data = read_bytes(path)
    kind = (
        nib.Nifti2Image if 540 in {int.from_bytes(data[:4], order) for order in ("little", "big")} else nib.Nifti1Image
    )
    try:
        image = kind.from_bytes(data)
        stored: Any = image.dataobj
        scaled = stored.slope != 1 or stored.inter != 0
        voxels = np.asanyarray(stored) if scaled else stored.get_unscaled()
        if scaled or voxels.dtype.newbyteorder("=") not in READABLE:
            voxels = voxels.astype(np.float32, order="K")
    except Exception as error:  # bytes that are no such file make the reader fail in many ways
        raise ValueError(f"{path} is no readable NIfTI file ({error}).") from error
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), order="K", copy=False)
    affine = np.asarray(image.affine, dtype=np.float64)
    meta = {
        "filename_or_obj": str(path),
        "original_affine": affine,
        "spatial_shape": np.array(voxels.shape),
        "original_channel_dim": float("nan"),
        "space": "RAS",
    }
    return MetaTensor(_tensor(voxels)[None], affine=torch.as_tensor(affine), meta=meta)


def _tensor(voxels: np.ndarray) -> torch.Tensor:
    """A view of the voxels; a copy where the array is read-only."""
    ordered = voxels.T  # first axis fastest, as files are: contiguous now
    ordered = ordered if ordered.flags.writeable else ordered.copy()
    return torch.from_numpy(ordered).permute(*reversed(range(voxels.ndim)))


def write_nifti(voxels: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """Write a volume by ``scripts.files.atomic_file``; the same voxels give the same bytes.

    Args:
        voxels: ``H W D``.
        affine: voxel to world in mm, RAS.
        path: .nii or .nii.gz.
    """
    path = Path(path)
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip_module().compress(data, COMPRESSION, mtime=0)
    with atomic_file(path) as file:
        file.write(data)


class LoadModalitiesd(LoadImaged):
    """MONAI's ``LoadImaged`` with the NIfTI files of one case read at the same time, by ``read_nifti``.

    Anything else (DICOM folders, .mha, 4D files) goes MONAI's own way afterwards: ITK's Python modules change the
    working directory while they load themselves, which other threads must not see.
    """

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        item = dict(data)
        keys = [key for key in self.key_iterator(item) if not isinstance(item[key], torch.Tensor)]
        quick = [key for key in keys if str(item[key]).endswith((".nii", ".nii.gz"))]
        with ThreadPoolExecutor(max(1, len(quick))) as pool:
            volumes = dict(zip(quick, pool.map(read_nifti, [item[key] for key in quick]), strict=True))
        for key in keys:
            volume = volumes.get(key)
            item[key] = volume if volume is not None and volume.ndim == 4 else self._loader(item[key])
        return item


class SaveMaskd(SaveImaged):
    """MONAI's ``SaveImaged`` for masks: written at once or not at all, as uint8, named after the case.

    Args:
        key: of the mask, ``1 H W D``, whose metadata name the case and hold the affine.
        output_dir: folder of ``<case_id>.nii.gz``.
    """

    def __init__(self, key: str, output_dir: str) -> None:
        super().__init__(key, output_dir=output_dir, output_ext=".nii.gz", print_log=False)
        self.folder = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        mask = data[self.keys[0]]
        name = mask.meta.get("case_id") or Path(str(mask.meta.get("filename_or_obj", "mask"))).name.split(".")[0]
        write_nifti(mask[0].to(torch.uint8).numpy(), np.asarray(mask.affine), self.folder / f"{name}.nii.gz")
        return dict(data)
