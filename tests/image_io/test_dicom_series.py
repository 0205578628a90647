# SPDX-License-Identifier: Apache-2.0
"""Folders of DICOM files: read like SimpleITK if they form one even volume, refused otherwise."""

from __future__ import annotations

import locale
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from scripts.cli.main import main
from scripts.image_io.checks import Rules
from scripts.image_io.reader import header_of, read_volume
from scripts.networks import Student

Array = NDArray[Any]
Tags = Mapping[str, str]
SHAPE = (12, 10, 7)
SPACING, ORIGIN = (2.0, 2.5, 3.0), (-10.0, 5.0, 30.0)  # mm, LPS
OBLIQUE = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix()
SERIES, PATIENT, FRAME = "0020|000e", "0010|0020", "0020|0052"
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"  # capture, whose files GDCM leaves in the order of their names
PLACE, AXES, SLOPE = "0020|0032", "0020|0037", b"\x28\x00\x53\x10"
# Tag and length of the value, as they lie in the files: implicit VR, little endian.
PLACED, AXIS, SIZES, ROWS, FRAMES = (
    bytes.fromhex(each) for each in ("20003200 08000000", "20003700 0c000000", "28003000 06000000", "28001000 02000000",
                                     "28000800 02000000")
)  # fmt: skip
TINY = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[16,16,16]", "--set", "spacing=[4,4,4]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
]  # fmt: skip


def text(numbers: Any) -> str:
    return "\\".join(f"{number:.9g}" for number in np.ravel(numbers))


def noise(shape: tuple[int, ...] = SHAPE) -> Array:
    return np.random.default_rng(0).integers(-500, 500, shape).astype(np.int16) * 2


def write_series(
    folder: Path,
    voxels: Array | None = None,
    tags: Tags | None = None,
    each: Callable[[int], Tags] = lambda _: {},
    steps: Any = None,
    axes: Any = ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    name: str = "{:03d}.dcm",
) -> Path:
    """Write one CT slice per plane of the last axis; ``steps``: positions along the normal, in slice distances."""
    voxels, axes = noise() if voxels is None else voxels, np.asarray(axes, dtype=float)
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)  # GDCM sets it to C when it writes; Python would then read text as ASCII
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    for k in range(voxels.shape[2]):
        image = sitk.GetImageFromArray(voxels[:, :, k].T[None])
        image.SetSpacing(SPACING)
        place = np.asarray(ORIGIN) + axes[:, 2] * SPACING[2] * (k if steps is None else steps[k])
        written = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"1.2.3.4.{k + 1}.{voxels.shape[0]}",
            "0008|0060": "CT", PATIENT: "SECRET-7", "0010|0010": "DOE^JANE", "0020|000d": "1.2.3.1",
            SERIES: "1.2.3.4", "0020|0013": str(k + 1), FRAME: "1.2.3.9", PLACE: text(place), AXES: text(axes[:, :2].T),
            **(tags or {}), **each(k),
        }  # fmt: skip
        for key, value in written.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / name.format(k)))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)
    return folder


