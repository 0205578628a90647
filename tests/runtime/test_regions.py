# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from scripts.runtime.regions import (
    check_classes,
    class_mask_values,
    class_names,
    mask_values,
    own_classes,
    region_classes,
    region_mask_values,
    region_values,
    sigmoid_regions,
)

BRATS = [[0], [1], [2], [4]]
REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
NAMES = ["background", "necrosis", "oedema", "enhancing"]


def test_each_foreground_class_is_a_region_by_default():
    assert region_values([[0], [1, 2], [3]], ["background", "a", "b"]) == {"a": [1, 2], "b": [3]}
    assert region_values([[0], [1]]) == {"foreground": [1]}
    assert region_classes([[0], [1, 2], [3]]) == {"class 1": [1], "class 2": [2]}
    assert class_names(BRATS) == ["background", "class 1", "class 2", "class 3"]


def test_a_region_has_the_classes_of_its_values():
    assert region_values(BRATS, NAMES, REGIONS) == REGIONS
    assert region_classes(BRATS, NAMES, REGIONS) == {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


def test_a_sigmoid_head_has_one_channel_per_region():
    assert sigmoid_regions(BRATS, "sigmoid", NAMES, REGIONS) == [[1, 2, 3], [1, 3], [3]]
    assert sigmoid_regions(BRATS, "softmax", NAMES, REGIONS) is None


def test_a_region_stands_for_its_class_that_no_later_region_has():
    assert own_classes([[1, 2, 3], [1, 3], [3]]) == [2, 1, 3]
    with pytest.raises(ValueError, match="Order the regions from the outermost to the innermost"):
        own_classes([[3], [1, 3], [1, 2, 3]])


def test_masks_hold_the_first_value_of_a_class_or_its_index():
    assert mask_values([[0], [2, 3], [4]]) == [0, 2, 4]
    assert mask_values([[0], [2, 3], [4]], "index") == [0, 1, 2]
    with pytest.raises(ValueError, match='Give "file" or "index"'):
        mask_values([[0], [1]], "values")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [[0], [1, 2, 4], [1, 4], [4]]}, "value 1 in classes 1 and 2.*regions"),
        ({"labels": [[value] for value in range(255)]}, "labels has 255 classes. At most 254 are possible"),
        ({"labels": BRATS, "ignore": 4}, "ignore is 4, which labels lists in class 3"),
        ({"labels": BRATS, "classes": ["background", "a"]}, "labels has 4 classes"),
        ({"labels": BRATS, "classes": ["background", "a", "a", "b"]}, "one name of its own"),
        ({"labels": BRATS, "regions": {"WT": [1, 3]}}, "region WT has the value 3, which is of no class"),
        ({"labels": BRATS, "regions": {"WT": [0, 1]}}, "region WT has the value 0, which is the background"),
        ({"labels": [[0], [1, 2]], "regions": {"A": [1]}}, "region A has the value 1 but not 2"),
        ({"labels": BRATS, "regions": {"A": [1], "B": [1]}}, "regions A and B have the same values"),
        ({"labels": BRATS, "regions": {"A": []}}, "region A is"),
        (
            {"labels": BRATS, "regions": {"ET": [4], "WT": [1, 2, 4]}, "head": "sigmoid"},
            "With the head sigmoid each region needs one class",
        ),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_classes(**settings)


def test_brats_and_an_ignored_value_are_accepted():
    check_classes(BRATS, NAMES, REGIONS, ignore=5, head="sigmoid")


def test_a_written_mask_has_the_values_of_the_files_or_indices():
    assert region_mask_values(BRATS, NAMES, REGIONS) == REGIONS
    assert region_mask_values(BRATS, NAMES, REGIONS, "index") == {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
    assert region_mask_values([[0], [5, 7], [3]], mode="file") == {"class 1": [5], "class 2": [3]}
    assert class_mask_values(BRATS, NAMES, REGIONS) == {"necrosis": 1, "oedema": 2, "enhancing": 4}
    assert class_mask_values(BRATS, NAMES, mode="index") == {"necrosis": 1, "oedema": 2, "enhancing": 3}


def test_a_class_without_a_name_is_named_like_the_region_that_is_it_alone():
    assert class_mask_values(BRATS, None, REGIONS) == {"class 1": 1, "class 2": 2, "ET": 4}
    assert class_mask_values([[0], [1], [2]], None, {"left": [1], "right": [2]}) == {"left": 1, "right": 2}
    assert class_mask_values([[0], [1]]) == {"foreground": 1}
