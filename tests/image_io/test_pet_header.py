# SPDX-License-Identifier: Apache-2.0
"""SUV of PET whose header was cleaned, compared with the arithmetic of its definition."""

from __future__ import annotations

import logging
from typing import Any

import pydicom
import pytest

from scripts.image_io.dicom_suv import series_suv_factor, suv_factor
from scripts.image_io.pet_header import philips_factor

DRUG = {"RadionuclideTotalDose": "370000000", "RadionuclideHalfLife": "6000", "RadiopharmaceuticalStartTime": "100000"}
COMPLETE = 70_000 / (370e6 / 2)  # 70 kg, 370 MBq, one half life (6000 s) before the scan


def header(drug: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A PET slice; ``None`` as a value removes the element, and ``drug=None`` the radiopharmaceutical."""
    dataset = pydicom.Dataset()
    values = {"Units": "BQML", "DecayCorrection": "START", "PatientWeight": "70", "SeriesDate": "20200102"}
    for keyword, value in {**values, "SeriesTime": "114000", **changes}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if drug is not None:
        item = pydicom.Dataset()
        for keyword, value in drug.items():
            if value is not None:
                setattr(item, keyword, value)
        dataset.RadiopharmaceuticalInformationSequence = [item]
    return dataset


def philips(suv: str | None, activity: str | None, creator: str = "Philips PET Private Group", **changes: Any) -> Any:
    dataset = header(DRUG, Units="CNTS", **changes)
    block = dataset.private_block(0x7053, creator, create=True)
    if suv is not None:
        block.add_new(0x00, "DS", suv)
    if activity is not None:
        block.add_new(0x09, "DS", activity)
    return dataset


ALL = {"patient_weight": 70.0, "injected_dose": 370e6, "half_life": 6000.0, "injection_time": "100000"}


@pytest.mark.parametrize(
    ("head", "given"),
    [
        (header(DRUG, PatientWeight=None), {"patient_weight": 70.0}),
        (header(DRUG, PatientWeight=""), {"patient_weight": 70.0}),
        (header({**DRUG, "RadionuclideTotalDose": None}), {"injected_dose": 370e6}),
        (header({**DRUG, "RadionuclideHalfLife": None}), {"half_life": 6000.0}),
        (header({**DRUG, "RadiopharmaceuticalStartTime": None}), {"injection_time": "100000"}),
        (header({**DRUG, "RadiopharmaceuticalStartTime": None}), {"injection_time": "20200102100000"}),
        (header(None, PatientWeight=None), ALL),  # the whole sequence was removed
        (header({}, PatientWeight=None), ALL),
        (header(DRUG), ALL),  # the same as in the header
        (
            header({**DRUG, "RadiopharmaceuticalStartTime": "100042"}),
            {"injection_time": "100000"},
        ),  # 42 s: the header's
    ],
)
def test_given_values_take_the_place_of_missing_ones(
    head: Any, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = str(head)
    with caplog.at_level(logging.WARNING):
        assert suv_factor([head], "PET", given) == pytest.approx(COMPLETE, rel=0.006)
    assert not caplog.text
    assert str(head) == before


def test_each_value_is_used_as_it_is_given_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    given = {"patient_weight": 35.0, "injected_dose": 740e6, "half_life": 3000.0, "injection_time": "105000"}
    with caplog.at_level(logging.INFO):
        found = suv_factor([header(None, PatientWeight=None)], "PET", given)
    assert found == pytest.approx(35_000 / (740e6 / 2))  # 50 minutes, one half life of 3000 s
    assert "PET: --patient-weight of 35 kg is used, the header has no PatientWeight." in caplog.text
    assert "PET: --injected-dose of 7.4e+08 Bq is used" in caplog.text
    assert "PET: --injection-time is used, the header has no time of injection." in caplog.text


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (header(DRUG, PatientWeight=None), r"has no PatientWeight, which SUV requires\. Give --patient-weight \(in a"),
        (
            header(None, PatientWeight=None),
            r"has no PatientWeight, no RadionuclideTotalDose, no RadionuclideHalfLife and no time of injection, which "
            r"SUV requires\. Give --patient-weight, --injected-dose, --half-life and --injection-time \(in a table",
        ),
        (
            header(None, PatientWeight=None, DecayCorrection="ADMIN"),
            r"has no PatientWeight and no RadionuclideTotalDose, which SUV requires\.",
        ),
    ],
)
def test_what_is_missing_is_listed(head: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^PET {message}"):
        suv_factor([head], "PET")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"patient_weight": 80.0}, r"has a PatientWeight of 70 kg, but --patient-weight is 80 kg\. Remove --patient-"),
        ({"injected_dose": 300e6}, r"has a RadionuclideTotalDose of 3\.7e\+08 Bq, but --injected-dose is 3e\+08 Bq"),
        ({"half_life": 6586.2}, r"has a RadionuclideHalfLife of 6000 s, but --half-life is 6586\.2 s"),
        ({"injection_time": "100200"}, r"has another time of injection in its header than --injection-time"),
    ],
)
def test_a_value_that_contradicts_the_header_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^PET {message}"):
        suv_factor([header(DRUG)], "PET", given)


def test_dates_of_the_injection_are_compared_too() -> None:
    dated = header({**DRUG, "RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": "20200102100000"})
    assert suv_factor([dated], "PET", {"injection_time": "100000"}) == pytest.approx(COMPLETE)
    with pytest.raises(ValueError, match="another time of injection"):
        suv_factor([dated], "PET", {"injection_time": "20200101100000"})


@pytest.mark.parametrize(
    ("head", "given"),
    [
        (header(DRUG, PatientWeight="0"), {"patient_weight": 70.0}),
        (header({**DRUG, "RadionuclideTotalDose": "370"}), {"injected_dose": 370e6}),  # in MBq
        (header({**DRUG, "RadiopharmaceuticalStartTime": "10:00"}), {"injection_time": "100000"}),
    ],
)
def test_a_value_replaces_an_invalid_one_with_a_warning(
    head: Any, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert suv_factor([head], "PET", given) == pytest.approx(COMPLETE)
    assert "which is invalid." in caplog.text


def test_a_factor_is_the_whole_conversion(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert suv_factor([header(None, Units=None, PatientWeight=None)], "PET", {"suv_factor": 0.25}) == 0.25
        assert suv_factor([header(DRUG)], "PET", {"suv_factor": COMPLETE * 1.001}) == COMPLETE * 1.001
    assert not caplog.text
    assert suv_factor([header(DRUG)], "PET", {"suv_factor": 0.25}) == 0.25
    assert "PET: --suv-factor of 0.25 replaces that of the header, 0.000378378." in caplog.text


def test_a_pet_in_suv_needs_no_value(caplog: pytest.LogCaptureFixture) -> None:
    head = header(None, Units="GML")
    assert suv_factor([head], "PET", {"patient_weight": 70.0}) == 1
    assert "PET: --patient-weight is not used, because its values are SUV already." in caplog.text
    assert suv_factor([head], "PET", {"suv_factor": 1.0}) == 1
    with pytest.raises(ValueError, match=r"PET is in SUV already \(Units GML\), but --suv-factor is 0\.5\. Remove it"):
        suv_factor([head], "PET", {"suv_factor": 0.5})


def test_a_factor_does_not_make_up_for_missing_corrections() -> None:
    with pytest.raises(ValueError, match="not corrected for attenuation"):
        suv_factor([header(DRUG, CorrectedImage=["DECY"])], "PET", {"suv_factor": 0.25})


def test_counts_of_philips_become_suv_by_its_own_factor(caplog: pytest.LogCaptureFixture) -> None:
    assert suv_factor([philips("0.000412", "1.5")], "PET") == 0.000412
    assert suv_factor([philips("0.000412", None, PatientWeight=None)], "PET") == 0.000412
    assert suv_factor([philips("0.000412", None)], "PET", {"patient_weight": 70.0}) == 0.000412
    assert "--patient-weight is not used, because Philips' factor (7053,1000) stands in the header" in caplog.text


@pytest.mark.parametrize("suv", [None, "0"])
def test_without_it_the_factor_of_activity_gives_bq_per_ml(suv: str | None) -> None:
    assert suv_factor([philips(suv, "1.5")], "PET") == pytest.approx(1.5 * COMPLETE)
    cleaned = philips(suv, "1.5", PatientWeight=None)
    assert suv_factor([cleaned], "PET", {"patient_weight": 140.0}) == pytest.approx(3 * COMPLETE)
    with pytest.raises(ValueError, match="PET has no PatientWeight"):
        suv_factor([cleaned], "PET")


@pytest.mark.parametrize("head", [philips(None, None), philips("0", "0"), philips("0.1", "1", creator="ANOTHER")])
def test_counts_without_a_factor_are_refused(head: Any) -> None:
    assert philips_factor(head) == (0, 0)
    with pytest.raises(ValueError, match=r"PET has the units CNTS.*\(7053,1000 or 7053,1009\).*--suv-factor"):
        suv_factor([head], "PET")
    assert suv_factor([head], "PET", {"suv_factor": 0.5}) == 0.5


@pytest.mark.parametrize("implicit", [False, True])
def test_the_factor_of_philips_is_read_from_files_and_is_that_of_all_slices(implicit: bool, tmp_path: Any) -> None:
    syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    for number, factor in enumerate(("0.000412", "0.000412", "0.0005")):
        dataset = philips(factor, None)
        dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.128", f"1.2.{number}"
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    files = [str(tmp_path / f"{number}.dcm") for number in range(3)]
    assert series_suv_factor(files[:2], "PET") == 0.000412
    with pytest.raises(ValueError, match="PET contains slices with different factors of Philips"):
        series_suv_factor(files, "PET")
