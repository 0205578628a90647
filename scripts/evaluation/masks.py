# SPDX-License-Identifier: Apache-2.0
"""Foreground of masks on disk, with reference and prediction on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import ERROR, WARNING, Finding, Rules, check_mask
from scripts.image_io.headers import Header
from scripts.image_io.reader import header_of, read_itk
from scripts.report.case_images import resample_to_grid


def foreground_mask(image: sitk.Image, labels: Sequence[Sequence[float]], source: str) -> np.ndarray:
    """Foreground of a mask: every class but the first.

    Args:
        image: the mask.
        labels: per class the values that mean it.
        source: path of the mask, for the error.

    Returns:
        Booleans, as z y x.

    Raises:
        ValueError: the mask holds values that ``labels`` does not list.
    """
    values = sitk.GetArrayFromImage(image)
    listed = {value for class_values in labels for value in class_values}
    unlisted = sorted(set(np.unique(values).tolist()) - listed)
    if unlisted:
        shown = ", ".join(f"{value:.7g}" for value in unlisted[:5])
        raise ValueError(
            f"{source} contains the values {shown}, which are not in the data set's mapping {list(labels)}. Correct "
            "the file or the config's `labels`."
        )
    return np.isin(values, [value for class_values in labels[1:] for value in class_values])


def read_reference(path: str | Path, rules: Rules) -> tuple[Header, sitk.Image]:
    """A reference mask and its header, whose ``warnings`` tell what is unusual about it.

    Raises:
        ValueError: the file cannot be read.
        OSError: likewise.
    """
    return header_of(path, rules), read_itk(path, rules)


def read_prediction(path: Path, reference: Header, grid: sitk.Image, rules: Rules) -> tuple[sitk.Image, list[Finding]]:
    """A predicted mask on the grid of its reference, by nearest neighbour, and what is unusual about its own grid.

    Args:
        path: the mask.
        reference: header of the reference mask.
        grid: the reference mask.
        rules: which files are accepted.

    Raises:
        ValueError: the file cannot be read, or its grid cannot belong to the reference (see ``check_mask``).
        OSError: the file cannot be read.
    """
    header = header_of(path, rules)
    if len(header.shape) > 3:
        raise ValueError(f"{path} contains {' x '.join(map(str, header.shape))} voxels. Give one 3D volume per file.")
    findings = check_mask(reference, header)
    errors = [finding for finding in findings if finding.level == ERROR]
    if errors:  # the header's warnings may be the cause
        texts = [finding.what for finding in [*errors, *(each for each in findings if each.level == WARNING)]]
        raise ValueError(" ".join(f"{text.rstrip('.')}." for text in texts))
    return resample_to_grid(read_itk(path, rules), grid, sitk.sitkNearestNeighbor), findings
