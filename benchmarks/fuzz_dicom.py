# SPDX-License-Identifier: Apache-2.0
"""Damaged DICOM files for ``benchmarks.fuzz_readers``: a series of slices of which one is damaged, or an enhanced file.

Files are explicit, implicit, deflated, RLE, JPEG-LS and JPEG 2000. Elements get boundary values, other VRs, other
lengths and other places, at the top and inside sequences; sequences are nested or lose their ends; pixel data and its
fragments get random bytes; files are cut.
"""

from __future__ import annotations

import io
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from benchmarks.dicom_samples import enhanced, write_enhanced, write_series

SHAPE = (16, 16, 4)
SYNTAXES = (
    *(ExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian),
    *(RLELossless, JPEGLSLossless, JPEG2000Lossless),
)
HOW = ("fields", "bytes", "sequences", "cut", "pixels")
KINDS = [f"dicom {source} {how}" for source in ("slices", "enhanced") for how in HOW]
SHARES = [5, 3, 2, 1.5, 2.5] * 2
LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"SQ", b"UN", b"UT", b"UC", b"UR", b"SV", b"UV", b"OV")
VRS = (*LONG_VRS, b"DS", b"IS", b"UI", b"US", b"SS", b"LO", b"CS", b"FD", b"AT", b"PN", b"\0\0", b"ZZ")
TEXTS = (
    *("", "0", "-1", "1", "4", "1e400", "nan", "inf", "1e-300", "99999999999999999999", "1\\1\\1\\1\\1\\1", "0\\0\\0"),
    *("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.4", "LOCALIZER", "\xf6"),
    *("\\" * 50, "x" * 5000, "%s%n", "MONOCHROME1", "RGB", "PALETTE COLOR", "1.2.840.10008.1.2", "1\\0\\0\\0\\0\\1"),
)
BINARY = tuple(struct.pack("<H", n) for n in (0, 1, 2, 3, 7, 8, 12, 16, 32, 64, 255, 400, 32767, 65535))
LENGTHS = (0, 1, 2, 3, 7, 100, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
ITEM, ITEM_END, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"
PIXELS = b"\xe0\x7f\x10\x00"


class Sample(NamedTuple):
    """An undamaged file: meta information, data set (not deflated), and how it is written."""

    meta: bytes
    data: bytes
    syntax: str


Samples = dict[tuple[str, str], list[Sample]]  # by source and transfer syntax
Mutated = list[bytes]  # the files of a folder


def compress(dataset: Dataset, syntax: str) -> None:
    """Compress a data set's pixels in place."""
    if syntax == JPEG2000Lossless:
        frames = []
        for plane in np.atleast_3d(dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)):
            stream = io.BytesIO()
            Image.fromarray(plane.astype(np.uint16)).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
            frames.append(stream.getvalue())
        dataset.PixelData = encapsulate(frames)
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    elif syntax in (RLELossless, JPEGLSLossless):
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax


def samples() -> Samples:
    """Four slices (CT and PET), and enhanced CT and PET files of four frames, in every transfer syntax."""
    stored = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.uint16)
    found: Samples = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, syntax in enumerate(dict.fromkeys(SYNTAXES)):
            for kind in ("CT", "PT"):
                folder = Path(scratch) / f"{number}{kind}"

                def change(_: int, dataset: Dataset, syntax: str = syntax) -> None:
                    compress(dataset, syntax)

                paths = write_series(folder / "slices", stored, kind, change)
                found["slices", f"{kind} {syntax}"] = [_split(path.read_bytes(), syntax) for path in paths]
                dataset = enhanced(stored, kind, [2, 0, 3, 1], shared=kind == "CT")
                compress(dataset, syntax)
                path = write_enhanced(folder / "enhanced", dataset)
                found["enhanced", f"{kind} {syntax}"] = [_split(path.read_bytes(), syntax)]
    return found


def _split(content: bytes, syntax: str) -> Sample:
    length = struct.unpack("<I", content[140:144])[0]
    meta, data = content[: 144 + length], content[144 + length :]
    return Sample(meta, zlib.decompress(data, -15) if syntax == DeflatedExplicitVRLittleEndian else data, syntax)


def joined(sample: Sample, data: bytes) -> bytes:
    """A file with another data set, which is deflated if the sample is."""
    if sample.syntax == DeflatedExplicitVRLittleEndian:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        data = packer.compress(data) + packer.flush()
    return sample.meta + data


class Element(NamedTuple):
    """Where an element lies in a data set: its start, its value and its end. Items of sequences count as elements."""

    start: int
    value: int
    end: int
    depth: int


def elements(data: bytes, explicit: bool, start: int = 0, end: int | None = None, depth: int = 0) -> list[Element]:
    """All elements of an undamaged data set, those of sequences included."""
    end, found = len(data) if end is None else end, []
    while start + 8 <= end:
        tag, vr = data[start : start + 4], data[start + 4 : start + 6]
        if tag[:2] == b"\xfe\xff" or not explicit:
            value, length = start + 8, struct.unpack("<I", data[start + 4 : start + 8])[0]
        elif vr in LONG_VRS:
            value, length = start + 12, struct.unpack("<I", data[start + 8 : start + 12])[0]
        else:
            value, length = start + 8, struct.unpack("<H", data[start + 6 : start + 8])[0]
        if tag in (ITEM_END, SEQUENCE_END):
            found.append(Element(start, value, value, depth))
            start = value
            continue
        stop = end if length == 0xFFFFFFFF else value + length
        found.append(Element(start, value, stop, depth))
        nested = tag == ITEM or data[value : value + 4] == ITEM
        if nested and tag != PIXELS:
            found += elements(data, explicit, value, stop, depth + 1)
        start = stop
    return found


