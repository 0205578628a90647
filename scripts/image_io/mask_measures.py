# SPDX-License-Identifier: Apache-2.0
"""Read a mask and the PET of its case at their full resolution, and measure the lesions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import ERROR, WARNING, Rules
from scripts.image_io.headers import LPS_TO_RAS
from scripts.image_io.intensity_checks import check_intensities
from scripts.image_io.reader import read_itk
from scripts.metrics.lesion_measures import Measures, measure_mask
from scripts.metrics.lesion_shape import Volume


def measure_files(
    mask: str | Path,
    regions: Mapping[str, Sequence[float]],
    pet: str | Path | None = None,
    rules: Rules | None = None,
    channel: int | None = None,
    warnings: list[str] | None = None,
) -> list[Measures]:
    """Measure a mask on its own grid, and its uptake in a PET on that of the PET.

    Args:
        mask: its file.
        regions: name -> values of the mask.
        pet: file in SUV, or folder of a DICOM series, which is converted to SUV.
        rules: which files are accepted; by default all.
        channel: of the PET in a 4D file.
        warnings: gets what is unusual about the values of the PET.

    Raises:
        ValueError: a file cannot be read, or the PET holds NaN and ``rules`` replace none.
        OSError: likewise.
    """
    image, rules = None, rules or Rules()
    if pet is not None:
        image = volume_of(read_itk(pet, rules, channel))
        # As for the network, this replaces NaN and infinite voxels.
        findings = check_intensities(image.voxels, str(pet), "pet", rules)
        if errors := [finding.what for finding in findings if finding.level == ERROR]:
            raise ValueError(" ".join(errors))
        if warnings is not None:
            warnings += [finding.what for finding in findings if finding.level == WARNING]
    return measure_mask(volume_of(read_itk(mask, rules)), regions, image)


def volume_of(image: sitk.Image) -> Volume:
    """An image of SimpleITK with its affine in RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image).T, LPS_TO_RAS @ affine)
