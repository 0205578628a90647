# SPDX-License-Identifier: Apache-2.0
"""Enhanced multi-frame CT, PET and MR: the same volume as single slices, or refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from benchmarks.dicom_samples import SUV_FACTOR, enhanced, item, pet_tags, write_enhanced, write_series
from scripts.cli.main import main
from scripts.image_io.checks import WARNING, Rules, check_headers
from scripts.image_io.reader import header_of, read_volume

RULES = Rules()
STORED = np.random.default_rng(0).integers(0, 2000, (12, 10, 7)).astype(np.uint16)
ORDER = [3, 0, 6, 1, 5, 2, 4]
RESCALES = [(0.5 + k, -100.0 * k) for k in range(7)]
Change = Callable[[Dataset], object]


def read(folder: Path) -> tuple[Any, Any]:
    header = header_of(folder, RULES)
    volume = read_volume(header, RULES)
    assert volume.shape == header.shape
    return header.affine, volume


@pytest.mark.parametrize("shared", [True, False], ids=["shared groups", "groups per frame"])
@pytest.mark.parametrize("order", [None, ORDER], ids=["in order", "shuffled"])
@pytest.mark.parametrize("kind", ["CT", "PT", "MR"])
def test_frames_give_the_same_volume_as_single_slices(
    kind: str, order: list[int] | None, shared: bool, tmp_path: Path
) -> None:
    def rescale(k: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = RESCALES[k]

    write_series(tmp_path / "slices", STORED, kind, rescale)
    write_enhanced(tmp_path / "frames", enhanced(STORED, kind, order, RESCALES, shared))
    (affine, voxels), (expected_affine, expected) = read(tmp_path / "frames"), read(tmp_path / "slices")
    np.testing.assert_allclose(affine, expected_affine, atol=1e-6)
    np.testing.assert_allclose(affine, [[-2, 0, 0, 10], [0, -2.5, 0, -5], [0, 0, 3, 30], [0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(voxels, expected, rtol=1e-6)
    slopes, intercepts = np.array(RESCALES).T
    factor = SUV_FACTOR if kind == "PT" else 1
    np.testing.assert_allclose(voxels, (STORED * slopes + intercepts) * factor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "ending"), [("CT", "2.2"), ("MR", "4.4"), ("PT", "128.1")])
def test_legacy_converted_enhanced_files_are_read(kind: str, ending: str, tmp_path: Path) -> None:
    dataset = enhanced(STORED, kind, ORDER, [(2, -3)])
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = f"1.2.840.10008.5.1.4.1.1.{ending}"
    write_enhanced(tmp_path, dataset)
    factor = SUV_FACTOR if kind == "PT" else 1
    np.testing.assert_allclose(read(tmp_path)[1], (STORED * 2.0 - 3) * factor, rtol=1e-6)


def test_an_mr_without_a_rescale_is_read_as_stored(tmp_path: Path) -> None:
    write_enhanced(tmp_path, enhanced(STORED, "MR", ORDER, None))
    np.testing.assert_array_equal(read(tmp_path)[1], STORED)


def test_signed_values_of_12_bits_are_read_without_the_bits_above(tmp_path: Path) -> None:
    dataset = enhanced((STORED.astype(np.int16) - 1000).astype(np.uint16) & 0xFFF | 0x7000, rescales=[(1, 0)])
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 1
    write_enhanced(tmp_path, dataset)
    np.testing.assert_array_equal(read(tmp_path)[1], STORED.astype(np.float32) - 1000)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless]
)
def test_other_transfer_syntaxes_give_the_same_volume(syntax: Any, tmp_path: Path) -> None:
    dataset = enhanced(STORED, order=ORDER)
    if syntax.is_encapsulated:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    write_enhanced(tmp_path, dataset)
    np.testing.assert_array_equal(read(tmp_path)[1], STORED - 1024.0)


def test_a_transfer_syntax_without_a_decoder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    dataset = enhanced(STORED)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    write_enhanced(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"cannot decode it here \(JPEG Lossless.*\)\. Export it without compression"):
        read(tmp_path)


def test_a_pet_that_states_its_units_and_corrections_as_enhanced_pet_does(tmp_path: Path) -> None:
    dataset = enhanced(STORED, "PT", ORDER, [(2, 0)])
    for keyword in ("Units", "DecayCorrection", "SeriesDate", "SeriesTime"):
        delattr(dataset, keyword)
    dataset.AttenuationCorrected = dataset.DecayCorrected = "YES"
    dataset.SeriesDate, dataset.SeriesTime = "20200102", "150000"  # of a later reconstruction
    dataset.DecayCorrectionDateTime = "20200102114000.00"
    units = item(MeasurementUnitsCodeSequence=[item(CodeValue="Bq/ml", CodingSchemeDesignator="UCUM")])
    dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = [units]
    write_enhanced(tmp_path / "pet", dataset)
    np.testing.assert_allclose(read(tmp_path / "pet")[1], STORED * 2 * SUV_FACTOR, rtol=1e-6)
    dataset.AttenuationCorrected = "NO"
    write_enhanced(tmp_path / "pet", dataset)
    with pytest.raises(ValueError, match=r"is not corrected for attenuation"):
        read(tmp_path / "pet")
    dataset.AttenuationCorrected, dataset.DecayCorrected = "YES", "NO"
    write_enhanced(tmp_path / "pet", dataset)
    with pytest.raises(ValueError, match=r"is not corrected for decay"):
        read(tmp_path / "pet")


def _enhanced_pet(moment: str, zone: str = "", **mapping: Any) -> Dataset:
    """A PET whose injection was at 10:40 UTC+1; ``moment`` is its time of decay correction."""
    dataset = enhanced(STORED, "PT", ORDER, [(2, 0)])
    for keyword in ("Units", "DecayCorrection", "SeriesDate", "SeriesTime"):
        delattr(dataset, keyword)
    dataset.AttenuationCorrected = dataset.DecayCorrected = "YES"
    dataset.DecayCorrectionDateTime = moment
    if zone:
        dataset.TimezoneOffsetFromUTC = zone
    units = item(
        MeasurementUnitsCodeSequence=[item(CodeValue="Bq/ml", CodingSchemeDesignator="UCUM")],
        **{"RealWorldValueSlope": 2.0, "RealWorldValueIntercept": 0.0, **mapping},
    )
    dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = [units]
    return dataset


@pytest.mark.parametrize(
    ("moment", "zone"),
    [
        ("20200102114000", ""), ("20200102114000.00+0100", "+0100"), ("20200102104000+0000", "+0100"),
        ("20200102054000.5-0500", "+0100"), ("202001021140+0100", ""),
    ],
)  # fmt: skip
def test_the_time_of_decay_correction_counts_in_the_time_zone_of_the_file(
    moment: str, zone: str, tmp_path: Path
) -> None:
    """All are the same moment."""
    write_enhanced(tmp_path, _enhanced_pet(moment, zone))
    np.testing.assert_allclose(read(tmp_path)[1], STORED * 2 * SUV_FACTOR, rtol=1e-6)


@pytest.mark.parametrize(("slope", "intercept"), [(3.5, 0.0), (2.0, 1.0)])
def test_a_mapping_to_other_numbers_does_not_give_the_unit(slope: float, intercept: float, tmp_path: Path) -> None:
    dataset = _enhanced_pet("20200102114000", RealWorldValueSlope=slope, RealWorldValueIntercept=intercept)
    write_enhanced(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"has the units (US|none)\. Only BQML"):
        read(tmp_path)


def test_a_pet_of_a_legacy_conversion_keeps_its_elements_in_a_sequence(tmp_path: Path) -> None:
    dataset = enhanced(STORED, "PT", None, [(1, 0)])
    tags = pet_tags()
    for keyword in tags:
        delattr(dataset, keyword)
    dataset.UnassignedSharedConvertedAttributesSequence = [item(**tags)]
    write_enhanced(tmp_path, dataset)
    np.testing.assert_allclose(read(tmp_path)[1], STORED * SUV_FACTOR, rtol=1e-6)


def frame(dataset: Dataset, number: int) -> Dataset:
    return dataset.PerFrameFunctionalGroupsSequence[number]


def in_frame(number: int, sequence: str, **values: Any) -> Change:
    """Set elements of one frame's functional group, which is added if it is absent."""

    def change(dataset: Dataset) -> None:
        group = frame(dataset, number)
        if sequence not in group:
            setattr(group, sequence, [Dataset()])
        for keyword, value in values.items():
            setattr(group[sequence].value[0], keyword, value)

    return change


