# SPDX-License-Identifier: Apache-2.0
"""Readers of damaged files: none crashes, hangs, allocates too much memory, or returns damaged data."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import signal
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.nifti import read_bytes
from scripts.image_io.reader import header_of, read_volume

ROOT = Path(__file__).parents[3]
RULES = Rules()
MUTATIONS, DICOM_MUTATIONS = 1500, 300
MHA = b"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = False\nOffset = 1 2 3\n"
MHA += b"ElementSpacing = 2 2 2\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n" + bytes(range(8))


def read(path: Path) -> Any:
    return read_volume(header_of(path, RULES), RULES)


def noise(shape: tuple[int, ...] = (9, 8, 7), dtype: Any = np.int16) -> Any:
    return np.random.default_rng(1).integers(0, 120, shape).astype(dtype)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_readers", ROOT / "benchmarks" / "fuzz_readers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutation_is_read_completely_or_refused_with_one_message(fuzz: ModuleType, tmp_path: Path) -> None:
    outcomes = fuzz.fuzz(MUTATIONS, 7, tmp_path)
    assert [each for each in outcomes if each[2] not in ("read", "refused")] == []
    counts = fuzz.summary(outcomes, 7)
    assert counts["total"]["mutations"] == MUTATIONS
    for kind, count in counts["kinds"].items():
        assert count["refused"] > 0, kind
        assert count["read"] > 0 or "cut" in kind or "bomb" in kind, kind  # most changes of a header are harmless


def test_every_mutation_of_a_dicom_folder_is_read_completely_or_refused(fuzz: ModuleType, tmp_path: Path) -> None:
    outcomes = fuzz.fuzz(DICOM_MUTATIONS, 7, tmp_path, dicom=True)
    assert [each for each in outcomes if each[2] not in ("read", "refused")] == []
    for kind, count in fuzz.summary(outcomes, 7)["kinds"].items():
        assert count["refused"] > 0, kind
        assert count["read"] == 0 or "cut" not in kind, kind
    assert fuzz.summary(outcomes, 7)["total"]["read"] > DICOM_MUTATIONS // 10


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda path: {}[path], "KeyError"),
        (lambda path: int("no file named"), "not a one-line message that names the file"),
        (lambda path: time.sleep(9), "more than 1 s"),
        (lambda path: signal.raise_signal(signal.SIGSEGV), "ended by signal 11"),
        (lambda path: len(np.empty(300 * 2**20, np.uint8)) * 0 or None, "MiB of address space"),
        (lambda path: np.zeros((1, 2, 3)), "shape (1, 2, 3)"),
    ],
)
def test_the_fuzzer_detects_each_fault(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str
) -> None:
    """Undamaged files, and a reader that fails from the second file on."""

    def broken(header: Any, rules: Rules) -> Any:
        volume = read_volume(header, rules)
        wrong = None if header.path.endswith("good.nii") else fault(header.path)
        return volume if wrong is None else wrong

    monkeypatch.setattr(fuzz, "read_volume", broken)
    monkeypatch.setattr(fuzz, "mutate", lambda kind, rng, undamaged: ("nii", undamaged["nifti1"]))
    if "1 s" in words:
        monkeypatch.setattr(fuzz, "SECONDS", 1)
    ((_, _, outcome),) = fuzz.fuzz(1, 0, tmp_path)
    assert outcome.startswith("fault: ")
    assert words in outcome


def test_reading_a_stream_that_gzip_refuses_is_a_fault(fuzz: ModuleType, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(noise(), np.eye(4)), tmp_path / "x.nii.gz")
    data = (tmp_path / "x.nii.gz").read_bytes()
    assert fuzz.outcome_of(tmp_path / "x.nii.gz", tmp_path / "x.nii.gz", data) == "read"
    damaged = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]  # the checksum
    assert "although gzip says" in fuzz.outcome_of(tmp_path / "x.nii.gz", tmp_path / "x.nii.gz", damaged)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.mha"])
def test_a_file_is_read_by_several_threads_at_once(tmp_path: Path, name: str) -> None:
    voxels = noise((20, 19, 18))
    if name == "x.mha":
        sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(voxels.T)), str(tmp_path / name), True)
    else:
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / name)
    with ThreadPoolExecutor(4) as pool:
        for read_voxels in pool.map(read, [tmp_path / name] * 40):
            np.testing.assert_array_equal(read_voxels, voxels)


@pytest.mark.parametrize("module", ["isal", "zlib"])
def test_a_gzip_bomb_after_a_small_header_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """64 MiB of zeros in 64 KiB: unpacking stops one byte after the size in the header."""
    if module == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)
    path = tmp_path / "x.nii.gz"
    plain = nib.Nifti1Image(noise(), np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(plain + bytes(2**26)))
    header = header_of(path, RULES)
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than the 504 voxels") as refused:
        read_volume(header, RULES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(refused.value)
    assert peak < 2 * path.stat().st_size + 2**20


@pytest.mark.parametrize("module", ["isal", "zlib"])
def test_reading_many_empty_members_takes_time_in_proportion_to_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """A decompressor that copies the rest of the file for every member would copy 40 GB here."""
    if module == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)
    plain, path = bytes(noise()), tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(plain[:500]) + gzip.compress(b"") * 60_000 + gzip.compress(plain[500:]))
    began = time.process_time()
    assert read_bytes(path, len(plain)) == plain
    assert time.process_time() - began < 5


def test_members_of_all_sizes_and_trailing_zeros_are_read_as_by_gzip(tmp_path: Path) -> None:
    rng = random.Random(3)
    parts = [rng.randbytes(rng.choice((0, 1, 200, 5000, 300_000))) for _ in range(40)]
    path = tmp_path / "x.gz"
    path.write_bytes(b"".join(gzip.compress(part, rng.randint(0, 9)) for part in parts) + bytes(700))
    assert read_bytes(path) == b"".join(parts) == gzip.decompress(path.read_bytes())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="is truncated or damaged"):
        read_bytes(path)


NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_metaimage_that_itk_writes_is_read(tmp_path: Path, dtype: str, packed: bool) -> None:
    """Including the fields of a NIfTI header, which ITK copies into it."""
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    nib.save(nib.Nifti1Image(noise(dtype=dtype), affine, dtype=np.dtype(dtype)), tmp_path / "x.nii")
    image = sitk.ReadImage(str(tmp_path / "x.nii"))
    image.SetMetaData("0008|0060", "CT")
    sitk.WriteImage(image, str(tmp_path / "x.mha"), packed)
    assert b"0008|0060 = CT" in (tmp_path / "x.mha").read_bytes()
    assert b"dim[0] = 3" in (tmp_path / "x.mha").read_bytes()
    np.testing.assert_array_equal(read(tmp_path / "x.mha"), noise())
    np.testing.assert_array_equal(header_of(tmp_path / "x.mha", RULES).affine, affine)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"NDims = 3", b"NDims = 2147483647", "damaged MetaImage header (NDims)"),  # crashes ITK
        (b"Offset = 1 2 3", b"Offset = 1 x 3", "damaged MetaImage header (Offset)"),  # ITK reads 0
        (b"Offset = 1 2 3", b"Offset = 1 2 3\nOrigin = 3 2 1", "(both Offset and Origin)"),
        (b"NDims = 3", b"NDims = 3\nNDims = 3", "damaged MetaImage header (line 3)"),
        (b"NDims = 3", b"NDims 3", "damaged MetaImage header (line 2)"),
        (b"BinaryData = True", b"BinaryData = False", "not a binary image"),
        (b"2 2 2\nElementType", b"2 2 3\nElementType", "truncated or damaged"),
        (b"2 2 2\nElementType", b"2 2 900\nElementType", "too small"),
        (b"Data = False", b"Data = True\nCompressedDataSize = 2147483647", "truncated"),  # ITK allocates that much
        (b"Data = False", b"Data = True\nCompressedDataSize = 2147483647 1 1", "(CompressedDataSize)"),
        (b"Data = False", b"Data = True\nCompressedDataSize = -1", "(CompressedDataSize)"),
        (b"Data = False", b"Data = False\nCompressedDataSize = 8", "(CompressedDataSize)"),
        (b"2 2 2\nElementType", b"2 2 1\nElementType", "more voxels than its header states"),
        (b"2 2 2\nElementType", b"2 2 -2\nElementType", "damaged MetaImage header (DimSize)"),
        (b"MET_UCHAR", b"MET_UCHAR_ARRAY", "RGB, complex or other voxels"),
        (b"= LOCAL", b"= other.raw", "stores its voxels in another file"),
        (b"CompressedData = False", b"CompressedData=True", "truncated or damaged"),  # read as voxels before
        (b"ObjectType = Image", b"ObjectType = Image\nHeaderSize = -1", "damaged MetaImage header (HeaderSize)"),
    ],
)
def test_a_metaimage_that_itk_would_misread_is_refused(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    path = tmp_path / "x.mha"
    path.write_bytes(MHA)
    np.testing.assert_array_equal(read(path), np.arange(8).reshape(2, 2, 2).T)
    path.write_bytes(MHA.replace(old, new))
    assert path.read_bytes() != MHA
    with pytest.raises(ValueError, match=r"^\S+x\.mha [^\n]*\.$") as refused:
        read(path)
    assert words in str(refused.value)


def test_the_published_record_contains_no_fault() -> None:
    record = json.loads((ROOT / "docs/results/reliability/fuzz.json").read_text())
    assert record["total"]["mutations"] >= 17_000
    assert sum(count["mutations"] for kind, count in record["kinds"].items() if kind.startswith("dicom")) >= 5000
    assert record["total"]["fault"] == 0
    for name, total in record["total"].items():
        assert total == sum(kind[name] for kind in record["kinds"].values())
