# SPDX-License-Identifier: Apache-2.0
"""What a MetaImage (.mha) says, line by line: ITK takes unreadable numbers for 0, and some headers end its process."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

HEAD = 1 << 16  # bytes in which a header must end
# Writers add fields such as "dim[0]" and "0008|0060".
LINE = re.compile(r"([!-<>-~][ -<>-~]{0,200}?)[ \t]*=([\t -~\x80-\xff]{0,1000})")
WHOLE = re.compile(r"0*[1-9]\d{0,9}", re.ASCII)
SIZES = {"MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4}
SIZES |= {"MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8}
VECTORS = ("Offset", "Position", "Origin", "ElementSpacing", "ElementSize", "CenterOfRotation")
MATRICES = ("TransformMatrix", "Rotation", "Orientation")
SWITCHES = ("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData")
# Each says once more, by another name, what ITK would take from only one of them.
SAME = (VECTORS[:3], MATRICES, SWITCHES[1:3])


class Voxels(NamedTuple):
    """Where a file's voxels are, and whether their place in space is told.

    Attributes:
        start, end: first and last byte.
        size: in bytes, unpacked.
        packed: whether they are compressed.
        shape: voxels per axis.
        placed: whether the header gives an origin and directions, which ITK would take to be 0 and the axes.
    """

    start: int
    end: int
    size: int
    packed: bool
    shape: tuple[int, ...]
    placed: bool


def check_metaimage(path: Path) -> Voxels:
    """Read a header strictly.

    Raises:
        ValueError: a line that is no ``name = value``, a field that occurs twice or cannot be read, voxels that are
            text, of several channels, without a size or in another file, or fewer or more of them than the header says.
    """
    with open(path, "rb") as file:
        raw = file.read(HEAD)
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = raw.find(b"\n", start)
        match = LINE.fullmatch(raw[start:end].decode("latin-1").rstrip("\r")) if end >= 0 else None
        if match is None or match[1] in fields:
            line = len(fields) + 1
            raise ValueError(f"{path} has a damaged MetaImage header (line {line}): copy or convert it again.")
        fields[match[1]], start = match[2].strip(), end + 1
    fault = _fault(fields)
    if fault:
        raise ValueError(f"{path} has a damaged MetaImage header ({fault}): copy or convert it again.")
    if fields["ElementDataFile"] != "LOCAL":
        raise ValueError(f"{path} keeps its voxels in another file: convert it to one file.")
    kind, channels = fields["ElementType"], fields.get("ElementNumberOfChannels", "1")
    if kind not in SIZES or channels != "1":
        what = f"{kind[:40]}, {channels[:10]} channels"
        raise ValueError(f"{path} holds RGB, complex or other voxels ({what}): give an image of one number per voxel.")
    if not fields.keys() & {"ElementSpacing", "ElementSize"}:
        raise ValueError(f"{path} has no voxel sizes (ElementSpacing): convert it again, or add them to its header.")
    shape = tuple(int(n) for n in fields["DimSize"].split())
    end = path.stat().st_size
    if "CompressedDataSize" in fields:  # ITK allocates this much before it reads
        claimed = start + int(fields["CompressedDataSize"])
        if claimed > end:
            raise ValueError(f"{path} is cut off or damaged: copy it again.")
        end = claimed
    packed = fields.get("CompressedData") == "True"
    placed = all(fields.keys() & names for names in (VECTORS[:3], MATRICES))
    return Voxels(start, end, math.prod(shape) * SIZES[kind], packed, shape, placed)


def _fault(fields: dict[str, str]) -> str:
    """The first field that cannot be understood, or nothing."""
    for name in ("NDims", "DimSize", "ElementType"):
        if name not in fields:
            return f"no {name}"
    if fields["NDims"] not in ("2", "3", "4"):
        return "NDims"
    count = int(fields["NDims"])
    if any(sum(name in fields for name in names) > 1 for names in SAME):
        return "one thing said twice"
    sizes = fields["DimSize"].split()
    if len(sizes) != count or not all(re.fullmatch(WHOLE, n) for n in sizes):
        return "DimSize"
    wanted = {**dict.fromkeys(VECTORS, count), **dict.fromkeys(MATRICES, count * count)}
    for name in wanted.keys() & fields.keys():
        if not _numbers(fields[name], wanted[name], name.startswith("Element")):
            return name
    for name in SWITCHES:
        if fields.get(name, "True") not in ("True", "False"):
            return name
    if fields.get("ObjectType", "Image") != "Image" or fields.get("BinaryData") != "True":
        return "not a binary image"
    packed = fields.get("CompressedDataSize", "1")
    if not re.fullmatch(WHOLE, packed) or ("CompressedDataSize" in fields and fields.get("CompressedData") != "True"):
        return "CompressedDataSize"
    return "HeaderSize" if fields.get("HeaderSize", "0") != "0" else ""


def _numbers(text: str, count: int, positive: bool) -> bool:
    try:
        values = [float(each) for each in text.split()]
    except ValueError:
        return False
    return len(values) == count and all(math.isfinite(each) and (each > 0 or not positive) for each in values)


def check_voxels(path: Path) -> None:
    """Unpack the voxels once: ITK reads on where a stream ends early or in a wrong checksum, and fills up by zeros.

    Raises:
        ValueError: the stream is damaged, or there are fewer or more voxels than the header says.
    """
    voxels = check_metaimage(path)
    with open(path, "rb") as file:
        file.seek(voxels.start)
        data, behind = file.read(voxels.end - voxels.start), file.read().strip(b"\0")
    found, whole = len(data) + len(behind), True
    if voxels.packed:
        found, stream = 0, zlib.decompressobj()
        try:
            while data and not stream.eof and found <= voxels.size:  # in parts, which are not kept
                found += len(stream.decompress(data, 1 << 24))
                data = stream.unconsumed_tail
            whole = stream.eof and not stream.unused_data.strip(b"\0") and not behind
        except zlib.error:
            whole = False
    if found > voxels.size:
        raise ValueError(f"{path} holds more voxels than it claims: copy it again.")
    if not whole or found < voxels.size:
        raise ValueError(f"{path} is cut off or damaged: copy it again.")
