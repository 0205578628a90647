# SPDX-License-Identifier: Apache-2.0
"""SUV by body weight against the arithmetic of its definition."""

from __future__ import annotations

from typing import Any

import pydicom
import pytest

from scripts.data.suv import suv_factor


def header(infusion: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A PET slice of 70 kg, 370 MBq of a nuclide with a half life of 6000 s, injected 100 minutes before the scan."""
    dataset = pydicom.Dataset()
    values: dict[str, Any] = {"Units": "BQML", "DecayCorrection": "START", "PatientWeight": "70"}
    values |= {"SeriesDate": "20200102", "SeriesTime": "114000", "AcquisitionDate": "20200102"}
    values |= {"AcquisitionTime": "114000.00", **changes}
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    drug = pydicom.Dataset()
    given = {"RadionuclideTotalDose": "370000000", "RadionuclideHalfLife": "6000"}
    for keyword, value in {**given, "RadiopharmaceuticalStartTime": "100000", **(infusion or {})}.items():
        if value is not None:
            setattr(drug, keyword, value)
    dataset.RadiopharmaceuticalInformationSequence = [drug]
    return dataset


def test_activity_is_brought_to_the_start_of_the_scan() -> None:
    assert suv_factor([header()], "PET") == pytest.approx(70_000 / (370e6 / 2))  # one half life


def test_activity_stays_as_injected_where_the_images_are_corrected_to_the_injection() -> None:
    assert suv_factor([header(DecayCorrection="ADMIN")], "PET") == pytest.approx(70_000 / 370e6)


def test_a_later_series_time_gives_way_to_the_earliest_acquisition() -> None:
    slices = [header(SeriesTime="150000", AcquisitionTime=time) for time in ("114500", "114000", "115000")]
    assert suv_factor(slices, "PET") == pytest.approx(70_000 / (370e6 / 2))


def test_an_injection_before_midnight_is_of_the_day_before() -> None:
    times = {"SeriesTime": "003000", "AcquisitionTime": "003000"}
    found = suv_factor([header({"RadiopharmaceuticalStartTime": "225000"}, **times)], "PET")
    assert found == pytest.approx(70_000 / (370e6 / 2))


def test_date_and_time_of_the_injection_go_before_its_time_alone() -> None:
    drug = {"RadiopharmaceuticalStartDateTime": "20200102082000.5+0100", "RadiopharmaceuticalStartTime": "100000"}
    assert suv_factor([header(drug)], "PET") == pytest.approx(70_000 / (370e6 / 4))  # 200 minutes


def test_suv_by_body_weight_is_taken_as_it_is() -> None:
    assert suv_factor([header(Units="GML")], "PET") == 1
    assert suv_factor([header(Units="GML", SUVType="BW")], "PET") == 1


@pytest.mark.parametrize(
    ("changes", "infusion", "message"),
    [
        ({"Units": "CNTS"}, {}, "the units CNTS"),
        ({"Units": None}, {}, "the units none"),
        ({"Units": "GML", "SUVType": "LBM"}, {}, "SUV by LBM"),
        ({"DecayCorrection": "NONE"}, {}, "the decay correction NONE"),
        ({"PatientWeight": None}, {}, "lacks PatientWeight"),
        ({"PatientWeight": "0"}, {}, "PatientWeight of 0 kg"),
        ({}, {"RadionuclideTotalDose": None}, "lacks RadionuclideTotalDose"),
        ({}, {"RadionuclideTotalDose": "370"}, "RadionuclideTotalDose of 370 Bq"),
        ({}, {"RadionuclideHalfLife": None}, "lacks RadionuclideHalfLife"),
        ({}, {"RadiopharmaceuticalStartTime": None}, "lacks the time of injection"),
        ({}, {"RadiopharmaceuticalStartDateTime": "20200104100000"}, "injected -46.3 hours before"),
        ({"SeriesTime": None, "AcquisitionTime": None}, {}, "lacks the times"),
    ],
)
def test_what_does_not_become_suv_is_refused_by_name(changes: Any, infusion: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        suv_factor([header(infusion, **changes)], "study/pet")
    assert str(caught.value).startswith("study/pet ")


def test_two_radiopharmaceuticals_are_refused() -> None:
    doubled = header()
    doubled.RadiopharmaceuticalInformationSequence = list(doubled.RadiopharmaceuticalInformationSequence) * 2
    with pytest.raises(ValueError, match="names 2 radiopharmaceuticals"):
        suv_factor([doubled], "PET")