def by_itk(folder: Path) -> tuple[Array, Array]:
    """Affine (RAS) and voxels by SimpleITK's own reader of series."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1, 1, 1]) @ affine, sitk.GetArrayFromImage(image).T


def read(folder: Path, *uids: str) -> tuple[Array, Array]:
    rules = Rules(series_uids=uids)
    header = header_of(folder, rules)
    volume = read_volume(header, rules)
    assert volume.shape == header.shape
    return header.affine, volume


@pytest.mark.parametrize("axes", [np.eye(3), OBLIQUE, OBLIQUE[:, [1, 2, 0]]], ids=["straight", "oblique", "sagittal"])
def test_a_series_has_the_grid_and_the_values_that_simpleitk_reads(axes: Array, tmp_path: Path) -> None:
    affine, voxels = read(write_series(tmp_path / "ct", axes=axes))
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = axes * SPACING, ORIGIN
    np.testing.assert_allclose(affine, np.diag([-1.0, -1, 1, 1]) @ expected, atol=1e-5)
    np.testing.assert_allclose(affine, by_itk(tmp_path / "ct")[0], atol=1e-5)
    np.testing.assert_array_equal(voxels, by_itk(tmp_path / "ct")[1])
    np.testing.assert_array_equal(voxels, noise())


def test_slices_are_ordered_by_position_not_by_file_name_or_number(tmp_path: Path) -> None:
    steps = [3, 0, 6, 1, 5, 2, 4]  # of the slice in the file 000, 001, ...
    affine, voxels = read(write_series(tmp_path / "ct", steps=steps, name="IM{}"))
    np.testing.assert_array_equal(voxels[..., steps], noise())
    np.testing.assert_allclose(affine[:3, 3], [10, -5, 30], atol=1e-5)


def test_slices_of_sop_classes_that_gdcm_does_not_sort_are_ordered_by_position(tmp_path: Path) -> None:
    steps = [3, 0, 6, 1, 5, 2, 4]
    affine, voxels = read(write_series(tmp_path, steps=steps, tags={"0008|0016": SECONDARY}))
    np.testing.assert_array_equal(voxels[..., steps], noise())
    np.testing.assert_allclose(
        affine, np.diag([-1, -1, 1, 1]) @ [[2, 0, 0, -10], [0, 2.5, 0, 5], [0, 0, 3, 30], [0, 0, 0, 1]]
    )


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    slopes, two = 0.5 + np.arange(SHAPE[2]), SLOPE + (2).to_bytes(4, "little") + b"2 "
    folder = write_series(tmp_path, each=lambda _: {"0028|1053": "2", "0028|1052": "0"})  # stored: half of the values
    for path, slope in zip(sorted(folder.iterdir()), slopes, strict=True):
        head, _, rest = path.read_bytes().partition(two)
        path.write_bytes(head + SLOPE + (4).to_bytes(4, "little") + f"{slope:4}".encode() + rest)
    np.testing.assert_allclose(read(folder)[1], noise() / 2 * slopes, atol=1e-4)


def two_series(folder: Path) -> Path:
    write_series(folder, tags={SERIES: "1.2.3.5"}, name="b{}.dcm", voxels=noise()[..., ::-1])
    return write_series(folder)


def test_one_of_two_series_is_chosen_by_its_uid(tmp_path: Path) -> None:
    two_series(tmp_path)
    np.testing.assert_array_equal(read(tmp_path, "1.2.3.4")[1], noise())
    np.testing.assert_array_equal(read(tmp_path, "1.2.3.5", "another")[1], noise()[..., ::-1])


def cut(bytes_left: int | None, number: int = 6) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = write_series(folder) / f"{number:03d}.dcm"
        path.write_bytes(path.read_bytes()[:bytes_left])

    return write


def by_slice(key: str, first: str, later: str) -> Callable[[Path], object]:
    return lambda folder: write_series(folder, each=lambda k: {key: first if k < 4 else later})


def at(*steps: float) -> Callable[[Path], object]:
    return lambda folder: write_series(folder, steps=steps)


def shifted(along: float, aside: float, which: Callable[[int], float]) -> Callable[[Path], object]:
    place = np.asarray(ORIGIN)
    return lambda folder: write_series(
        folder, each=lambda k: {PLACE: text(place + np.array([aside * which(k), 0, along * k * SPACING[2]]))}
    )


def without(tag: bytes, slices: Sequence[int] = range(SHAPE[2])) -> Callable[[Path], object]:
    """Replace the tag by another one that is not read."""
    return garbled(tag, tag[:2] + bytes([tag[2] | 0x80]) + tag[3:], slices)


def garbled(old: bytes, new: bytes, slices: Sequence[int] = (3,), **tags: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        write_series(folder, tags=tags)
        for k in slices:
            path = folder / f"{k:03d}.dcm"
            head, _, tail = path.read_bytes().rpartition(old)  # the first may be in the file's meta header
            assert head
            assert len(old) == len(new)
            path.write_bytes(head + new + tail)

    return write


def frames(*kept: bytes) -> Callable[[Path], object]:
    """One file of two frames of half a slice each; of its position, orientation and pixel size only ``kept`` remain."""

    def write(folder: Path) -> None:
        path = write_series(folder, noise()[..., :1], name="one.dcm") / "one.dcm"
        head, _, tail = path.read_bytes().rpartition(ROWS)
        half = (SHAPE[1] // 2).to_bytes(2, "little")
        data = head + FRAMES + b"2 " + ROWS + half + tail[2:]
        for tag in {PLACED, AXIS, SIZES}.difference(kept):
            assert data.count(tag) == 1
            data = data.replace(tag, tag[:2] + bytes([tag[2] | 0x80]) + tag[3:])
        path.write_bytes(data)

    return write


def several_sizes(folder: Path) -> None:
    write_series(folder)
    write_series(folder, noise((10, 10, 7)), steps=range(7, 14), name="b{}.dcm")


def not_dicom(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")


FAULTS = {
    "two series": (two_series, "2 DICOM series (1.2.3.4, 1.2.3.5). Choose one with --series-uid"),
    "a missing slice": (at(0, 1, 2, 4, 5, 6, 7), "has missing slices (6.00 mm after slice 3 of 7, 3.00 mm elsewhere)"),
    "two missing slices": (
        at(0, 1, 2, 3, 6, 7, 8),
        "has missing slices (9.00 mm after slice 4 of 7, 3.00 mm elsewhere)",
    ),
    "a doubled slice": (at(0, 4, 2, 3, 2, 5, 1), "several slices at one position. Keep one"),
    "almost a doubled slice": (at(0, 1, 2, 2.01, 3, 4, 5), "several slices at one position. Keep one"),
    "uneven spacing": (
        at(0, 1, 2, 3.4, 4.4, 5.4, 6.4),
        "has uneven slice distances (4.20 mm after slice 3 of 7, 3.00 mm elsewhere)",
    ),
    "growing spacing": (at(*1.019 ** np.arange(7) * 50), "has uneven slice distances ("),
    "a slice aside": (
        shifted(1, 4, lambda k: k == 3),
        "has uneven slice distances (slice 4 of 7 lies 4.00 mm off the even grid)",
    ),
    "a tilted gantry": (shifted(1, 3 * np.tan(np.pi / 12), float), "sheared affine: its axes are 75.0 degrees apart"),
    "two patients": (by_slice(PATIENT, "SECRET-7", "SECRET-8"), "slices of several patients. Keep"),
    "two frames of reference": (by_slice(FRAME, "1.2.3.9", "1.2.3.10"), "slices of several frames of reference. Keep"),
    "two orientations": (
        by_slice(AXES, "1\\0\\0\\0\\1\\0", "1\\0\\0\\0\\0\\1"),
        "slices of several orientations. Keep",
    ),
    "two sizes": (several_sizes, "slices of several sizes. Keep"),
    "no size of pixels": (without(SIZES), "000.dcm has no PixelSpacing. Export the series as"),
    "no size of one slice's pixels": (without(SIZES, [5]), "005.dcm has no PixelSpacing"),
    "no orientation": (without(AXIS), "000.dcm has no ImageOrientationPatient. Export the series as"),
    "no position": (without(PLACED, [2]), "002.dcm has no ImagePositionPatient. Export the series as"),
    "a position that is text": (
        garbled(b"-10\\5\\39", b"abc\\5\\39"),
        "003.dcm is a damaged DICOM file: its ImagePositionPatient",
    ),
    "a position that is NaN": (garbled(b"-10\\5\\39", b"nan\\5\\39"), "its ImagePositionPatient is not valid. Export"),
    "a position of a flipped byte": (
        garbled(b"-10\\5\\39", b"-1\xf6\\5\\39"),
        "its ImagePositionPatient is not valid. Export",
    ),
    "a position of two numbers": (garbled(b"-10\\5\\39", b"-1035\\39"), "its ImagePositionPatient is not valid"),
    "pixels of size 0": (
        garbled(b"2.5\\2 ", b"0.0\\2 "),
        "003.dcm is a damaged DICOM file: its PixelSpacing is not valid",
    ),
    "a class of a flipped byte": (
        garbled(b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.8\xf60.10008.5.1.4.1.1.2\0"),
        "003.dcm is a damaged DICOM file: its UIDs cannot be parsed. Export it again",
    ),
    "a frame of a flipped byte": (garbled(b"1.2.3.9\0", b"1.2.\xf6.9\0"), "its UIDs cannot be parsed. Export it again"),
    "frames without a position": (frames(), "one.dcm has several frames, but is no enhanced CT, PET or MR: the"),
    "no DICOM file": (not_dicom, "contains no DICOM images. Give a file, or the folder of one series"),
    "no file": (Path.mkdir, "contains no DICOM images. Give a file, or the folder of one series"),
    "a last slice cut off": (cut(-100), "006.dcm is truncated or not a DICOM file"),
    "a first slice cut off": (cut(-100, 0), "000.dcm is truncated or not a DICOM file"),
    "a slice cut off in its header": (cut(500), "006.dcm is truncated or not a DICOM file"),
    "a slice cut off in its preamble": (cut(100), "006.dcm is truncated or not a DICOM file"),
    "an empty slice": (cut(0), "006.dcm is truncated or not a DICOM file"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny student."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({"model": Student(3, 2, (4, 8, 8, 8), norm=("group", {"num_groups": 4})).state_dict()}, path)
    return path


Segment = Callable[..., tuple[int, str]]


@pytest.fixture
def segment(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Segment:
    """The verb's exit code and its standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        given = [*map(str, arguments), "--weights", str(weights), "--output", str(tmp_path / "out" / "mask.nii.gz")]
        return main(["segment", *TINY, "--allow-missing", *given]), capsys.readouterr().err

    return run


