# SPDX-License-Identifier: Apache-2.0
"""A strict parser of MetaImage (.mha) headers.

ITK reads unreadable numbers as 0, and some damaged headers crash its process.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

MAX_HEADER_BYTES = 1 << 16
# Field names may contain brackets and bars, because writers add fields such as "dim[0]" and "0008|0060".
LINE = re.compile(r"([!-<>-~][ -<>-~]{0,200}?)[ \t]*=([\t -~\x80-\xff]{0,1000})")
POSITIVE_INTEGER = re.compile(r"0*[1-9]\d{0,9}", re.ASCII)
VOXEL_BYTES = {
    **{"MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4},
    **{"MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8},
}
ORIGINS = ("Offset", "Position", "Origin")
SPACINGS = ("ElementSpacing", "ElementSize")
MATRICES = ("TransformMatrix", "Rotation", "Orientation")
BYTE_ORDERS = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
VECTORS = (*ORIGINS, *SPACINGS, "CenterOfRotation")
BOOLEANS = ("BinaryData", *BYTE_ORDERS, "CompressedData")
MILLIMETRES = ("?", "mm", "")  # values of DistanceUnits; unknown is read as mm
SCALE = {"ElementToIntensityFunctionSlope": "1", "ElementToIntensityFunctionOffset": "0"}
SYNONYMS = (ORIGINS, MATRICES, BYTE_ORDERS)  # a file may contain one of each; ITK would ignore a second one


class Voxels(NamedTuple):
    """Where a MetaImage's voxels lie in the file.

    Attributes:
        start, end: first byte, and the byte after the last one.
        size: in bytes, unpacked.
        packed: whether they are compressed.
        shape: voxels per axis.
        warnings: messages about what ITK fills in or ignores.
        element_size, element_size_field: the size of a voxel in mm, as ``ElementSize`` (or else ``ElementSpacing``)
            states it.
        orientation: ``AnatomicalOrientation``, empty if absent.
    """

    start: int
    end: int
    size: int
    packed: bool
    shape: tuple[int, ...]
    warnings: tuple[str, ...]
    element_size: tuple[float, ...]
    element_size_field: str
    orientation: str


def check_metaimage(path: Path) -> Voxels:
    """Read a header strictly.

    Raises:
        ValueError: a line is not ``name = value``; a field occurs twice or cannot be parsed; the voxels are text, have
            several channels, no spacing, another unit than mm or a slope, or lie in another file; or the file is
            truncated.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_HEADER_BYTES)
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        line_end = raw.find(b"\n", start)
        match = LINE.fullmatch(raw[start:line_end].decode("latin-1").rstrip("\r")) if line_end >= 0 else None
        if match is None or match[1] in fields:
            number = len(fields) + 1
            raise ValueError(f"{path} has a damaged MetaImage header (line {number}). Copy or convert it again.")
        fields[match[1]], start = match[2].strip(), line_end + 1
    invalid = _invalid_field(fields)
    if invalid:
        raise ValueError(f"{path} has a damaged MetaImage header ({invalid}). Copy or convert it again.")
    if fields["ElementDataFile"] != "LOCAL":
        raise ValueError(f"{path} stores its voxels in another file. Convert it to a single file.")
    kind, channels = fields["ElementType"], fields.get("ElementNumberOfChannels", "1")
    if kind not in VOXEL_BYTES or channels != "1":
        raise ValueError(
            f"{path} contains RGB, complex or other voxels ({kind[:40]}, {channels[:10]} channels). "
            "Give an image with one number per voxel."
        )
    if not fields.keys() & set(SPACINGS):
        raise ValueError(f"{path} has no voxel sizes (ElementSpacing). Convert it again, or add them to its header.")
    unit = fields.get("DistanceUnits", "?")
    if unit not in MILLIMETRES:
        raise ValueError(f"{path} states lengths in {unit[:40]} (DistanceUnits), which are not converted. Use mm.")
    slope, intercept = (float(fields.get(name, default)) for name, default in SCALE.items())
    if (slope, intercept) != (1, 0):
        raise ValueError(
            f"{path} states a slope of {slope:g} and an intercept of {intercept:g} "
            "(ElementToIntensityFunctionSlope, Offset), which ITK does not apply. Apply them, and remove these fields."
        )
    shape = tuple(int(n) for n in fields["DimSize"].split())
    end = path.stat().st_size
    if "CompressedDataSize" in fields:  # ITK allocates this many bytes before it reads
        stated_end = start + int(fields["CompressedDataSize"])
        if stated_end > end:
            raise ValueError(f"{path} is truncated or damaged. Copy it again.")
        end = stated_end
    packed = fields.get("CompressedData") == "True"
    field = next(name for name in reversed(SPACINGS) if name in fields)
    sizes = tuple(float(number) for number in fields[field].split())
    orientation = fields.get("AnatomicalOrientation", "")
    size = math.prod(shape) * VOXEL_BYTES[kind]
    return Voxels(start, end, size, packed, shape, _warnings(fields, path), sizes, field, orientation)


