# SPDX-License-Identifier: Apache-2.0
"""What the head of an image file says, judged before a voxel is read or memory is asked for."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from scripts.image_io.metaimage import check_metaimage

Affine = NDArray[np.floating[Any]]

MAX_VOXELS = 2**30  # a total-body PET/CT of 512 x 512 x 1000 has a quarter of it
NIFTI, METAIMAGE = (".nii", ".nii.gz"), (".mha",)
HEADER_BYTES = 540  # NIfTI-2; NIfTI-1 has 348 and 4 more
LEAST_OFFSET = {348: 352, 540: 544}
DEFLATE = 1032  # no gzip stream unpacks to more than this many times its size
TURNED = 1e-3  # cosine between two axes, 0 where they are perpendicular
UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's codes; 2 is mm, and everybody takes 0, unknown, as mm
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world axes are LPS


class Header(NamedTuple):
    """An image's grid and type.

    Attributes:
        path: of the file or folder.
        shape: voxels per axis, at least three; axes of length 1 behind them are left out.
        affine: voxel to world in mm, RAS.
        kind: type of the voxels as stored.
        end: bytes of the unpacked file up to the last voxel, where that is known.
        warnings: sentences about what is odd, but usable.
        series: DICOM's series, patient and frame of reference, or nothing.
        slices: DICOM's files, in the order of their positions.
    """

    path: str
    shape: tuple[int, ...]
    affine: Affine
    kind: np.dtype[Any]
    end: int | None = None
    warnings: tuple[str, ...] = ()
    series: tuple[str, str, str] | None = None
    slices: tuple[str, ...] = ()

    @property
    def voxels(self) -> int:
        """Their number, as a Python integer: a header can claim any product."""
        return int(np.prod(self.shape, dtype=object))


def read_header(path: str | Path, max_voxels: int = MAX_VOXELS) -> Header:
    """Read and judge the head of a NIfTI file (.nii, .nii.gz) or a MetaImage (.mha).

    Args:
        path: of the file.
        max_voxels: a file that claims more is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, text, a Git LFS pointer, cut off, another format, RGB or complex voxels, more voxels than
            ``max_voxels``, voxel sizes that are missing or not in mm, or an affine that is singular, sheared or not
            finite.
    """
    name = str(path)
    if name.endswith(NIFTI):
        header = _nifti(Path(path), max_voxels)
    elif name.endswith(METAIMAGE):
        header = _metaimage(Path(path), max_voxels)
    else:
        raise ValueError(f"{path} is of an unknown format: give .nii.gz, .nii, .mha, or a folder of DICOM files.")
    check_affine(header.affine, name)
    return header


def _check_size(path: Path, shape: Sequence[int], least: int, max_voxels: int) -> None:
    """Raise ValueError where a file claims more voxels than the cap, or than its ``least`` bytes could hold."""
    voxels = math.prod(shape)
    if voxels > max_voxels:
        raise ValueError(
            f"{path} claims {' x '.join(map(str, shape))} voxels, more than the cap of {max_voxels}: check the "
            "file, or raise the cap by --max-voxels."
        )
    if os.path.getsize(path) < least:
        raise ValueError(f"{path} is too small for the {voxels} voxels that it claims: copy it again.")


def check_affine(affine: Affine, name: str) -> None:
    """Raise ValueError where an affine is no place of a voxel grid: not finite, singular or sheared."""
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if not lengths.all() or not np.isfinite(lengths).all():
        raise ValueError(f"{name} has an affine or voxel sizes that are zero or not finite: correct its header.")
    cosines = np.abs((axes / lengths).T @ (axes / lengths) - np.eye(3)).max()
    if cosines > 1 - TURNED:
        raise ValueError(f"{name} has a singular affine, two axes in one direction: correct its header.")
    if cosines > TURNED:
        raise ValueError(
            f"{name} has a sheared affine (its axes are {np.degrees(np.arccos(cosines)):.1f} degrees apart, not 90, as "
            "in a CT with a tilted gantry): resample it onto a grid of right angles first."
        )


def _start(path: Path) -> bytes:
    """The first bytes of a file, unpacked.

    Raises:
        ValueError: what is no image at all, by what it is.
    """
    with open(path, "rb") as file:
        raw = file.read(1 << 16)
    if not raw:
        raise ValueError(f"{path} is an empty file: copy or download it again.")
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the image: fetch the image by git lfs pull.")
    packed = raw.startswith(b"\x1f\x8b")
    if path.name.endswith(".gz") and packed:
        try:
            return zlib.decompressobj(wbits=31).decompress(raw, HEADER_BYTES)
        except zlib.error as error:
            raise ValueError(f"{path} is cut off or damaged ({error}): copy or download it again.") from error
    if _is_text(raw) and not raw.startswith(b"ObjectType"):
        raise ValueError(f"{path} is a text file, not an image: copy or download it again.")
    if packed or path.name.endswith(".gz"):
        found = "compressed by gzip" if packed else "not compressed by gzip"
        raise ValueError(f"{path} is {found}, other than its name says: rename it.")
    return raw


def _is_text(raw: bytes) -> bool:
    try:
        text = raw[:512].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _nifti(path: Path, max_voxels: int) -> Header:
    data = _start(path)
    sizes = {int.from_bytes(data[:4], order) for order in ("little", "big")} & set(LEAST_OFFSET)
    size = next(iter(sizes), 0)
    if not size or len(data) < size:
        raise ValueError(f"{path} is no NIfTI file, or is cut off in its header: copy or download it again.")
    kind = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    try:
        header = kind(data[:size], check=False)
        magic, dims = bytes(header["magic"]), [int(n) for n in header["dim"]]
        header.get_slope_inter()
        stored = header.get_data_dtype()
        offset = float(header["vox_offset"])
    except Exception as error:  # a damaged header makes nibabel fail in many ways
        raise ValueError(f"{path} has a damaged NIfTI header ({_brief(error)}): copy or convert it again.") from error
    if not magic.startswith(b"n+"):
        raise ValueError(f"{path} is not a single NIfTI file (its voxels would lie in an .img): convert it to .nii.gz.")
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise ValueError(f"{path} claims {dims[1 : dims[0] + 1]} voxels in {dims[0]} dimensions: correct its header.")
    if not LEAST_OFFSET[size] <= offset <= 2**31:
        raise ValueError(f"{path} says that its voxels begin at byte {offset:g}: correct its header.")
    _check_kind(stored, path)
    shape = _shape(dims[1 : dims[0] + 1])
    end = int(offset) + int(np.prod(shape, dtype=object)) * stored.itemsize
    _check_size(path, shape, end // DEFLATE if path.name.endswith(".gz") else end, max_voxels)
    affine, warnings = _place(header, path, shape)
    return Header(str(path), shape, affine, stored, end, warnings)


def _shape(dims: list[int]) -> tuple[int, ...]:
    while len(dims) > 3 and dims[-1] == 1:
        dims = dims[:-1]
    return tuple(dims + [1] * (3 - len(dims)))


def _check_kind(stored: np.dtype[Any], path: Path) -> None:
    if stored.fields is not None or stored.kind not in "biuf":
        what = "RGB" if stored.fields is not None else "complex" if stored.kind == "c" else str(stored)
        raise ValueError(f"{path} holds {what} voxels: give an image of one number per voxel.")


def _place(header: Any, path: Path, shape: tuple[int, ...]) -> tuple[Affine, tuple[str, ...]]:
    """The affine, by nibabel's rule: sform, else qform, else voxel sizes alone; and what is odd about it."""
    sizes = np.asarray(header["pixdim"][1:4], dtype=float)
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"{path} has voxel sizes of {sizes.tolist()} mm: correct its header.")
    if unit := UNITS.get(int(header["xyzt_units"]) & 7):
        what = f"has a header that says that its voxel sizes are in {unit}"
        raise ValueError(f"{path} {what}: correct its header (xyzt_units), or convert it to mm.")
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except Exception as error:
        raise ValueError(f"{path} has a damaged NIfTI header ({_brief(error)}): correct its qform.") from error
    if sform is None and qform is None:
        return affine, (f"{path} has no place in space (neither sform nor qform): its voxel sizes alone are used",)
    if sform is not None and qform is not None and np.isfinite(sform).all():
        corners = np.array(np.meshgrid(*([0, n - 1] for n in shape[:3]), [1])).reshape(4, -1)
        apart = np.linalg.norm((sform - qform) @ corners, axis=0).max()
        if not apart < 0.1 * sizes.min():
            return affine, (f"{path} has an sform and a qform that are up to {apart:.1f} mm apart: the sform is used",)
    return affine, ()


