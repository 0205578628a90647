# SPDX-License-Identifier: Apache-2.0
"""Values of DICOM images: rescale, sign and bits; scouts and objects that are no images in the same folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from benchmarks.dicom_samples import CLASSES, SUV_FACTOR, image, item, write_series
from scripts.cli.main import main
from scripts.image_io.checks import ERROR, NOTE, WARNING, Rules, check_headers
from scripts.image_io.dicom_classes import no_image, sop_class_of
from scripts.image_io.reader import header_of, read_volume

RULES = Rules()
STORED = np.random.default_rng(0).integers(0, 2000, (8, 6, 5)).astype(np.uint16)
STORAGE = "1.2.840.10008.5.1.4.1.1."
OTHERS = {"RTSTRUCT": "481.3", "RTPLAN": "481.5", "RTDOSE": "481.2", "SR": "88.33", "KO": "88.59", "PR": "11.1",
          "SEG": "66.4"}  # fmt: skip


def read(folder: Path) -> Any:
    return read_volume(header_of(folder, RULES), RULES)


def without(keywords: str, slices: Any = range(5)) -> Callable[[int, Dataset], None]:
    def each(k: int, dataset: Dataset) -> None:
        for keyword in keywords.split() if k in slices else ():
            delattr(dataset, keyword)

    return each


def with_values(slices: Any = range(5), **values: Any) -> Callable[[int, Dataset], None]:
    def each(k: int, dataset: Dataset) -> None:
        for keyword, value in values.items() if k in slices else ():
            setattr(dataset, keyword, value)

    return each


@pytest.mark.parametrize(
    ("kind", "each", "words"),
    [
        ("CT", without("RescaleSlope RescaleIntercept"), "000.dcm has no RescaleSlope, nor have 4 other slices. Its"),
        (
            "CT",
            without("RescaleIntercept", [3]),
            "003.dcm has no RescaleIntercept. Its values cannot be converted to HU",
        ),
        ("CT", without("RescaleSlope", [0, 4]), "000.dcm has no RescaleSlope, nor have 1 other slices"),
        ("PT", without("RescaleSlope RescaleIntercept"), "000.dcm has no RescaleSlope, nor have 4 other slices. Its"),
        ("PT", without("RescaleSlope RescaleIntercept", [2]), "002.dcm has no RescaleSlope. Its values cannot be conv"),
        ("MR", without("RescaleSlope RescaleIntercept", [1]), "001.dcm has no RescaleSlope. Its values cannot be comp"),
        ("MR", without("RescaleIntercept"), "000.dcm has no RescaleIntercept"),
        ("CT", with_values([1], RescaleSlope=0), "001.dcm is a damaged DICOM file: its RescaleSlope is 0"),
        ("PT", with_values([1], RescaleSlope=0), "001.dcm is a damaged DICOM file: its RescaleSlope is 0"),
        ("MR", with_values([1], RescaleIntercept="-5\\3"), "its RescaleIntercept is not a number"),
        (
            "CT",
            with_values([2], RescaleType="OD"),
            "002.dcm is a CT whose RescaleType is not HU. Give the series in HU",
        ),
        ("CT", without("PixelRepresentation"), "000.dcm has no PixelRepresentation. Its values cannot be read"),
        ("CT", without("BitsStored", [4]), "004.dcm has no BitsStored"),
        ("MR", with_values(HighBit=7), "its BitsStored, HighBit or PixelRepresentation is not valid. Export it again"),
        ("CT", with_values(PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1, which readers invert. Convert it"),
        ("CT", with_values([3], Modality="PT"), "contains slices of several modalities"),
        ("CT", with_values(ImageOrientationPatient=[2, 0, 0, 0, 2, 0]), "its ImageOrientationPatient is not valid"),
        (
            "CT",
            with_values(ImageOrientationPatient=[1, 0, 0, 0.5, 0.866, 0]),
            "its ImageOrientationPatient is not valid",
        ),
        ("PT", with_values([1], Units="GML"), "contains slices with different Units"),
    ],
)
def test_a_series_whose_values_a_library_would_guess_is_refused(
    kind: str, each: Callable[[int, Dataset], None], words: str, tmp_path: Path
) -> None:
    write_series(tmp_path / "series", STORED, kind, each)
    with pytest.raises(ValueError, match=r"^\S+series[^\n]*\.$") as refused:
        read(tmp_path / "series")
    assert words in str(refused.value)


@pytest.mark.parametrize("text", [b"1_000 ", b"1,5   ", b"nan   "])
def test_a_slope_that_gdcm_and_python_read_differently_is_refused(text: bytes, tmp_path: Path) -> None:
    path = write_series(tmp_path, STORED, each=with_values([2], RescaleSlope="1.2345"))[2]
    data = path.read_bytes()
    assert data.count(b"1.2345") == 1
    path.write_bytes(data.replace(b"1.2345", text))
    with pytest.raises(ValueError, match=r"002\.dcm is a damaged DICOM file: its RescaleSlope is not a number"):
        read(tmp_path)


def test_values_are_rescaled_per_slice(tmp_path: Path) -> None:
    each = lambda k, dataset: with_values(RescaleSlope=k + 0.5, RescaleIntercept=-k)(k, dataset)  # noqa: E731
    write_series(tmp_path / "ct", STORED, "CT", each)
    write_series(tmp_path / "mr", STORED, "MR", each)
    write_series(tmp_path / "pet", STORED, "PT", each)
    k = np.arange(5)
    expected = STORED * (k + 0.5) - k
    np.testing.assert_allclose(read(tmp_path / "ct"), expected, rtol=1e-6)
    np.testing.assert_allclose(read(tmp_path / "mr"), expected, rtol=1e-6)
    np.testing.assert_allclose(read(tmp_path / "pet"), expected * SUV_FACTOR, rtol=1e-6)


def test_an_mr_without_a_rescale_is_read_as_stored(tmp_path: Path) -> None:
    write_series(tmp_path, STORED, "MR", rescale=None)
    np.testing.assert_array_equal(read(tmp_path), STORED)


def test_a_pet_without_a_modality_is_still_converted_to_suv(tmp_path: Path) -> None:
    write_series(tmp_path, STORED, "PT", without("Modality"), rescale=(1, 0))
    np.testing.assert_allclose(read(tmp_path), STORED * SUV_FACTOR, rtol=1e-6)


def warnings_of(folder: Path, level: str = WARNING) -> list[str]:
    findings = check_headers({"ct": header_of(folder, RULES)}, "ct")
    return [finding.what for finding in findings if finding.level == level]


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"RescaleType": "US"}, "is a CT with the RescaleType US: its values are read as HU"),
        (
            {"SpacingBetweenSlices": 1.5},
            "has slices 3 mm apart by their positions, which are used, but a SpacingBetween",
        ),
        ({"NumberOfSlices": 7}, "has 5 slices, but a NumberOfSlices of 7: are slices missing?"),
    ],
)
def test_what_a_header_contradicts_or_leaves_open_is_a_warning(tags: Any, words: str, tmp_path: Path) -> None:
    write_series(tmp_path, STORED, **tags)
    (warning,) = warnings_of(tmp_path)
    assert words in warning


@pytest.mark.parametrize(("kind", "key"), [("CT", "pet"), ("PT", "ct"), ("MR", "ct"), ("CT", "mr")])
def test_a_series_given_as_another_modality_is_refused(kind: str, key: str, tmp_path: Path) -> None:
    write_series(tmp_path, STORED, kind)
    header = header_of(tmp_path, RULES)
    errors = [finding.what for finding in check_headers({key: header}, key) if finding.level == ERROR]
    assert len(errors) == 1
    assert f"{tmp_path} is given as {key}, but its Modality is {kind}. Give a series of" in errors[0]
    assert not check_headers({"t1": header}, "t1")


def test_a_plain_series_draws_no_warning(tmp_path: Path) -> None:
    write_series(tmp_path, STORED, RescaleType="HU", SpacingBetweenSlices=3.0, NumberOfSlices=5)
    assert warnings_of(tmp_path) == []


def scout(folder: Path, number: int, **tags: Any) -> None:
    """A coronal LOCALIZER image of other sizes, without a rescale."""
    plane = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "PixelSpacing": [1, 1], "Rows": 4, "Columns": 4}
    values = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImagePositionPatient": [0, 0, 0], **plane, **tags}
    dataset = image("CT", CLASSES["CT"], PixelData=b"\0\0" * 16, **values)
    dataset["PixelData"].VR = "OW"
    dataset.save_as(folder / f"scout{number}.dcm", enforce_file_format=True)


def test_scouts_in_the_series_are_left_out_with_a_warning(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", STORED)
    scout(tmp_path / "ct", 1)
    scout(tmp_path / "ct", 2)
    np.testing.assert_array_equal(read(tmp_path / "ct"), STORED - 1024.0)
    (warning,) = warnings_of(tmp_path / "ct")
    assert warning == f"{tmp_path / 'ct'}: left out 2 LOCALIZER images (scout1.dcm, scout2.dcm)"


def test_a_series_of_scouts_beside_the_volume_is_left_out(tmp_path: Path) -> None:
    write_series(tmp_path, STORED)
    scout(tmp_path, 1, SeriesInstanceUID="1.2.3.77")
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)
    assert "left out 1 LOCALIZER image (scout1.dcm)" in warnings_of(tmp_path)[0]
    with pytest.raises(ValueError, match="contains only LOCALIZER images"):
        header_of(tmp_path, Rules(series_uids=["1.2.3.77"]))


def other_object(folder: Path, kind: str, syntax: str | None = None, series: str | None = None) -> Path:
    """An object that references the CT's images, as a PACS returns it among them."""
    pixels = {}
    if kind in ("RTDOSE", "SEG"):
        pixels = {"Rows": 6, "Columns": 8, "NumberOfFrames": 2, "PixelData": b"\1\0" * 96, "PixelSpacing": [2, 2]}
    reference = item(ReferencedSOPClassUID=CLASSES["CT"], ReferencedSOPInstanceUID="1.2.3.4")
    dataset = image("CT", STORAGE + OTHERS[kind], ReferencedImageSequence=[reference], **pixels)
    dataset.Modality, dataset.SeriesInstanceUID = kind, series or f"1.2.3.{OTHERS[kind]}"
    if not pixels:
        for keyword in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"):
            delattr(dataset, keyword)
        del dataset.PhotometricInterpretation
    else:
        dataset["PixelData"].VR = "OW"
    if syntax:
        dataset.file_meta.TransferSyntaxUID = syntax
    path = folder / f"{kind}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_objects_that_are_no_images_are_passed_over_with_a_note(syntax: Any, tmp_path: Path) -> None:
    write_series(tmp_path, STORED)
    for kind in OTHERS:
        assert no_image(sop_class_of(other_object(tmp_path, kind, syntax)) or "") == kind
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)
    assert warnings_of(tmp_path) == []
    notes = " ".join(warnings_of(tmp_path, NOTE))
    assert "passed over what is no image" in notes
    assert all(kind in notes or "more" in notes for kind in OTHERS)


