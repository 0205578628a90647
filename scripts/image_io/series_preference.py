# SPDX-License-Identifier: Apache-2.0
"""Which of several DICOM series of one modality to take: an order of preferences, each with its reason in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ORIGINAL, CORRECTED, THINNEST, NEWEST = "original", "corrected", "thinnest", "newest"
PREFERENCES = (ORIGINAL, CORRECTED, THINNEST, NEWEST)
PREFER = "prefer"  # the key of a rule in a task's ``dicom``
# Of one modality, series of CT hold the same quantity (HU), and of PET (SUV). MR has many contrasts, which only a rule
# can tell apart.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "ct": (ORIGINAL, THINNEST, NEWEST),
    "pet": (CORRECTED, ORIGINAL, THINNEST, NEWEST),
}
# Elements of the series' headers that preferences read.
KEYWORDS = (
    *("ImageType", "CorrectedImage", "SliceThickness"),
    *("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime"),
)
Elements = Mapping[str, Sequence[str]]
_LOSERS = {ORIGINAL: "derived", CORRECTED: "not attenuation-corrected", THINNEST: "thicker slices", NEWEST: "older"}


def check_preferences(key: str, rule: Mapping[str, Any]) -> None:
    """Refuse what is no list of preferences in the rule of a modality.

    Raises:
        ValueError: there is an unknown one.
    """
    wanted = rule.get(PREFER, [])
    if not isinstance(wanted, list | tuple) or not all(each in PREFERENCES for each in wanted):
        raise ValueError(
            f'dicom["{key}"] has {PREFER} {wanted!r}. Give a list of {", ".join(PREFERENCES)}, the first one counts '
            "most; with [], several series are refused."
        )


def preferences(modalities: Sequence[str], rules: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The preferences of each modality: those of its rule, or for ``ct`` and ``pet`` the defaults, or none."""
    return {key: tuple(rules.get(key, {}).get(PREFER, DEFAULTS.get(key, ()))) for key in modalities}


def narrow(series: Mapping[str, Elements], wanted: Sequence[str]) -> tuple[list[str], str, dict[str, str]]:
    """Apply preferences in their order until one series is left; one that not all series can be judged by is passed.

    Args:
        series: elements of the candidates' headers by the series' UIDs.
        wanted: preferences.

    Returns:
        The UIDs that are left; why, in words; and why each other one is not.
    """
    others: dict[str, str] = {}
    left, reasons = list(series), []
    for preference in wanted:
        if len(left) == 1:
            break
        ranks = {uid: _rank(preference, series[uid]) for uid in left}
        best = [uid for uid in left if ranks[uid] is not None and ranks[uid] == min(filter(_known, ranks.values()))]
        if None in ranks.values() or len(best) == len(left):
            continue
        reasons.append(f"{preference} of {len(left)}{_size(preference, series[best[0]])}")
        others |= {uid: _LOSERS[preference] + _size(preference, series[uid]) for uid in left if uid not in best}
        left = best
    return left, ", ".join(reasons), others


def _known(rank: Any) -> bool:
    return rank is not None


def _rank(preference: str, elements: Elements) -> Any:
    """What sorts a series among others, the best first; None if its header does not say."""
    if preference == ORIGINAL:
        kinds = [text.upper() for text in elements.get("ImageType", ())]
        return ("ORIGINAL" not in kinds[:1], "PRIMARY" not in kinds[1:2]) if kinds else None
    if preference == CORRECTED:
        applied = [text.upper() for text in elements.get("CorrectedImage", ())]
        return "ATTN" not in applied if applied else None
    if preference == THINNEST:
        return _thickness(elements)
    return _age(elements)


def _thickness(elements: Elements) -> float | None:
    try:
        thickness = float(next(iter(elements.get("SliceThickness", ()))))
    except (StopIteration, ValueError):
        return None
    return round(thickness, 3) if thickness > 0 else None


def _age(elements: Elements) -> float | None:
    """Minus the number YYYYMMDDHHMMSS of the series' time, or of its acquisition's."""
    for kind in ("Series", "Acquisition"):
        date, clock = (next(iter(elements.get(f"{kind}{part}", ())), "") for part in ("Date", "Time"))
        clock = clock.partition(".")[0]
        if len(date) == 8 and date.isdecimal() and clock.isdecimal() and len(clock) <= 6:
            return -float(date + clock.ljust(6, "0"))
    return None


def _size(preference: str, elements: Elements) -> str:
    return f" ({_thickness(elements):g} mm)" if preference == THINNEST else ""
