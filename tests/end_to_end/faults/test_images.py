# SPDX-License-Identifier: Apache-2.0
"""Damaged and unusable image files are refused by name: each fault by the readers, each verb once end to end."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from scripts.data.case_io import LoadModalitiesd
from scripts.image_io.checks import Rules

Array = NDArray[Any]
Damage = Callable[[Path], Path]
XYZT_UNITS = 123  # offset in a NIfTI-1 header; the lower three bits are the unit of length
DIM, PIXDIM, QFORM, QUATERN, SROW = 40, 76, 252, 256, 280  # offsets in a NIfTI-1 header
DAMAGED = (
    r"is (truncated|too small|not a NIfTI file|not compressed with gzip)|contains (fewer|more) |has a damaged MetaImage"
)


def _voxels(function: Callable[[Array], Array]) -> Damage:
    """Other voxels under the same affine."""

    def damage(path: Path) -> Path:
        image = nib.Nifti1Image.from_filename(path)
        nib.save(nib.Nifti1Image(function(np.array(image.dataobj)), image.affine), path)
        return path

    return damage


def _with(value: float, count: int) -> Damage:
    def change(voxels: Array) -> Array:
        changed = voxels.astype(np.float32)
        chosen = np.random.default_rng(0).choice(changed.size, count, replace=False)
        changed[np.unravel_index(chosen, changed.shape)] = value
        return changed

    return _voxels(change)


def _rgb(voxels: Array) -> Array:
    return np.zeros(voxels.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


def _bytes(function: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> Path:
        path.write_bytes(function(path.read_bytes()))
        return path

    return damage


def _header(offset: int, kind: str, *values: float) -> Damage:
    """Numbers written into the header, as a broken converter would."""

    def damage(path: Path) -> Path:
        data = bytearray(gzip.decompress(path.read_bytes()))
        data[offset : offset + np.dtype(kind).itemsize * len(values)] = np.array(values, kind).tobytes()
        path.write_bytes(gzip.compress(bytes(data)))
        return path

    return damage


def _axes(*rows: tuple[float, float, float]) -> Damage:
    """An sform alone, with these axes."""

    def damage(path: Path) -> Path:
        _header(QFORM, "<i2", 0, 1)(path)
        return _header(SROW, "<f4", *(number for row in rows for number in (*row, 0.0)))(path)

    return damage


def _flip(place: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def flipped(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[place(len(data))] ^= 16
        return bytes(changed)

    return flipped


def _as_nii(path: Path) -> Path:
    """The same image, not compressed."""
    plain = path.with_name(path.name.removesuffix(".gz"))
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    return plain


def _as_mha(path: Path) -> Path:
    """The same image as a compressed MetaImage."""
    return _mha(path, packed=True)


def _mha(path: Path, packed: bool) -> Path:
    written = path.with_name(path.name.replace(".nii.gz", ".mha"))
    image = sitk.GetImageFromArray(np.array(nib.Nifti1Image.from_filename(path).dataobj).T)  # ITK would take NaN for 0
    image.CopyInformation(sitk.ReadImage(str(path)))
    sitk.WriteImage(image, str(written), useCompression=packed)
    return written


def _as_plain_mha(path: Path) -> Path:
    """The same image as a MetaImage that is not compressed."""
    return _mha(path, packed=False)


def _in_voxels(share: float) -> Callable[[bytes], bytes]:
    """Flip a bit after a MetaImage's header, which has no checksum."""

    def flipped(data: bytes) -> bytes:
        start = data.index(b"\n", data.index(b"ElementDataFile")) + 1
        return _flip(lambda n: start + int((n - start - 1) * share))(data)

    return flipped


def _mha_line(name: str, text: str | None) -> Damage:
    """A MetaImage with another line in its header, or without it."""

    def damage(path: Path) -> Path:
        changed = _as_mha(path)
        line = b"" if text is None else f"{name} = {text}\n".encode()
        data = re.sub(rf"(?m)^{name} = .*\n".encode(), line, changed.read_bytes(), count=1)
        changed.write_bytes(data)
        return changed

    return damage


def _rgb_mha(path: Path) -> Path:
    image = sitk.ReadImage(str(path))
    colour = path.with_name("pet.mha")
    sitk.WriteImage(sitk.Compose([sitk.Cast(image, sitk.sitkUInt8)] * 3), str(colour))
    return colour


