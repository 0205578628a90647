# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.image_io.checks import ERROR, WARNING, Rules, check_suv_values
from scripts.image_io.headers import Header
from scripts.image_io.suv_values import checked_suv_values, options_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"patient_weight": "70"}, {"patient_weight": 70.0}),
        ({"injected_dose": 370e6, "half_life": None}, {"injected_dose": 370e6}),
        ({"injection_time": "10:05"}, {"injection_time": "100500"}),
        ({"injection_time": "100530"}, {"injection_time": "100530"}),
        ({"injection_time": "2020-01-02 10:05:30"}, {"injection_time": "20200102100530"}),
        ({"injection_time": "20200102T1005"}, {"injection_time": "20200102100500"}),
        ({"suv_factor": 0.5}, {"suv_factor": 0.5}),
    ],
)
def test_values_are_numbers_and_times_as_dicom_writes_them(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert checked_suv_values(given) == expected
    assert checked_suv_values(expected) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"patient_weight": 0},
            r"^--patient-weight is 0\. Give the weight of the patient, a number from 0\.2 to 500 kg",
        ),
        ({"patient_weight": "seventy"}, r"^--patient-weight is 'seventy'\. Give"),
        ({"patient_weight": True}, r"^--patient-weight is True\. Give"),
        ({"injected_dose": 370}, r"^--injected-dose is 370\. Give the injected activity, a number from 100000 to"),
        ({"half_life": float("nan")}, r"^--half-life is nan\. Give"),
        ({"injection_time": "25:00"}, r"^--injection-time is '25:00'\. Give the time of the injection as"),
        ({"injection_time": "93000"}, r"^--injection-time is '93000'\. Give"),  # a spreadsheet took the first 0 off
        ({"injection_time": 100500}, r"^--injection-time is 100500\. Give"),
        (
            {"suv_factor": 1.0, "half_life": 6000.0},
            r"^--suv-factor is the whole conversion to SUV\. Remove --half-life",
        ),
        ({"weight": 70}, r"^weight is no value for SUV\. Use patient_weight, injected_dose, injection_time"),
    ],
)
def test_what_is_implausible_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_suv_values(given)
    with pytest.raises(ValueError, match=message):
        Rules(suv=given)


def test_the_values_of_a_case_are_added_to_those_of_all() -> None:
    rules = Rules(suv={"half_life": 6000}, max_voxels=10)
    assert rules.of_case({"suv": {"patient_weight": 70.0}}) == Rules(
        suv={"half_life": 6000.0, "patient_weight": 70.0}, max_voxels=10
    )
    assert rules.of_case({"case_id": "P1"}) is rules


def test_options_are_listed_in_words() -> None:
    assert options_of(["patient_weight"]) == "--patient-weight"
    keys = ["patient_weight", "injected_dose", "half_life"]
    assert options_of(keys) == "--patient-weight, --injected-dose and --half-life"


@pytest.mark.parametrize(
    ("headers", "level"),
    [
        ({"ct": ("CT", ("a.dcm",)), "pet": ("PT", ("b.dcm",))}, None),
        ({"ct": ("CT", ("a.dcm",)), "pet": ("", ())}, ERROR),
        ({"ct": ("CT", ("a.dcm",))}, WARNING),
        ({"ct": ("CT", ("a.dcm",)), "label": ("", ())}, WARNING),
    ],
)
def test_values_for_a_pet_that_is_no_dicom_are_refused(headers: dict[str, Any], level: str | None) -> None:
    made = {
        key: Header(f"{key}.nii", (2, 2, 2), np.eye(4), np.dtype("int16"), modality=kind, slices=files)
        for key, (kind, files) in headers.items()
    }
    findings = check_suv_values(made, Rules(suv={"patient_weight": 70}))
    assert [finding.level for finding in findings] == ([level] if level else [])
    assert all("--patient-weight" in finding.what for finding in findings)
    assert check_suv_values(made, Rules()) == []


def test_columns_of_a_table_become_the_values_of_a_case(tmp_path: Path) -> None:
    from scripts.data.case_table import read_case_table

    for name in ("ct", "pet"):
        (tmp_path / name).mkdir()
    table = tmp_path / "cases.csv"
    table.write_text("case_id,ct,pet,Patient Weight,injected-dose,injection_time\nP1,ct,pet,70,3.7e8,10:05\n")
    (item,) = read_case_table(table, "", ["image", "ct", "pet"])
    assert item["suv"] == {"patient_weight": 70.0, "injected_dose": 3.7e8, "injection_time": "100500"}
    assert not {"patient_weight", "injected_dose", "injection_time"} & set(item)
    table.write_text("case_id,ct,patient_weight\nP1,ct,heavy\n")
    with pytest.raises(ValueError, match=r"cases\.csv, case 1: patient_weight is 'heavy'\. Give the weight"):
        read_case_table(table, "", ["image", "ct"])
    table.write_text("case_id,ct,patient_weight\nP1,ct,\n")
    assert "suv" not in read_case_table(table, "", ["image", "ct"])[0]
