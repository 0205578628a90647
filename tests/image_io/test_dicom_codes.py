# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes as dicom_codes

from scripts.cli.config import config_names, read_config
from scripts.image_io.dicom_codes import ABNORMAL, CATEGORIES, LESIONS, TISSUE, Property, is_lesion, segment_properties
from scripts.runtime.regions import region_values

NEOPLASM = ("108369006", "SCT", "Neoplasm")
LIVER = ("10200004", "SCT", "Liver")


def test_lesions_are_the_types_that_dicom_lists_as_abnormal_structures():
    listed = {(each.value, each.scheme_designator) for each in dicom_codes.cid7194.concepts.values()}
    assert listed - LESIONS == {("125040", "DCM"), ("17621005", "SCT")}  # Background and Normal
    assert listed > LESIONS


def test_categories_are_those_of_dicom():
    listed = {(each.value, each.scheme_designator, each.meaning) for each in dicom_codes.cid7150.concepts.values()}
    assert {ABNORMAL, *CATEGORIES.values()} <= listed


@pytest.mark.parametrize(
    ("kind", "category"),
    [
        (NEOPLASM, "49755003"),
        (LIVER, "91723000"),
        (("79654002", "SCT", "Edema"), "49755003"),
        (("55603005", "SCT", "Fat"), "85756007"),
        (("C94970", "NCIt", "Reference Region"), "309825002"),
    ],
)
def test_the_category_follows_from_the_type(kind: tuple[str, str, str], category: str):
    found = segment_properties(["a"], {"a": list(kind)})["a"]
    assert (found.category[0], found.type, found.anatomy) == (category, kind, None)


def test_a_region_without_a_code_is_tissue():
    assert segment_properties(["a", "b"], {"b": list(LIVER)})["a"] == Property(TISSUE, TISSUE)


def test_category_and_anatomy_may_be_given():
    whole = {"type": ["393563007", "SCT", "Glioblastoma"], "category": list(ABNORMAL), "anatomy": list(LIVER)}
    assert segment_properties(["a"], {"a": whole})["a"] == Property(ABNORMAL, tuple(whole["type"]), LIVER)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"b": list(LIVER)}, "codes has an entry for b, which is no region of this task. Use a."),
        ({"a": ["1", "SCT"]}, r'codes\["a"\] has \[.1., .SCT.\]\. Give the value, the scheme'),
        ({"a": "Liver"}, r"has .Liver.\. Give the value"),
        ({"a": ["1" * 17, "SCT", "x"]}, "at most 16, 16 and 64 characters"),
        ({"a": {"category": list(ABNORMAL)}}, r'codes\["a"\] names no type'),
        ({"a": {"type": list(LIVER), "colour": "red"}}, "has the unknown key colour"),
        ({"a": ["393563007", "SCT", "Glioblastoma"]}, "Glioblastoma, for which DICOM lists no category. Name one"),
    ],
)
def test_what_is_no_code_is_refused(codes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        segment_properties(["a"], codes)


@pytest.mark.parametrize("name", ["x" * 65, "a\\b", "a\nb"])
def test_a_region_whose_name_dicom_cannot_hold_is_refused(name: str):
    with pytest.raises(ValueError, match="cannot be a name in DICOM"):
        segment_properties([name], {})


def test_a_lesion_is_told_by_its_category_or_its_type():
    assert is_lesion(list(NEOPLASM))
    assert is_lesion({"type": ["393563007", "SCT", "Glioblastoma"], "category": list(ABNORMAL)})
    assert not any(map(is_lesion, (None, list(LIVER), "Neoplasm", {"type": list(NEOPLASM), "category": list(TISSUE)})))


@pytest.mark.parametrize("name", config_names("data"))
def test_the_regions_of_the_known_data_sets_are_neoplasms(name: str):
    task = read_config(f"data/{name}")
    found = segment_properties(region_values(task["labels"], task["classes"]), task["codes"])
    assert [each.type for each in found.values()] == [NEOPLASM]
    assert {each.category for each in found.values()} == {ABNORMAL}