def in_halves(sequence: str, keyword: str, first: Any, second: Any, same_positions: bool = False) -> Change:
    def change(dataset: Dataset) -> None:
        for number in range(7):
            in_frame(number, sequence, **{keyword: first if number < 4 else second})(dataset)
            if same_positions and number >= 4:
                position = frame(dataset, number - 4).PlanePositionSequence[0].ImagePositionPatient
                in_frame(number, "PlanePositionSequence", ImagePositionPatient=position)(dataset)

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    "two stacks": (in_halves("FrameContentSequence", "StackID", "1", "2"), "contains 2 stacks (StackID). Export one"),
    "two orientations": (
        in_halves("PlaneOrientationSequence", "ImageOrientationPatient", [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]),
        "contains frames of several orientations. Export one",
    ),
    "two pixel sizes": (
        in_halves("PixelMeasuresSequence", "PixelSpacing", [2, 2], [3, 3]), "contains frames of several pixel sizes"
    ),
    "two time points": (
        in_halves("FrameContentSequence", "TemporalPositionIndex", 1, 2, True), "contains 2 time points (Temporal"
    ),
    "two echoes": (in_halves("MREchoSequence", "EffectiveEchoTime", 5.0, 9.0, True), "contains 2 echoes (Effective"),
    "two b-values": (
        in_halves("MRDiffusionSequence", "DiffusionBValue", 0.0, 900.0, True), "contains 2 b-values (DiffusionBValue)"
    ),
    "two frame types": (
        in_halves("MRImageFrameTypeSequence", "ComplexImageComponent", "MAGNITUDE", "PHASE", True),
        "contains 2 frame types (ComplexImageComponent)",
    ),
    "two frames at one position": (
        in_halves("FrameContentSequence", "FrameAcquisitionNumber", 1, 2, True), "several frames at one position, such"
    ),
    "no position": (lambda d: delattr(frame(d, 2), "PlanePositionSequence"), "(frame 3) has no ImagePositionPatient"),
    "no pixel size": (
        lambda d: delattr(d.SharedFunctionalGroupsSequence[0], "PixelMeasuresSequence"), "has no PixelSpacing"
    ),
    "no frames' groups": (
        lambda d: delattr(d, "PerFrameFunctionalGroupsSequence"), "states 7 frames, but describes 0. Export it again"
    ),
    "one frame too few": (lambda d: setattr(d, "NumberOfFrames", 6), "states 6 frames, but describes 7"),
    "one frame too many": (lambda d: setattr(d, "NumberOfFrames", 8), "has 1680 bytes of pixel data instead of 1920"),
    "no rescale": (
        lambda d: delattr(frame(d, 4), "PixelValueTransformationSequence"), "(frame 5) has no RescaleSlope. Its values"
    ),
    "a slope of 0": (in_frame(1, "PixelValueTransformationSequence", RescaleSlope=0), "its RescaleSlope is 0. Export"),
    "another unit": (in_frame(1, "PixelValueTransformationSequence", RescaleType="ED"), "whose RescaleType is not HU"),
    "no sign": (lambda d: delattr(d, "PixelRepresentation"), "has no PixelRepresentation"),
    "inverted": (lambda d: setattr(d, "PhotometricInterpretation", "MONOCHROME1"), "MONOCHROME1, which readers invert"),
    "missing frame": (
        in_frame(6, "PlanePositionSequence", ImagePositionPatient=[-10, 5, 60]), "has missing slices (15.00 mm after"
    ),
    "too few pixels": (lambda d: setattr(d, "PixelData", d.PixelData[:-500]), "has 1180 bytes of pixel data inst"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_is_not_one_volume_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = REFUSED[fault]
    dataset = enhanced(STORED)
    change(dataset)
    write_enhanced(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"^\S+one\.dcm[^\n]*\.$") as refused:
        read(tmp_path)
    assert words in str(refused.value)


def test_frames_without_an_orientation_are_refused(tmp_path: Path) -> None:
    """GDCM, which reads the header, raises."""
    dataset = enhanced(STORED)
    del dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    write_enhanced(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"one\.dcm is a damaged DICOM file\. Export it again"):
        read(tmp_path)


def test_two_files_are_refused(tmp_path: Path) -> None:
    write_enhanced(tmp_path, enhanced(STORED), "a.dcm")
    write_enhanced(tmp_path, enhanced(STORED), "b.dcm")
    with pytest.raises(ValueError, match=r"contains several multi-frame files\. Keep one"):
        read(tmp_path)


def test_more_voxels_than_allowed_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    write_enhanced(tmp_path, enhanced(STORED))
    with pytest.raises(ValueError, match=r"states 12 x 10 x 7 voxels, more than the limit of 839"):
        header_of(tmp_path, Rules(max_voxels=839))


def test_a_spacing_that_contradicts_the_positions_is_a_warning(tmp_path: Path) -> None:
    dataset = enhanced(STORED)
    dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = 1.5
    write_enhanced(tmp_path, dataset)
    findings = check_headers({"ct": header_of(tmp_path, RULES)}, "ct")
    assert ["has slices 3 mm apart by their positions" in each.what for each in findings if each.level == WARNING] == [
        True
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A 1 x 1 x 1 network whose mask is HU > 0."""
    net = torch.nn.Conv3d(3, 2, 1)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        net.weight[1, 0] = 1.0
        net.bias[1] = 0.0
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    torch.save({"model": net.state_dict()}, path)
    return str(path)


NET = 'network_def={"_target_":"torch.nn.Conv3d","in_channels":3,"out_channels":2,"kernel_size":1}'


def test_without_pydicom_the_file_is_refused_with_the_command_that_installs_it(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> Any:
        if name.startswith("pydicom"):
            raise ModuleNotFoundError(name="pydicom")
        return importlib.import_module(name)

    write_enhanced(tmp_path / "ct", enhanced(STORED))
    monkeypatch.setattr("scripts.image_io.dicom_packages.import_module", fail)
    command = ["segment", "--ct", str(tmp_path / "ct"), "--allow-missing", "--weights", weights, "--set", NET]
    assert main([*command, "--engine", "torch", "--output", str(tmp_path / "mask.nii.gz")]) == 1
    error = capsys.readouterr().err
    assert "one.dcm is multi-frame (enhanced) DICOM: pydicom is not installed. Run: pip install" in error


@pytest.mark.parametrize("kind", ["frames", "slices"])
def test_dicom_segments_an_enhanced_ct_and_writes_a_segmentation_of_its_frames(
    kind: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = tmp_path / "study", tmp_path / "out"
    ball = np.linalg.norm(np.indices((24, 20, 16)).transpose(1, 2, 3, 0) - [11, 9, 7], axis=-1) < 6
    stored = np.where(ball, 1100, 0).astype(np.uint16)
    order = np.random.default_rng(1).permutation(16).tolist()
    if kind == "frames":
        write_enhanced(study / "ct", enhanced(stored, "CT", order, Manufacturer="TEST"))
    else:
        write_series(study / "ct", stored)
    options = ["--weights", weights, "--set", NET, "--engine", "torch", "--threads", "1", "--allow-missing"]
    options += ["--set", "spacing=[2,2.5,3]"]
    command = ["dicom", "--study", str(study), "--output-dir", str(out), *options]
    if kind == "frames":
        assert main([*command, "--rtstruct"]) == 1
        assert "is multi-frame (enhanced) DICOM, for which no RTSTRUCT can be written" in capsys.readouterr().err
        assert not out.exists()
    assert main([*command, "--sr"]) == 0
    report = highdicom.sr.srread(out / "sr.dcm")
    region, lesion = report.content.get_volumetric_roi_measurement_groups()
    for group in (region, lesion):
        volume = group.get_measurements(name=highdicom.sr.CodedConcept("118565006", "SCT", "Volume"))[0]
        assert volume.value == pytest.approx(ball.sum() * 2 * 2.5 * 3 / 1000, rel=0.1)
    image = nib.Nifti1Image.from_filename(out / "mask.nii.gz")
    mask = np.asanyarray(image.dataobj) > 0
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.95
    segmentation = highdicom.seg.segread(out / "seg.dcm")
    if kind == "frames":
        pixels = segmentation.get_pixels_by_source_frame(
            segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID,
            list(range(1, 17)), segment_numbers=[1], combine_segments=True, ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )  # fmt: skip
        np.testing.assert_array_equal(pixels > 0, mask[..., order].transpose(2, 1, 0))


def test_segment_reads_the_folder_with_the_one_file(weights: str, tmp_path: Path) -> None:
    write_enhanced(tmp_path / "ct", enhanced(STORED, "CT", ORDER))
    command = ["segment", "--ct", str(tmp_path / "ct"), "--allow-missing", "--weights", weights, "--set", NET]
    assert main([*command, "--engine", "torch", "--threads", "1", "--output", str(tmp_path / "mask.nii.gz")]) == 0
    affine = nib.Nifti1Image.from_filename(tmp_path / "mask.nii.gz").affine
    np.testing.assert_allclose(affine, header_of(tmp_path / "ct", RULES).affine, atol=1e-5)
