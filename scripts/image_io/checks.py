# SPDX-License-Identifier: Apache-2.0
"""Checks of a case's headers, and what all checks share, for every verb, the bundle's configs and MONAI Label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from scripts.image_io.grid_geometry import axes_and_spacing, centre, grids_overlap
from scripts.image_io.headers import MAX_VOXELS, VOXEL_SIZES, Header
from scripts.image_io.suv_values import SuvValues, checked_suv_values, options_of

logger = logging.getLogger(__name__)

ERROR, WARNING, NOTE = "error", "warning", "note"
CONSTANT = "constant"
LABEL = "label"
MASK = "mask"
DICOM_MODALITIES = {"ct": "CT", "pet": "PT", "mr": "MR"}  # by the config's modality
FLOAT32_MAX = float(np.finfo(np.float32).max)  # larger values become infinite on their way to the network
MIN_VOXEL_MM, MAX_VOXEL_MM = 0.02, 50.0  # of clinical images; sizes in metres or micrometres lie outside


class Finding(NamedTuple):
    """One message about a case.

    Attributes:
        level: ``ERROR`` (the case is refused), ``WARNING`` (logged) or ``NOTE`` (logged on request).
        what: the message.
        case_id, key: the case and the modality, or ``label``.
        kind: ``CONSTANT`` for an image of one value, else empty.
    """

    level: str
    what: str
    case_id: str = ""
    key: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Rules:
    """Limits for what is accepted of image files.

    Attributes:
        max_voxels: refuse a file whose header states more voxels, before memory is allocated.
        replace_nonfinite: value that replaces NaN and infinite voxels; None refuses such files.
        series_uids: DICOM series to read from folders that contain several.
        voxel_size: which voxel sizes to believe where a header contradicts itself by more than 1%: those of the
            ``"affine"`` (the axes of the sform, ElementSpacing) or of ``"pixdim"`` (pixdim, ElementSize); None refuses
            such files. See ``scripts.image_io.headers.reconcile_voxel_sizes``.
        suv: what the header of a PET in DICOM lacks for SUV, see ``scripts.image_io.suv_values``.

    Raises:
        ValueError: ``replace_nonfinite`` is not finite in float32, ``voxel_size`` is unknown, or a value in ``suv``
            is implausible.
    """

    max_voxels: int = MAX_VOXELS
    replace_nonfinite: float | None = None
    series_uids: Sequence[str] = field(default=())
    voxel_size: str | None = None
    suv: SuvValues = field(default_factory=dict)

    def __post_init__(self) -> None:
        value = self.replace_nonfinite
        if value is not None and not (isinstance(value, int | float) and abs(value) <= FLOAT32_MAX):
            raise ValueError(f"--replace-nonfinite is {value}: give a number that is finite in float32, such as 0.")
        if self.voxel_size is not None and self.voxel_size not in VOXEL_SIZES:
            raise ValueError(f"--voxel-size is {self.voxel_size!r}. Choose {' or '.join(VOXEL_SIZES)}.")
        object.__setattr__(self, "suv", checked_suv_values(self.suv))

    def of_case(self, case: Mapping[Any, Any]) -> Rules:
        """These rules with the values for SUV that the table of cases gives for a case."""
        return replace(self, suv={**self.suv, **case["suv"]}) if case.get("suv") else self


def report_findings(findings: Iterable[Finding], log_notes: bool = False) -> None:
    """Log warnings, and raise if there are errors.

    Args:
        findings: of one case.
        log_notes: also log notes.

    Raises:
        ValueError: there are errors; its message joins all of theirs.
    """
    errors = []
    for finding in findings:
        if finding.level == ERROR:
            errors.append(finding.what)
        elif finding.level == WARNING:
            logger.warning("%s", finding.what)
        elif log_notes:
            logger.info("%s", finding.what)
    if errors:
        raise ValueError(" ".join(dict.fromkeys(errors)))  # one file may provide several modalities


def check_headers(headers: Mapping[str, Header], reference: str, stacked: Sequence[str] = ()) -> list[Finding]:
    """Compare the headers of one case's files.

    Args:
        headers: by modality, and ``label``.
        reference: the modality whose grid all others are resampled to.
        stacked: modalities along the last axis, if each of them names the same 4D file.
    """
    findings = [Finding(WARNING, text, key=key) for key, header in headers.items() for text in header.warnings]
    findings += [Finding(NOTE, text, key=key) for key, header in headers.items() for text in header.notes]
    for key, header in headers.items():
        spacing = axes_and_spacing(header.affine)[1]
        if spacing.max() < MIN_VOXEL_MM or spacing.max() > MAX_VOXEL_MM:
            sizes = " x ".join(f"{size:.3g}" for size in spacing)
            text = f"{header.path} has voxels of {sizes} mm: are these sizes in mm?"
            findings.append(Finding(WARNING, text, key=key))
    for key, header in headers.items():
        extra_axes = expected_extra_axes(key, stacked)
        if header.shape[3:] != extra_axes:
            expected = (
                f"one 4D file whose last axis is {', '.join(stacked)}" if extra_axes else "one 3D volume per file"
            )
            size = " x ".join(map(str, header.shape))
            findings.append(Finding(ERROR, f"{header.path} contains {size} voxels. Give {expected}.", key=key))
    findings += _check_single_slices(headers) + _check_dicom_series(headers) + _check_dicom_modalities(headers)
    if reference in headers:
        for key, header in headers.items():
            if key != reference:
                findings += _compare_with_reference(headers[reference], header, key)
    return findings


def check_suv_values(headers: Mapping[str, Header], rules: Rules) -> list[Finding]:
    """An error if values for SUV are given for a case whose PET is no DICOM, a warning if it has no PET."""
    images = {key: header for key, header in headers.items() if key != LABEL}
    if not rules.suv or any(header.modality == "PT" for header in images.values()):
        return []
    files = [header.path for header in images.values() if not header.slices]
    if not files:
        return [Finding(WARNING, f"{options_of(rules.suv)} is not used: the case has no PET")]
    return [
        Finding(
            ERROR,
            f"{options_of(rules.suv)} completes the header of a PET in DICOM, but {', '.join(files)} is none. Remove "
            "it, and give the PET in SUV.",
        )
    ]


def expected_extra_axes(key: str, stacked: Sequence[str]) -> tuple[int, ...]:
    """The shape that a file must have after its first three axes; axes of length 1 are not counted."""
    return (len(stacked),) if key in stacked and len(stacked) > 1 else ()


def _check_single_slices(headers: Mapping[str, Header]) -> list[Finding]:
    single = [key for key, header in headers.items() if 1 in header.shape[:3]]
    if not single:
        return []
    if len(single) == len(headers):
        return [Finding(WARNING, f"{headers[single[0]].path} and the case's other files are single slices")]
    volume = next(header.path for key, header in headers.items() if key not in single)
    return [
        Finding(ERROR, f"{headers[key].path} is a single slice, but {volume} is a volume. Give volumes.", key=key)
        for key in single
    ]


def _check_dicom_series(headers: Mapping[str, Header]) -> list[Finding]:
    """Find series of different patients or frames of reference. The messages do not contain patient ids."""
    known = [(header.path, header.series) for header in headers.values() if header.series]
    findings = []
    for (path, (_, patient, frame)), (path2, (_, patient2, frame2)) in combinations(known, 2):
        if patient != patient2:
            text = f"{path} and {path2} belong to different patients. Give series of one patient."
            findings.append(Finding(ERROR, text))
        elif frame != frame2:
            frames = f"{path} has the frame of reference {frame or 'unknown'}, {path2} has {frame2 or 'unknown'}"
            findings.append(Finding(ERROR, f"{frames}. Register one to the other first."))
    return findings


def _check_dicom_modalities(headers: Mapping[str, Header]) -> list[Finding]:
    """Find series that are given as another modality than their headers state."""
    findings = []
    for key, header in headers.items():
        expected = DICOM_MODALITIES.get(key)
        if expected and header.modality in DICOM_MODALITIES.values() and header.modality != expected:
            text = f"{header.path} is given as {key}, but its Modality is {header.modality}"
            findings.append(Finding(ERROR, f"{text}. Give a series of {expected}.", key=key))
    return findings


def _compare_with_reference(reference: Header, other: Header, key: str) -> list[Finding]:
    """An error if two images do not overlap, a note on their relative position if their grids differ."""
    if not grids_overlap(reference, other):
        text = f"{other.path} and {reference.path} do not overlap in space. Check that these files belong together."
        return [Finding(ERROR, text, key=key)]
    if other.shape == reference.shape and np.allclose(other.affine, reference.affine, atol=1e-3):
        return []
    (axes, spacing), (axes2, spacing2) = axes_and_spacing(reference.affine), axes_and_spacing(other.affine)
    rotation = axes2.T @ axes
    largest = np.abs(rotation).argmax(1)  # exchanged and flipped axes do not count as a rotation
    angle = float(np.degrees(np.arccos(np.clip(np.abs(rotation[range(3), largest]), 0, 1))).max())
    distance = float(np.linalg.norm(centre(other) - centre(reference)))
    own, references = (" x ".join(f"{size:.3g}" for size in sizes) for sizes in (spacing2, spacing))
    text = (
        f"{key}: centre {distance:.2f} mm from the reference's, rotated by {angle:.1f} degrees, "
        f"voxels of {own} mm (reference: {references} mm)"
    )
    return [Finding(NOTE, text, key=key)]
