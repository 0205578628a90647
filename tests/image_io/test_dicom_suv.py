# SPDX-License-Identifier: Apache-2.0
"""SUV by body weight against the arithmetic of its definition."""

from __future__ import annotations

import logging
from typing import Any

import pydicom
import pytest

from scripts.image_io.dicom_suv import suv_factor


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
    drug = {"RadiopharmaceuticalStartDateTime": "20200102082000.5", "RadiopharmaceuticalStartTime": "100000"}
    assert suv_factor([header(drug)], "PET") == pytest.approx(70_000 / (370e6 / 4))  # 200 minutes


@pytest.mark.parametrize(
    ("injected", "scanned", "minutes"),
    [("1045", "122500", 100), ("104500", "1225", 100), ("10", "114000.123456", 100), ("0000", "1045", 645)],
)
@pytest.mark.parametrize("dated", [False, True])
def test_times_may_end_after_hours_or_minutes(injected: str, scanned: str, minutes: float, dated: bool) -> None:
    tag, text = ("StartDateTime", f"20200102{injected}") if dated else ("StartTime", injected)
    drug = {"RadiopharmaceuticalStartTime": None, f"Radiopharmaceutical{tag}": text}
    found = suv_factor([header(drug, SeriesTime=scanned, AcquisitionTime=None)], "PET")
    assert found == pytest.approx(70_000 / (370e6 / 2 ** (minutes / 100)))


@pytest.mark.parametrize(
    ("injected", "zone", "minutes"),
    [
        ("20200102100000+0100", "+0100", 100),
        ("20200102090000+0000", "+0100", 100),
        ("20200102054000-0500", "+0000", 60),  # 10:40 by UTC
        ("20200101233000-1000", "+0000", 130),  # the day before
        ("20200102100000", "+0100", 100),
    ],
)
def test_offsets_from_utc_are_brought_to_one_zone(injected: str, zone: str, minutes: float, caplog: Any) -> None:
    slices = [header({"RadiopharmaceuticalStartDateTime": injected}, TimezoneOffsetFromUTC=zone)]
    assert suv_factor(slices, "PET") == pytest.approx(70_000 / (370e6 / 2 ** (minutes / 100)))
    assert not caplog.text


def test_an_offset_that_only_the_injection_has_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = suv_factor([header({"RadiopharmaceuticalStartDateTime": "20200102100000+0100"})], "PET")
    assert found == pytest.approx(70_000 / (370e6 / 2))
    assert "PET: the offset from UTC in RadiopharmaceuticalStartDateTime was left out" in caplog.text
    assert "20200102" not in caplog.text


@pytest.mark.parametrize("dated", [False, True])
def test_a_series_before_the_injection_gives_way_to_its_acquisition(dated: bool) -> None:
    """Started at 9:55, injected at 10:00, scanned at 11:40: not 23 hours and 55 minutes after the day before's."""
    drug = {"RadiopharmaceuticalStartDateTime": "20200102100000"} if dated else {}
    assert suv_factor([header(drug, SeriesTime="095500")], "PET") == pytest.approx(70_000 / (370e6 / 2))


@pytest.mark.parametrize("units", ["BQML", "GML"])
@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["DECY", "SCAT"], r"attenuation \(ATTN\) by its CorrectedImage"),
        ("ATTN", r"decay \(DECY\) by its CorrectedImage"),
        (["NORM", "DTIM"], r"attenuation \(ATTN\) and decay \(DECY\) by"),
    ],
)
def test_images_that_are_not_corrected_are_refused(told: Any, message: str, units: str) -> None:
    assert suv_factor([header(CorrectedImage=["NORM", "DECY", "ATTN"])], "PET") == pytest.approx(70_000 / 185e6)
    with pytest.raises(ValueError, match=f"^PET is not corrected for {message}"):
        suv_factor([header(CorrectedImage=told, Units=units)], "PET")


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
        ({"PatientWeight": ["70", "71"]}, {}, "has a PatientWeight that is not one number: correct it"),
        ({}, {"RadionuclideTotalDose": None}, "lacks RadionuclideTotalDose"),
        ({}, {"RadionuclideTotalDose": "370"}, "RadionuclideTotalDose of 370 Bq"),
        ({}, {"RadionuclideHalfLife": None}, "lacks RadionuclideHalfLife"),
        ({}, {"RadiopharmaceuticalStartTime": None}, "lacks the time of injection"),
        ({}, {"RadiopharmaceuticalStartDateTime": "20200104100000"}, "scanned 46.3 hours before its injection by Rad"),
        ({}, {"RadiopharmaceuticalStartDateTime": "20191229114000"}, "scanned 96.0 hours after.* at most 12 are taken"),
        (
            {},
            {"RadiopharmaceuticalStartTime": "114500"},
            "scanned 0.1 hours before its injection by RadiopharmaceuticalS",
        ),
        ({}, {"RadiopharmaceuticalStartTime": "233900"}, "scanned 12.0 hours before"),  # the day before: 12:01
        (
            {"SeriesTime": "2359"},
            {"RadiopharmaceuticalStartTime": "10000"},
            "no valid date (?:and|or) time in RadiopharmaceuticalStartTime:",
        ),
        (
            {},
            {"RadiopharmaceuticalStartTime": "10:00:00"},
            "no valid date (?:and|or) time in RadiopharmaceuticalStartTime:",
        ),
        (
            {},
            {"RadiopharmaceuticalStartDateTime": "2020010210450"},
            "no valid date (?:and|or) time in RadiopharmaceuticalStartDateTime:",
        ),
        (
            {},
            {"RadiopharmaceuticalStartDateTime": "20200102"},
            "no valid date (?:and|or) time in RadiopharmaceuticalStartDateTime:",
        ),
        ({"SeriesTime": "1140.5"}, {}, "no valid date or time in SeriesDate, SeriesTime:"),
        ({"AcquisitionTime": "256000"}, {}, "date or time in AcquisitionDate, AcquisitionTime:"),
        ({"TimezoneOffsetFromUTC": "CET"}, {}, "in SeriesDate, SeriesTime or TimezoneOffsetFromUTC:"),
        (
            {},
            {"RadiopharmaceuticalStartDateTime": "20200102180000+0700"},
            "lie -6.3 hours .* add TimezoneOffsetFromUTC",
        ),
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
