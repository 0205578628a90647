# SPDX-License-Identifier: Apache-2.0
"""The files that `evaluate --predictions` accepts as masks, and what it says about all others."""

from __future__ import annotations

import csv
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.cli.main import main
from scripts.evaluation.mask_files import find_masks

pytestmark = pytest.mark.usefixtures("fake_git")
SHAPE = (20, 16, 12)
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
IDS = ("P1", "Müller_1")


def write_mask(path: Path, compress: bool = True) -> None:
    """The reference's cube at the reference's place, in the format that the ending names."""
    voxels = np.zeros(SHAPE[::-1], np.uint8)
    voxels[3:9, 4:10, 6:12] = 1
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((2, 2, 3))
    image.SetOrigin((10, -20, 30))
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_name(f"temporary{path.name[path.name.index('.') :].lower()}")
    sitk.WriteImage(image, str(plain), compress)
    plain.rename(path)


@pytest.fixture
def evaluate(
    tmp_path: Path, write_nifti: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[int, dict[str, str]]]:
    """Evaluate the folder ``masks`` through the command line: exit code, and Dice by case."""
    monkeypatch.setattr("scripts.evaluation.score.case_overlays", lambda *arguments: [])
    affine = AFFINE.copy()
    affine[:3, 3] = [-10, 20, 30]
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[6:12, 4:10, 3:9] = 1
    lines = ["case_id,patient_id,ct,label"]
    for i, case_id in enumerate(IDS):
        write_nifti(tmp_path / str(i) / "ct.nii.gz", voxels, affine)
        write_nifti(tmp_path / str(i) / "label.nii.gz", voxels, affine)
        lines.append(f"{case_id},{case_id},{i}/ct.nii.gz,{i}/label.nii.gz")
    (tmp_path / "cases.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "masks").mkdir()

    def run() -> tuple[int, dict[str, str]]:
        arguments = ["evaluate", "--data", "phantom", "--data-list", tmp_path / "cases.csv", "--predictions"]
        arguments += [tmp_path / "masks", "--output-dir", tmp_path / "out", "--set", "+score#workers=1"]
        code = main([str(argument) for argument in [*arguments, "--set", 'modalities=["ct"]']])
        path = tmp_path / "out" / "cases.csv"
        if not path.is_file():
            return code, {}
        with open(path, newline="", encoding="utf-8") as file:
            return code, {row["case_id"]: row["dice"] for row in csv.DictReader(file)}

    return run


@pytest.mark.parametrize(
    "ending", [".nii", ".nii.gz", ".mha", ".nrrd", ".NII", ".NII.GZ", ".MHA", ".NRRD", ".seg.nrrd"]
)
def test_masks_of_every_format_are_scored(ending: str, evaluate: Callable, tmp_path: Path) -> None:
    for case_id in IDS:
        write_mask(tmp_path / "masks" / f"{case_id}{ending}")
    assert evaluate() == (0, dict.fromkeys(IDS, "1.0"))


def test_masks_without_compression_are_scored(evaluate: Callable, tmp_path: Path) -> None:
    write_mask(tmp_path / "masks" / "P1.nrrd", compress=False)
    write_mask(tmp_path / "masks" / "Müller_1.mha", compress=False)
    assert evaluate() == (0, dict.fromkeys(IDS, "1.0"))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_in_composed_form(form: str, evaluate: Callable, tmp_path: Path) -> None:
    for case_id in IDS:
        write_mask(tmp_path / "masks" / f"{unicodedata.normalize(form, case_id)}.nii.gz")
    assert evaluate() == (0, dict.fromkeys(IDS, "1.0"))


@pytest.mark.parametrize("names", [("P1.nii", "P1.nii.gz"), ("P1.NRRD", "P1.mha"), ("P1.seg.nrrd", "P1.nrrd")])
def test_two_files_of_one_case_are_refused_by_name(
    names: tuple[str, str], evaluate: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        write_mask(tmp_path / "masks" / name)
    assert evaluate() == (1, {})
    message = capsys.readouterr().err
    assert "contains several masks of one case: " in message
    assert all(name in message for name in names)


def test_two_spellings_of_one_name_are_refused(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "Müller_1.nii.gz")).touch()
    with pytest.raises(ValueError, match="contains several masks of one case"):
        find_masks(tmp_path, IDS)


def test_an_image_suffix_of_nnu_net_is_named_with_what_to_do(
    evaluate: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One mask lies under its own name: the other one is missing, and the table says why."""
    words = "P1_0000.nii.gz has nnU-Net's suffix of an image. If it is the mask, rename it to P1.nii.gz"
    write_mask(tmp_path / "masks" / "P1_0000.nii.gz")
    assert evaluate() == (1, {})
    assert words in capsys.readouterr().err
    write_mask(tmp_path / "masks" / "Müller_1.nii.gz")
    assert evaluate() == (0, {"P1": "", "Müller_1": "1.0"})
    assert words in caplog.text
    assert words in (tmp_path / "out" / "cases.csv").read_text(encoding="utf-8")
    assert words in (tmp_path / "out" / "summary.json").read_text(encoding="utf-8")


def test_the_image_of_a_case_that_has_a_mask_is_an_extra_file(tmp_path: Path) -> None:
    for name in ("P1.nii.gz", "P1_0000.nii.gz"):
        (tmp_path / name).touch()
    masks = find_masks(tmp_path, ["P1"])
    assert (masks.paths, masks.hints, masks.extra) == ({"P1": tmp_path / "P1.nii.gz"}, {}, ["P1_0000.nii.gz"])


def test_an_id_that_looks_like_a_suffix_is_an_id(tmp_path: Path) -> None:
    (tmp_path / "P1_0000.nii.gz").touch()
    assert find_masks(tmp_path, ["P1_0000"]).paths == {"P1_0000": tmp_path / "P1_0000.nii.gz"}


CONTENTS = {
    "empty": ([], "It is empty."),
    "other formats": (["P1.mhd", "P1.raw", "Müller_1.mhd"], "It contains 2 .mhd files, 1 .raw file."),
    "other names": (["a.nii.gz", "b.nii.gz", "dataset.json"], "It contains 1 .json file, 2 .nii.gz files."),
    "folders": (["P1/mask.nii.gz", "x/mask.nii.gz"], "It contains 2 folders."),
    "hidden files of macOS": (["._P1.nii.gz", ".DS_Store"], "It contains 2 hidden files."),
    "no ending": (["P1"], "It contains 1 file."),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_folder_without_any_mask_is_refused_with_its_contents(
    kind: str, evaluate: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, words = CONTENTS[kind]
    for name in names:
        (tmp_path / "masks" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "masks" / name).write_bytes(b"x")
    assert evaluate() == (1, {})
    message = capsys.readouterr().err
    assert f"None of the 2 masks was found in {tmp_path / 'masks'}. {words}" in message
    assert "Name the masks <case_id>.nii.gz, such as P1.nii.gz (or .nii, .mha, .nrrd)." in message
    assert not (tmp_path / "out" / "summary.json").exists()


def test_hidden_files_beside_the_masks_are_ignored(evaluate: Callable, tmp_path: Path) -> None:
    """macOS writes a small file ``._<name>`` beside every file on other volumes."""
    for case_id in IDS:
        write_mask(tmp_path / "masks" / f"{case_id}.nii.gz")
        shutil.copy(__file__, tmp_path / "masks" / f"._{case_id}.nii.gz")
    assert evaluate() == (0, dict.fromkeys(IDS, "1.0"))
    assert '"extra_files": []' in (tmp_path / "out" / "summary.json").read_text(encoding="utf-8")
