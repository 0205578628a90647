# SPDX-License-Identifier: Apache-2.0
"""The structure of a DICOM file: every length inside it must fit, before a library allocates memory by it.

GDCM and pydicom allocate what a damaged length states, follow nested sequences to any depth, or skip files that they
cannot read. This module finds the elements of a file without reading their values.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from scripts.image_io.dicom_classes import sop_class_of

SOP_CLASS, SERIES_UID, SYNTAX = 0x00080016, 0x0020000E, 0x00020010
ROWS, COLUMNS = 0x00280010, 0x00280011
JPEG_SIZES = frozenset((0xF7, *range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))  # SOF
PIXEL_DATA = (0x7FE00008, 0x7FE00009, 0x7FE00010)
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
LONG_VRS = frozenset((b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UN", b"UT", b"UC", b"UR", b"SV", b"UV"))
VRS = LONG_VRS | set(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
MAX_DEPTH = 20  # of nested sequences
MAX_INFLATED = 2**30  # bytes of a deflated data set
PADDING = 64  # zeros after the pixel data that end a file
KEPT_BYTES = 256  # of a UID that is returned


class DamagedError(ValueError):
    """The file is cut or its lengths do not fit."""


class Structure(NamedTuple):
    """What a file is.

    Attributes:
        sop_class, series_uid: UIDs; empty if absent.
        pixel_bytes: stated length of the pixel data; 0 without pixel data, -1 for fragments (compressed).
    """

    sop_class: str
    series_uid: str
    pixel_bytes: int


def read_structure(path: str | Path) -> Structure | None:
    """Find all elements of a DICOM file.

    Args:
        path: any file.

    Returns:
        None for a file that is not DICOM.

    Raises:
        DamagedError: a length leads out of the file, sequences do not end, or an element occurs twice.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return None
    with data:
        start = 132 if data[128:132] == b"DICM" else 0
        if not start and data[:2] not in (b"\x08\x00", b"\x02\x00"):
            return None
        try:
            return _structure(data, start)
        except struct.error:
            raise DamagedError("ends within an element") from None
        except DamagedError:
            if start or sop_class_of(path) is not None:
                raise
            return None  # another kind of file, which begins with these bytes by chance


def _structure(data: mmap.mmap, start: int) -> Structure:
    meta = _Walk(data, "<", only_group=2)
    start = meta.dataset(start, len(data), 0)
    syntax = meta.text(SYNTAX)
    if data[128:132] == b"DICM" and not syntax:
        raise DamagedError("has no transfer syntax")
    body: mmap.mmap | bytes = data
    if syntax == DEFLATED:
        try:
            unpacker = zlib.decompressobj(-15)
            body, start = unpacker.decompress(data[start:], MAX_INFLATED), 0
        except zlib.error:
            raise DamagedError("has a damaged deflated data set") from None
        if not unpacker.eof:
            raise DamagedError("has a deflated data set that is cut or too large")
    walk = _Walk(body, ">" if syntax == BIG_ENDIAN else "<")
    walk.dataset(start, len(body), 0)
    _check_compressed_size(walk)
    sizes = [walk.lengths[tag] for tag in PIXEL_DATA if tag in walk.lengths]
    return Structure(walk.text(SOP_CLASS), walk.text(SERIES_UID), sizes[0] if sizes else 0)


def _check_compressed_size(walk: _Walk) -> None:
    """Refuse a first JPEG, JPEG-LS or JPEG 2000 frame of another size than Rows and Columns: decoders crop it."""
    if not walk.first_frame or not {ROWS, COLUMNS} <= walk.starts.keys():
        return
    stated = tuple(walk.short(walk.data, walk.starts[tag])[0] for tag in (ROWS, COLUMNS))
    found = _compressed_size(walk.data[walk.first_frame : walk.first_frame + 4096])
    if found and found != stated:
        raise DamagedError(f"has {found[0]} x {found[1]} compressed pixels, but states {stated[0]} x {stated[1]}")


