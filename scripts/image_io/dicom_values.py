# SPDX-License-Identifier: Apache-2.0
"""What the stored pixel values of a DICOM image mean: rescale to HU or Bq/ml, bits, sign.

Libraries fill in what a header lacks (slope 1, intercept 0, unsigned) or invert values (MONOCHROME1). Here, such a file
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from scripts.image_io.dicom_geometry import parse_decimals

UNITS = {"CT": "HU", "PT": "SUV"}  # modalities whose values are nothing without their rescale
OTHER_CT_TYPES = ("US", "HU_MOD")  # unspecified, and HU with a modification: HU in most files
PIXEL_KEYWORDS = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")


class Rescale(NamedTuple):
    """The texts of RescaleSlope, RescaleIntercept and RescaleType of a slice or frame; empty if absent."""

    slope: str
    intercept: str
    kind: str = ""


def check_rescale(rescales: Mapping[str, Rescale], modality: str, series: str) -> list[str]:
    """Check slopes and intercepts of a series: of CT and PET each slice has both, of others all slices or none.

    Args:
        rescales: by file or frame.
        modality: DICOM's ``CT``, ``PT``, ``MR`` or another.
        series: folder or file, for warnings.

    Returns:
        Warnings.

    Raises:
        ValueError: a slice without, or with an invalid slope or intercept; a CT in another unit than HU.
    """
    any_present = any(rescale.slope or rescale.intercept for rescale in rescales.values())
    if modality not in UNITS and not any_present:
        return []
    lacks = {
        where: "RescaleSlope" if not rescale.slope else "RescaleIntercept"
        for where, rescale in rescales.items()
        if not (rescale.slope and rescale.intercept)
    }
    if lacks:
        where, keyword = next(iter(lacks.items()))
        count = "" if len(lacks) == 1 else f", nor have {len(lacks) - 1} other slices"
        if modality in UNITS:
            why = f"Its values cannot be converted to {UNITS[modality]}."
        else:
            why = "Its values cannot be compared with those of the slices that have both slope and intercept."
        raise ValueError(f"{where} has no {keyword}{count}. {why} Export the series again.")
    for where, rescale in rescales.items():
        slope, intercept = parse_decimals(rescale.slope, 1), parse_decimals(rescale.intercept, 1)
        if slope is None or intercept is None or slope[0] == 0:
            keyword = "RescaleSlope" if slope is None or slope[0] == 0 else "RescaleIntercept"
            text = "is 0" if slope is not None and slope[0] == 0 else "is not a number"
            raise ValueError(f"{where} is a damaged DICOM file: its {keyword} {text}. Export the series again.")
        if modality == "CT" and rescale.kind not in ("", "HU", *OTHER_CT_TYPES):
            raise ValueError(f"{where} is a CT whose RescaleType is not HU. Give the series in HU.")
    others = {rescale.kind for rescale in rescales.values()} & set(OTHER_CT_TYPES) if modality == "CT" else set()
    return [f"{series} is a CT with the RescaleType {kind}: its values are read as HU" for kind in sorted(others)]


def check_pixel_format(text_of: Callable[[str], str], where: str) -> None:
    """Refuse a file whose header does not tell how its pixels are stored, or in inverted values.

    Args:
        text_of: the text of an element by its keyword; empty if absent.
        where: the file, for error messages.

    Raises:
        ValueError: no or contradictory bits, no sign, or MONOCHROME1.
    """
    numbers = {}
    for keyword in PIXEL_KEYWORDS:
        text = text_of(keyword)
        if not text:
            raise ValueError(f"{where} has no {keyword}. Its values cannot be read with certainty. Export it again.")
        if not text.isdecimal():
            raise ValueError(f"{where} is a damaged DICOM file: its {keyword} is not valid. Export it again.")
        numbers[keyword] = int(text)
    allocated, stored, high, signed = numbers.values()
    if not 1 <= stored <= allocated or high != stored - 1 or signed > 1:
        raise ValueError(
            f"{where} is a damaged DICOM file: its BitsStored, HighBit or PixelRepresentation is not valid. Export it "
            "again."
        )
    if text_of("PhotometricInterpretation") == "MONOCHROME1":
        raise ValueError(
            f"{where} has the PhotometricInterpretation MONOCHROME1, which readers invert. Convert it to MONOCHROME2."
        )