def test_a_structure_set_in_the_series_of_the_images_is_passed_over(tmp_path: Path) -> None:
    write_series(tmp_path, STORED)
    other_object(tmp_path, "RTSTRUCT", series=f"1.2.3.{ord('C')}")
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)


@pytest.mark.parametrize("suffix", [".dcm", ""])
@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_a_slice_that_is_cut_off_is_refused_in_every_transfer_syntax(syntax: Any, suffix: str, tmp_path: Path) -> None:
    def each(k: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()

    paths = write_series(tmp_path, STORED, each=each)
    np.testing.assert_array_equal(read(tmp_path), STORED - 1024.0)
    for length in (0.95, 0.5):
        data = paths[4].read_bytes()
        cut = paths[4].with_suffix(suffix)
        paths[4].unlink()
        cut.write_bytes(data[: int(len(data) * length)])
        with pytest.raises(ValueError, match=r"/004\S* is (truncated|a damaged)"):
            read(tmp_path)
        cut.unlink()
        paths[4].write_bytes(data)


def test_check_refuses_a_ct_without_a_rescale_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_series(tmp_path / "ct", STORED, each=without("RescaleSlope RescaleIntercept", [2]))
    (tmp_path / "cases.csv").write_text("case_id,ct\na,ct\n")
    with caplog.at_level(logging.INFO):
        code = main(
            ["check", "--data", "sts", "--data-list", str(tmp_path / "cases.csv"), "--set", 'modalities=["ct"]']
        )
    assert code == 1
    output = "".join(capsys.readouterr()) + caplog.text
    assert "002.dcm has no RescaleSlope. Its values cannot be converted to HU. Export the series again." in output
