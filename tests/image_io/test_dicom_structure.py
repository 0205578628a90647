# SPDX-License-Identifier: Apache-2.0
"""Files whose lengths or order do not fit are refused before a library reads them; unusual but valid ones are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from benchmarks import fuzz_dicom
from benchmarks.dicom_samples import item, write_series
from scripts.image_io.checks import Rules
from scripts.image_io.dicom_structure import read_structure
from scripts.image_io.reader import header_of, read_volume

RULES = Rules()
STORED = np.random.default_rng(0).integers(0, 2000, (8, 6, 5)).astype(np.uint16)
PIXELS = b"\xe0\x7f\x10\x00OW\0\0"
SEQUENCE = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
ENDS = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
MODALITY = b"\x08\x00\x60\x00CS\x02\x00CT"


def read(folder: Path) -> Any:
    return read_volume(header_of(folder, RULES), RULES)


def inserted(new: bytes, after: bytes = MODALITY) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(after, after + new)


VALID: dict[str, Callable[[bytes], bytes]] = {
    "zeros at the end": lambda data: data + bytes(1000),
    "padding at the end": lambda data: data + b"\xfc\xff\xfc\xffOB\0\0\x04\0\0\0\1\2\3\4",
    "no preamble": lambda data: data[132:],
    "nested sequences": inserted(SEQUENCE * 3 + ENDS * 3),
    "an unknown sequence": inserted(SEQUENCE.replace(b"SQ", b"UN") + ENDS),
}


@pytest.mark.parametrize("name", VALID)
def test_an_unusual_file_is_read(name: str, tmp_path: Path) -> None:
    paths = write_series(tmp_path, STORED)
    changed = VALID[name](paths[2].read_bytes())
    assert changed != paths[2].read_bytes()
    paths[2].write_bytes(changed)
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)


def test_sequences_of_implicit_files_are_walked(tmp_path: Path) -> None:
    def each(k: int, dataset: Any) -> None:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        dataset.ReferencedImageSequence = [item(ReferencedSOPInstanceUID="1.2"), item(ReferencedSOPInstanceUID="1.3")]

    (path, *_) = write_series(tmp_path, STORED, each=each)
    assert read_structure(path) == ("1.2.840.10008.5.1.4.1.1.2", "1.2.3.67", 96)
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a length of 4 GB": (
        lambda data: data.replace(PIXELS + b"\x60\0\0\0", PIXELS + b"\xfe\xff\xff\xff"), "ends within an element"
    ),
    "3000 sequences": (inserted(SEQUENCE * 3000 + ENDS * 3000), "are nested too deeply"),
    "a sequence without an end": (inserted(SEQUENCE), "ends within"),
    "a sequence without items": (inserted(SEQUENCE[:12] + bytes(8)), "has a sequence without items"),
    "an item outside a sequence": (inserted(SEQUENCE[12:]), "has an item outside a sequence"),
    "a repeated element": (inserted(MODALITY), "has the element (0008,0060) twice"),
    "bytes after the pixel data": (lambda data: data + bytes(range(1, 90)), "has more bytes than its pixel data"),
    "no transfer syntax": (
        lambda data: data.replace(b"\x02\x00\x10\x00UI", b"\x02\x00\x11\x00UI"), "has no transfer syntax"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_structure_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, words = DAMAGED[name]
    path = write_series(tmp_path, STORED)[2]
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(
        ValueError, match=r"002\.dcm is truncated or not a DICOM file \(it [^\n]*\)\. Export"
    ) as refused:
        read(tmp_path)
    assert words in str(refused.value)


def test_more_pixel_data_than_the_header_states_is_a_warning_and_less_is_refused(tmp_path: Path) -> None:
    def add(k: int, dataset: Any) -> None:
        dataset.PixelData += bytes(8 if k == 3 else 0)

    def cut(k: int, dataset: Any) -> None:
        dataset.PixelData = dataset.PixelData[: -8 if k == 1 else None]

    write_series(tmp_path, STORED, each=add)
    (warning,) = header_of(tmp_path, RULES).warnings
    assert "contains more pixel data than the sizes in its headers, which are used (003.dcm)" in warning
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)
    write_series(tmp_path, STORED, each=cut)
    with pytest.raises(ValueError, match=r"001\.dcm has 88 bytes of pixel data instead of 96\. Export it again\."):
        header_of(tmp_path, RULES)


def test_a_file_of_another_kind_that_begins_like_dicom_is_ignored(tmp_path: Path) -> None:
    write_series(tmp_path, STORED)
    (tmp_path / "notes.bin").write_bytes(b"\x08\x00" + bytes(range(1, 200)))
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)


@pytest.mark.parametrize("size", [(4, 12), (12, 4), (6, 4), (6, 8)])
@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
def test_compressed_pixels_of_another_size_than_the_header_states_are_refused(
    syntax: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    def each(k: int, dataset: Any) -> None:
        fuzz_dicom.compress(dataset, syntax)
        dataset.Rows, dataset.Columns = size

    write_series(tmp_path, STORED, each=each)
    if size == (6, 8):
        np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)
        return
    with pytest.raises(ValueError, match=rf"6 x 8 compressed pixels, but states {size[0]} x {size[1]}\)\. Export"):
        read(tmp_path)
