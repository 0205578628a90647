# SPDX-License-Identifier: Apache-2.0
"""Checks of a case's headers and voxels, shared by every verb, the bundle's configs and MONAI Label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from scripts.image_io.headers import MAX_VOXELS, VOXEL_SIZES, Affine, Header
from scripts.image_io.suv_values import SuvValues, checked_suv_values, options_of

logger = logging.getLogger(__name__)

ERROR, WARNING, NOTE = "error", "warning", "note"
CONSTANT = "constant"
LABEL = "label"
MASK = "mask"
DICOM_MODALITIES = {"ct": "CT", "pet": "PT", "mr": "MR"}  # by the config's modality
FLOAT32_MAX = float(np.finfo(np.float32).max)  # larger values become infinite on their way to the network
MAX_PLAUSIBLE = 1e9  # no scanner stores larger values, in any unit
CT_MAX_AIR_HU = -200.0  # a CT shows air (about -1000 HU), so its minimum lies below this
PET_MIN_SUV, PET_MAX_SUV = -10.0, 200.0  # g/mL; tumours rarely exceed 50
MR_MIN = -500.0  # MR signals and parameter maps stay above this, HU do not
MAX_SHIFT = 0.5  # distance in voxels up to which two grids of one shape count as the same
# Values that do not fit the range that the network gets, as fractions of that range or of the voxels. Measured on 38
# patients of STS, 4 of HECKTOR 2021 and one of PI-CAI (docs/reliability.md):
MIN_FILLED = {"pet": 0.2}  # the largest value must reach this; smallest: PET 0.34, MR 0.91, ADC 1.09; PET in 0..1: 0.1
MIN_FILLED_OTHER = 0.3  # MR in 0..255: 0.21
MAX_ABOVE = {"ct": 0.4, "pet": 0.06}  # of the voxels; largest: CT 0.033 (a skull has more), PET 0.037, MR 0.006
MAX_ABOVE_OTHER = 0.03
MAX_BELOW, BELOW_MARGIN = 0.05, 0.02  # of the voxels, and how far below the range; in PET, MR and ADC there are none
MAX_PET_P90 = 0.3  # the 90th percentile of a PET; largest: 0.195 (SUV 1.95); STS in kBq/ml: from 0.36
SAMPLED_VOXELS = 10**6  # about as many are used for these fractions
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
        spacing = _axes(header.affine)[1]
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
    (axes, spacing), (axes2, spacing2) = _axes(reference.affine), _axes(other.affine)
    rotation = axes2.T @ axes
    largest = np.abs(rotation).argmax(1)  # exchanged and flipped axes do not count as a rotation
    angle = float(np.degrees(np.arccos(np.clip(np.abs(rotation[range(3), largest]), 0, 1))).max())
    distance = float(np.linalg.norm(_centre(other) - _centre(reference)))
    own, references = (" x ".join(f"{size:.3g}" for size in sizes) for sizes in (spacing2, spacing))
    text = (
        f"{key}: centre {distance:.2f} mm from the reference's, rotated by {angle:.1f} degrees, "
        f"voxels of {own} mm (reference: {references} mm)"
    )
    return [Finding(NOTE, text, key=key)]


def _axes(affine: Affine) -> tuple[Affine, Affine]:
    """Unit vectors along the voxel axes (columns) and the spacing in mm."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return affine[:3, :3] / spacing, spacing


def _corners(header: Header) -> Affine:
    """World coordinates of a grid's outer corners, 8 x 3."""
    ends = [[-0.5, size - 0.5] for size in header.shape[:3]]
    points = np.array(np.meshgrid(*ends)).reshape(3, -1).T
    return points @ header.affine[:3, :3].T + header.affine[:3, 3]


def _centre(header: Header) -> Affine:
    return _corners(header).mean(0)


def grids_overlap(first: Header, second: Header) -> bool:
    """Whether two grids share space: no axis separates their boxes (separating axis theorem)."""
    corners = _corners(first), _corners(second)
    edges = [header.affine[:3, :3].T for header in (first, second)]
    faces = [np.cross(e[[0, 0, 1]], e[[1, 2, 2]]) for e in edges]
    normals = np.concatenate([*faces, np.cross(edges[0][:, None], edges[1]).reshape(9, 3)])
    normals = normals[np.linalg.norm(normals, axis=1) > 1e-9]
    spans = [points @ normals.T for points in corners]
    separated = (spans[0].max(0) <= spans[1].min(0)) | (spans[1].max(0) <= spans[0].min(0))
    return not separated.any()


def same_grid(first: Header, second: Header) -> bool:
    """Whether the voxels of two images lie at the same places, in whatever order, within ``MAX_SHIFT`` voxels."""
    volumes = (header._replace(shape=header.shape[:3]) for header in (first, second))
    shift = _largest_shift(*map(_canonical, volumes))
    return shift is not None and shift[0] <= MAX_SHIFT