def _warnings(fields: dict[str, str], path: Path) -> tuple[str, ...]:
    """Messages about what ITK fills in or ignores."""
    warnings = []
    if not all(fields.keys() & set(names) for names in (ORIGINS, MATRICES)):
        warnings.append(
            f"{path} has no position in space (no Offset or no TransformMatrix): 0 and its own axes are used"
        )
    if any(float(number) for number in fields.get("CenterOfRotation", "0").split()):
        warnings.append(f"{path} has a CenterOfRotation of {fields['CenterOfRotation']}: it is ignored, as in ITK")
    return tuple(warnings)


def _invalid_field(fields: dict[str, str]) -> str:
    """The first field that is missing or cannot be parsed; empty if there is none."""
    for name in ("NDims", "DimSize", "ElementType"):
        if name not in fields:
            return f"no {name}"
    if fields["NDims"] not in ("2", "3", "4"):
        return "NDims"
    dimensions = int(fields["NDims"])
    for names in SYNONYMS:
        present = [name for name in names if name in fields]
        if len(present) > 1:
            return f"both {present[0]} and {present[1]}"
    sizes = fields["DimSize"].split()
    if len(sizes) != dimensions or not all(POSITIVE_INTEGER.fullmatch(size) for size in sizes):
        return "DimSize"
    lengths = {**dict.fromkeys(VECTORS, dimensions), **dict.fromkeys(MATRICES, dimensions * dimensions)}
    for name in lengths.keys() & fields.keys():
        if not _are_numbers(fields[name], lengths[name], positive=name in SPACINGS):
            return name
    for name in SCALE:
        if not _are_numbers(fields.get(name, "1"), 1, positive=False):
            return name
    for name in BOOLEANS:
        if fields.get(name, "True") not in ("True", "False"):
            return name
    if fields.get("ObjectType", "Image") != "Image" or fields.get("BinaryData") != "True":
        return "not a binary image"
    if not POSITIVE_INTEGER.fullmatch(fields.get("CompressedDataSize", "1")):
        return "CompressedDataSize"
    if "CompressedDataSize" in fields and fields.get("CompressedData") != "True":
        return "CompressedDataSize"
    return "HeaderSize" if fields.get("HeaderSize", "0") != "0" else ""


def _are_numbers(text: str, count: int, positive: bool) -> bool:
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        return False
    return len(values) == count and all(math.isfinite(value) and (value > 0 or not positive) for value in values)


def check_metaimage_voxels(path: Path) -> None:
    """Unpack the voxels once and discard them.

    ITK ignores a stream that ends early or has a wrong checksum, and fills the image with zeros.

    Raises:
        ValueError: the stream is damaged, or there are fewer or more voxels than the header states.
    """
    voxels = check_metaimage(path)
    with open(path, "rb") as file:
        file.seek(voxels.start)
        data, trailing = file.read(voxels.end - voxels.start), file.read().strip(b"\0")
    size, complete = len(data) + len(trailing), True
    if voxels.packed:
        size, stream = 0, zlib.decompressobj()
        try:
            while data and not stream.eof and size <= voxels.size:  # in parts, to keep memory small
                size += len(stream.decompress(data, 1 << 24))
                data = stream.unconsumed_tail
            complete = stream.eof and not stream.unused_data.strip(b"\0") and not trailing
        except zlib.error:
            complete = False
    if size > voxels.size:
        raise ValueError(f"{path} contains more voxels than its header states. Copy it again.")
    if not complete or size < voxels.size:
        raise ValueError(f"{path} is truncated or damaged. Copy it again.")
