# SPDX-License-Identifier: Apache-2.0
"""Read the images of a case: check the headers, read the files in parallel, check the voxels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from numpy.typing import NDArray

from scripts.image_io.checks import Rules, check_headers, check_suv_values, report_findings
from scripts.image_io.headers import Header
from scripts.image_io.intensity_checks import check_images
from scripts.image_io.reader import header_of, read_modality


class Image(NamedTuple):
    """A volume ``H W D`` and the header of its file."""

    voxels: NDArray
    header: Header


def read_images(
    paths: Mapping[str, str],
    reference: str,
    rules: Rules,
    stacked: Sequence[str] = (),
    before_reading: Callable[[Mapping[str, Header]], None] | None = None,
    unchecked: Sequence[str] = (),
    log_notes: bool = False,
    intensity: Mapping[str, Sequence[float] | str] | None = None,
) -> dict[str, Image]:
    """Read the images of a case, and its label if it is named.

    Args:
        paths: file or DICOM folder by modality.
        reference: the modality whose grid all others are resampled to.
        rules: what is accepted.
        stacked: modalities in the order of the last axis, if each of them names the same 4D file.
        before_reading: called with the headers before voxels are read.
        unchecked: keys whose voxels are not used, and therefore not checked.
        log_notes: log where each image lies relative to the reference.
        intensity: per modality the range that the network gets, see ``check_intensities``.

    Raises:
        ValueError: see ``scripts.image_io.checks``; the message names every file with an error.
    """
    headers = {key: header_of(path, rules) for key, path in paths.items()}
    report_findings([*check_headers(headers, reference, stacked), *check_suv_values(headers, rules)], log_notes)
    if before_reading:
        before_reading(headers)
    with ThreadPoolExecutor(max(1, len(paths))) as pool:
        results = pool.map(lambda key: read_modality(key, headers[key], rules, stacked), headers)
        volumes = dict(zip(headers, results, strict=True))
    checked = {key: volume for key, volume in volumes.items() if key not in unchecked}
    report_findings(check_images(checked, {key: headers[key].path for key in checked}, rules, intensity))
    return {key: Image(volume, headers[key]) for key, volume in volumes.items()}
