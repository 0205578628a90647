# SPDX-License-Identifier: Apache-2.0
"""Proposals of a task's settings, each with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scripts.data.fingerprint import CaseFingerprint, ModalityValues
from scripts.data.planner import (
    modality_intensity,
    plan_flips,
    plan_intensity,
    plan_labels,
    plan_mask_values,
    plan_rotation,
    plan_spacing,
    plan_task,
)


def values(sample: Sequence[float], low: float = 0.0, kind: str = "") -> ModalityValues:
    return ModalityValues(low, max(sample), np.asarray(sample, dtype=np.float32), kind)


def case(number: int = 0, **changes: Any) -> CaseFingerprint:
    properties: dict[str, Any] = {
        "shape": (128, 128, 128),
        "spacing": (1.0, 1.0, 1.0),
        "values": {"ct": values([-100, 0, 100], -1024)},
        "volumes": {0.0: 1e6, 1.0: 1e5},
    }
    return CaseFingerprint(f"case{number}", **{**properties, **changes})


def planned(cases: Sequence[CaseFingerprint], gib: float = 0.5, **task: Any) -> dict[str, Any]:
    proposals = plan_task(cases, {"modalities": ["ct"], **task}, (24, 48, 96, 192), 8, gib)
    assert all(len(each.reason) > 3 for each in proposals)
    return {each.name: each.value for each in proposals}


def test_ct_of_three_organs_with_sides() -> None:
    sample = np.random.default_rng(1).normal(50, 30, 4000)
    classes = ["background", "left kidney", "right kidney", "liver"]
    labels = [[0], [1], [2], [3]]
    cases = [case(number, values={"ct": values(sample.tolist(), -1024)}) for number in range(10)]
    task = planned(cases, labels=labels, classes=classes)
    assert task["spacing"] == [1, 1, 1]
    assert task["flips"] == [1, 2]
    assert task["rotation"] == [15, 15, 15]
    assert task["student_strides"] is None
    assert task["mask_values"] == "file"
    assert task["intensity"]["ct"] == [round(np.percentile(sample, each)) for each in (0.5, 99.5)]
    assert "labels" not in task


def test_mr_with_thick_slices() -> None:
    images = {"t2": values([10, 20, 400])}
    cases = [case(n, shape=(384, 384, 24), spacing=(0.5, 0.5, 5.0), values=images) for n in range(10)]
    task = planned(cases, modalities=["t2"])
    assert task["labels"] == [[0], [1]]
    assert task["spacing"] == [0.5, 0.5, 5]
    assert task["intensity"] == {"t2": "zscore"}
    assert task["rotation"] == [0, 0, 15]
    assert task["student_strides"][0] == [2, 2, 1]
    assert all(n <= most for n, most in zip(task["patch"], (384, 384, 24), strict=True))
    along_slices = np.prod([step if isinstance(step, int) else step[2] for step in task["student_strides"]])
    assert task["patch"][2] % along_slices == 0


def test_fixed_settings_decide_what_depends_on_them() -> None:
    cases = [case(number) for number in range(10)]
    assert planned(cases, spacing=[1, 1, 6])["student_strides"][0] == [2, 2, 1]
    assert planned(cases, spacing=[1, 1, 6])["rotation"] == [0, 0, 15]
    assert planned(cases, spacing=[1, 1, 6])["spacing"] == [1, 1, 1]  # still proposed
    assert planned(cases, patch=[24, 24, 24])["student_strides"][3] == [1, 1, 1]
    assert planned(cases, student_strides=[2, 2, 2, [2, 2, 1]])["patch"][0] % 16 == 0


def test_a_sigmoid_head_has_one_channel_per_region() -> None:
    labels = [[0], *([value] for value in range(1, 30))]
    regions = {"all": list(range(1, 30))}
    cases = [case(number) for number in range(10)]
    softmax = np.prod(planned(cases, labels=labels)["patch"])
    assert np.prod(planned(cases, labels=labels, head="sigmoid", regions=regions)["patch"]) > softmax


def test_labels_are_the_values_of_the_files() -> None:
    cases = [case(0, volumes={0.0: 1, 4.0: 1}), case(1, volumes={0.0: 1, 2.0: 1, 255.0: 1}), case(2, volumes=None)]
    assert plan_labels(cases, ignore=255).value == [[0], [2], [4]]
    with pytest.raises(ValueError, match="no labels"):
        plan_labels([case(volumes=None), case(volumes={0.0: 1.0})])


def test_the_spacing_is_the_median_of_each_axis() -> None:
    spacings = np.array([[1, 0.5, 2], [2, 0.6, 2.5], [4, 0.9, 1.5]])
    assert plan_spacing(spacings, np.full((3, 3), 100)).value == [2, 0.6, 2]


@pytest.mark.parametrize(("slices", "expected"), [(20, np.percentile([3, 5, 5, 5, 6, 7, 10], 10)), (100, 5)])
def test_thick_slices_that_are_few_get_a_low_percentile(slices: int, expected: float) -> None:
    """As in nnU-Net: the coarsest spacing is 3 times the others, and its axis has a third of their voxels."""
    spacings = np.array([[0.5, 0.5, thick] for thick in (3, 5, 5, 5, 6, 7, 10)])
    shapes = np.array([[256, 256, slices]] * 7)
    proposal = plan_spacing(spacings, shapes)
    assert proposal.value == pytest.approx([0.5, 0.5, expected])
    assert proposal.value[2] >= spacings[:, 2].min()


def test_thick_slices_never_become_thinner_than_the_other_axes() -> None:
    spacings = np.array([[1, 1, thick] for thick in (0.5, 0.5, 4, 4, 4)])
    assert plan_spacing(spacings, np.array([[256, 256, 20]] * 5)).value == [1, 1, 1]


def test_a_spacing_of_the_data_is_kept_exactly() -> None:
    spacings = np.array([[0.48828125, 0.48828125, np.float32(0.7)]] * 3)
    assert plan_spacing(spacings, np.full((3, 3), 100)).value == [0.488281, 0.488281, 0.7]


@pytest.mark.parametrize(
    ("key", "image", "expected"),
    [
        ("pet", values([0, 5, 12.4]), [0, 12]),
        ("FDG-PET", values([0, 0.2, 0.84]), [0, 0.8]),
        ("x", values([0, 5, 12.4], kind="PT"), [0, 12]),
        ("pet", values([-500, 0, 40], low=-1024), "zscore"),  # no SUV
        ("CT", values([-100, 0, 100], low=-1024), [-99, 99]),
        ("channel_0", values([-100, 0, 100], low=-3024), [-99, 99]),
        ("b", values([-100, 0, 100], low=-50, kind="CT"), [-99, 99]),
        ("t1", values([0, 100, 900]), "zscore"),
        ("adc", values([0, 1000, 3000]), "zscore"),
        ("act", values([0, 100, 900]), "zscore"),  # not the word ct
        ("ct", values([3, 3, 3], low=-1024), "zscore"),  # no range
    ],
)
def test_intensity_by_name_header_and_values(key: str, image: ModalityValues, expected: Any) -> None:
    rule, reason = modality_intensity(key, [case(values={key: image})])
    assert rule == pytest.approx(expected)
    assert reason


def test_reasons_say_what_is_odd() -> None:
    assert "no value is that of air" in modality_intensity("ct", [case(values={"ct": values([1, 50], 0)})])[1]
    assert "Bq/ml" in modality_intensity("pet", [case(values={"pet": values([1, 9000], 0)})])[1]
    unlabelled = replace(values([1, 50], -1000), of_foreground=False)
    assert "no foreground" in modality_intensity("ct", [case(values={"ct": unlabelled})])[1]
    assert modality_intensity("mr", [case()]) == ("zscore", "no case has it")


def test_given_intensities_stay() -> None:
    cases = [case(values={"ct": values([-100, 0, 100], -1024), "mr": values([1, 2])})]
    proposal = plan_intensity(cases, ["ct", "mr"], {"ct": [-50, 50]})
    assert proposal.value == {"ct": [-50, 50], "mr": "zscore"}


@pytest.mark.parametrize(
    ("name", "sided"),
    [
        ("left kidney", True),
        ("kidney_R", True),
        ("lh-hippocampus", True),
        ("RightLung", True),
        ("leftover", False),
        ("L1 vertebra", False),
        ("liver", False),
        ("bright spot", False),
    ],
)
def test_sides_are_not_flipped(name: str, sided: bool) -> None:
    proposal = plan_flips(["background", name])
    assert proposal.value == ([1, 2] if sided else [0, 1, 2])
    assert (name in proposal.reason) == sided


@pytest.mark.parametrize(
    ("spacing", "angles"),
    [((1, 1, 1), [15, 15, 15]), ((1, 1, 2.9), [15, 15, 15]), ((1, 1, 3), [0, 0, 15]), ((4, 1, 1), [15, 0, 0])],
)
def test_thick_slices_are_turned_in_plane_only(spacing: tuple[float, ...], angles: list[int]) -> None:
    assert plan_rotation(spacing).value == angles


def test_cases_without_a_foreground_tell_nothing_about_it_where_others_have_one() -> None:
    """The air of a CT without a lesion must not widen the range."""
    lesion = ModalityValues(-1024.0, 900.0, np.array([20.0, 60.0], dtype=np.float32), "CT")
    empty = ModalityValues(-1024.0, 900.0, np.array([-1024.0, 900.0], dtype=np.float32), "CT", of_foreground=False)
    cases = [CaseFingerprint(name, (9, 9, 9), (1, 1, 1), {"ct": each}) for name, each in (("a", lesion), ("b", empty))]
    value, reason = modality_intensity("ct", cases)
    assert value == [20, 60]
    assert reason == "its name or header says CT: percentiles 0.5 to 99.5 of the foreground"
    value, reason = modality_intensity("ct", cases[1:])
    assert value[0] < -900
    assert reason.endswith("of voxels that are not 0 (no foreground)")


def test_labels_that_are_no_whole_numbers_are_written_as_indices() -> None:
    assert plan_mask_values([[0], [0.5]]).value == "index"
    assert plan_mask_values([[0], [1.0]]).value == "file"
