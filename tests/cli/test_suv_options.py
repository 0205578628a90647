# SPDX-License-Identifier: Apache-2.0
"""A PET whose header was cleaned, completed by options and by columns of a table: the mask of the complete header."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from scripts.cli.main import main
from tests.dicom_phantom import SLOPE, write_study

WHOLE = ["--patient-weight", "70", "--injected-dose", "370e6", "--injection-time", "10:00", "--half-life", "6000"]


@pytest.fixture(scope="module")
def study(phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per series; the PET of 70 kg, 370 MBq, one half life before the scan."""
    root = write_study(phantoms[0], tmp_path_factory.mktemp("study"))
    for kind in ("CT", "PT", "MR"):
        (root / kind).mkdir()
        for path in (root / "dicom").glob(f"{kind}_*.dcm"):
            path.rename(root / kind / path.name)
    shutil.copytree(root / "PT", root / "cleaned")
    for path in (root / "cleaned").iterdir():
        head = pydicom.dcmread(path)
        del head.PatientWeight, head.RadiopharmaceuticalInformationSequence
        head.save_as(path)
    return root


def _images(study: Path, pet: str) -> list[str]:
    return ["--ct", str(study / "CT"), "--pet", str(study / pet), "--mr", str(study / "MR")]


def _mask(path: Path) -> Any:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


@pytest.fixture(scope="module")
def expected(study: Path, tiny_student: list[str]) -> Any:
    assert main(["segment", *_images(study, "PT"), "--output", str(study / "complete.nii.gz"), *tiny_student]) == 0
    return _mask(study / "complete.nii.gz")


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        (WHOLE, {"patient_weight": 70.0, "injected_dose": 370e6, "injection_time": "10:00", "half_life": 6000.0}),
        (["--suv-factor", str(1 / 1000 / float(SLOPE))], {"suv_factor": 1 / 1000 / float(SLOPE)}),
    ],
)
def test_options_complete_the_header_and_stand_in_the_manifest(
    given: list[str], recorded: Any, study: Path, tiny_student: list[str], expected: Any, tmp_path: Path
) -> None:
    command = ["segment", *_images(study, "cleaned"), "--output", str(tmp_path / "mask.nii.gz"), *tiny_student]
    assert main([*command, *given]) == 0
    np.testing.assert_array_equal(_mask(tmp_path / "mask.nii.gz"), expected)
    manifest = json.loads((tmp_path / "mask.manifest.json").read_text())
    assert manifest["config"]["checks"]["suv"] == pytest.approx(recorded)


def test_another_weight_gives_another_mask(study: Path, tiny_student: list[str], expected: Any, tmp_path: Path) -> None:
    command = ["segment", *_images(study, "cleaned"), "--output", str(tmp_path / "mask.nii.gz"), *tiny_student]
    assert main([*command, *WHOLE[2:], "--patient-weight", "7"]) == 0
    assert (_mask(tmp_path / "mask.nii.gz") != expected).any()


@pytest.mark.parametrize(
    ("pet", "given", "message"),
    [
        (
            "cleaned",
            [],
            "has no PatientWeight, no RadionuclideTotalDose, no RadionuclideHalfLife and no time of inject",
        ),
        ("PT", ["--patient-weight", "80"], "has a PatientWeight of 70 kg, but --patient-weight is 80 kg"),
        ("pet.nii.gz", ["--patient-weight", "70"], "pet.nii.gz is none. Remove it, and give the PET in SUV."),
        ("cleaned", ["--patient-weight", "7000"], "--patient-weight is 7000.0. Give the weight of the patient"),
        ("cleaned", ["--injection-time", "ten"], "--injection-time is 'ten'. Give the time of the injection"),
        ("cleaned", [*WHOLE, "--suv-factor", "1"], "--suv-factor is the whole conversion to SUV. Remove --patient-w"),
    ],
)
def test_what_does_not_fit_is_refused(
    pet: str, given: list[str], message: str, study: Path, tiny_student: list[str], tmp_path: Path, capsys: Any
) -> None:
    output = ["--output", str(tmp_path / "mask.nii.gz")]
    assert main(["segment", *_images(study, pet), *output, *tiny_student, *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mask.nii.gz").exists()


def test_columns_of_a_table_complete_each_case(
    study: Path, tiny_student: list[str], expected: Any, tmp_path: Path, capsys: Any
) -> None:
    table, output = tmp_path / "cases.csv", tmp_path / "masks"
    row = f"{study}/CT,{study}/%s,{study}/MR"
    table.write_text(f"case_id,ct,pet,mr,patient_weight,injected_dose,injection_time\ncomplete,{row % 'PT'},,,\n")
    command = ["segment", "--data-list", str(table), "--allow-outside", "--output-dir", str(output), *tiny_student]
    command += ["--half-life", "6000"]
    assert main([*command, "--patient-weight", "70"]) == 1
    assert "--patient-weight is the value of one patient. With --data-list" in capsys.readouterr().err
    assert main(command) == 0
    table.write_text(
        "case_id,ct,pet,mr,patient_weight,injected_dose,injection_time\n"
        f"cleaned,{row % 'cleaned'},70,370000000,10:00:00\n"
    )
    assert main(command) == 0
    for name in ("complete", "cleaned"):
        np.testing.assert_array_equal(_mask(output / f"{name}.nii.gz"), expected)
    manifest = json.loads((output / "cleaned.manifest.json").read_text())
    assert manifest["config"]["checks"]["suv"]["injected_dose"] == 370e6

    capsys.readouterr()
    assert main(command) == 0
    assert "1 cases: 0 segmented, 1 already there" in capsys.readouterr().out
    table.write_text(table.read_text().replace(",70,", ",7,"))
    assert main(command) == 0
    assert "1 cases: 1 segmented, 0 already there" in capsys.readouterr().out
    assert (_mask(output / "cleaned.nii.gz") != expected).any()


def test_the_check_of_a_data_set_uses_the_columns(study: Path, tmp_path: Path, capsys: Any) -> None:
    table = tmp_path / "cases.csv"
    row = f"cleaned,{study}/CT,{study}/cleaned,{study}/MR"
    command = ["check", "--data-list", str(table), "--allow-outside", "--output-dir", str(tmp_path / "check")]
    for suv, code in (("70,370000000,10:00:00,6000", 0), ("70,,10:00:00,6000", 1)):
        table.write_text(f"case_id,ct,pet,mr,patient_weight,injected_dose,injection_time,half_life\n{row},{suv}\n")
        assert main(command) == code
    assert "has no RadionuclideTotalDose, which SUV requires. Give --injected-dose" in "".join(capsys.readouterr())