def refusal(result: tuple[int, str], output: Path) -> str:
    """The error message of a verb that fails without writing a file."""
    code, errors = result
    messages = re.findall(r"^.*?(error: .*)$", errors, re.MULTILINE)  # a progress bar may precede it
    assert (code, len(messages)) == (1, 1)
    assert "Traceback" not in errors
    assert [path.name for path in output.rglob("*") if not path.name.startswith(".")] == []
    return messages[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_one_even_volume_is_refused_by_name_and_without_patient_data(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, words = FAULTS[fault]
    make(tmp_path / "series")
    capfd.readouterr()
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        read(tmp_path / "series")
    message = str(refused.value)
    assert str(tmp_path / "series") in message
    assert "\n" not in message
    assert not re.search("SECRET|DOE", message + "".join(capfd.readouterr()))
    assert not re.search(r"abc|nan|udcf6|codec", message.replace(str(tmp_path), ""))  # nor the tags' values


def test_segment_refuses_such_a_folder_in_one_line_and_writes_nothing(segment: Segment, tmp_path: Path) -> None:
    make, words = FAULTS["two patients"]
    make(tmp_path / "series")
    result = segment("--ct", tmp_path / "series")
    assert words in refusal(result, tmp_path / "out")
    assert not re.search("SECRET|DOE", result[1])


def test_frames_of_another_class_with_one_position_are_refused(tmp_path: Path) -> None:
    """GDCM takes the distance of the frames for 1 mm."""
    frames(SIZES, AXIS, PLACED)(tmp_path / "ct")
    with pytest.raises(ValueError, match=r"one\.dcm has several frames, but is no enhanced CT, PET or MR"):
        header_of(tmp_path / "ct", Rules())


def test_file_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    os.rename(tmp_path / "ct" / "003.dcm", os.fsencode(tmp_path) + b"/ct/\xf6\xff.dcm")
    with pytest.raises(ValueError, match=r"ct contains a file whose name is not UTF-8 \(.*\)\. Rename it\."):
        read(tmp_path / "ct")


def test_patients_with_non_ascii_ids_stay_different(tmp_path: Path) -> None:
    """Bytes of ISO 8859-1, which SimpleITK does not decode: both would become one question mark."""
    garbled(b"SECRET-7", b"SECRET-\xf6", range(7))(tmp_path / "one")
    garbled(b"SECRET-7", b"SECRET-\xfc", range(7))(tmp_path / "two")
    one, two = (header_of(tmp_path / name, Rules()).series for name in ("one", "two"))
    assert one != two and "".join(one + two).encode("utf-8")  # noqa: PT018


def test_other_files_in_the_folder_of_a_series_are_ignored(tmp_path: Path) -> None:
    write_series(tmp_path)
    (tmp_path / "README").write_text("notes")
    (tmp_path / ".hidden.dcm").touch()
    write_series(tmp_path / "below" / "another")
    np.testing.assert_array_equal(read(tmp_path)[1], noise())


def test_rounding_differences_between_slices_are_accepted(tmp_path: Path) -> None:
    other = {AXES: "1\\0.00001\\0\\-0.00001\\1\\0", "0028|0030": "2.500001\\2"}
    steps = np.arange(7) + np.array([0, 1, -1, 0, 1, 0, 0]) * 1e-3
    write_series(tmp_path, each=lambda k: other if k == 3 else {}, steps=steps)
    np.testing.assert_array_equal(read(tmp_path)[1], noise())


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({PATIENT: "SECRET-8"}, "belong to different patients. Give series of one patient"),
        ({FRAME: "1.2.3.10"}, "has the frame of reference 1.2.3.9, "),
        ({FRAME: ""}, "has unknown. Register one to the other first"),
    ],
    ids=["patients", "frames", "no frame"],
)
def test_series_that_do_not_belong_together_are_refused_without_the_patients_ids(
    tags: Tags, words: str, segment: Segment, tmp_path: Path
) -> None:
    write_series(tmp_path / "ct")
    write_series(tmp_path / "mr", tags={SERIES: "1.2.3.6", "0008|0060": "MR", **tags})
    message = refusal(segment("--ct", tmp_path / "ct", "--mr", tmp_path / "mr"), tmp_path / "out")
    assert words in message
    assert str(tmp_path / "ct") in message
    assert str(tmp_path / "mr") in message
    assert "SECRET" not in message
    assert "DOE" not in message


