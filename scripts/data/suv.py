# SPDX-License-Identifier: Apache-2.0
"""Standardised uptake values (SUV, g/mL, by body weight) from what a PET's DICOM header says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from scripts.data.packages import dicom_package

WEIGHT_KG = (0.2, 500.0)  # what a header can mean
DOSE_BQ = (1e5, 1e11)  # a dose in MBq would lie below


def series_suv(files: Sequence[str], name: str) -> float:
    """``suv_factor`` of a series' files; ValueError where pydicom is not installed."""
    try:
        pydicom = dicom_package("pydicom")
    except ValueError as error:
        raise ValueError(f"{name} is a PET in DICOM: {error}") from error
    return suv_factor([pydicom.dcmread(file, stop_before_pixels=True) for file in files], name)


def suv_factor(slices: Sequence[Any], name: str) -> float:
    """What the stored values (rescaled) are to be multiplied by, so that they are SUV by body weight.

    ``Units`` ``GML`` are SUV already. ``BQML`` are divided by the injected activity per gram of the patient; where the
    images are corrected for decay to the start of the scan (``START``), the activity is brought there, too; where they
    are corrected to the injection (``ADMIN``), it is taken as injected. The start of the scan is the series' time, or
    the earliest acquisition's where that is earlier (a series time may be that of a later reconstruction).

    Args:
        slices: headers of one series (pydicom datasets).
        name: of the series' folder, for errors.

    Raises:
        ValueError: other units or corrections, and what is missing or makes no sense.
    """
    first = slices[0]
    units = str(first.get("Units", "")) or "none"
    if units == "GML":
        kind = str(first.get("SUVType", "") or "BW")
        if kind != "BW":
            raise ValueError(f"{name} is in SUV by {kind}, not by body weight (BW): convert it.")
        return 1.0
    if units != "BQML":
        raise ValueError(f"{name} has the units {units}: only BQML and GML become SUV by body weight.")
    decay = str(first.get("DecayCorrection", "")) or "none"
    if decay not in ("START", "ADMIN"):
        raise ValueError(f"{name} has the decay correction {decay}: START or ADMIN is needed for SUV.")
    weight = _number(first, "PatientWeight", name, WEIGHT_KG, "kg")
    infusions = list(first.get("RadiopharmaceuticalInformationSequence", []) or [])
    if len(infusions) != 1:
        raise ValueError(f"{name} names {len(infusions)} radiopharmaceuticals: exactly one is needed for SUV.")
    dose = _number(infusions[0], "RadionuclideTotalDose", name, DOSE_BQ, "Bq")
    if decay == "START":
        half_life = _number(infusions[0], "RadionuclideHalfLife", name, (1.0, 1e9), "s")
        dose *= math.exp2(-_uptake_seconds(slices, infusions[0], name) / half_life)
    return weight * 1000.0 / dose


def _number(dataset: Any, keyword: str, name: str, limits: tuple[float, float], unit: str) -> float:
    value = dataset.get(keyword)
    if value in (None, ""):
        raise ValueError(f"{name} lacks {keyword}, which SUV needs: add it, or give the PET as SUV.")
    if not limits[0] <= float(value) <= limits[1]:
        raise ValueError(f"{name} has a {keyword} of {float(value):g} {unit}, which cannot be: correct it.")
    return float(value)


def _uptake_seconds(slices: Sequence[Any], infusion: Any, name: str) -> float:
    """From the injection to the start of the scan."""
    scan = _scan_start(slices, name)
    injected = _time(str(infusion.get("RadiopharmaceuticalStartDateTime", "") or ""))
    if injected is None:
        time = str(infusion.get("RadiopharmaceuticalStartTime", "") or "")
        injected = _time(f"{scan:%Y%m%d}{time}") if time else None
        if injected is not None and injected > scan:  # injected before midnight
            injected -= timedelta(days=1)
    if injected is None:
        raise ValueError(f"{name} lacks the time of injection, which SUV needs: add it, or give the PET as SUV.")
    seconds = (scan - injected).total_seconds()
    if not 0 <= seconds < 86400:
        raise ValueError(
            f"{name} was injected {seconds / 3600:.1f} hours before its scan, which cannot be: correct it."
        )
    return seconds


def _scan_start(slices: Sequence[Any], name: str) -> datetime:
    times = [
        _time(f"{each.get(f'{kind}Date', '') or ''}{each.get(f'{kind}Time', '') or ''}")
        for each in slices
        for kind in ("Series", "Acquisition")
        if each.get(f"{kind}Date") and each.get(f"{kind}Time")
    ]
    known = [time for time in times if time is not None]
    if not known:
        raise ValueError(f"{name} lacks the times of series and acquisition, which SUV needs: add one.")
    return min(known)


def _time(text: str) -> datetime | None:
    """DICOM's date and time, ``YYYYMMDDHHMMSS.ffffff``; an offset from UTC is left out, as in the other times."""
    digits = text.strip()[:14].partition("+")[0].partition("-")[0].partition(".")[0]
    try:
        return datetime.strptime(digits, "%Y%m%d%H%M%S")
    except ValueError:
        try:
            return datetime.strptime(digits, "%Y%m%d%H%M")
        except ValueError:
            return None
