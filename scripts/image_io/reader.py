# SPDX-License-Identifier: Apache-2.0
"""Every way from a path to a volume: NIfTI, MetaImage, a folder of DICOM files."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from scripts.image_io.checks import Rules, judge_headers, judge_images, settle
from scripts.image_io.dicom_series import is_pet, read_series_header
from scripts.image_io.dicom_suv import series_suv
from scripts.image_io.headers import METAIMAGE, NIFTI, TO_RAS, Header, read_header
from scripts.image_io.metaimage import check_voxels
from scripts.image_io.nifti import located, read_nifti


def header_of(path: str | Path, rules: Rules) -> Header:
    """The head of a file, or of a folder of DICOM files; see ``read_header`` and ``read_series_header`` for errors."""
    if Path(path).is_dir():
        return read_series_header(path, rules.series_uids, rules.max_voxels)
    return read_header(path, rules.max_voxels)


def read_volume(header: Header, rules: Rules) -> MetaTensor:
    """The voxels behind a header, ``1 H W D [N]``.

    Raises:
        ValueError: they are cut off or damaged.
        OSError: there is not enough memory for them.
    """
    try:
        return _voxels(header)
    except MemoryError as error:
        size = f"{header.voxels * header.kind.itemsize / 2**30:.2f} GiB, more than once while it is read"
        advice = "use a machine with more memory, or refuse such files by --max-voxels"
        raise OSError(f"{header.path} does not fit in memory (it takes {size}): {advice}.") from error


def _voxels(header: Header) -> MetaTensor:
    if header.path.endswith(NIFTI):
        return read_nifti(header.path, header)
    if header.path.endswith(METAIMAGE):
        check_voxels(Path(header.path))
        image = _executed(sitk.ImageFileReader(), header.path, header.path)
    else:
        image = _executed(sitk.ImageSeriesReader(), header.slices, header.path)
        image = image * series_suv(header.slices, header.path) if is_pet(header.slices[0]) else image
    voxels = sitk.GetArrayFromImage(image).T
    if voxels.dtype not in (np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64):
        voxels = voxels.astype(np.float32)
    return located(torch.from_numpy(voxels.reshape(header.shape)), header)


def _executed(reader: Any, names: Any, path: str) -> sitk.Image:
    if isinstance(reader, sitk.ImageSeriesReader):
        reader.SetFileNames(names)
        reader.SetOutputPixelType(sitk.sitkFloat32)  # else the first slice's slope would decide on the type of all
    else:
        reader.SetFileName(names)
    try:
        return reader.Execute()
    except RuntimeError as error:
        if "alloc" in str(error):  # itk::MemoryAllocationError or std::bad_alloc
            raise MemoryError from error
        raise ValueError(f"{path} is cut off or damaged: copy or export it again.") from error


def read_itk(path: str | Path, rules: Rules, channel: int | None = None) -> sitk.Image:
    """A judged and whole 3D image as SimpleITK has it, whose own reader takes cut files, and NaN in masks for 0.

    Args:
        path: of the file, or the folder of DICOM files.
        rules: what is accepted.
        channel: which of a 4D file's last axis.

    Raises:
        ValueError: it is damaged, or 4D without a ``channel``.
    """
    header = header_of(path, rules)
    if len(header.shape) > 3 and channel is None:
        raise ValueError(f"{path} holds {' x '.join(map(str, header.shape))} voxels: give one 3D volume per file.")
    voxels = read_volume(header, rules)[0].numpy()
    image = sitk.GetImageFromArray((voxels if voxels.ndim == 3 else voxels[..., channel]).T)
    affine = TO_RAS @ header.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def read_modality(key: str, header: Header, rules: Rules, stacked: Sequence[str] = ()) -> MetaTensor:
    """One modality, ``1 H W D``, out of its own file or out of the one of all that are ``stacked``."""
    volume = read_volume(header, rules)
    if volume.ndim == 4:
        return volume
    return located(volume.as_tensor()[0, ..., stacked.index(key)], header._replace(shape=header.shape[:3]))


class LoadModalitiesd(LoadImaged):
    """MONAI's ``LoadImaged`` with a case's files judged by their heads, then read at the same time, then judged again.

    Args:
        keys: of paths; absent ones are left out.
        reference: the modality on whose grid everything is brought; by default the first key.
        rules: what is accepted.
        stacked: modalities, in the order of the last axis, where each of them names the one 4D file of all.
        before: called with the headers before voxels are read.
        unjudged: keys whose voxels are not used, so that they may hold anything.
        notes: log where each image lies beside the reference.

    Raises:
        ValueError: (when called) see ``scripts.image_io.checks``; every file at fault is named.
    """

    def __init__(
        self,
        keys: Sequence[str],
        reference: str | None = None,
        rules: Rules | None = None,
        stacked: Sequence[str] = (),
        before: Callable[[Mapping[str, Header]], None] | None = None,
        unjudged: Sequence[str] = (),
        notes: bool = False,
    ) -> None:
        self.files, self.reference = list(keys), reference or keys[0]
        # MONAI Label asks a loader's `keys` of every case: only the reference is always there.
        super().__init__(self.reference, ensure_channel_first=True)
        self.rules, self.stacked = rules or Rules(), list(stacked)
        self.before, self.unjudged, self.notes = before, set(unjudged), notes

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        item = dict(data)
        there = [key for key in self.files if key in item]
        paths = {key: str(item[key]) for key in there if not isinstance(item[key], torch.Tensor)}
        headers = {key: header_of(path, self.rules) for key, path in paths.items()}
        settle(judge_headers(headers, self.reference, self.stacked), self.notes)
        if self.before:
            self.before(headers)
        with ThreadPoolExecutor(max(1, len(paths))) as pool:
            read = pool.map(lambda key: read_modality(key, headers[key], self.rules, self.stacked), headers)
            volumes = dict(zip(headers, read, strict=True))
        judged = {key: volume for key, volume in volumes.items() if key not in self.unjudged}
        settle(judge_images(judged, self.rules))
        item.update(volumes)
        return item
