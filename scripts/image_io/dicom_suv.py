# SPDX-License-Identifier: Apache-2.0
"""Standardised uptake values (SUV, g/mL, by body weight) from what a PET's DICOM header says."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from scripts.image_io.dicom_packages import dicom_package

logger = logging.getLogger(__name__)

WEIGHT_KG = (0.2, 500.0)  # what a header can mean
DOSE_BQ = (1e5, 1e11)  # a dose in MBq would lie below
# From the injection to the scan. FDG is scanned within a few hours; after 12 hours 1% of fluorine-18 is left (half life
# 110 minutes). Longer ones are of other tracers than the network knows, or of a clock or date that is wrong.
LONGEST = timedelta(hours=12)
CORRECTIONS = {"ATTN": "attenuation", "DECY": "decay"}  # which QIBA asks for
CLOCK = r"\d\d(?:\d\d(?:\d\d(?:\.\d{1,6})?)?)?"  # HH, HHMM, HHMMSS, HHMMSS.ffffff
ZONE = r"[+-]\d{4}"  # from UTC


def series_suv(files: Sequence[str], name: str) -> float:
    """``suv_factor`` of a series' files; ValueError where pydicom is not installed."""
    try:
        pydicom = dicom_package("pydicom")
    except ValueError as error:
        raise ValueError(f"{name} is a PET in DICOM: {error}") from error
    try:
        slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    except Exception:  # pydicom says in many ways that a file is damaged, and quotes it
        raise ValueError(f"{name} holds a damaged DICOM file: export the series again.") from None
    return suv_factor(slices, name)


def suv_factor(slices: Sequence[Any], name: str) -> float:
    """What the stored values (rescaled) are to be multiplied by, so that they are SUV by body weight.

    ``Units`` ``GML`` are SUV already. ``BQML`` are divided by the injected activity per gram of the patient; where the
    images are corrected for decay to the start of the scan (``START``), the activity is brought there, too; where they
    are corrected to the injection (``ADMIN``), it is taken as injected. The start of the scan is the series' time, or
    the earliest acquisition's where that is earlier (a series time may be that of a later reconstruction) or where the
    series' lies before the injection.

    Args:
        slices: headers of one series (pydicom datasets).
        name: of the series' folder, for errors.

    Raises:
        ValueError: other units or corrections, and what is missing or makes no sense.
    """
    first = slices[0]
    _refuse_uncorrected(first, name)
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
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} has a {keyword} that is not one number: correct it.") from None
    if not limits[0] <= number <= limits[1]:
        raise ValueError(f"{name} has a {keyword} of {number:g} {unit}, which cannot be: correct it.")
    return number


def _refuse_uncorrected(first: Any, name: str) -> None:
    """What the images are corrected for, where they say so."""
    told = first.get("CorrectedImage") or []
    words = [told] if isinstance(told, str) else list(told)
    lost = [word for word in CORRECTIONS if words and word not in words]
    if lost:
        names = " and ".join(f"{CORRECTIONS[word]} ({word})" for word in lost)
        raise ValueError(f"{name} is not corrected for {names} by its CorrectedImage: give the series that is.")


def _uptake_seconds(slices: Sequence[Any], infusion: Any, name: str) -> float:
    """From the injection to the start of the scan.

    Of an injection whose date is not told, it is the scan's, or the day before where the uptake is plausible by that.
    """
    starts = _scan_starts(slices, name)
    dated, clock = (str(infusion.get(f"Radiopharmaceutical{tag}") or "") for tag in ("StartDateTime", "StartTime"))
    if dated:
        tag, uptakes = "RadiopharmaceuticalStartDateTime", _since(dated, starts, name)
    elif clock:
        tag, zone = "RadiopharmaceuticalStartTime", f"{starts[0]:%z}"
        same = [start - _moment(f"{start:%Y%m%d}", clock, zone, tag, name) for start in starts]
        uptakes = same + [each + timedelta(days=1) for each in same]
    else:
        raise ValueError(f"{name} lacks the time of injection, which SUV needs: add it, or give the PET as SUV.")
    found = _plausible(uptakes)
    if found is not None:
        return found.total_seconds()
    hours, tags = uptakes[0].total_seconds() / 3600, f"by {tag} and the dates and times of Series and Acquisition"
    if hours < 0:
        raise ValueError(f"{name} was scanned {-hours:.1f} hours before its injection {tags}: correct what is wrong.")
    raise ValueError(
        f"{name} was scanned {hours:.1f} hours after its injection {tags}, and at most "
        f"{LONGEST.total_seconds() / 3600:g} are taken here: correct what is wrong, or give the PET as SUV."
    )


def _plausible(uptakes: Sequence[timedelta]) -> timedelta | None:
    return next((each for each in uptakes if timedelta(0) <= each <= LONGEST), None)


def _since(dated: str, starts: Sequence[datetime], name: str) -> list[timedelta]:
    """From the injection's date and time to each start, in one zone."""
    tag = "RadiopharmaceuticalStartDateTime"
    parts = re.fullmatch(rf"(\d{{8}})({CLOCK})({ZONE})?", dated.strip())
    if not parts:
        raise ValueError(f"{name} holds no valid date and time in {tag}: correct it.")
    own, scans = parts[3], f"{starts[0]:%z}"
    injected = _moment(parts[1], parts[2], (own or scans) if scans else "", tag, name)
    uptakes = [start - injected for start in starts]
    if own and not scans:
        if _plausible(uptakes) is None:
            hours = uptakes[0].total_seconds() / 3600
            raise ValueError(
                f"{name} has a {tag} with an offset from UTC and no TimezoneOffsetFromUTC, and if both were of one "
                f"zone, its scan would lie {hours:.1f} hours after the injection: add TimezoneOffsetFromUTC."
            )
        logger.warning("%s: the offset from UTC in %s was left out: TimezoneOffsetFromUTC is lacking.", name, tag)
    return uptakes


def _scan_starts(slices: Sequence[Any], name: str) -> list[datetime]:
    """The series' time and the earliest acquisition's, as far as they are told; the earlier one first."""
    zone, starts = str(slices[0].get("TimezoneOffsetFromUTC") or "").strip(), []
    for kind in ("Series", "Acquisition"):
        tags = f"{kind}Date", f"{kind}Time"
        told = {tuple(str(each.get(tag) or "") for tag in tags) for each in slices}
        what = f"{tags[0]}, {tags[1]}{' or TimezoneOffsetFromUTC' if zone else ''}"
        moments = [_moment(date, clock, zone, what, name) for date, clock in told if date and clock]
        starts += [min(moments)] if moments else []
    if not starts:
        raise ValueError(f"{name} lacks the times of series and acquisition, which SUV needs: add one.")
    return sorted(starts)


def _moment(date: str, clock: str, zone: str, tag: str, name: str) -> datetime:
    """DICOM's DA and TM, in a zone where there is one; parts of a second are left out."""
    date, clock = date.strip(), clock.strip()
    try:
        if not (re.fullmatch(r"\d{8}", date) and re.fullmatch(CLOCK, clock) and re.fullmatch(f"(?:{ZONE})?", zone)):
            raise ValueError
        whole = date + clock.partition(".")[0].ljust(6, "0") + zone
        return datetime.strptime(whole, "%Y%m%d%H%M%S%z" if zone else "%Y%m%d%H%M%S")
    except ValueError:
        raise ValueError(f"{name} holds no valid date or time in {tag}: correct it.") from None
