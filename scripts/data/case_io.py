# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms that read the images of a case and write its mask."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged, SaveImaged
from numpy.typing import NDArray

from scripts.image_io.checks import Rules
from scripts.image_io.headers import Header
from scripts.image_io.nifti import mask_table, write_nifti
from scripts.runtime.case_files import read_images


def to_tensor(volume: NDArray) -> torch.Tensor:
    """A volume as a tensor with the same memory; a copy where its strides are negative."""
    return torch.from_numpy(volume if min(volume.strides, default=1) >= 0 else volume.copy())


def to_meta_tensor(volume: NDArray, header: Header) -> MetaTensor:
    """A volume ``H W D [N]`` as ``1 H W D [N]``, with the metadata that MONAI's reader gives."""
    meta = {
        "filename_or_obj": header.path,
        "original_affine": header.affine,
        "spatial_shape": np.array(header.shape),
        "original_channel_dim": float("nan"),
        "space": "RAS",
    }
    return MetaTensor(to_tensor(volume)[None], affine=torch.as_tensor(header.affine), meta=meta)


class LoadModalitiesd(LoadImaged):
    """MONAI's ``LoadImaged`` with the checks of ``scripts.runtime.case_files.read_images``.

    Args:
        keys: keys of paths; absent ones are skipped.
        reference: the modality whose grid all others are resampled to; by default the first key.
        rules, stacked, before_reading, unchecked, log_notes, intensity: see ``read_images``.

    Raises:
        ValueError: (when called) see ``scripts.image_io.checks``; the message names every file with an error.
    """

    def __init__(
        self,
        keys: Sequence[str],
        reference: str | None = None,
        rules: Rules | None = None,
        stacked: Sequence[str] = (),
        before_reading: Callable[[Mapping[str, Header]], None] | None = None,
        unchecked: Sequence[str] = (),
        log_notes: bool = False,
        intensity: Mapping[str, Sequence[float] | str] | None = None,
    ) -> None:
        self.image_keys, self.reference = list(keys), reference or keys[0]
        # MONAI Label expects a loader's `keys` in every case, and only the reference is always present.
        super().__init__(self.reference, ensure_channel_first=True)
        self.rules, self.stacked = rules or Rules(), list(stacked)
        self.before_reading, self.unchecked, self.log_notes = before_reading, list(unchecked), log_notes
        self.intensity = intensity

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        item = dict(data)
        paths = {k: str(item[k]) for k in self.image_keys if k in item and not isinstance(item[k], torch.Tensor)}
        rules = self.rules.of_case(item)
        item.pop("suv", None)
        images = read_images(
            paths,
            self.reference,
            rules,
            self.stacked,
            self.before_reading,
            self.unchecked,
            self.log_notes,
            self.intensity,
        )
        for key, (volume, header) in images.items():
            item[key] = to_meta_tensor(volume, header._replace(shape=volume.shape))
        return item


class SaveMaskd(SaveImaged):
    """MONAI's ``SaveImaged`` for masks: written atomically, as integers, and named after the case.

    Args:
        key: key of the mask, class indices ``1 H W D``; its metadata contain the affine and the case's id or file name.
        output_dir: folder of ``<case_id>.nii.gz``.
        values: what to write for each class, see ``mask_table``; by default the indices, as uint8.
    """

    def __init__(self, key: str, output_dir: str, values: Sequence[float] | None = None) -> None:
        super().__init__(key, output_dir=output_dir, output_ext=".nii.gz", print_log=False)
        self.folder, self.table = Path(output_dir), mask_table(values)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        mask = data[self.keys[0]]
        name = mask.meta.get("case_id") or Path(str(mask.meta.get("filename_or_obj", "mask"))).name.split(".")[0]
        voxels = mask[0].to(torch.uint8).numpy()
        write_nifti(
            voxels if self.table is None else self.table[voxels],
            np.asarray(mask.affine),
            self.folder / f"{name}.nii.gz",
        )
        return dict(data)
