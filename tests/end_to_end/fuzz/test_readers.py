# SPDX-License-Identifier: Apache-2.0
"""Readers given damaged files: none crashes, hangs, takes memory that the file cannot fill, or reads what is broken."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import signal
import sys
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.image_io import nifti
from scripts.image_io.checks import Rules
from scripts.image_io.nifti import read_bytes
from scripts.image_io.reader import header_of, read_volume

ROOT = Path(__file__).parents[3]
RULES = Rules()
MUTATIONS = 1500
MHA = b"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = False\nOffset = 1 2 3\n"
MHA += b"ElementSpacing = 2 2 2\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n" + bytes(range(8))


def read(path: Path) -> Any:
    return read_volume(header_of(path, RULES), RULES)[0].numpy()


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


def test_every_mutation_is_read_whole_or_refused_in_one_sentence(fuzz: ModuleType, tmp_path: Path) -> None:
    found = fuzz.fuzz(MUTATIONS, 7, tmp_path)
    assert [each for each in found if each[2] not in ("read", "refused")] == []
    counts = fuzz.summary(found, 7)
    assert counts["total"]["mutations"] == MUTATIONS
    for kind, count in counts["kinds"].items():
        assert count["refused"] > 0, kind
        assert count["read"] > 0 or "cut" in kind or "bomb" in kind, kind  # most changes of a header do no harm


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda path: {}[path], "KeyError"),
        (lambda path: int("no file named"), "not one sentence that names the file"),
        (lambda path: time.sleep(9), "more than 1 s"),
        (lambda path: signal.raise_signal(signal.SIGSEGV), "ended by signal 11"),
        (lambda path: len(np.empty(300 * 2**20, np.uint8)) * 0 or None, "MiB of address space"),
        (lambda path: np.zeros((1, 2, 3)), "shape (1, 2, 3)"),
    ],
)
def test_the_harness_notices_each_fault(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str
) -> None:
    """Whole files, and a reader that is wrong from the second file on."""
    good = read_volume

    def broken(header: Any, rules: Rules) -> Any:
        found = good(header, rules)
        wrong = None if header.path.endswith("good.nii") else fault(header.path)
        return found if wrong is None else wrong

    monkeypatch.setattr(fuzz, "read_volume", broken)
    monkeypatch.setattr(fuzz, "mutate", lambda kind, rng, whole: ("nii", whole["nifti1"]))
    if "1 s" in words:
        monkeypatch.setattr(fuzz, "SECONDS", 1)
    ((_, _, outcome),) = fuzz.fuzz(1, 0, tmp_path)
    assert outcome.startswith("fault: ")
    assert words in outcome


def test_a_stream_that_gzip_refuses_is_a_fault_where_it_is_read(fuzz: ModuleType, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(noise(), np.eye(4)), tmp_path / "x.nii.gz")
    data = (tmp_path / "x.nii.gz").read_bytes()
    assert fuzz.judge(tmp_path / "x.nii.gz", tmp_path / "x.nii.gz", data) == "read"
    damaged = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]  # the checksum
    assert "although gzip says" in fuzz.judge(tmp_path / "x.nii.gz", tmp_path / "x.nii.gz", damaged)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.mha"])
def test_a_file_is_read_by_several_threads_at_once(tmp_path: Path, name: str) -> None:
    voxels = noise((20, 19, 18))
    if name == "x.mha":
        sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(voxels.T)), str(tmp_path / name), True)
    else:
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / name)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read, [tmp_path / name] * 40):
            np.testing.assert_array_equal(found, voxels)


@pytest.mark.parametrize("module", ["isal", "zlib"])
def test_a_bomb_behind_a_small_header_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """64 MiB of zeros in 64 KiB: unpacking stops one byte behind what the header claims."""
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


def test_many_empty_members_are_read_without_copying_the_rest_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decompressor copies what lies behind its member: in total no more than a small multiple of the file."""
    plain, members, given = bytes(noise()), 3000, []

    class Counted:
        def __init__(self, wbits: int) -> None:
            self.stream = zlib.decompressobj(wbits=wbits)

        def decompress(self, data: bytes, most: int) -> bytes:
            given.append(len(data))
            return self.stream.decompress(data, most)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    monkeypatch.setattr(nifti, "gzip_modules", lambda: (SimpleNamespace(decompressobj=Counted, error=zlib.error), gzip))
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(plain[:500]) + gzip.compress(b"") * members + gzip.compress(plain[500:]))
    assert read_bytes(path, len(plain)) == plain
    assert len(given) >= members
    assert sum(given) < 20 * path.stat().st_size  # it would be 1,500 times


def test_members_of_all_sizes_and_zeros_behind_them_are_what_gzip_reads(tmp_path: Path) -> None:
    rng = random.Random(3)
    parts = [rng.randbytes(rng.choice((0, 1, 200, 5000, 300_000))) for _ in range(40)]
    path = tmp_path / "x.gz"
    path.write_bytes(b"".join(gzip.compress(part, rng.randint(0, 9)) for part in parts) + bytes(700))
    assert read_bytes(path) == b"".join(parts) == gzip.decompress(path.read_bytes())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="something else follows its end"):
        read_bytes(path)


NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_metaimage_that_itk_writes_is_read(tmp_path: Path, dtype: str, packed: bool) -> None:
    """With a NIfTI file's fields, which ITK copies into it."""
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
        (b"NDims = 3", b"NDims = 2147483647", "damaged MetaImage header (NDims)"),  # ends ITK's process
        (b"Offset = 1 2 3", b"Offset = 1 x 3", "damaged MetaImage header (Offset)"),  # 0 to ITK
        (b"Offset = 1 2 3", b"Offset = 1 2 3\nOrigin = 3 2 1", "one thing said twice"),
        (b"NDims = 3", b"NDims = 3\nNDims = 3", "damaged MetaImage header (line 3)"),
        (b"NDims = 3", b"NDims 3", "damaged MetaImage header (line 2)"),
        (b"BinaryData = True", b"BinaryData = False", "not a binary image"),
        (b"2 2 2\nElementType", b"2 2 3\nElementType", "cut off or damaged"),
        (b"2 2 2\nElementType", b"2 2 900\nElementType", "too small"),
        (b"Data = False", b"Data = True\nCompressedDataSize = 2147483647", "cut off"),  # so much memory ITK asks for
        (b"Data = False", b"Data = True\nCompressedDataSize = 2147483647 1 1", "(CompressedDataSize)"),
        (b"Data = False", b"Data = True\nCompressedDataSize = -1", "(CompressedDataSize)"),
        (b"Data = False", b"Data = False\nCompressedDataSize = 8", "(CompressedDataSize)"),
        (b"2 2 2\nElementType", b"2 2 1\nElementType", "more voxels than it claims"),
        (b"2 2 2\nElementType", b"2 2 -2\nElementType", "damaged MetaImage header (DimSize)"),
        (b"MET_UCHAR", b"MET_UCHAR_ARRAY", "RGB, complex or other voxels"),
        (b"= LOCAL", b"= other.raw", "keeps its voxels in another file"),
        (b"CompressedData = False", b"CompressedData=True", "cut off or damaged"),  # read as voxels before
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


def test_the_record_holds_no_fault() -> None:
    record = json.loads((ROOT / "docs/results/reliability/fuzz.json").read_text())
    assert record["total"]["mutations"] >= 12_000
    assert record["total"]["fault"] == 0
    for name, total in record["total"].items():
        assert total == sum(kind[name] for kind in record["kinds"].values())
