# SPDX-License-Identifier: Apache-2.0
"""The codes of a task's regions in DICOM: the category and the type of what a segment shows, and where it lies.

A task gives the code of a region's type. Its category follows from the context group of DICOM PS3.16 that lists the
type. A region without a code is called tissue (SNOMED CT 85756007, in the context groups of the categories and of the
types), as 3D Slicer calls a new segment: that is true of an organ and of a tumour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from scripts.image_io.dicom_packages import dicom_package
from scripts.utils.values import is_list

Triple = tuple[str, str, str]  # value, scheme and meaning of a code

ABNORMAL: Triple = ("49755003", "SCT", "Morphologically Abnormal Structure")
TISSUE: Triple = ("85756007", "SCT", "Tissue")
# Types of abnormal structures: context group 7194, without Background and Normal.
LESIONS = frozenset(
    (
        *(("44132006", "SCT"), ("75753009", "SCT"), ("367643001", "SCT"), ("79654002", "SCT"), ("55584005", "SCT")),
        *(("50960005", "SCT"), ("409774005", "SCT"), ("52988006", "SCT"), ("4147007", "SCT"), ("6574001", "SCT")),
        *(("108369006", "SCT"), ("372087000", "SCT"), ("14799000", "SCT"), ("27925004", "SCT"), ("301766008", "SCT")),
        *(("C113842", "NCIt"), ("C81175", "NCIt")),
    )
)
# Other categories and the context groups of their types, in the order of preference.
CATEGORIES: dict[int, Triple] = {
    7192: ("91723000", "SCT", "Anatomical Structure"),
    7191: TISSUE,
    7193: ("260787004", "SCT", "Physical object"),
    7197: ("91720002", "SCT", "Body Substance"),
    7195: ("246464006", "SCT", "Function"),
    7196: ("309825002", "SCT", "Spatial and Relational Concept"),
}
KEYS = ("type", "category", "anatomy")
EXAMPLE = '"codes": {"tumour": ["108369006", "SCT", "Neoplasm"]}'
MAX_SHORT, MAX_LONG = 16, 64  # characters of DICOM's VR SH and LO


class Property(NamedTuple):
    """What a segment shows.

    Attributes:
        category, type: of the segmented property.
        anatomy: the region of the body, if the task names one.
    """

    category: Triple
    type: Triple
    anatomy: Triple | None = None


def check_codes(regions: Iterable[str], codes: Mapping[str, Any]) -> None:
    """Refuse codes that are none, or are of no region; what needs pydicom is left to ``segment_properties``.

    Args:
        regions, codes: see ``segment_properties``.

    Raises:
        ValueError: there is such a code.
    """
    names = list(regions)
    for name, code in codes.items():
        if name not in names:
            raise ValueError(f"codes has an entry for {name}, which is no region of this task. Use {', '.join(names)}.")
        _triples(name, code)


def segment_properties(regions: Iterable[str], codes: Mapping[str, Any]) -> dict[str, Property]:
    """What each region is in DICOM.

    Args:
        regions: their names.
        codes: region -> ``[value, scheme, meaning]`` of its type, or an object with ``type`` and, where wanted,
            ``category`` and ``anatomy``, each such a list. Regions without an entry are called tissue.

    Raises:
        ValueError: a code is no code, or is of no region; the category of a type is not known; a name is too long for
            DICOM; or pydicom is not installed.
    """
    names = list(regions)
    check_codes(names, codes)
    for name in names:
        if len(name) > MAX_LONG or "\\" in name or not name.isprintable():
            raise ValueError(
                f"The region {name!r} cannot be a name in DICOM. Give it at most {MAX_LONG} printable characters "
                "without a backslash."
            )
    return {name: _property(name, codes[name]) if name in codes else Property(TISSUE, TISSUE) for name in names}


def is_lesion(code: Any) -> bool:
    """Whether a region is an abnormal structure, such as a tumour, by its entry in the task's ``codes``."""
    given = _given(code)
    category, kind = (given[key] if _is_triple(given.get(key)) else () for key in ("category", "type"))
    return tuple(category[:2]) == ABNORMAL[:2] if category else tuple(kind[:2]) in LESIONS


def _property(region: str, code: Any) -> Property:
    triples = _triples(region, code)
    category = triples.get("category") or _category(region, triples["type"])
    return Property(category, triples["type"], triples.get("anatomy"))


def _triples(region: str, code: Any) -> dict[str, Triple]:
    """The codes of a region's entry by their keys."""
    given = _given(code)
    unknown = [key for key in given if key not in KEYS]
    if unknown or "type" not in given:
        fault = f"has the unknown key {unknown[0]}" if unknown else "names no type"
        raise ValueError(f'codes["{region}"] {fault}. Use {", ".join(KEYS)}, or the code of the type: {EXAMPLE}.')
    for value in given.values():
        if not _is_triple(value):
            raise ValueError(
                f'codes["{region}"] has {value!r}. Give the value, the scheme and the meaning of a code, at most '
                f"{MAX_SHORT}, {MAX_SHORT} and {MAX_LONG} characters long: {EXAMPLE}."
            )
    return {key: (value[0], value[1], value[2]) for key, value in given.items()}


def _given(code: Any) -> dict[str, Any]:
    return dict(code) if isinstance(code, Mapping) else {"type": code}


def _is_triple(value: Any) -> bool:
    if not is_list(value) or len(value) != 3 or not all(isinstance(each, str) and each.strip() for each in value):
        return False
    fits = all(len(each) <= limit for each, limit in zip(value, (MAX_SHORT, MAX_SHORT, MAX_LONG), strict=True))
    return fits and all(each.isprintable() and "\\" not in each for each in value)


def _category(region: str, kind: Triple) -> Triple:
    """The category whose context group lists a type."""
    if kind[:2] in LESIONS:
        return ABNORMAL
    groups = dicom_package("pydicom.sr.codedict").codes
    for number, category in CATEGORIES.items():
        concepts = getattr(groups, f"cid{number}").concepts.values()
        if any((each.value, each.scheme_designator) == kind[:2] for each in concepts):
            return category
    raise ValueError(
        f'codes["{region}"] has the type {kind[2]}, for which DICOM lists no category. Name one: '
        f'{{"type": ["{kind[0]}", "{kind[1]}", "{kind[2]}"], "category": ["{ABNORMAL[0]}", "{ABNORMAL[1]}", '
        f'"{ABNORMAL[2]}"]}}.'
    )