def check_mask(reference: Header, mask: Header) -> list[Finding]:
    """Compare the header of a predicted mask with the header of its reference mask.

    Returns:
        What ``check_headers`` finds in both. Besides, an error if they have one shape and their voxels lie more than
        ``MAX_SHIFT`` voxels apart anywhere; axes that are stored in another order or direction draw a warning
        instead, unless one of the headers states no position. An error if the sizes of the axes are exchanged and
        their directions are not. A warning where the mask covers only a part of the reference.
    """
    findings = check_headers({LABEL: reference, MASK: mask}, LABEL)
    if any(finding.level == ERROR for finding in findings):
        return findings
    findings += _check_axes(reference, mask)
    if any(finding.level == ERROR for finding in findings):
        return findings
    if (fraction := _covered_fraction(reference, mask)) < 1:
        percent = min(99, max(1, round(100 * fraction)))
        text = (
            f"{mask.path} covers {percent}% of the extent of {reference.path}: all voxels outside count as background"
        )
        findings.append(Finding(WARNING, text, key=MASK))
    return findings


def _check_axes(reference: Header, mask: Header) -> list[Finding]:
    """An error or a warning if two masks have the same axes, in whatever order, and lie on different grids."""
    if sorted(mask.shape) != sorted(reference.shape):
        return []
    canonical = _canonical(reference), _canonical(mask)
    shift = _largest_shift(reference, mask)
    if shift is None:
        if canonical[0].shape == canonical[1].shape:
            return []
        sizes = [" x ".join(map(str, header.shape)) for header in (mask, reference)]
        text = (
            f"{mask.path} has {sizes[0]} voxels, but {reference.path} has {sizes[1]}: the axes are in another order, "
            "but the affine is not. Save the mask with the axes of the image."
        )
        return [Finding(ERROR, text, key=MASK)]
    if shift[0] <= MAX_SHIFT:
        return []
    reordered = _largest_shift(*canonical)
    if reordered is None or reordered[0] > MAX_SHIFT or not (reference.placed and mask.placed):
        advice = "Save both with the affine of the image."
        if not reference.placed:
            advice = "Correct the header of the reference: it states no position in space."
        text = (
            f"{mask.path} has the shape of {reference.path}, but another affine: its voxels lie up to "
            f"{shift[1]:.1f} mm ({shift[0]:.1f} voxels) away. {advice}"
        )
        return [Finding(ERROR, text, key=MASK)]
    codes = ["".join(nib.orientations.aff2axcodes(header.affine)) for header in (mask, reference)]
    text = (
        f"{mask.path} stores its axes in another order or direction ({codes[0]}) than {reference.path} "
        f"({codes[1]}): its header is believed"
    )
    return [Finding(WARNING, text, key=MASK)]


def _largest_shift(reference: Header, other: Header) -> tuple[float, float] | None:
    """The largest distance between the same voxel of two grids, in voxels and in mm; None if their shapes differ."""
    if reference.shape != other.shape:
        return None
    corners = np.array(np.meshgrid(*([0, size - 1] for size in reference.shape[:3]), [1])).reshape(4, -1)
    distances = (other.affine - reference.affine) @ corners
    voxels = (np.linalg.inv(reference.affine) @ distances)[:3]
    return float(np.abs(voxels).max()), float(np.linalg.norm(distances[:3], axis=0).max())


def _canonical(header: Header) -> Header:
    """The same grid with axes that run to the right, to anterior and to superior, as far as it can be."""
    orientation = nib.orientations.io_orientation(header.affine)
    shape = header.shape[:3]
    affine = header.affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    return header._replace(affine=affine, shape=tuple(shape[int(axis)] for axis in np.argsort(orientation[:, 0])))


def _covered_fraction(reference: Header, mask: Header) -> float:
    """Fraction of a reference's voxels that lie on the grid of a mask; half a voxel of the mask is tolerated.

    The fraction is counted on at most 64 evenly spaced voxels per axis, which include the first and the last one.
    """
    axes = [np.linspace(0, size - 1, min(size, 64)) for size in reference.shape[:3]]
    to_mask = np.linalg.inv(mask.affine) @ reference.affine
    size = np.array(mask.shape[:3])[:, None]

    def inside(points: Affine, margin: float) -> Any:
        index = to_mask[:3, :3] @ points + to_mask[:3, 3:]
        return ((index >= -0.5 - margin) & (index <= size - 0.5 + margin)).all(0)

    corners = np.array(np.meshgrid(*([axis[0], axis[-1]] for axis in axes))).reshape(3, -1)
    if inside(corners, 0.5).all():  # a grid is convex
        return 1.0
    points = np.array(np.meshgrid(*axes)).reshape(3, -1)
    return min(float(inside(points, 1e-3).mean()), 1 - 1e-9)


