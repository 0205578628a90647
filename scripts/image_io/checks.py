# SPDX-License-Identifier: Apache-2.0
"""The one place where images are judged: by every verb, by the bundle's configs and by MONAI Label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor

from scripts.image_io.headers import MAX_VOXELS, Affine, Header

logger = logging.getLogger(__name__)

ERROR, WARNING, NOTE = "error", "warning", "note"
CONSTANT = "constant"
LABEL = "label"
AIR_HU, MOST_SUV, LEAST_SUV = -200.0, 200.0, -10.0  # air has about -1000 HU; tumours rarely exceed 50 g/mL
BEYOND = 1e9  # no scanner stores such values, whatever their unit
MOST = float(np.finfo(np.float32).max)  # what is beyond becomes infinite on its way to the network
LEAST_SIGNAL = -500.0  # magnetic resonance and its maps do not go there, HU do


class Finding(NamedTuple):
    """A sentence about a case: an error is refused, a warning is told, a note is there for who wants to know.

    Attributes:
        level: ``ERROR``, ``WARNING`` or ``NOTE``.
        what: the sentence.
        case_id, key: whose it is; the key is a modality or ``label``.
        kind: ``CONSTANT``, or nothing where nobody goes by it.
    """

    level: str
    what: str
    case_id: str = ""
    key: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Rules:
    """What is accepted beyond the usual.

    Attributes:
        max_voxels: a file whose header claims more is refused before memory is asked for.
        replace_nonfinite: value for NaN and infinite voxels; None refuses them.
        series_uids: DICOM series to take from folders that hold several.

    Raises:
        ValueError: the value for NaN would not be finite itself.
    """

    max_voxels: int = MAX_VOXELS
    replace_nonfinite: float | None = None
    series_uids: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        value = self.replace_nonfinite
        if value is not None and not (isinstance(value, int | float) and abs(value) <= MOST):
            raise ValueError(f"--replace-nonfinite is {value}: give a number that is finite in float32, such as 0.")


def settle(findings: Iterable[Finding], notes: bool = False) -> None:
    """Log what is to be told, and refuse what is wrong.

    Args:
        findings: of one case.
        notes: log notes, too.

    Raises:
        ValueError: there are errors; it holds all of their sentences.
    """
    errors = []
    for each in findings:
        if each.level == ERROR:
            errors.append(each.what)
        elif each.level == WARNING or notes:
            logger.log(logging.WARNING if each.level == WARNING else logging.INFO, "%s", each.what)
    if errors:
        raise ValueError(" ".join(dict.fromkeys(errors)))  # one file may stand for several modalities


def judge_headers(headers: Mapping[str, Header], reference: str, stacked: Sequence[str] = ()) -> list[Finding]:
    """What the heads of one case's files say of one another.

    Args:
        headers: by modality, and ``label``.
        reference: the modality on whose grid everything is brought.
        stacked: modalities along the last axis of the one 4D file that each of them names.
    """
    found = [Finding(WARNING, what, key=key) for key, header in headers.items() for what in header.warnings]
    for key, header in headers.items():
        if header.shape[3:] != (several := last_axes(key, stacked)):
            wanted = f"4D file whose last axis is {', '.join(stacked)}" if several else "3D volume per file"
            sizes = " x ".join(map(str, header.shape))
            found.append(Finding(ERROR, f"{header.path} holds {sizes} voxels: give one {wanted}.", key=key))
    found += _slices(headers) + _series(headers)
    if reference in headers:
        others = {key: header for key, header in headers.items() if key != reference}
        found += [each for key, header in others.items() for each in _against(headers[reference], header, key)]
    return found


def last_axes(key: str, stacked: Sequence[str]) -> tuple[int, ...]:
    """What a file's shape must have behind its first three axes; an axis of length 1 counts as none."""
    return (len(stacked),) if key in stacked and len(stacked) > 1 else ()


def _slices(headers: Mapping[str, Header]) -> list[Finding]:
    single = [key for key, header in headers.items() if 1 in header.shape[:3]]
    if not single:
        return []
    if len(single) == len(headers):
        return [Finding(WARNING, f"{headers[single[0]].path} and the case's other files are single slices")]
    volume = next(header.path for key, header in headers.items() if key not in single)
    return [
        Finding(ERROR, f"{headers[key].path} is a single slice, but {volume} is a volume: give volumes.", key=key)
        for key in single
    ]


def _series(headers: Mapping[str, Header]) -> list[Finding]:
    """Series of different patients or frames of reference; the patients' ids are not told."""
    known = [(header.path, header.series) for header in headers.values() if header.series]
    found = []
    for (path, (_, patient, frame)), (other, (_, patient2, frame2)) in combinations(known, 2):
        if patient != patient2:
            found.append(Finding(ERROR, f"{path} and {other} are of different patients: give series of one patient."))
        elif frame != frame2:
            what = f"{path} has the frame of reference {frame or 'unknown'}, {other} has {frame2 or 'unknown'}"
            found.append(Finding(ERROR, f"{what}: register one to the other first."))
    return found


