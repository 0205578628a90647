# SPDX-License-Identifier: Apache-2.0
"""What a PET's header has of the values that SUV requires, and given values in place of those that it lacks.

A given value never replaces a plausible value of the header: one of the two is another patient's, or an error, and
nobody can tell which. It must be the same, within ``SAME``. It replaces a value that is implausible or no number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.suv_values import DOSE, HALF_LIFE, QUANTITIES, TIME, WEIGHT, SuvValues, option, options_of

logger = logging.getLogger(__name__)

SAME = 0.01  # relative difference up to which two statements of one value are the same
SAME_SECONDS = 60.0
PHILIPS = "Philips PET Private Group"
SUV_SCALE, ACTIVITY_SCALE = 0x00, 0x09  # (7053,1000) and (7053,1009), if the block is the first
DRUGS = "RadiopharmaceuticalInformationSequence"
START_TIMES = ("RadiopharmaceuticalStartDateTime", "RadiopharmaceuticalStartTime")  # the first is used before the other
KEYWORDS = {WEIGHT: "PatientWeight", DOSE: "RadionuclideTotalDose", HALF_LIFE: "RadionuclideHalfLife"}


def philips_factor(head: Any) -> tuple[float, float]:
    """The private factors of Philips, for ``Units`` ``CNTS``: SUV and Bq/ml of a value of 1 after rescaling.

    0 where there is none: 0, absent, or no number.
    """
    factors = []
    for element in (SUV_SCALE, ACTIVITY_SCALE):
        try:
            factors.append(max(0.0, float(head.private_block(0x7053, PHILIPS)[element].value)))
        except (KeyError, TypeError, ValueError):
            factors.append(0.0)
    return factors[0], factors[1]


def require_complete(head: Any, needs_uptake: bool, name: str) -> None:
    """Refuse a header that lacks values; the message names all of them, and the options that give them.

    Args:
        head: of the first slice; it lists one radiopharmaceutical, or none.
        needs_uptake: whether the time since the injection is needed.
        name: the series' folder.

    Raises:
        ValueError: values are missing.
    """
    drug: Any = next(iter(head.get(DRUGS) or []), {})
    lacks = {WEIGHT: "PatientWeight"} if head.get("PatientWeight") in (None, "") else {}
    lacks |= {key: KEYWORDS[key] for key in (DOSE, HALF_LIFE) if drug.get(KEYWORDS[key]) in (None, "")}
    if not any(str(drug.get(tag) or "") for tag in START_TIMES):
        lacks[TIME] = "time of injection"
    if not needs_uptake:
        lacks = {key: what for key, what in lacks.items() if key in (WEIGHT, DOSE)}
    if lacks:
        *others, last = [f"no {what}" for what in lacks.values()]
        listed = " and ".join(filter(None, (", ".join(others), last)))
        raise ValueError(
            f"{name} has {listed}, which SUV requires. Give {options_of(lacks)} (in a table: columns of these "
            "names with underscores), or the PET as SUV."
        )


def complete_header(head: Any, given: SuvValues, name: str) -> Any:
    """A copy of a header with the given values in place of those that it lacks; each is logged.

    Args:
        head: of the first slice of a PET.
        given: see ``scripts.image_io.suv_values``, without a factor.
        name: the series' folder.

    Raises:
        ValueError: the header has another, plausible value.
    """
    pydicom = dicom_package("pydicom")
    completed = pydicom.Dataset()
    completed.update(head)  # shares the elements: each change adds a new one
    drugs = list(head.get(DRUGS) or [])
    if len(drugs) > 1:
        return completed  # refused later
    drug = pydicom.Dataset()
    drug.update(drugs[0] if drugs else {})
    completed.add_new(pydicom.datadict.tag_for_keyword(DRUGS), "SQ", pydicom.Sequence([drug]))
    for key, value in given.items():
        if key == TIME:
            _set_time(drug, str(value), name)
        else:
            _set_number(completed if key == WEIGHT else drug, key, float(value), name)
    return completed


def _set_number(dataset: Any, key: str, value: float, name: str) -> None:
    keyword, quantity = KEYWORDS[key], QUANTITIES[key]
    present = dataset.get(keyword)
    text = f"{value:g} {quantity.unit}"
    if present in (None, ""):
        logger.info("%s: %s of %s is used, the header has no %s.", name, option(key), text, keyword)
    else:
        try:
            number = float(present)
        except (TypeError, ValueError):
            number = float("nan")
        if quantity.limits[0] <= number <= quantity.limits[1]:
            if abs(number - value) > SAME * number:
                raise ValueError(
                    f"{name} has a {keyword} of {number:g} {quantity.unit}, but {option(key)} is {text}. Remove "
                    f"{option(key)}, correct the header, or give the whole conversion with --suv-factor."
                )
            return
        logger.warning("%s: %s of %s replaces the header's %s, which is invalid.", name, option(key), text, keyword)
    dataset.add_new(dicom_package("pydicom.datadict").tag_for_keyword(keyword), "DS", f"{value:.9g}")


def _set_time(drug: Any, value: str, name: str) -> None:
    texts = [str(drug.get(tag) or "").strip() for tag in START_TIMES]
    present = texts[0] or texts[1]
    if present:
        apart = _seconds_apart(present, value)
        if apart is not None and apart > SAME_SECONDS:
            raise ValueError(
                f"{name} has another time of injection in its header than {option(TIME)}. Remove {option(TIME)}, "
                "correct the header, or give the whole conversion with --suv-factor."
            )
        if apart is not None:
            return
        logger.warning("%s: %s replaces the header's time of injection, which is invalid.", name, option(TIME))
    else:
        logger.info("%s: %s is used, the header has no time of injection.", name, option(TIME))
    for tag in START_TIMES:
        drug.pop(tag, None)
    dated = len(value) > len("HHMMSS")
    setattr(drug, START_TIMES[0 if dated else 1], value)


def _seconds_apart(present: str, value: str) -> float | None:
    """Seconds between the clocks of two times, and of their dates if both have one; None for an invalid ``present``."""
    valuerep = dicom_package("pydicom.valuerep")
    if not present.isascii():
        return None
    try:
        if len(present.partition(".")[0]) > len("HHMMSS"):
            first = valuerep.DT(present)
            date = f"{first:%Y%m%d}"
        else:
            first, date = valuerep.TM(present), value[:-6]
    except ValueError:
        return None
    clock = value[-6:]
    seconds = [t.hour * 3600 + t.minute * 60 + t.second for t in (first, valuerep.TM(clock))]
    if value[:-6] and date != value[:-6]:
        return float("inf")
    return float(abs(seconds[0] - seconds[1]))


def given_factor(by_header: Callable[[], float], factor: float, units: str, name: str) -> float:
    """The given factor; a warning if the header gives another one.

    Args:
        by_header: computes the factor by the header, or raises ValueError.
        factor: the given one.
        units: of the header.
        name: the series' folder.

    Raises:
        ValueError: the values are SUV already, and the factor is not 1.
    """
    try:
        own = by_header()
    except ValueError:
        logger.info("%s: --suv-factor of %g is used; the header (units %s) gives none.", name, factor, units)
        return factor
    if abs(own - factor) > SAME * own:
        if units == "GML":
            raise ValueError(f"{name} is in SUV already (Units GML), but --suv-factor is {factor:g}. Remove it.")
        message = "%s: --suv-factor of %g replaces that of the header, %g."
        logger.warning(message, name, factor, own)
    return factor