def mutate_field(sample: Sample, rng: random.Random, nested: bool = False) -> bytes:
    """Change the value, the VR or the length of an element, remove, repeat or move it."""
    data, explicit = sample.data, sample.syntax != ImplicitVRLittleEndian
    listed = [each for each in elements(data, explicit) if bool(each.depth) == nested] or elements(data, explicit)
    start, value, end, _ = rng.choice(listed)
    how = rng.randrange(8)
    head, content = data[start:value], data[value:end]
    if how <= 2:
        new: bytes = rng.choice(TEXTS).encode("latin-1") if rng.random() < 0.7 else rng.choice(BINARY)
        if rng.random() < 0.3 and content:
            new = content[: rng.randrange(len(content))] + new
        new += b" " * (len(new) % 2)
        long = value - start == 12 or not explicit or head[:2] == b"\xfe\xff"
        size = struct.pack("<I", len(new)) if long else struct.pack("<H", len(new) & 0xFFFF)
        return data[:start] + head[: -len(size)] + size + new + data[end:]
    if how == 3 and explicit:
        return data[: start + 4] + rng.choice(VRS) + data[start + 6 :]
    if how <= 4:
        size = struct.pack("<I", rng.choice(LENGTHS))[: 4 if value - start == 12 or not explicit else 2]
        return data[: value - len(size)] + size + data[value:]
    if how == 5:
        return data[:start] + data[end:]
    if how == 6:
        return data[:end] + data[start:end] + data[end:]
    other = rng.choice(listed)
    return data[:start] + data[other.start : other.end] + data[start:]


def mutate_sequence(sample: Sample, rng: random.Random) -> bytes:
    """Nest sequences deeply, leave out their ends, or change elements inside them."""
    explicit = sample.syntax != ImplicitVRLittleEndian
    if rng.random() < 0.6:
        return mutate_field(sample, rng, nested=True)
    tag = b"\x08\x00\x40\x11"  # ReferencedImageSequence
    opened = tag + (b"SQ\0\0" if explicit else b"") + b"\xff\xff\xff\xff" + ITEM + b"\xff\xff\xff\xff"
    closed = ITEM_END + bytes(4) + SEQUENCE_END + bytes(4)
    depth = rng.choice((1, 2, 50, 900, 3000))
    ends = closed * rng.choice((depth, depth - 1, 0, depth + 1))
    listed = [each for each in elements(sample.data, explicit) if each.depth == 0]
    at = rng.choice(listed).start
    return sample.data[:at] + opened * depth + ends + sample.data[at:]


def mutate_pixels(sample: Sample, rng: random.Random) -> bytes:
    """Change bytes, bits, fragments or the length of the pixel data."""
    data = sample.data
    start = data.rindex(PIXELS) if data.count(PIXELS) == 1 else data.index(PIXELS, len(data) // 2)
    how = rng.randrange(5)
    if how <= 1:
        return data[: start + 8] + _changed(data[start + 8 :], rng)
    if how == 2:
        at = rng.randrange(start + 8, len(data))
        return data[:at] + data[at + rng.randint(1, 40) :]
    if how == 3:
        at = rng.randrange(start + 8, len(data))
        return data[:at] + rng.randbytes(rng.randint(1, 300)) + data[at:]
    fragment = data.find(ITEM, start + 12)
    if fragment < 0:
        return data[: start + 8] + struct.pack("<I", rng.choice(LENGTHS)) + data[start + 12 :]
    return data[: fragment + 4] + struct.pack("<I", rng.choice(LENGTHS)) + data[fragment + 8 :]


def _changed(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def mutate(kind: str, rng: random.Random, undamaged: Samples) -> Mutated:
    """The files of one folder, of which one is damaged."""
    _, source, how = kind.split()
    syntax, modality = rng.choice(SYNTAXES), rng.choice(("CT", "CT", "PT"))
    chosen = undamaged[source, f"{modality} {syntax}"]
    files = [joined(each, each.data) for each in chosen]
    number = rng.randrange(len(chosen))
    sample, whole = chosen[number], files[number]
    if how == "cut":
        files[number] = whole[: rng.randrange(len(whole))]
    elif how == "bytes":
        at = max(132, min(len(whole), len(sample.meta) + sample.data.rfind(PIXELS)))
        files[number] = whole[:132] + _changed(whole[132:at], rng) + whole[at:]
    else:
        change: dict[str, Callable[[Sample, random.Random], bytes]] = {
            **{"fields": mutate_field, "sequences": mutate_sequence, "pixels": mutate_pixels}
        }
        files[number] = joined(sample, change[how](sample, rng))
    return files


def stated_shape(files: Mutated) -> tuple[int, ...]:
    """Columns, rows, and the number of files or frames, by pydicom."""
    heads = [pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=True) for content in files]
    head: Any = heads[0]
    depth = int(head.get("NumberOfFrames") or 1) if len(files) == 1 else len(files)
    return int(head.Columns), int(head.Rows), depth
