# SPDX-License-Identifier: Apache-2.0
"""Checks of a case's voxels: NaN, constant images, values that do not fit the modality's unit or the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from scripts.image_io.checks import CONSTANT, ERROR, FLOAT32_MAX, LABEL, WARNING, Finding, Rules

MAX_PLAUSIBLE = 1e9  # no scanner stores larger values, in any unit
CT_MAX_AIR_HU = -200.0  # a CT shows air (about -1000 HU), so its minimum lies below this
PET_MIN_SUV, PET_MAX_SUV = -10.0, 200.0  # g/mL; tumours rarely exceed 50
MR_MIN = -500.0  # MR signals and parameter maps stay above this, HU do not
# Values that do not fit the range that the network gets, as fractions of that range or of the voxels. Measured on 38
# patients of STS, 4 of HECKTOR 2021 and one of PI-CAI (docs/reliability.md):
MIN_FILLED = {"pet": 0.2}  # the largest value must reach this; smallest: PET 0.34, MR 0.91, ADC 1.09; PET in 0..1: 0.1
MIN_FILLED_OTHER = 0.3  # MR in 0..255: 0.21
MAX_ABOVE = {"ct": 0.4, "pet": 0.06}  # of the voxels; largest: CT 0.033 (a skull has more), PET 0.037, MR 0.006
MAX_ABOVE_OTHER = 0.03
MAX_BELOW, BELOW_MARGIN = 0.05, 0.02  # of the voxels, and how far below the range; in PET, MR and ADC there are none
MAX_PET_P90 = 0.3  # the 90th percentile of a PET; largest: 0.195 (SUV 1.95); STS in kBq/ml: from 0.36
SAMPLED_VOXELS = 10**6  # about as many are used for these fractions


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
