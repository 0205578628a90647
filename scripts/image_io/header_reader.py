# SPDX-License-Identifier: Apache-2.0
"""Read and check the header of an image file before voxels are read or memory is allocated."""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.headers import (
    MAX_VOXELS,
    METAIMAGE,
    NIFTI,
    Affine,
    Header,
    check_affine,
    check_max_voxels,
    drop_trailing_ones,
    itk_header,
    reconcile_voxel_sizes,
    short_message,
)
from scripts.image_io.metaimage import check_metaimage
from scripts.image_io.nrrd import NRRD, read_nrrd_header

NIFTI_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by size in bytes
MIN_VOXEL_OFFSET = {348: 352, 540: 544}  # header and 4 bytes that announce extensions
MAX_DEFLATE_RATIO = 1032  # of a gzip or zlib stream
MILLIMETRES, UNITS = (0, 2), {1: "metres", 3: "micrometres"}  # NIfTI codes; 0 (unknown) is read as mm


def read_header(path: str | Path, max_voxels: int = MAX_VOXELS, voxel_size: str | None = None) -> Header:
    """Read and check the header of a NIfTI file (.nii, .nii.gz), a MetaImage (.mha) or a NRRD file (.nrrd).

    The ending may be written in upper case.

    Args:
        path: the file.
        max_voxels: refuse a file whose header states more.
        voxel_size: which voxel sizes to believe where the header contradicts itself, one of ``VOXEL_SIZES``; None
            refuses such a file. See ``reconcile_voxel_sizes``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, text, a Git LFS pointer, truncated or of another format; it has RGB or complex
            voxels, more voxels than ``max_voxels``, voxel sizes that are missing, contradictory or not in mm, or an
            affine that is singular, sheared or not finite.
    """
    name = str(path)
    if name.lower().endswith(NIFTI):
        header = _read_nifti_header(Path(path), max_voxels, voxel_size)
    elif name.lower().endswith(METAIMAGE):
        header = _read_metaimage_header(Path(path), max_voxels, voxel_size)
    elif name.lower().endswith(NRRD):
        header = _read_nrrd_header(Path(path), max_voxels)
    else:
        raise ValueError(f"{path} has an unknown format. Give .nii.gz, .nii, .mha, .nrrd, or a folder of DICOM files.")
    check_affine(header.affine, name)
    return header


def _check_size(path: Path, shape: Sequence[int], min_bytes: int, max_voxels: int) -> None:
    """Raise ValueError if a file states more voxels than ``max_voxels``, or is smaller than ``min_bytes``."""
    check_max_voxels(path, shape, max_voxels)
    if os.path.getsize(path) < min_bytes:
        raise ValueError(f"{path} is too small for the {math.prod(shape)} voxels in its header. Copy it again.")


