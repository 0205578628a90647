# SPDX-License-Identifier: Apache-2.0
"""NIfTI files in and out: read whole or refused, without reordering voxels; written atomically.

Compressed files go through isal (Intel's storage library) where it is installed, Python's own zlib otherwise: the same
bytes come out of either, and both compare the checksum and the length at the end of the stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from scripts.image_io.headers import Header, read_header
from scripts.utils.atomic_files import write_bytes

COMPRESSION = 1  # masks shrink a hundredfold at the lowest level already
READABLE = (np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64)  # what torch and SimpleITK both know


def gzip_modules() -> tuple[ModuleType, ModuleType]:
    """The fastest modules that are installed: with ``decompressobj``, and with ``compress``."""
    try:
        from isal import igzip, isal_zlib
    except ImportError:
        import gzip

        return zlib, gzip
    return isal_zlib, igzip


def read_bytes(path: str | Path, most: int = 2**62) -> bytes:
    """A file's bytes, unpacked where its name ends in .gz; never more than ``most`` and one.

    Raises:
        ValueError: the gzip stream is cut off or damaged.
    """
    data = Path(path).read_bytes()
    if not str(path).endswith(".gz"):
        return data
    parts: list[bytes] = []
    at, left, module = 0, most + 1, gzip_modules()[0]
    try:
        while at < len(data) and data[at] and left > 0:  # a stream may have several members, and zeros behind them
            member, at = _member(data, at, left, module)
            left -= sum(map(len, member))
            parts += member
        if left > 0 and data[at:].strip(b"\0"):
            raise ValueError("something else follows its end")
    except (EOFError, OSError, zlib.error, ValueError, getattr(module, "error", zlib.error)) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): copy or download it again.") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _member(data: bytes, start: int, most: int, module: ModuleType) -> tuple[list[bytes], int]:
    """One member of a gzip stream, at most ``most`` bytes of it, and where the next one begins.

    What a decompressor is given behind its member's end it copies, so only the first is given all of the file: copies
    of the rest for each of a million empty members would take hours.
    """
    stream, parts = module.decompressobj(wbits=31), []
    at, step = start, len(data) if start == 0 else 1 << 8
    while not stream.eof and most > 0:
        if at >= len(data):
            raise EOFError("the stream has no end")
        parts.append(stream.decompress(data[at : at + step], most))
        most -= len(parts[-1])
        at, step = min(at + step, len(data)), 2 * step
    return [part for part in parts if part], at - len(stream.unused_data)


def read_nifti(path: str | Path, header: Header | None = None) -> MetaTensor:
    """A NIfTI file as ``1 H W D`` in the file's own type, with slope and intercept applied.

    The voxels stay in the file's order (first axis fastest), so that the tensor is a view with such strides. A 4D file
    becomes ``1 H W D N``.

    Args:
        path: .nii or .nii.gz.
        header: the file's, where it has been read already.

    Raises:
        ValueError: a damaged file, one that is no NIfTI file, or one that holds less or more than its header says.
        MemoryError: there is not enough for it.
    """
    header = header or read_header(path)
    data = read_bytes(path, header.end or 0)
    if len(data) != header.end:
        less = "less" if len(data) < (header.end or 0) else "more"
        raise ValueError(f"{path} holds {less} than the {header.voxels} voxels that it claims: copy it again.")
    kind = (
        nib.Nifti2Image if 540 in {int.from_bytes(data[:4], order) for order in ("little", "big")} else nib.Nifti1Image
    )
    try:
        stored: Any = kind.from_bytes(data).dataobj
        scaled = stored.slope != 1 or stored.inter != 0
        voxels = np.asanyarray(stored) if scaled else stored.get_unscaled()
        if scaled or voxels.dtype.newbyteorder("=") not in READABLE:
            voxels = voxels.astype(np.float32, order="K")
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no such file make the reader fail in many ways
        why = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is no readable NIfTI file ({why}): copy or convert it again.") from error
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), order="K", copy=False).reshape(header.shape, order="F")
    return located(_tensor(voxels), header)


def located(volume: torch.Tensor, header: Header) -> MetaTensor:
    """A volume ``H W D [N]`` as ``1 H W D [N]`` with the metadata that MONAI's reader gives."""
    meta = {
        "filename_or_obj": header.path,
        "original_affine": header.affine,
        "spatial_shape": np.array(header.shape),
        "original_channel_dim": float("nan"),
        "space": "RAS",
    }
    return MetaTensor(volume[None], affine=torch.as_tensor(header.affine), meta=meta)


def _tensor(voxels: np.ndarray) -> torch.Tensor:
    """A view of the voxels; a copy where the array is read-only."""
    ordered = voxels.T  # first axis fastest, as files are: contiguous now
    ordered = ordered if ordered.flags.writeable else ordered.copy()
    return torch.from_numpy(ordered).permute(*reversed(range(voxels.ndim)))


def write_nifti(voxels: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """Write a volume by ``scripts.utils.atomic_files.write_bytes``; the same voxels give the same bytes.

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
        data = gzip_modules()[1].compress(data, COMPRESSION, mtime=0)
    write_bytes(data, path)


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
