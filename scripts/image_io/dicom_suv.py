# SPDX-License-Identifier: Apache-2.0
"""Standardised uptake values (SUV by body weight, g/mL) from the DICOM headers of a PET series."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from scripts.image_io.dicom_classes import ENHANCED
from scripts.image_io.dicom_enhanced import pet_elements
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.pet_header import START_TIMES, complete_header, given_factor, philips_factor, require_complete
from scripts.image_io.suv_values import DOSE, FACTOR, HALF_LIFE, QUANTITIES, WEIGHT, SuvValues, options_of

logger = logging.getLogger(__name__)

# Longest time from injection to scan. FDG is scanned within a few hours, and after 12 hours 1% of fluorine-18 is left
# (half life 110 minutes). A longer time means another tracer than the network was trained on, or a wrong clock or date.
MAX_UPTAKE = timedelta(hours=12)
CORRECTIONS = {"ATTN": "attenuation", "DECY": "decay"}  # required by QIBA
SAME_IN_ALL = ("Units", "SUVType", "DecayCorrection", "CorrectedImage", "PatientWeight")  # slices of a series
UTC_OFFSET = r"[+-]\d{4}"


def series_suv_factor(files: Sequence[str], name: str, given: SuvValues | None = None) -> float:
    """Run ``suv_factor`` on a series' files. Also raises ValueError if pydicom is not installed."""
    try:
        pydicom = dicom_package("pydicom")
    except ValueError as error:
        raise ValueError(f"{name} is a PET in DICOM: {error}") from error
    try:
        slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        slices = [pet_elements(head) if str(head.SOPClassUID) in ENHANCED else head for head in slices]
        differing = [keyword for keyword in SAME_IN_ALL if len({str(head.get(keyword)) for head in slices}) > 1]
        differing += ["factors of Philips"] if len({philips_factor(head) for head in slices}) > 1 else []
    except Exception:  # pydicom raises many exception types on a damaged file, and quotes its content
        raise ValueError(f"{name} contains a damaged DICOM file. Export the series again.") from None
    if differing:
        raise ValueError(f"{name} contains slices with different {differing[0]}. Export the series again.")
    try:
        return suv_factor(slices, name, given)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} contains a damaged DICOM file. Export the series again.") from None


def suv_factor(slices: Sequence[Any], name: str, given: SuvValues | None = None) -> float:
    """The factor that turns a series' values (after rescaling) into SUV by body weight.

    - ``Units`` ``GML``: the values are SUV already; the factor is 1.
    - ``Units`` ``BQML``: the values are divided by the injected activity per gram of body weight. If the images are
      decay-corrected to the start of the scan (``START``), the activity is decayed to that time, too. If they are
      corrected to the injection (``ADMIN``), the injected activity is used.
    - ``Units`` ``CNTS`` of Philips: the private factor (7053,1000); without it, (7053,1009) gives Bq/ml.

    The start of the scan is the series' time. The earliest acquisition's time is used instead if it is earlier (the
    series' time may be that of a later reconstruction), or if the series' time lies before the injection.

    Args:
        slices: headers of one series (pydicom datasets).
        name: the series' folder, for error messages.
        given: what the header lacks, see ``scripts.image_io.suv_values``. A value that the header has, too, must be
            the same; ``suv_factor`` stands against the header, with a warning.

    Raises:
        ValueError: other units or corrections; values that are missing, implausible or contradictory.
    """
    first, given = slices[0], given or {}
    _require_corrections(first, name)
    units = str(first.get("Units", "")) or "none"
    if FACTOR in given:
        return given_factor(lambda: _header_factor(slices, first, units, name), float(given[FACTOR]), units, name)
    if given and (units == "GML" or (units == "CNTS" and philips_factor(first)[0])):
        why = "its values are SUV already" if units == "GML" else "Philips' factor (7053,1000) stands in the header"
        logger.warning("%s: %s is not used, because %s.", name, options_of(given), why)
    elif given:
        first = complete_header(first, given, name)
    return _header_factor(slices, first, units, name)


