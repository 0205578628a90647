# SPDX-License-Identifier: Apache-2.0
"""Read a volume from a path: NIfTI, MetaImage, NRRD, or a folder of DICOM files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from scripts.image_io.checks import Rules
from scripts.image_io.dicom_enhanced import is_enhanced, read_enhanced_voxels
from scripts.image_io.dicom_series import is_pet, read_series_header
from scripts.image_io.dicom_suv import series_suv_factor
from scripts.image_io.header_reader import read_header
from scripts.image_io.headers import LPS_TO_RAS, METAIMAGE, NIFTI, VOXEL_TYPES, Header
from scripts.image_io.metaimage import check_metaimage_voxels
from scripts.image_io.nifti import read_nifti
from scripts.image_io.nrrd import NRRD, read_nrrd_voxels


def header_of(path: str | Path, rules: Rules) -> Header:
    """The header of a file or of a DICOM folder; see ``read_header`` and ``read_series_header`` for errors."""
    if Path(path).is_dir():
        return read_series_header(path, rules.series_uids, rules.max_voxels)
    return read_header(path, rules.max_voxels, rules.voxel_size)


def read_volume(header: Header, rules: Rules) -> NDArray:
    """Read the voxels that belong to a header, ``H W D [N]``.

    Raises:
        ValueError: the voxels are truncated or damaged.
        OSError: not enough memory.
    """
    try:
        return _read_voxels(header, rules)
    except MemoryError as error:
        gib = header.voxels * header.kind.itemsize / 2**30
        raise OSError(
            f"{header.path} does not fit in memory: it needs a multiple of {gib:.2f} GiB while it is read. "
            "Use a machine with more memory, or refuse such files with --max-voxels."
        ) from error


def _read_voxels(header: Header, rules: Rules) -> NDArray:
    name = header.path.lower()
    if name.endswith(NIFTI):
        return read_nifti(header.path, header)
    if name.endswith(NRRD):
        return _from_array(read_nrrd_voxels(Path(header.path)), header)
    if header.slices and is_enhanced(header.slices[0]):
        voxels = read_enhanced_voxels(header.slices[0])
        if is_pet(header.slices[0]):
            voxels *= series_suv_factor(header.slices, header.path, rules.suv)
        return voxels.reshape(header.shape)
    if name.endswith(METAIMAGE):
        check_metaimage_voxels(Path(header.path))
        reader = sitk.ImageFileReader()
        reader.SetImageIO("MetaImageIO")
        image = _execute(reader, header.path, header.path)
    else:
        image = _execute(sitk.ImageSeriesReader(), header.slices, header.path)
        if is_pet(header.slices[0]):
            image = image * series_suv_factor(header.slices, header.path, rules.suv)
    return _from_array(sitk.GetArrayFromImage(image).T, header)


def _from_array(voxels: NDArray, header: Header) -> NDArray:
    if voxels.dtype not in VOXEL_TYPES:
        voxels = voxels.astype(np.float32)
    return voxels.reshape(header.shape)


def _execute(reader: Any, names: Any, path: str) -> sitk.Image:
    if isinstance(reader, sitk.ImageSeriesReader):
        reader.SetFileNames(names)
        reader.SetOutputPixelType(sitk.sitkFloat32)  # otherwise the first slice's slope decides the type of all
    else:
        reader.SetFileName(names)
    try:
        return reader.Execute()
    except RuntimeError as error:
        if "alloc" in str(error):  # itk::MemoryAllocationError or std::bad_alloc
            raise MemoryError from error
        raise ValueError(f"{path} is truncated or damaged. Copy or export it again.") from error


def read_itk(path: str | Path, rules: Rules, channel: int | None = None) -> sitk.Image:
    """Read a 3D image as SimpleITK has it, after the same checks as everywhere else.

    SimpleITK's own reader accepts truncated files, and reads NaN in masks as 0.

    Args:
        path: the file or DICOM folder.
        rules: what is accepted.
        channel: index along a 4D file's last axis.

    Raises:
        ValueError: the file is damaged, or 4D without a ``channel``.
    """
    header = header_of(path, rules)
    if len(header.shape) > 3 and channel is None:
        raise ValueError(f"{path} contains {' x '.join(map(str, header.shape))} voxels. Give one 3D volume per file.")
    voxels = read_volume(header, rules)
    image = sitk.GetImageFromArray((voxels if voxels.ndim == 3 else voxels[..., channel]).T)
    affine = LPS_TO_RAS @ header.affine  # to LPS; the matrix is its own inverse
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def read_modality(key: str, header: Header, rules: Rules, stacked: Sequence[str] = ()) -> NDArray:
    """Read one modality, ``H W D``, from its own file or from the 4D file of all ``stacked`` modalities."""
    volume = read_volume(header, rules)
    return volume if volume.ndim == 3 else volume[..., stacked.index(key)]
