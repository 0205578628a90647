# SPDX-License-Identifier: Apache-2.0
"""Read NRRD files (.nrrd, .seg.nrrd) with attached voxels, raw or packed by gzip.

Headers are parsed strictly: a field that this reader does not follow, such as ``byte skip``, refuses the file.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NRRD = (".nrrd",)
MAX_HEADER_BYTES = 1 << 20  # Slicer describes every segment in the header
MAX_PACKED_RATIO = 1032  # of a gzip stream
TYPES = {
    np.dtype(kind): names
    for kind, names in {
        "i1": ("signed char", "int8", "int8_t"),
        "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
        "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
        "i4": ("int", "signed int", "int32", "int32_t"),
        "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
        "i8": (
            "longlong",
            "long long",
            "long long int",
            "signed long long",
            "signed long long int",
            "int64",
            "int64_t",
        ),
        "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
        "f4": ("float",),
        "f8": ("double",),
    }.items()
}
# Signs that turn each space's axes into RAS.
SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
}
SYNONYMS = {"centers": "centerings", "lineskip": "line skip", "byteskip": "byte skip", "datafile": "data file"}
UNSUPPORTED = ("data file", "line skip", "byte skip", "sample units", "old min", "old max", "oldmin", "oldmax")
VECTOR = re.compile(r"\(([^()]*)\)")


class NrrdHeader(NamedTuple):
    """The header of a NRRD file.

    Attributes:
        shape: voxels per axis, the fastest axis first.
        affine: voxel to world in mm, RAS.
        kind: stored type, in the file's byte order.
        start: first byte of the voxels.
        packed: whether they are compressed by gzip.
        placed: whether the header gives a space, directions and an origin.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    kind: np.dtype[Any]
    start: int
    packed: bool
    placed: bool

    @property
    def size(self) -> int:
        """Bytes of the unpacked voxels."""
        return math.prod(self.shape) * self.kind.itemsize


