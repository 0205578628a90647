# SPDX-License-Identifier: Apache-2.0
"""What a data set is like: per case its grid, a sample of each modality's values, and the label values with volumes.

Everything is in the axes of the network: right, anterior, superior (RAS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from scripts.data.case_jobs import run_cases
from scripts.data.case_list import Item
from scripts.image_io.checks import ERROR, LABEL, Rules, check_headers
from scripts.image_io.headers import Affine, Header
from scripts.image_io.reader import header_of, read_modality
from scripts.runtime.grids import own_grid
from scripts.runtime.modalities import GatherModalities
from scripts.utils.process_pool import PROCESS_DIED

Array = NDArray[Any]
USER_ERRORS = (ValueError, OSError)  # raised by readers with a message for the user
SAMPLES = 10_000  # most voxels that are sampled of one case and modality
ALL_SAMPLES = 4_000_000  # most voxels that are sampled of one modality in all cases
MAX_VALUES = 256  # a file with more values is no label


@dataclass(frozen=True)
class ModalityValues:
    """The values of one image.

    Attributes:
        low, high: the smallest and the largest finite value of the whole image.
        sample: values of voxels drawn with replacement: from the foreground, or, in a case without one, from all that
            are not 0.
        kind: DICOM's ``CT``, ``PT`` or ``MR``; empty for other formats.
        of_foreground: whether the sample is of the foreground.
    """

    low: float
    high: float
    sample: Array
    kind: str = ""
    of_foreground: bool = True


@dataclass(frozen=True)
class CaseFingerprint:
    """One case.

    Attributes:
        case_id: of the data list.
        shape: voxels per axis of the reference, after a crop to the case's box.
        spacing: mm per axis of the reference.
        values: per modality that the case has.
        volumes: label value -> mm3; None without a label.
        problem: why the case could not be read, as a sentence; all other attributes are then empty.
    """

    case_id: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    values: Mapping[str, ModalityValues] = field(default_factory=dict)
    volumes: Mapping[float, float] | None = None
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """How the files of every case are read.

    Attributes:
        modalities: the reference first.
        rules: what is accepted of files.
        naming: rules for modalities that the data list does not name, see ``GatherModalities``.
        stacked: whether each case's ``image`` is one 4D file of all modalities.
        background: label values that are no foreground.
        samples: number of voxels that are drawn of each image.
    """

    modalities: Sequence[str]
    rules: Rules = field(default_factory=Rules)
    naming: Sequence[Mapping[str, str]] = ()
    stacked: bool = False
    background: Sequence[float] = (0,)
    samples: int = SAMPLES


def fingerprint_cohort(cases: Sequence[Item], source: Source, workers: int = 2) -> list[CaseFingerprint]:
    """Read every case once; each process keeps one image and one label in memory at a time.

    Args:
        cases: items of a data list.
        source: how their files are read; ``samples`` is lowered for large data sets.
        workers: number of processes.
    """
    samples = max(1, min(source.samples, ALL_SAMPLES // max(1, len(cases))))
    source = Source(**{**vars(source), "samples": samples})
    return run_cases(partial(fingerprint_case, source=source), cases, workers, "reading", _process_died)


def _process_died(case_id: str) -> CaseFingerprint:
    return CaseFingerprint(case_id, problem=f"Case {case_id}: {PROCESS_DIED}.")


def fingerprint_case(case: Item, source: Source) -> CaseFingerprint:
    """Read one case; an error becomes its ``problem``."""
    case_id = str(case["case_id"])
    try:
        return _read_case(case_id, case, source)
    except USER_ERRORS as error:
        return CaseFingerprint(case_id, problem=str(error))


def _read_case(case_id: str, case: Item, source: Source) -> CaseFingerprint:
    named: dict[Any, Any] = {**case}
    item = GatherModalities(source.modalities, source.naming, allow_missing=True, stacked=source.stacked)(named)
    source = replace(source, rules=source.rules.of_case(case))
    stacked = source.modalities if source.stacked else ()
    keys = [key for key in (*source.modalities, LABEL) if key in item]
    headers = {key: header_of(item[key], source.rules) for key in keys}
    errors = [each.what for each in check_headers(headers, source.modalities[0], stacked) if each.level == ERROR]
    if errors:
        raise ValueError(" ".join(errors))
    reference = headers[source.modalities[0]]
    own = own_grid(item, reference.affine, reference.shape)
    shape, spacing = ras_grid(own.part_affine, own.part)
    rng = np.random.default_rng(0)
    volumes, points = None, None
    if LABEL in headers:
        volumes, points = _read_label(headers[LABEL], source, rng)
    values = {
        key: _image_values(key, headers[key], source, stacked, points, rng)
        for key in source.modalities
        if key in headers
    }
    return CaseFingerprint(case_id, shape, spacing, values, volumes)


def ras_grid(affine: Affine, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The shape in voxels and the spacing in mm of a grid whose axes are ordered as right, anterior, superior.

    Args:
        affine: of the grid, voxel to world in mm.
        shape: of the grid.
    """
    axes = nib.io_orientation(affine)[:, 0].astype(int)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    order = [int(np.flatnonzero(axes == axis)[0]) for axis in range(3)]
    return tuple(int(shape[axis]) for axis in order), tuple(float(lengths[axis]) for axis in order)


