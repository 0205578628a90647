# SPDX-License-Identifier: Apache-2.0
"""The header of an image, and what every format's must fulfil; ``header_reader`` reads those of files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

Affine = NDArray[np.floating[Any]]

MAX_VOXELS = 2**30  # four times a total-body PET/CT of 512 x 512 x 1000
NIFTI, METAIMAGE = (".nii", ".nii.gz"), (".mha",)
MAX_COSINE = 1e-3  # between two axes that count as perpendicular
NO_PLACE = "has no position in space"  # in the warning about such a header
MAX_SIZE_RATIO = 1.01  # between two statements of a voxel size that count as equal
VOXEL_SIZES = ("affine", "pixdim")  # which statement of the voxel sizes to believe where a header contradicts itself
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # world axes of ITK and DICOM are LPS, of NIfTI and MONAI RAS
VOXEL_TYPES = (np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64)  # known to both torch and SimpleITK


class Header(NamedTuple):
    """An image's grid and voxel type.

    Attributes:
        path: the file or DICOM folder.
        shape: voxels per axis, at least three; trailing axes of length 1 are dropped.
        affine: voxel to world in mm, RAS.
        kind: stored type of the voxels.
        end: bytes of the unpacked file up to the last voxel, if known.
        warnings: messages about unusual but usable headers.
        series: DICOM series UID, patient id and frame of reference; None for other formats.
        slices: DICOM files in the order of their positions.
        notes: messages that are shown on request only.
        modality: DICOM's ``CT``, ``PT``, ``MR`` or another; empty for other formats.
    """

    path: str
    shape: tuple[int, ...]
    affine: Affine
    kind: np.dtype[Any]
    end: int | None = None
    warnings: tuple[str, ...] = ()
    series: tuple[str, str, str] | None = None
    slices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    modality: str = ""

    @property
    def voxels(self) -> int:
        """Number of voxels, as a Python integer: a damaged header can state any product."""
        return math.prod(self.shape)

    @property
    def placed(self) -> bool:
        """Whether the file states where the image lies in space."""
        return not any(NO_PLACE in text for text in self.warnings)


def check_max_voxels(path: str | Path, shape: Sequence[int], max_voxels: int) -> None:
    """Raise ValueError if an image has more voxels than ``max_voxels``."""
    if math.prod(shape) > max_voxels:
        size = " x ".join(map(str, shape))
        raise ValueError(
            f"{path} states {size} voxels, more than the limit of {max_voxels}. "
            "Check the file, or raise the limit with --max-voxels."
        )


def check_affine(affine: Affine, name: str) -> None:
    """Raise ValueError if an affine is not finite, singular or sheared."""
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if not lengths.all() or not np.isfinite(lengths).all():
        raise ValueError(f"{name} has an affine or voxel sizes that are zero or not finite. Correct its header.")
    cosine = np.abs((axes / lengths).T @ (axes / lengths) - np.eye(3)).max()
    if cosine > 1 - MAX_COSINE:
        raise ValueError(f"{name} has a singular affine: two axes are parallel. Correct its header.")
    if cosine > MAX_COSINE:
        raise ValueError(
            f"{name} has a sheared affine: its axes are {np.degrees(np.arccos(cosine)):.1f} degrees apart instead of "
            "90, as in a CT with a tilted gantry. Resample it to a grid with perpendicular axes."
        )


def reconcile_voxel_sizes(
    affine: Affine, stated: Affine, path: Path, names: tuple[str, str], voxel_size: str | None
) -> tuple[Affine, tuple[str, ...]]:
    """Compare the lengths of an affine's axes with the voxel sizes that the same header states elsewhere.

    Args:
        affine: voxel to world.
        stated: the other voxel sizes, three.
        path: the file.
        names: of the header's fields that the affine and the other voxel sizes come from.
        voxel_size: ``"affine"`` keeps the affine. ``"pixdim"`` scales its axes to ``stated``; the centre of the first
            voxel keeps its place, and the axes their directions. None refuses a contradiction.

    Returns:
        The affine, and a warning if the two contradict each other by more than 1% along an axis.

    Raises:
        ValueError: they do, and ``voxel_size`` is None; or ``check_affine`` refuses the affine.
    """
    check_affine(affine, str(path))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (np.maximum(lengths / stated, stated / lengths) <= MAX_SIZE_RATIO).all():
        return affine, ()
    sizes = [" x ".join(f"{size:.4g}" for size in each) for each in (lengths, stated)]
    contradiction = f"{path} has voxels of {sizes[0]} mm by its {names[0]}, but of {sizes[1]} mm by its {names[1]}"
    if voxel_size is None:
        raise ValueError(
            f"{contradiction}. Correct its header, or choose with --voxel-size affine ({names[0]}) or "
            f"--voxel-size pixdim ({names[1]})."
        )
    if voxel_size == "affine":
        return affine, (f"{contradiction}: the {names[0]} is used (--voxel-size affine)",)
    scaled = affine.copy()
    scaled[:3, :3] *= stated / lengths
    return scaled, (f"{contradiction}: the {names[1]} is used (--voxel-size pixdim)",)


def drop_trailing_ones(dims: list[int]) -> tuple[int, ...]:
    """A shape of at least three axes, without trailing axes of length 1 after the third."""
    while len(dims) > 3 and dims[-1] == 1:
        dims = dims[:-1]
    return tuple(dims + [1] * (3 - len(dims)))


def itk_header(reader: sitk.ImageFileReader, path: str) -> Header:
    """The header of a file whose information a SimpleITK reader has read.

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
        name = sitk.GetPixelIDValueAsString(kind)
        raise ValueError(
            f"{path} contains RGB, complex or other voxels ({name}). Give an image with one number per voxel."
        )
    size, dimensions = list(reader.GetSize()), reader.GetDimension()
    affine = np.eye(4)
    space = min(3, dimensions)
    axes = np.array(reader.GetDirection()).reshape(dimensions, dimensions)[:space, :space]
    affine[:space, :space] = axes * np.array(reader.GetSpacing())[:space]
    affine[:space, 3] = reader.GetOrigin()[:space]
    return Header(path, drop_trailing_ones(size), LPS_TO_RAS @ affine, np.dtype(types[kind]))


def short_message(error: Exception) -> str:
    """An exception's message in one line of at most 120 characters."""
    return " ".join(str(error).split())[:120]