def test_pet_whose_header_does_not_give_suv_is_refused(segment: Segment, tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    write_series(tmp_path / "pet", tags={SERIES: "1.2.3.6", "0008|0060": "PT"})
    message = refusal(segment("--ct", tmp_path / "ct", "--pet", tmp_path / "pet"), tmp_path / "out")
    assert f"{tmp_path / 'pet'} has the units none. Only BQML, GML and CNTS" in message


@pytest.mark.parametrize("chosen", [(), ("--series-uid", "1.2.3.4")], ids=["one series", "one of two"])
def test_segment_writes_the_mask_on_the_grid_of_the_series(
    chosen: tuple[str, ...], segment: Segment, tmp_path: Path
) -> None:
    folder = write_series(tmp_path / "ct", axes=OBLIQUE)
    expected, voxels = by_itk(folder)
    if chosen:
        write_series(folder, tags={SERIES: "1.2.3.5"}, name="b{}.dcm")
    write_series(tmp_path / "mr", tags={SERIES: "1.2.3.6", "0008|0060": "MR"}, axes=OBLIQUE)
    code, _ = segment("--ct", folder, "--mr", tmp_path / "mr", *chosen)
    assert code == 0
    mask = nib.load(tmp_path / "out" / "mask.nii.gz")
    assert mask.shape == voxels.shape
    np.testing.assert_allclose(mask.affine, expected, atol=1e-4)