def _against(reference: Header, other: Header, key: str) -> list[Finding]:
    """Where an image lies beside the reference."""
    if not overlap(reference, other):
        what = f"{other.path} and {reference.path} do not overlap in space: check which files belong together."
        return [Finding(ERROR, what, key=key)]
    if other.shape == reference.shape and np.allclose(other.affine, reference.affine, atol=1e-3):
        return []
    (axes, sizes), (axes2, sizes2) = _axes(reference.affine), _axes(other.affine)
    turn = axes2.T @ axes
    largest = np.abs(turn).argmax(1)  # axes may be exchanged and flipped without being turned
    angle = float(np.degrees(np.arccos(np.clip(np.abs(turn[range(3), largest]), 0, 1))).max())
    away = float(np.linalg.norm(_centre(other) - _centre(reference)))
    spacing = " x ".join(f"{size:.3g}" for size in sizes2)
    what = f"{key}: centre {away:.2f} mm from the reference's, turned by {angle:.1f} degrees, voxels of {spacing} mm"
    return [Finding(NOTE, f"{what} (the reference's: {' x '.join(f'{size:.3g}' for size in sizes)} mm)", key=key)]


def _axes(affine: Affine) -> tuple[Affine, Affine]:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    return affine[:3, :3] / sizes, sizes


def _corners(header: Header) -> Affine:
    """World coordinates of a grid's outer corners, 8 x 3."""
    ends = [[-0.5, size - 0.5] for size in header.shape[:3]]
    points = np.array(np.meshgrid(*ends)).reshape(3, -1).T
    return points @ header.affine[:3, :3].T + header.affine[:3, 3]


def _centre(header: Header) -> Affine:
    return _corners(header).mean(0)


def overlap(first: Header, second: Header) -> bool:
    """Whether two grids share any space: no axis separates their boxes (separating axis theorem)."""
    corners = _corners(first), _corners(second)
    edges = [header.affine[:3, :3].T for header in (first, second)]
    faces = [np.cross(e[[0, 0, 1]], e[[1, 2, 2]]) for e in edges]
    normals = np.concatenate([*faces, np.cross(edges[0][:, None], edges[1]).reshape(9, 3)])
    normals = normals[np.linalg.norm(normals, axis=1) > 1e-9]
    spans = [points @ normals.T for points in corners]
    apart = (spans[0].max(0) <= spans[1].min(0)) | (spans[1].max(0) <= spans[0].min(0))
    return not apart.any()


def judge_voxels(volume: MetaTensor, key: str, rules: Rules) -> list[Finding]:
    """One pass over an image's voxels; NaN and infinite ones are replaced in place where the rules say so.

    Args:
        volume: of any shape and type; its metadata name the file.
        key: the modality, whose plausible range is known for ``ct`` (HU) and ``pet`` (SUV).
        rules: what is accepted.
    """
    path, voxels = volume.meta.get("filename_or_obj", key), volume.as_tensor()
    found = []
    low, high = (float(each) for each in torch.aminmax(voxels))  # NaN where there is one
    if not -MOST <= low <= high <= MOST:
        strange = ~((voxels >= -MOST) & (voxels <= MOST))
        what = f"{path} holds {int(strange.sum())} voxels of {voxels.numel()} that are NaN or infinite"
        if rules.replace_nonfinite is None:
            advice = "correct the file, or replace them by --replace-nonfinite VALUE."
            return [Finding(ERROR, f"{what}: {advice}", key=key)]
        voxels[strange] = rules.replace_nonfinite
        found.append(Finding(WARNING, f"{what}: replaced by {rules.replace_nonfinite:g}", key=key))
        low, high = (float(each) for each in torch.aminmax(voxels))
    if low == high:
        what = f"{path} ({key}) is constant: every voxel is {low:g}"
        return [*found, Finding(WARNING, what, key=key, kind=CONSTANT)]
    doubt = _doubt(key, low, high)
    return [*found, Finding(WARNING, f"{path} {doubt}", key=key)] if doubt else found


def _doubt(key: str, low: float, high: float) -> str:
    """What speaks against values being in the modality's units."""
    values = f"has values from {low:.4g} to {high:.4g}"
    if max(-low, high) > BEYOND:
        return f"{values}, beyond what any scanner stores: is a voxel damaged?"
    if key == "ct":
        return f"{values}, none of air (about -1000 HU): is it a CT in HU?" if low > AIR_HU else ""
    if key == "pet":
        if low < LEAST_SUV:
            return f"{values}, far below 0: is it a PET in SUV, not a CT?"
        return f"{values}, more than an SUV reaches: is it in Bq/ml?" if high > MOST_SUV else ""
    return f"{values}, far below 0: is it a CT?" if low < LEAST_SIGNAL else ""


def judge_images(volumes: Mapping[str, MetaTensor], rules: Rules) -> list[Finding]:
    """``judge_voxels`` of every image but the label; constant images alone are refused."""
    images = {key: volume for key, volume in volumes.items() if key != LABEL}
    found = [each for key, volume in images.items() for each in judge_voxels(volume, key, rules)]
    names = {key: str(volume.meta.get("filename_or_obj", key)) for key, volume in images.items()}
    return found + judge_constant(found, names)


def judge_constant(findings: Iterable[Finding], names: Mapping[str, str]) -> list[Finding]:
    """One constant image may be an empty field of view; a case of nothing else is an error.

    Args:
        findings: of ``judge_voxels`` for all of the case's images.
        names: their files by modality.
    """
    constant = {each.key for each in findings if each.kind == CONSTANT}
    if not names or constant != set(names):
        return []
    listed = " and ".join(dict.fromkeys(names.values()))  # one file may stand for several modalities
    return [Finding(ERROR, f"Every image of the case is constant ({listed}): check the files.")]