def _compressed_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns by the header of a JPEG, JPEG-LS or JPEG 2000 stream; None for others."""
    if frame[:4] == b"\xff\x4f\xff\x51" and len(frame) >= 24:
        right, bottom, left, top = struct.unpack(">4I", frame[8:24])
        return bottom - top, right - left
    start = 2
    while frame[:2] == b"\xff\xd8" and start + 9 <= len(frame) and frame[start] == 0xFF:
        length, _, rows, columns = struct.unpack(">HBHH", frame[start + 2 : start + 9])
        if frame[start + 1] in JPEG_SIZES:
            return rows, columns
        start += 2 + length
    return None


class _Walk:
    """One pass over a data set; the values of ``text`` are those at its top."""

    def __init__(self, data: mmap.mmap | bytes, order: str, only_group: int | None = None) -> None:
        self.data, self.only_group = data, only_group
        self.lengths: dict[int, int] = {}
        self.starts: dict[int, int] = {}
        self.first_frame = 0  # start of the first fragment of pixel data after the offset table
        self.tag = struct.Struct(order + "HH").unpack_from
        self.short, self.long = struct.Struct(order + "H").unpack_from, struct.Struct(order + "I").unpack_from

    def text(self, tag: int) -> str:
        """An element's value without padding."""
        if tag not in self.lengths:
            return ""
        start = self.starts[tag]
        return self.data[start : start + min(self.lengths[tag], KEPT_BYTES)].decode("latin-1").strip(" \0")

    def dataset(self, start: int, end: int, depth: int) -> int:
        """Walk to ``end``, or to the end mark of an item of undefined length; return where that is."""
        if depth > MAX_DEPTH:
            raise DamagedError("has sequences that are nested too deeply")
        seen: set[int] = set()
        while start < end:
            after_pixels = not depth and any(tag in seen for tag in PIXEL_DATA)
            if after_pixels and not any(self.data[start : min(end, start + PADDING)]):
                return end
            if end - start < 8:
                raise DamagedError("ends within an element")
            group, element = self.tag(self.data, start)
            tag = group << 16 | element
            if self.only_group not in (None, group):
                return start
            if tag == ITEM_END and depth:
                return start + 8
            if group == 0xFFFE:
                raise DamagedError("has an item outside a sequence")
            if after_pixels and tag <= max(PIXEL_DATA):
                raise DamagedError("has more bytes than its pixel data")
            if tag in seen:
                raise DamagedError(f"has the element ({group:04x},{element:04x}) twice")
            seen.add(tag)
            vr, value, length = self._head(start)
            if not depth:
                self.starts[tag], self.lengths[tag] = value, -1 if length == UNDEFINED else length
            if length != UNDEFINED and value + length > end:
                raise DamagedError("ends within an element")
            if length == UNDEFINED or vr == b"SQ" or (not vr and self._is_sequence(value, length)):
                fragments = tag in PIXEL_DATA or vr in (b"OB", b"OW")
                start = self._items(value, end if length == UNDEFINED else value + length, length, depth, fragments)
            else:
                start = value + length
        return start

    def _head(self, start: int) -> tuple[bytes, int, int]:
        """VR (empty if implicit), start of the value, and length."""
        vr = bytes(self.data[start + 4 : start + 6])
        if vr in LONG_VRS:
            return vr, start + 12, self.long(self.data, start + 8)[0]
        if vr in VRS:
            return vr, start + 8, self.short(self.data, start + 6)[0]
        return b"", start + 8, self.long(self.data, start + 4)[0]

    def _is_sequence(self, value: int, length: int) -> bool:
        """Whether an implicit element looks like a sequence: its value begins with an item that fits."""
        if length < 8 or self.data[value : value + 4] != b"\xfe\xff\x00\xe0":
            return False
        inner = self.long(self.data, value + 4)[0]
        return bool(inner == UNDEFINED or inner <= length - 8)

    def _items(self, start: int, end: int, length: int, depth: int, fragments: bool) -> int:
        """Walk the items of a sequence, or fragments; return where they end."""
        number = 0
        while start < end:
            if end - start < 8:
                raise DamagedError("ends within a sequence")
            group, element = self.tag(self.data, start)
            size = self.long(self.data, start + 4)[0]
            tag, start = group << 16 | element, start + 8
            if tag == SEQUENCE_END and length == UNDEFINED:
                return start
            if tag != ITEM:
                raise DamagedError("has a sequence without items")
            if size == UNDEFINED and not fragments:
                start = self.dataset(start, end, depth + 1)
                continue
            if size == UNDEFINED or start + size > end:
                raise DamagedError("ends within a sequence")
            if fragments and not depth and number == 1:
                self.first_frame = start
            number += 1
            if not fragments:
                self.dataset(start, start + size, depth + 1)
            start += size
        if length == UNDEFINED:
            raise DamagedError("ends within a sequence")
        return start