def _header_factor(slices: Sequence[Any], first: Any, units: str, name: str) -> float:
    """The factor by the header ``first``; the times of the scan are those of all ``slices``."""
    if units == "GML":
        suv_type = str(first.get("SUVType", "") or "BW")
        if suv_type != "BW":
            raise ValueError(f"{name} is in SUV by {suv_type}, not by body weight (BW). Convert it.")
        return 1.0
    suv, bq_per_ml = philips_factor(first) if units == "CNTS" else (0.0, 1.0)
    if suv:
        return suv
    if units not in ("BQML", "CNTS") or not bq_per_ml:
        raise ValueError(
            f"{name} has the units {units}. Only BQML, GML and CNTS with a factor of Philips (7053,1000 or 7053,1009) "
            "can be converted to SUV by body weight. Give the whole conversion with --suv-factor, or the PET as SUV."
        )
    decay = str(first.get("DecayCorrection", "")) or "none"
    if decay not in ("START", "ADMIN"):
        raise ValueError(
            f"{name} has the decay correction {decay}. SUV requires START or ADMIN, or a given --suv-factor."
        )
    injections = list(first.get("RadiopharmaceuticalInformationSequence", []) or [])
    if len(injections) > 1:
        raise ValueError(f"{name} lists {len(injections)} radiopharmaceuticals. SUV requires exactly one.")
    require_complete(first, decay == "START", name)
    weight = _number(first, "PatientWeight", name, WEIGHT)
    dose = _number(injections[0], "RadionuclideTotalDose", name, DOSE)
    if decay == "START":
        half_life = _number(injections[0], "RadionuclideHalfLife", name, HALF_LIFE)
        dose *= math.exp2(-_uptake_seconds(slices, injections[0], name) / half_life)
    return bq_per_ml * weight * 1000.0 / dose


def _number(dataset: Any, keyword: str, name: str, key: str) -> float:
    """An element as the quantity of ``QUANTITIES`` that it is."""
    try:
        number = float(dataset.get(keyword))
    except (TypeError, ValueError):
        raise ValueError(f"{name} has a {keyword} that is not a number. Correct it.") from None
    low, high = QUANTITIES[key].limits
    if not low <= number <= high:
        raise ValueError(
            f"{name} has an implausible {keyword} of {number:g} {QUANTITIES[key].unit}. Correct it, or give "
            f"{options_of([key])}, which replaces it."
        )
    return number


def _require_corrections(first: Any, name: str) -> None:
    """Refuse images that list their corrections (``CorrectedImage``) without attenuation and decay."""
    value = first.get("CorrectedImage") or []
    applied = [value] if isinstance(value, str) else list(value)
    missing = [code for code in CORRECTIONS if applied and code not in applied]
    if missing:
        names = " and ".join(f"{CORRECTIONS[code]} ({code})" for code in missing)
        raise ValueError(f"{name} is not corrected for {names}, see its CorrectedImage. Give the corrected series.")


def _uptake_seconds(slices: Sequence[Any], injection: Any, name: str) -> float:
    """Seconds from the injection to the start of the scan.

    If only the time of the injection is given, its date is that of the scan, or the day before if only that gives a
    plausible uptake time.
    """
    starts = _scan_starts(slices, name)
    date_time, clock = (str(injection.get(tag) or "") for tag in START_TIMES)
    if date_time:
        tag, uptakes = "RadiopharmaceuticalStartDateTime", _uptakes_since(date_time, starts, name)
    else:
        tag, offset = "RadiopharmaceuticalStartTime", f"{starts[0]:%z}"
        same_day = [start - _parse_time(f"{start:%Y%m%d}", clock, offset, tag, name) for start in starts]
        uptakes = same_day + [uptake + timedelta(days=1) for uptake in same_day]
    plausible = _first_plausible(uptakes)
    if plausible is not None:
        return plausible.total_seconds()
    hours, sources = uptakes[0].total_seconds() / 3600, f"by {tag} and the dates and times of Series and Acquisition"
    if hours < 0:
        raise ValueError(f"{name} was scanned {-hours:.1f} hours before its injection {sources}. Correct them.")
    limit = MAX_UPTAKE.total_seconds() / 3600
    raise ValueError(
        f"{name} was scanned {hours:.1f} hours after its injection {sources}; the limit is {limit:g} hours. "
        "Correct them, or give the PET as SUV."
    )


