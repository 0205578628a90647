# SPDX-License-Identifier: Apache-2.0
"""SUV by body weight, compared with the arithmetic of its definition."""

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


def test_the_activity_is_decayed_to_the_start_of_the_scan() -> None:
    assert suv_factor([header()], "PET") == pytest.approx(70_000 / (370e6 / 2))  # one half life


def test_the_injected_activity_is_used_if_the_images_are_corrected_to_the_injection() -> None:
    assert suv_factor([header(DecayCorrection="ADMIN")], "PET") == pytest.approx(70_000 / 370e6)


def test_the_earliest_acquisition_is_used_instead_of_a_later_series_time() -> None:
    slices = [header(SeriesTime="150000", AcquisitionTime=time) for time in ("114500", "114000", "115000")]
    assert suv_factor(slices, "PET") == pytest.approx(70_000 / (370e6 / 2))


def test_an_injection_before_midnight_is_on_the_day_before() -> None:
    times = {"SeriesTime": "003000", "AcquisitionTime": "003000"}
    found = suv_factor([header({"RadiopharmaceuticalStartTime": "225000"}, **times)], "PET")
    assert found == pytest.approx(70_000 / (370e6 / 2))


def test_date_and_time_of_the_injection_are_used_before_its_time_alone() -> None:
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
def test_times_with_offsets_from_utc_are_compared_in_one_zone(
    injected: str, zone: str, minutes: float, caplog: Any
) -> None:
    slices = [header({"RadiopharmaceuticalStartDateTime": injected}, TimezoneOffsetFromUTC=zone)]
    assert suv_factor(slices, "PET") == pytest.approx(70_000 / (370e6 / 2 ** (minutes / 100)))
    assert not caplog.text


def test_an_offset_that_only_the_injection_has_is_ignored_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = suv_factor([header({"RadiopharmaceuticalStartDateTime": "20200102100000+0100"})], "PET")
    assert found == pytest.approx(70_000 / (370e6 / 2))
    assert "PET: ignored the offset from UTC in RadiopharmaceuticalStartDateTime" in caplog.text
    assert "20200102" not in caplog.text


@pytest.mark.parametrize("dated", [False, True])
def test_the_acquisition_is_used_if_the_series_time_is_before_the_injection(dated: bool) -> None:
    """Started at 9:55, injected at 10:00, scanned at 11:40: not 23 hours and 55 minutes after the day before's."""
    drug = {"RadiopharmaceuticalStartDateTime": "20200102100000"} if dated else {}
    assert suv_factor([header(drug, SeriesTime="095500")], "PET") == pytest.approx(70_000 / (370e6 / 2))


@pytest.mark.parametrize("units", ["BQML", "GML"])
@pytest.mark.parametrize(
    ("corrections", "message"),
    [
        (["DECY", "SCAT"], r"attenuation \(ATTN\), see its CorrectedImage"),
        ("ATTN", r"decay \(DECY\), see its CorrectedImage"),
        (["NORM", "DTIM"], r"attenuation \(ATTN\) and decay \(DECY\), see"),
    ],
)
def test_images_that_are_not_corrected_are_refused(corrections: Any, message: str, units: str) -> None:
    assert suv_factor([header(CorrectedImage=["NORM", "DECY", "ATTN"])], "PET") == pytest.approx(70_000 / 185e6)
    with pytest.raises(ValueError, match=f"^PET is not corrected for {message}"):
        suv_factor([header(CorrectedImage=corrections, Units=units)], "PET")


def test_values_that_are_suv_by_body_weight_are_not_changed() -> None:
    assert suv_factor([header(Units="GML")], "PET") == 1
    assert suv_factor([header(Units="GML", SUVType="BW")], "PET") == 1


@pytest.mark.parametrize(
    ("changes", "infusion", "message"),
    [
        ({"Units": "CNTS"}, {}, "the units CNTS"),
        ({"Units": None}, {}, "the units none"),
        ({"Units": "GML", "SUVType": "LBM"}, {}, "SUV by LBM"),
        ({"DecayCorrection": "NONE"}, {}, "the decay correction NONE"),
        ({"PatientWeight": None}, {}, "has no PatientWeight"),
        ({"PatientWeight": "0"}, {}, "implausible PatientWeight of 0 kg"),
        ({"PatientWeight": ["70", "71"]}, {}, "has a PatientWeight that is not a number"),
        ({}, {"RadionuclideTotalDose": None}, "has no RadionuclideTotalDose"),
        ({}, {"RadionuclideTotalDose": "370"}, "RadionuclideTotalDose of 370 Bq"),
        ({}, {"RadionuclideHalfLife": None}, "has no RadionuclideHalfLife"),
        ({}, {"RadiopharmaceuticalStartTime": None}, "has no time of injection"),
        ({}, {"RadiopharmaceuticalStartDateTime": "20200104100000"}, "scanned 46.3 hours before its injection by Rad"),
        (
            {},
            {"RadiopharmaceuticalStartDateTime": "20191229114000"},
            "scanned 96.0 hours after.* the limit is 12 hours",
        ),
        (
            {},
            {"RadiopharmaceuticalStartTime": "114500"},
            "scanned 0.1 hours before its injection by RadiopharmaceuticalS",
        ),
        ({}, {"RadiopharmaceuticalStartTime": "233900"}, "scanned 12.0 hours before"),  # the day before: 12:01
        (
            {"SeriesTime": "2359"},
            {"RadiopharmaceuticalStartTime": "10000"},
            "an invalid date (?:and|or) time in RadiopharmaceuticalStartTime\\.",
        ),
        (
            {},
            {"RadiopharmaceuticalStartTime": "10:00:00"},
            "an invalid date (?:and|or) time in RadiopharmaceuticalStartTime\\.",
        ),
        (
            {},
            {"RadiopharmaceuticalStartDateTime": "2020010210450"},
            "an invalid date (?:and|or) time in RadiopharmaceuticalStartDateTime\\.",
        ),
        (
            {},
            {"RadiopharmaceuticalStartDateTime": "20200102"},
            "an invalid date (?:and|or) time in RadiopharmaceuticalStartDateTime\\.",
        ),
        ({"SeriesTime": "1140.5"}, {}, "an invalid date or time in SeriesDate, SeriesTime\\."),
        ({"SeriesTime": " "}, {}, "an invalid date or time in SeriesDate, SeriesTime\\."),
        ({"SeriesDate": "2020.01.02"}, {}, "an invalid date or time in SeriesDate, SeriesTime\\."),
        ({"AcquisitionTime": "256000"}, {}, "date or time in AcquisitionDate, AcquisitionTime\\."),
        ({"TimezoneOffsetFromUTC": "CET"}, {}, "in SeriesDate, SeriesTime or TimezoneOffsetFromUTC\\."),
        ({}, {"RadiopharmaceuticalStartDateTime": "20200102180000+0700"}, "be -6.3 hours .* Add TimezoneOffsetFromUTC"),
        ({"SeriesTime": None, "AcquisitionTime": None}, {}, "has no time of the series"),
    ],
)
def test_a_header_that_gives_no_suv_is_refused_by_name(changes: Any, infusion: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        suv_factor([header(infusion, **changes)], "study/pet")
    assert str(caught.value).startswith("study/pet ")


def test_two_radiopharmaceuticals_are_refused() -> None:
    doubled = header()
    doubled.RadiopharmaceuticalInformationSequence = list(doubled.RadiopharmaceuticalInformationSequence) * 2
    with pytest.raises(ValueError, match="lists 2 radiopharmaceuticals"):
        suv_factor([doubled], "PET")