def check_intensities(
    voxels: NDArray, path: str, key: str, rules: Rules, intensity: Sequence[float] | str | None = None
) -> list[Finding]:
    """Check an image's voxels in one pass; replace NaN and infinite ones in place if the rules allow it.

    Args:
        voxels: ``H W D``, of any type.
        path: the file, for the messages.
        key: the modality; plausible ranges are known for ``ct`` (HU) and ``pet`` (SUV).
        rules: what is accepted.
        intensity: ``[low, high]`` of the values that the network gets as 0 to 1. Text (``"zscore"``) or None: no such
            range.
    """
    findings = []
    low, high = float(voxels.min()), float(voxels.max())  # NaN if any voxel is NaN
    if not -FLOAT32_MAX <= low <= high <= FLOAT32_MAX:
        nonfinite = ~((voxels >= -FLOAT32_MAX) & (voxels <= FLOAT32_MAX))
        text = f"{path}: {np.count_nonzero(nonfinite)} of {voxels.size} voxels are NaN or infinite"
        if rules.replace_nonfinite is None:
            advice = "Correct the file, or replace them with --replace-nonfinite VALUE."
            return [Finding(ERROR, f"{text}. {advice}", key=key)]
        voxels[nonfinite] = rules.replace_nonfinite
        findings.append(Finding(WARNING, f"{text}, replaced by {rules.replace_nonfinite:g}", key=key))
        low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        text = f"{path} ({key}) is constant: every voxel is {low:g}"
        return [*findings, Finding(WARNING, text, key=key, kind=CONSTANT)]
    implausible = _implausible_range(key, low, high)
    if not implausible and intensity is not None and not isinstance(intensity, str):
        implausible = _unfit_for_network(voxels, key, low, high, intensity)
    return [*findings, Finding(WARNING, f"{path} {implausible}", key=key)] if implausible else findings


def _implausible_range(key: str, low: float, high: float) -> str:
    """Why a range of values does not fit the modality's unit; empty if it fits."""
    values = f"has values from {low:.4g} to {high:.4g}"
    if max(-low, high) > MAX_PLAUSIBLE:
        return f"{values}, beyond what any scanner stores: is a voxel damaged?"
    if key == "ct":
        return f"{values}, none of air (about -1000 HU): is it a CT in HU?" if low > CT_MAX_AIR_HU else ""
    if key == "pet":
        if low < PET_MIN_SUV:
            return f"{values}, far below 0: is it a PET in SUV, not a CT?"
        return f"{values}, above any plausible SUV: is it in Bq/ml?" if high > PET_MAX_SUV else ""
    return f"{values}, far below 0: is it a CT?" if low < MR_MIN else ""


def _unfit_for_network(voxels: NDArray, key: str, low: float, high: float, intensity: Sequence[float]) -> str:
    """Why values do not fit the range that the network gets; empty if they fit."""
    start, end = map(float, intensity)
    text = f"({key}) has values from {low:.4g} to {high:.4g}"
    network = f"the range {start:g} to {end:g} that the network gets: are they in the unit that it was trained with?"
    filled = (high - start) / (end - start)
    if filled < MIN_FILLED.get(key, MIN_FILLED_OTHER):
        return f"{text}, which fill {max(0.0, filled):.2%} of {network}"
    step = max(1, round((voxels.size / SAMPLED_VOXELS) ** (1 / 3)))
    sample = voxels[::step, ::step, ::step].astype(np.float32)
    above = float((sample >= end).mean())
    if above > MAX_ABOVE.get(key, MAX_ABOVE_OTHER):
        return f"{text}, {above:.0%} of them above {network}"
    if key == "ct":
        return ""  # air lies below the range
    below = float((sample < start - BELOW_MARGIN * (end - start)).mean())
    if below > MAX_BELOW:
        return f"{text}, {below:.0%} of them below {network}"
    if key == "pet" and float((sample > start + MAX_PET_P90 * (end - start)).mean()) > 0.1:
        level = start + MAX_PET_P90 * (end - start)
        return f"{text}, more than 10% of them above {level:g}, which is rare in SUV: is it in kBq/ml?"
    return ""


def check_images(
    volumes: Mapping[str, NDArray],
    paths: Mapping[str, str],
    rules: Rules,
    intensity: Mapping[str, Sequence[float] | str] | None = None,
) -> list[Finding]:
    """Run ``check_intensities`` on every image except the label; refuse a case of constant images only.

    Args:
        volumes: by modality, ``H W D``.
        paths: the file of each.
        rules: what is accepted.
        intensity: per modality the range that the network gets.
    """
    images, ranges = {key: volume for key, volume in volumes.items() if key != LABEL}, intensity or {}
    findings = [
        finding
        for key, volume in images.items()
        for finding in check_intensities(volume, paths[key], key, rules, ranges.get(key))
    ]
    return findings + check_all_constant(findings, {key: paths[key] for key in images})


def check_all_constant(findings: Iterable[Finding], paths: Mapping[str, str]) -> list[Finding]:
    """An error if every image of a case is constant. A single constant image may be an empty field of view.

    Args:
        findings: of ``check_intensities`` for all of the case's images.
        paths: the images' files by modality.
    """
    constant = {finding.key for finding in findings if finding.kind == CONSTANT}
    if not paths or constant != set(paths):
        return []
    files = " and ".join(dict.fromkeys(paths.values()))  # one file may provide several modalities
    return [Finding(ERROR, f"Every image of the case is constant ({files}). Check the files.")]