def _zip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("image.nii", data)
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
SLICE = "is a single slice, but"
CASES = [  # row, modality, damage, a part of the sentence
    ("1 one NaN", "pet", _with(np.nan, 1), "1 of 5760 voxels are NaN or infinite. Correct the file"),
    ("1 three Inf", "mr", _with(np.inf, 3), "3 of 7392 voxels are NaN or infinite. Correct the file"),
    ("1 one -Inf", "ct", _with(-np.inf, 1), "1 of 7680 voxels are NaN or infinite. Correct the file"),
    ("1 one NaN .mha", "pet", lambda p: _as_mha(_with(np.nan, 1)(p)), "1 of 5760 voxels are NaN"),
    ("2 all NaN", "pet", _with(np.nan, 5760), "5760 of 5760 voxels are NaN or infinite"),
    ("4 sheared", "mr", _axes((4, 1, 0), (0, 4, 0), (0, 0, 6)), "has a sheared affine"),
    ("4 singular", "pet", _axes((5, 5, 0), (0, 0, 0), (0, 0, 5)), "has a singular affine"),
    ("4 zero axis", "pet", _axes((5, 0, 0), (0, 5, 0), (0, 0, 0)), "that are zero or not finite. Correct its header"),
    ("4 NaN affine", "ct", _axes((4, 0, 0), (0, np.nan, 0), (0, 0, 5)), "that are zero or not finite"),
    ("4 NaN origin", "ct", _header(SROW + 12, "<f4", np.nan), "that are zero or not finite"),
    ("4 NaN qform", "ct", lambda p: _header(QUATERN, "<f4", np.nan)(_header(QFORM, "<i2", 1, 0)(p)), "its header."),
    ("4 zero pixdim", "ct", _header(PIXDIM + 4, "<f4", 0.0), "has voxel sizes of [0.0, 4.0, 5.0] mm"),
    ("4 NaN pixdim", "ct", _header(PIXDIM + 8, "<f4", np.nan), "has voxel sizes of [4.0, nan, 5.0] mm"),
    ("4 sheared .mha", "pet", _mha_line("TransformMatrix", "1 0 0 0.3 1 0 0 0 1"), "has a sheared affine"),
    ("4 zero spacing .mha", "pet", _mha_line("ElementSpacing", "0 5 5"), ".mha"),
    ("4 in metres", "ct", _header(XYZT_UNITS, "u1", 1), "that voxel sizes are in metres. Correct xyzt_units"),
    (
        "4 in micrometres",
        "mr",
        _header(XYZT_UNITS, "u1", 3 + 8),
        "that voxel sizes are in micrometres. Correct xyzt_units",
    ),
    ("4 no spacing .mha", "pet", _mha_line("ElementSpacing", None), "has no voxel sizes (ElementSpacing). Convert it"),
    ("6 4D", "pet", _voxels(lambda v: np.stack([v, v], -1)), "contains 20 x 18 x 16 x 2 voxels. Give one 3D volume"),
    ("7 2D", "mr", _voxels(lambda v: v[..., 7]), SLICE),
    ("7 a slice", "mr", _voxels(lambda v: v[..., 7:8]), SLICE),
    ("7 a slice of the reference", "ct", _voxels(lambda v: v[..., 7:8]), SLICE),
    ("9 .nii cut", "ct", lambda p: _bytes(lambda d: d[:-1])(_as_nii(p)), "is too small for the 7680 voxels"),
    ("9 .nii cut in its head", "ct", lambda p: _bytes(lambda d: d[:200])(_as_nii(p)), "truncated in its header"),
    ("9 .nii too long", "ct", lambda p: _bytes(lambda d: d + b"\1")(_as_nii(p)), "contains more than the 7680 voxels"),
    ("9 .mha cut", "pet", lambda p: _bytes(lambda d: d[: len(d) // 2])(_as_mha(p)), "is truncated or damaged"),
    ("10 empty", "pet", _bytes(lambda _: b""), "is an empty file"),
    ("10 text", "mr", _bytes(lambda _: b"<html>Please log in.</html>"), "is a text file, not an image"),
    ("10 Git LFS", "ct", _bytes(lambda _: POINTER), "is a Git LFS pointer, not the image"),
    ("10 zip", "ct", _bytes(_zip), "is not compressed with gzip"),
    ("10 gzip of text", "ct", _bytes(lambda _: gzip.compress(b"not an image" * 99)), "is not a NIfTI file"),
    ("10 empty .mha", "ct", lambda p: _bytes(lambda _: b"")(_as_mha(p)), "is an empty file"),
    ("11 30000^3", "ct", _header(DIM, "<i2", 3, 30000, 30000, 30000), "states 30000 x 30000 x 30000 voxels"),
    ("11 30000^3 .mha", "ct", _mha_line("DimSize", "30000 30000 30000"), "states 30000 x 30000 x 30000 voxels"),
    ("11 less than it claims", "ct", _header(DIM, "<i2", 3, 24, 20, 900), "contains fewer than the 432000 voxels"),
    ("11 negative", "ct", _header(DIM, "<i2", 3, 24, -20, 16), "states [24, -20, 16] voxels"),
    ("12 RGB", "pet", _voxels(_rgb), "contains RGB voxels"),
    ("12 complex", "mr", _voxels(lambda v: v.astype(np.complex64)), "contains complex voxels"),
    ("12 RGB .mha", "pet", _rgb_mha, "contains RGB, complex or other voxels"),
]
EVERY = pytest.mark.parametrize(("key", "damage", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


def _assert_refused(case: Any, key: str, words: str, findings_of: Any) -> None:
    """Both readers refuse the case with one line: the loader of segment, train and evaluate, and that of check."""
    with pytest.raises(ValueError, match=re.escape(str(case[key]))) as refused:
        LoadModalitiesd(["ct", "pet", "mr"])({k: str(case[k]) for k in ("ct", "pet", "mr")})
    assert re.search(words, str(refused.value))
    assert "\n" not in str(refused.value)
    (error,) = (finding for finding in findings_of(case) if finding.level == "error")
    assert error.key == key
    assert str(case[key]) in error.what
    assert re.search(words, error.what)


@EVERY
def test_every_reader_refuses_a_faulty_image_by_name(
    key: str, damage: Damage, words: str, case: Any, findings_of: Any
) -> None:
    case[key] = damage(case[key])
    _assert_refused(case, key, re.escape(words), findings_of)


IN_HEADER, IN_VOXELS = CASES[8], CASES[0]


@pytest.mark.parametrize(("_row", "key", "damage", "words"), [IN_HEADER, IN_VOXELS], ids=["header", "voxels"])
def test_segment_refuses_a_faulty_image_by_name(
    _row: str, key: str, damage: Damage, words: str, case: Any, segment: Any, assert_refused: Any
) -> None:
    case[key] = damage(case[key])
    assert_refused(segment(case), str(case[key]), words)


def test_check_lists_a_faulty_image_and_continues_with_the_other_cases(
    cohort_of: Any, change_voxels: Any, check: Any, assert_refused: Any
) -> None:
    _, key, damage, words = IN_VOXELS
    cases = cohort_of(3)
    cases["B"][key] = damage(cases["B"][key])
    change_voxels(cases["C"]["mr"], lambda voxels: voxels * 0 + 7)
    outcome = check(cases)
    assert_refused(outcome, "1 error found")
    (error,) = (each for each in outcome.findings if each["level"] == "error")
    assert (error["case_id"], error["key"]) == ("B", key)
    assert str(cases["B"][key]) in error["what"]
    assert words in error["what"]
    assert outcome.warned(str(cases["C"]["mr"]), "is constant: every voxel is 7")
    assert f"| error | B | {key} |" in outcome.out


@pytest.mark.parametrize(("_row", "key", "damage", "words"), [IN_HEADER, IN_VOXELS], ids=["header", "voxels"])
def test_training_refuses_a_faulty_image_before_its_first_epoch(
    _row: str, key: str, damage: Damage, words: str, cohort_of: Any, train: Any, assert_refused: Any
) -> None:
    cases = cohort_of(5)
    cases["D"][key] = damage(cases["D"][key])
    outcome = train(cases)
    assert_refused(outcome, str(cases["D"][key]), words)
    assert "loss=" not in outcome.err


@pytest.mark.parametrize("line", ["Offset", "TransformMatrix"])
def test_a_metaimage_without_a_position_is_accepted_with_a_warning(
    line: str, case: Any, segment: Any, check: Any
) -> None:
    case["pet"] = _as_mha(case["pet"])
    words = (str(case["pet"]), "has no position in space (no Offset or no TransformMatrix)")
    assert not segment(case, name="whole").warned(*words)
    case["pet"].write_bytes(re.sub(rf"(?m)^{line} = .*\n".encode(), b"", case["pet"].read_bytes(), count=1))
    for outcome in (segment(case), check({"A": case})):
        assert outcome.code == 0, outcome.err
        assert outcome.warned(*words)


@pytest.mark.parametrize("units", [0, 2, 2 + 8])
def test_lengths_in_mm_or_without_a_unit_are_read_as_mm(units: int, case: Any, findings_of: Any) -> None:
    case["ct"] = _header(XYZT_UNITS, "u1", units)(case["ct"])
    assert {each.level for each in findings_of(case)} <= {"note"}


@pytest.mark.parametrize("eighth", range(9))
@pytest.mark.parametrize("how", ["bit", "cut", "cut .nii", "cut .mha", "cut plain .mha"])
def test_a_file_truncated_or_flipped_at_any_eighth_is_refused(
    how: str, eighth: int, case: Any, findings_of: Any
) -> None:
    """A cut at 8 eighths removes the last byte."""
    prepare = {"cut .nii": _as_nii, "cut .mha": _as_mha, "cut plain .mha": _as_plain_mha}
    case["pet"] = prepare.get(how, lambda path: path)(case["pet"])

    def place(length: int) -> int:
        return min(length * eighth // 8, length - 1)

    _bytes(_flip(place) if how == "bit" else lambda data: data[: place(len(data))])(case["pet"])
    is_empty = eighth == 0 and how.startswith("cut")
    _assert_refused(case, "pet", "is an empty file" if is_empty else DAMAGED, findings_of)


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_of_the_checksum_and_length_is_noticed(bit: int, case: Any, findings_of: Any) -> None:
    def flipped(data: bytes) -> bytes:
        return data[: bit - 8] + bytes([data[bit - 8] ^ 1 << bit]) + (data[bit - 7 :] if bit < 7 else b"")

    _bytes(flipped)(case["ct"])
    _assert_refused(case, "ct", "is truncated or damaged", findings_of)


@pytest.mark.parametrize("eighth", range(9))
def test_a_flipped_bit_in_a_compressed_metaimage_is_refused(eighth: int, case: Any, findings_of: Any) -> None:
    case["pet"] = _as_mha(case["pet"])
    assert [each for each in findings_of(case) if each.level == "error"] == []
    _bytes(_in_voxels(eighth / 8))(case["pet"])
    _assert_refused(case, "pet", "pet.mha", findings_of)


def test_with_the_limit_raised_30000_cubed_voxels_are_refused_within_1_gib_of_address_space(
    case: Any, findings_of: Any
) -> None:
    case["ct"] = _header(DIM, "<i2", 3, 30000, 30000, 30000)(case["ct"])
    case["pet"] = _mha_line("DimSize", "30000 30000 30000")(case["pet"])
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            limit = psutil.Process().memory_info().vms + 2**30
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            errors = {each.key: each.what for each in findings_of(case, Rules(10**14)) if each.level == "error"}
            os.write(sink, json.dumps(errors).encode())
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        errors = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert set(errors) == {"ct", "pet"}
    for key, error in errors.items():
        assert f"{case[key]} is too small for the 27000000000000 voxels in its header" in error


def test_max_voxels_lowers_and_raises_the_limit(case: Any, segment: Any, check: Any, assert_refused: Any) -> None:
    """The largest file of the case, its CT, has 24 x 20 x 16 = 7680 voxels."""
    assert_refused(segment(case, "--max-voxels", 7679), str(case["ct"]), "limit of 7679", "--max-voxels")
    assert segment(case, "--max-voxels", 7680).code == 0
    assert check({"A": case}, "--max-voxels", 7679).code == 1
    assert check({"A": case}, "--max-voxels", 7680).code == 0