def _metaimage(path: Path, max_voxels: int) -> Header:
    _start(path)
    voxels = check_metaimage(path)
    _check_size(path, voxels.shape, voxels.size // DEFLATE if voxels.packed else voxels.size, max_voxels)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path} has a damaged MetaImage header: copy or convert it again.") from error
    what = f"{path} has no place in space (no Offset or no TransformMatrix): 0 and its own axes are used"
    return itk_header(reader, str(path))._replace(warnings=() if voxels.placed else (what,))


def itk_header(reader: sitk.ImageFileReader, path: str) -> Header:
    """The header that a SimpleITK reader has read.

    Raises:
        ValueError: RGB or complex voxels.
    """
    kind = reader.GetPixelID()
    types: dict[int, Any] = {
        **{sitk.sitkUInt8: np.uint8, sitk.sitkInt8: np.int8, sitk.sitkUInt16: np.uint16, sitk.sitkInt16: np.int16},
        **{sitk.sitkUInt32: np.uint32, sitk.sitkInt32: np.int32, sitk.sitkUInt64: np.uint64, sitk.sitkInt64: np.int64},
        **{sitk.sitkFloat32: np.float32, sitk.sitkFloat64: np.float64},
    }
    if kind not in types or reader.GetNumberOfComponents() > 1:
        what = sitk.GetPixelIDValueAsString(kind)
        raise ValueError(f"{path} holds RGB, complex or other voxels ({what}): give an image of one number per voxel.")
    shape, count = tuple(reader.GetSize()), reader.GetDimension()
    affine = np.eye(4)
    space = min(3, count)
    axes = np.array(reader.GetDirection()).reshape(count, count)[:space, :space]
    affine[:space, :space] = axes * np.array(reader.GetSpacing())[:space]
    affine[:space, 3] = reader.GetOrigin()[:space]
    return Header(path, _shape(list(shape)), TO_RAS @ affine, np.dtype(types[kind]))


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
