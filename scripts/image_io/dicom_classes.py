# SPDX-License-Identifier: Apache-2.0
"""SOP classes: what a DICOM file is, by its first bytes, also where no library can read it."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

STORAGE = "1.2.840.10008.5.1.4.1.1."
CT, PET, MR = f"{STORAGE}2", f"{STORAGE}128", f"{STORAGE}4"
# Enhanced Storage and Legacy Converted Enhanced Storage: one file of many frames.
ENHANCED = {
    **{f"{STORAGE}2.1": "CT", f"{STORAGE}2.2": "CT", f"{STORAGE}130": "PT", f"{STORAGE}128.1": "PT"},
    **{f"{STORAGE}4.1": "MR", f"{STORAGE}4.4": "MR"},
}
MODALITY_OF_CLASS = {CT: "CT", PET: "PT", MR: "MR", **ENHANCED}
SECONDARY_CAPTURES = tuple(f"{STORAGE}7{ending}" for ending in ("", ".1", ".2", ".3", ".4"))
IMAGES = {*MODALITY_OF_CLASS, *SECONDARY_CAPTURES}
# By the beginning of the UID; none of them is an image to segment.
NO_IMAGES = {
    **{f"{STORAGE}481.3": "RTSTRUCT", f"{STORAGE}481.2": "RTDOSE", f"{STORAGE}481": "RT object"},
    **{f"{STORAGE}66.4": "SEG", f"{STORAGE}66": "registration or other raw data", f"{STORAGE}67": "mapping of values"},
    **{f"{STORAGE}88.59": "KO", f"{STORAGE}88": "SR", f"{STORAGE}11": "PR", f"{STORAGE}104": "document"},
    **{f"{STORAGE}9": "waveform", "1.2.840.10008.1.3.10": "DICOMDIR", "1.2.840.10008.5.1.4.34": "RT instruction"},
}
NO_IMAGES[f"{STORAGE}481.5"] = "RTPLAN"
DEFLATED = b"1.2.840.10008.1.2.1.99"
_UID = rb"([0-9][0-9.]{4,63})"
_CLASS = {  # (0008,0016) and (0002,0002): explicit VR, or a length of four bytes; little or big endian
    tag: re.compile(little + rb"(?:UI..|..\0\0)" + _UID + b"|" + big + rb"(?:UI..|\0\0..)" + _UID, re.S)
    for tag, little, big in (
        ("SOPClassUID", rb"\x08\x00\x16\x00", rb"\x00\x08\x00\x16"),
        ("MediaStorageSOPClassUID", rb"\x02\x00\x02\x00", rb"\x00\x02\x00\x02"),
    )
}  # fmt: skip
START = 1 << 16  # bytes in which a SOP class is looked for


def no_image(sop_class: str) -> str:
    """What an object is that contains no image to segment, such as ``RTSTRUCT``; empty for all other classes."""
    parts = sop_class.split(".")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((NO_IMAGES[beginning] for beginning in beginnings if beginning in NO_IMAGES), "")


def sop_class_of(path: str | Path) -> str | None:
    """The SOP class of a file that may be damaged or no DICOM file.

    Returns:
        The UID; empty for a DICOM file without one; None for a file that is not recognised as DICOM.
    """
    with open(path, "rb") as file:
        start = file.read(START)
    is_part_10 = start[128:132] == b"DICM"
    data = start
    if is_part_10 and DEFLATED in start[:1024]:
        data = _inflated(start) or start
    found = _CLASS["SOPClassUID"].search(data) or _CLASS["MediaStorageSOPClassUID"].search(start[:1024])
    if found:
        return (found[1] or found[2]).decode().rstrip(".")
    return "" if is_part_10 else None


def _inflated(start: bytes) -> bytes:
    """The data set of a deflated file, which follows the meta information."""
    length = re.search(rb"\x02\x00\x00\x00UL\x04\x00(....)", start[:200], re.S)
    if not length:
        return b""
    try:
        return zlib.decompressobj(-15).decompress(start[length.end() + int.from_bytes(length[1], "little") :], START)
    except zlib.error:
        return b""