def _read_start(path: Path) -> bytes:
    """The first bytes of a file, unpacked.

    Raises:
        ValueError: the path is a pipe, socket or device, or the file is empty, text, a Git LFS pointer or a damaged
            gzip stream.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait forever
        raise ValueError(f"{path} is a pipe, socket or device, not a file. Give the path of the image.")
    with open(path, "rb") as file:
        raw = file.read(1 << 16)
    if not raw:
        raise ValueError(f"{path} is an empty file. Copy or download it again.")
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the image. Run: git lfs pull.")
    packed = raw.startswith(b"\x1f\x8b")
    if path.name.lower().endswith(".gz") and packed:
        try:
            return zlib.decompressobj(wbits=31).decompress(raw, max(NIFTI_HEADERS))
        except zlib.error as error:
            raise ValueError(f"{path} is truncated or damaged ({error}). Copy or download it again.") from error
    if _is_text(raw) and not raw.startswith((b"ObjectType", b"NRRD000")):
        raise ValueError(f"{path} is a text file, not an image. Copy or download it again.")
    if packed or path.name.lower().endswith(".gz"):
        actual = "compressed with gzip" if packed else "not compressed with gzip"
        raise ValueError(f"{path} is {actual}, unlike its name says. Rename it.")
    return raw


def _is_text(raw: bytes) -> bool:
    try:
        text = raw[:512].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def nifti_header_size(data: bytes) -> int:
    """348 for NIfTI-1, 540 for NIfTI-2, 0 for anything else; a file begins with this number, in either byte order."""
    sizes = {int.from_bytes(data[:4], order) for order in ("little", "big")}
    return next(iter(sizes & NIFTI_HEADERS.keys()), 0)


def _read_nifti_header(path: Path, max_voxels: int, voxel_size: str | None) -> Header:
    data = _read_start(path)
    size = nifti_header_size(data)
    if not size or len(data) < size:
        raise ValueError(f"{path} is not a NIfTI file, or is truncated in its header. Copy or download it again.")
    try:
        header = NIFTI_HEADERS[size](data[:size], check=False)
        magic, dims = bytes(header["magic"]), [int(n) for n in header["dim"]]
        header.get_slope_inter()
        stored_type = header.get_data_dtype()
        offset = float(header["vox_offset"])
    except Exception as error:  # nibabel raises many exception types on a damaged header
        raise ValueError(
            f"{path} has a damaged NIfTI header ({short_message(error)}). Copy or convert it again."
        ) from error
    if not magic.startswith(b"n+"):
        raise ValueError(f"{path} is not a single NIfTI file: its voxels would be in an .img. Convert it to .nii.gz.")
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise ValueError(f"{path} states {dims[1 : dims[0] + 1]} voxels in {dims[0]} dimensions. Correct its header.")
    if not MIN_VOXEL_OFFSET[size] <= offset <= 2**31:
        raise ValueError(f"{path} states that its voxels begin at byte {offset:g}. Correct its header.")
    _check_voxel_type(stored_type, path)
    shape = drop_trailing_ones(dims[1 : dims[0] + 1])
    end = int(offset) + math.prod(shape) * stored_type.itemsize
    _check_size(path, shape, end // MAX_DEFLATE_RATIO if path.name.lower().endswith(".gz") else end, max_voxels)
    affine, warnings = _nifti_affine(header, path, shape, voxel_size)
    return Header(str(path), shape, affine, stored_type, end, (*warnings, *_unused_scale(header, path)))


def _unused_scale(header: Any, path: Path) -> tuple[str, ...]:
    """A warning if the header states a slope and intercept that are not applied: a slope that is 0 or not finite.

    Both 0, or a slope of 0 alone, is NIfTI's way to state that there are none.
    """
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if (slope and math.isfinite(slope)) or (slope == 0 and intercept == 0):
        return ()
    return (f"{path} has a slope of {slope:g} and an intercept of {intercept:g}: its values are read as stored",)


def _check_voxel_type(stored: np.dtype[Any], path: Path) -> None:
    if stored.fields is not None or stored.kind not in "biuf":
        kind = "RGB" if stored.fields is not None else "complex" if stored.kind == "c" else str(stored)
        raise ValueError(f"{path} contains {kind} voxels. Give an image with one number per voxel.")


def _nifti_affine(
    header: Any, path: Path, shape: tuple[int, ...], voxel_size: str | None
) -> tuple[Affine, tuple[str, ...]]:
    """The affine by nibabel's rule (sform, else qform, else voxel sizes only), and warnings about it."""
    affine: Affine
    sizes = np.asarray(header["pixdim"][1:4], dtype=float)
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"{path} has voxel sizes of {sizes.tolist()} mm. Correct its header.")
    warnings = []
    code = int(header["xyzt_units"]) & 7
    if code in UNITS:
        raise ValueError(
            f"{path} states in its header that voxel sizes are in {UNITS[code]}. Correct xyzt_units, or convert it to "
            "mm."
        )
    if code not in MILLIMETRES:
        warnings.append(f"{path} states an undefined unit of its voxel sizes (xyzt_units {code}): they are read as mm")
    if header["pixdim"][0] == 0 and header["qform_code"] > 0:
        header["pixdim"][0] = 1
        warnings.append(f"{path} has a qform without handedness (pixdim[0] is 0): it is read as right-handed")
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except Exception as error:  # nibabel raises many exception types on a damaged qform
        raise ValueError(f"{path} has a damaged NIfTI header ({short_message(error)}). Correct its qform.") from error
    if sform is None and qform is None:
        warnings.append(f"{path} has no position in space (neither sform nor qform): only its voxel sizes are used")
    if sform is not None:
        affine, found = reconcile_voxel_sizes(affine, sizes, path, ("sform", "pixdim"), voxel_size)
        warnings += found
    if sform is not None and qform is not None:
        corners = np.array(np.meshgrid(*([0, n - 1] for n in shape[:3]), [1])).reshape(4, -1)
        qform[:3, :3] *= np.linalg.norm(affine[:3, :3], axis=0) / sizes  # voxel sizes have been compared above
        distance = np.linalg.norm((affine - qform) @ corners, axis=0).max()
        if not distance < 0.1 * sizes.min():
            warnings.append(f"{path} has an sform and a qform up to {distance:.1f} mm apart: the sform is used")
    return affine, tuple(warnings)


def _read_metaimage_header(path: Path, max_voxels: int, voxel_size: str | None) -> Header:
    _read_start(path)
    voxels = check_metaimage(path)
    _check_size(path, voxels.shape, voxels.size // MAX_DEFLATE_RATIO if voxels.packed else voxels.size, max_voxels)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO")  # otherwise ITK does not know the ending .MHA
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path} has a damaged MetaImage header. Copy or convert it again.") from error
    header = itk_header(reader, str(path))
    affine = header.affine
    check_affine(affine, str(path))
    warnings = list(voxels.warnings)
    if len(voxels.element_size) >= 3:
        stated = np.array(voxels.element_size[:3])
        names = ("ElementSpacing and TransformMatrix", voxels.element_size_field)
        affine, found = reconcile_voxel_sizes(affine, stated, path, names, voxel_size)
        warnings += found
    return header._replace(affine=affine, warnings=(*warnings, *_orientation_warning(affine, voxels.orientation, path)))


def _orientation_warning(affine: Affine, orientation: str, path: Path) -> tuple[str, ...]:
    """A warning if a MetaImage's letters name other axes than its matrix.

    ITK writes the letters of the sides where the axes begin (RAI for identity), others those where they end (LPS), so
    both are accepted.
    """
    letters = orientation.upper()
    if not re.fullmatch("[LRAPSI]{3}", letters):
        return ()  # "???" means unknown
    ends = "".join(nib.aff2axcodes(affine))
    begins = ends.translate(str.maketrans("LRAPSI", "RLPAIS"))
    if letters in (begins, ends):
        return ()
    return (f"{path} has the AnatomicalOrientation {letters}, but its axes are {begins}: the TransformMatrix is used",)


def _read_nrrd_header(path: Path, max_voxels: int) -> Header:
    _read_start(path)
    nrrd = read_nrrd_header(path)
    end = nrrd.start + (nrrd.size // MAX_DEFLATE_RATIO if nrrd.packed else nrrd.size)
    _check_size(path, nrrd.shape, end, max_voxels)
    warning = f"{path} has no position in space (no space, directions or origin): 0 and its own axes are used"
    return Header(
        str(path), nrrd.shape, nrrd.affine, nrrd.kind.newbyteorder("="), warnings=() if nrrd.placed else (warning,)
    )