def _first_plausible(uptakes: Sequence[timedelta]) -> timedelta | None:
    return next((uptake for uptake in uptakes if timedelta(0) <= uptake <= MAX_UPTAKE), None)


def _uptakes_since(date_time: str, starts: Sequence[datetime], name: str) -> list[timedelta]:
    """Times from the injection (DICOM's DT) to each start of the scan, in one time zone."""
    tag = "RadiopharmaceuticalStartDateTime"
    parts = re.fullmatch(rf"(\d{{8}})([\d.]+)({UTC_OFFSET})?", date_time.strip())
    if not parts:
        raise ValueError(f"{name} has an invalid date and time in {tag}. Correct it.")
    own_offset, scan_offset = parts[3], f"{starts[0]:%z}"
    offset = (own_offset or scan_offset) if scan_offset else ""
    injected = _parse_time(parts[1], parts[2], offset, tag, name)
    uptakes = [start - injected for start in starts]
    if own_offset and not scan_offset:
        if _first_plausible(uptakes) is None:
            hours = uptakes[0].total_seconds() / 3600
            raise ValueError(
                f"{name} has a {tag} with an offset from UTC but no TimezoneOffsetFromUTC. In the same time zone, the "
                f"scan would be {hours:.1f} hours after the injection. Add TimezoneOffsetFromUTC."
            )
        logger.warning("%s: ignored the offset from UTC in %s, as there is no TimezoneOffsetFromUTC.", name, tag)
    return uptakes


def _scan_starts(slices: Sequence[Any], name: str) -> list[datetime]:
    """The series' time and the earliest acquisition's, if present; the earlier one first."""
    offset = str(slices[0].get("TimezoneOffsetFromUTC") or "").strip()
    starts = []
    for kind in ("Series", "Acquisition"):
        tags = f"{kind}Date", f"{kind}Time"
        values = {tuple(str(head.get(tag) or "") for tag in tags) for head in slices}
        sources = f"{tags[0]}, {tags[1]}{' or TimezoneOffsetFromUTC' if offset else ''}"
        times = [_parse_time(date, clock, offset, sources, name) for date, clock in values if date and clock]
        starts += [min(times)] if times else []
    if not starts:
        raise ValueError(
            f"{name} has no time of the series or its acquisition, which SUV requires. Add one, or give --suv-factor."
        )
    return sorted(starts)


def _parse_time(date: str, clock: str, utc_offset: str, tag: str, name: str) -> datetime:
    """Parse DICOM's DA and TM, and an offset from UTC, which may be empty. Fractions of a second are dropped."""
    values = dicom_package("pydicom.valuerep")
    date, clock = date.strip(), clock.strip()
    try:
        if not (date.isdecimal() and clock and re.fullmatch(f"(?:{UTC_OFFSET})?", utc_offset)):  # DA takes 2020.01.02
            raise ValueError
        day, time = values.DA(date), values.TM(clock)
        zone = datetime.strptime(utc_offset, "%z").tzinfo if utc_offset else None
        return datetime(day.year, day.month, day.day, time.hour, time.minute, time.second, tzinfo=zone)
    except ValueError:
        raise ValueError(f"{name} has an invalid date or time in {tag}. Correct it.") from None
