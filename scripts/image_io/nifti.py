# SPDX-License-Identifier: Apache-2.0
"""Read and write NIfTI files: a file is read completely or refused, and written atomically.

Compressed files go through isal (Intel's storage library) if it is installed, else through Python's own gzip. Both
verify the checksum and the length at the end of the stream.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from scripts.image_io.header_reader import nifti_header_size, read_header
from scripts.image_io.headers import VOXEL_TYPES, Header, short_message
from scripts.utils.atomic_files import write_bytes

COMPRESSION = 1  # the lowest level already makes masks a hundred times smaller


def gzip_module() -> ModuleType:
    """``isal.igzip`` if it is installed, else the standard library's ``gzip``, which has the same functions."""
    try:
        from isal import igzip
    except ImportError:
        return gzip
    return igzip  # type: ignore[no-any-return]


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """Read a file, and unpack it if its name ends in .gz.

    Args:
        path: the file.
        limit: return at most ``limit + 1`` bytes, so that a small file cannot unpack to any size. One byte more than
            the limit shows that the file is too long.

    Raises:
        ValueError: the gzip stream is truncated or damaged, or followed by anything but zeros.
    """
    size = -1 if limit is None else limit + 1
    if not str(path).lower().endswith(".gz"):
        with open(path, "rb") as file:
            return file.read(size)
    module = gzip_module()
    deflate_error = getattr(module, "isal_zlib", zlib).error
    try:
        with module.open(path) as stream:
            return stream.read(size)  # type: ignore[no-any-return]
    except (EOFError, gzip.BadGzipFile, deflate_error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Copy or download it again.") from error


def read_nifti(path: str | Path, header: Header | None = None) -> NDArray:
    """Read a NIfTI file as ``H W D [N]`` in the file's own type, with slope and intercept applied.

    The voxels stay in the file's order: the first axis is the fastest. The array may be written to.

    Args:
        path: .nii or .nii.gz.
        header: the file's header, if it has been read already.

    Raises:
        ValueError: the file is damaged, not a NIfTI file, or contains fewer or more bytes than its header states.
        MemoryError: not enough memory.
    """
    header = header or read_header(path)
    data = read_bytes(path, header.end or 0)
    if len(data) != header.end:
        amount = "fewer" if len(data) < (header.end or 0) else "more"
        raise ValueError(f"{path} contains {amount} than the {header.voxels} voxels in its header. Copy it again.")
    image_class = nib.Nifti2Image if nifti_header_size(data) == 540 else nib.Nifti1Image
    try:
        stored: Any = image_class.from_bytes(data).dataobj
        scaled = stored.slope != 1 or stored.inter != 0
        voxels = np.asanyarray(stored) if scaled else stored.get_unscaled()
        if scaled or voxels.dtype.newbyteorder("=") not in VOXEL_TYPES:
            voxels = voxels.astype(np.float32, order="K")
    except MemoryError:
        raise
    except Exception as error:  # nibabel raises many exception types on damaged bytes
        raise ValueError(
            f"{path} is not a readable NIfTI file ({short_message(error)}). Copy or convert it again."
        ) from error
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), order="K", copy=False).reshape(header.shape, order="F")
    return voxels if voxels.flags.writeable else voxels.copy(order="K")


def write_nifti(voxels: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """Write a volume atomically; the same voxels give the same bytes.

    Args:
        voxels: ``H W D``.
        affine: voxel to world in mm, RAS.
        path: .nii or .nii.gz.
    """
    path = Path(path)
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip_module().compress(data, COMPRESSION, mtime=0)
    write_bytes(data, path)


def mask_table(values: Sequence[float] | None) -> NDArray | None:
    """The values of written masks by class index, in the smallest of uint8, int16 and int32 that holds them.

    Returns:
        The values; None where they are the indices, which are written as uint8.

    Raises:
        ValueError: a value is no integer, or does not fit.
    """
    if values is None or list(values) == list(range(len(values))):
        return None
    for value in values:
        if value != int(value) or not -(2**31) <= value < 2**31:
            raise ValueError(
                f'labels has the value {value:g}, which a mask of integers cannot hold. Set mask_values to "index".'
            )
    kinds = (np.uint8, np.int16, np.int32)
    fitting = (kind for kind in kinds if np.iinfo(kind).min <= min(values) and max(values) <= np.iinfo(kind).max)
    return np.array(values).astype(next(fitting))