def _read_label(header: Header, source: Source, rng: np.random.Generator) -> tuple[dict[float, float], Array | None]:
    """The volume of each value in mm3, and world coordinates (4 x samples) of foreground voxels; None without any."""
    label = read_modality(LABEL, header, source.rules)
    if not np.isfinite(label).all():
        raise ValueError(f"{header.path} contains NaN or infinite values. Correct the file.")
    values, counts = _count_values(label)
    if len(values) > MAX_VALUES:
        raise ValueError(
            f"{header.path} contains {len(values)} different values. Give a label with one value per class."
        )
    size = float(abs(np.linalg.det(header.affine[:3, :3])))
    volumes = {float(value): int(count) * size for value, count in zip(values, counts, strict=True)}
    inside = np.flatnonzero(~np.isin(label, np.asarray(source.background, dtype=float)))
    if not inside.size:
        return volumes, None
    index = np.array(np.unravel_index(rng.choice(inside, source.samples), label.shape))
    return volumes, np.asarray(header.affine @ np.vstack([index, np.ones(index.shape[1])]))


def _count_values(label: Array) -> tuple[Array, Array]:
    """The different values, and how often each occurs."""
    if label.dtype == np.uint8:  # without the sort of np.unique
        counts = np.bincount(label.ravel(order="K"), minlength=256)
        values = np.flatnonzero(counts)
        return values, counts[values]
    return np.unique(label, return_counts=True)


def _image_values(
    key: str, header: Header, source: Source, stacked: Sequence[str], points: Array | None, rng: np.random.Generator
) -> ModalityValues:
    """The values of one image: at world coordinates, or of any voxels that are not 0."""
    volume = read_modality(key, header, source.rules, stacked)
    finite = volume if volume.dtype.kind != "f" else volume[np.isfinite(volume)]
    if not finite.size:
        raise ValueError(f"{header.path} contains only NaN or infinite values. Correct the file.")
    low, high = float(finite.min()), float(finite.max())
    del finite
    sample = np.empty(0, dtype=np.float32)
    if points is not None:
        index = np.rint(np.linalg.solve(header.affine, points)[:3]).astype(int)
        index = index[:, ((index >= 0) & (index < np.array(volume.shape)[:, None])).all(0)]
        sample = volume[tuple(index)]
    else:
        filled = np.flatnonzero(volume)
        if filled.size:
            sample = volume[np.unravel_index(rng.choice(filled, source.samples), volume.shape)]
    sample = sample.astype(np.float32)
    return ModalityValues(low, high, sample[np.isfinite(sample)], header.modality, points is not None)