def read_nrrd_header(path: Path) -> NrrdHeader:
    """Read a header strictly.

    Raises:
        ValueError: the header is damaged, the voxels lie in another file or are neither raw nor packed by gzip, there
            are several values per voxel, or a field is set that this reader does not follow.
    """
    fields, start = _fields(path)
    for name in UNSUPPORTED:
        if fields.get(name, "0") != "0":
            where = " Its voxels lie in another file." if name == "data file" else ""
            raise ValueError(
                f"{path} has the NRRD field '{name}', which is not supported.{where} Convert it to .nii.gz."
            )
    encoding = _value(fields, "encoding", path).lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ValueError(f"{path} has the NRRD encoding '{encoding[:20]}'. Only raw and gzip are read. Save it again.")
    name = _value(fields, "type", path).lower()
    kind = next((kind for kind, names in TYPES.items() if name in names), None)
    if kind is None:
        raise ValueError(f"{path} contains voxels of type '{name[:20]}'. Give an image with one number per voxel.")
    if kind.itemsize > 1:
        order = _value(fields, "endian", path).lower()
        if order not in ("little", "big"):
            raise _damaged(path, "endian")
        kind = kind.newbyteorder("<" if order == "little" else ">")
    shape = _sizes(fields, path)
    if not all(each in ("domain", "space", "???", "none") for each in fields.get("kinds", "").lower().split()):
        raise ValueError(
            f"{path} contains {' x '.join(map(str, shape))} values with an axis that is not in space (kinds: "
            f"{fields['kinds'][:60]}), such as overlapping segments. Export one label map."
        )
    if len(shape) != 3:
        raise ValueError(f"{path} contains {' x '.join(map(str, shape))} voxels. Give one 3D volume per file.")
    affine, placed = _affine(fields, path)
    return NrrdHeader(shape, affine, kind, start, encoding != "raw", placed)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a header in lower case, without comments and key/value pairs, and the byte after the header."""
    with open(path, "rb") as file:
        raw = file.read(MAX_HEADER_BYTES)
    if not re.match(rb"NRRD000[1-5]\r?\n", raw):
        raise ValueError(f"{path} is not a NRRD file. Copy or convert it again.")
    fields: dict[str, str] = {}
    start = raw.index(b"\n") + 1
    while True:
        end = raw.find(b"\n", start)
        if end < 0:
            raise _damaged(path, "it does not end")
        line, start = raw[start:end].decode("utf-8", "replace").rstrip("\r"), end + 1
        if not line:
            return fields, start
        if line.startswith("#") or re.match(r"[^:]*:=", line):
            continue
        name, colon, value = line.partition(":")
        name = SYNONYMS.get(name.lower(), name.lower())
        if not colon or name in fields:
            raise _damaged(path, f"'{line[:40]}'")
        fields[name] = value.strip()


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} has a damaged NRRD header ({what}). Copy or convert it again.")


def _value(fields: dict[str, str], name: str, path: Path) -> str:
    if name not in fields:
        raise _damaged(path, f"no {name}")
    return fields[name]


def _sizes(fields: dict[str, str], path: Path) -> tuple[int, ...]:
    words = _value(fields, "sizes", path).split()
    if not all(re.fullmatch(r"[1-9]\d{0,9}", word, re.ASCII) for word in words):
        raise _damaged(path, "sizes")
    if _value(fields, "dimension", path) != str(len(words)):
        raise _damaged(path, "dimension")
    return tuple(map(int, words))


def _affine(fields: dict[str, str], path: Path) -> tuple[np.ndarray, bool]:
    """Voxel to world in mm (RAS), and whether the header gives all of it."""
    units = {word.strip('"').lower() for word in fields.get("space units", fields.get("units", "")).split()}
    if not units <= {"mm", "millimeter", "millimeters", "???", ""}:
        raise ValueError(f"{path} states sizes in {' '.join(sorted(units))[:40]}. Convert it to mm.")
    space = fields.get("space", "").lower()
    if space and space not in SPACES:
        raise ValueError(f"{path} has the NRRD space '{space[:40]}'. Only RAS, LAS and LPS are read. Convert it.")
    affine = np.eye(4)
    if "space directions" in fields:
        vectors = _vectors(fields["space directions"], 3, path, "space directions")
        affine[:3, :3] = np.array(vectors).T
    elif "spacings" in fields:
        affine[:3, :3] = np.diag(_numbers(fields["spacings"].split(), path, "spacings"))
    else:
        raise ValueError(f"{path} has no voxel sizes (space directions or spacings). Convert it again.")
    if "space origin" in fields:
        affine[:3, 3] = _vectors(fields["space origin"], 1, path, "space origin")[0]
    placed = bool(space) and "space directions" in fields and "space origin" in fields
    signs = SPACES.get(space, SPACES["lps"])  # as ITK reads a file without a space
    return np.diag([*signs, 1.0]) @ affine, placed


def _vectors(text: str, count: int, path: Path, field: str) -> list[list[float]]:
    vectors = [_numbers(vector.split(","), path, field) for vector in VECTOR.findall(text)]
    if len(vectors) != count or VECTOR.sub("", text).strip():
        raise _damaged(path, field)
    return vectors


def _numbers(words: list[str], path: Path, field: str) -> list[float]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise _damaged(path, field)
    return numbers


def read_nrrd_voxels(path: Path) -> np.ndarray:
    """The voxels of a file, with the fastest axis first.

    Raises:
        ValueError: the voxels are truncated or damaged, or there are more of them than the header states.
    """
    header = read_nrrd_header(path)
    with open(path, "rb") as file:
        file.seek(header.start)
        data = file.read() if header.packed else file.read(header.size + 1)
    if header.packed:
        data = _unpack(data, header.size, path)
    if len(data) != header.size:
        amount = "fewer" if len(data) < header.size else "more"
        raise ValueError(
            f"{path} contains {amount} than the {math.prod(header.shape)} voxels in its header. Copy it again."
        )
    voxels = np.frombuffer(data, header.kind).reshape(header.shape, order="F")
    return voxels.astype(header.kind.newbyteorder("="), order="K")


def _unpack(data: bytes, size: int, path: Path) -> bytes:
    """Unpack a gzip stream of at most ``size`` bytes; one byte more shows that it is too long."""
    stream = zlib.decompressobj(wbits=31)
    try:
        unpacked = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Copy it again.") from error
    if len(unpacked) <= size and (not stream.eof or stream.unused_data.strip(b"\0")):
        raise ValueError(f"{path} is truncated or damaged. Copy it again.")
    return unpacked
