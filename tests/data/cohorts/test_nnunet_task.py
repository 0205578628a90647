# SPDX-License-Identifier: Apache-2.0
"""What nnU-Net's dataset.json says about a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.data.cohorts.nnunet_task import label_contradiction, nnunet_task
from scripts.runtime.regions import check_classes

CHANNELS = {"0": "CT", "1": "PET"}
BRATS = {"background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing": 3}


def write(root: Path, **content: Any) -> Path:
    (root / "dataset.json").write_text(json.dumps({"channel_names": CHANNELS, **content}), encoding="utf-8")
    return root


def test_values_are_classes(tmp_path: Path) -> None:
    root = write(tmp_path, labels={"background": 0, "GTVp": 1, "GTVn": 2, "ignore": 3})
    assert nnunet_task(root) == {
        "modalities": ["ct", "pet"],
        "labels": [[0], [1], [2]],
        "classes": ["background", "GTVp", "GTVn"],
        "regions": None,
        "ignore": 3,
        "head": "softmax",
    }


def test_lists_are_regions_and_classes_are_what_no_region_divides(tmp_path: Path) -> None:
    task = nnunet_task(write(tmp_path, labels={**BRATS, "vessel": [5, 6]}, regions_class_order=[1, 2, 3, 5]))
    assert task["labels"] == [[0], [1], [2], [3], [5, 6]]
    assert task["classes"] == ["background", "label 1", "label 2", "enhancing", "vessel"]
    assert task["regions"] == {"whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing": [3], "vessel": [5, 6]}
    assert task["ignore"] is None
    check_classes(task["labels"], task["classes"], task["regions"])


def test_version_1_names_values(tmp_path: Path) -> None:
    content = {"modality": {"1": "T2 w", "0": "T1-Gd"}, "labels": {"0": "Background", "1": "oedema", "2": "core"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    task = nnunet_task(tmp_path)
    assert task["modalities"] == ["t1_gd", "t2_w"]
    assert (task["labels"], task["classes"]) == ([[0], [1], [2]], ["background", "oedema", "core"])


def test_channels_of_one_name_are_numbered(tmp_path: Path) -> None:
    root = write(tmp_path, channel_names={"0": "noNorm", "1": "noNorm", "2": "CT"}, labels={"background": 0, "a": 1})
    assert nnunet_task(root)["modalities"] == ["nonorm_0", "nonorm_1", "ct"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": {"background": 0, "a": 1}, "channel_names": {}}, "names no channels"),
        ({"labels": {"background": 0, "a": 1}, "channel_names": {"1": "CT"}}, "Number them from 0"),
        ({"labels": {}}, "names no labels"),
        ({"labels": {"a": 1}}, "no label named background"),
        ({"labels": {"background": 0}}, "no label besides the background"),
        ({"labels": {"background": 0, "a": "1"}}, "label a has the value '1'. Give whole numbers"),
        ({"labels": {"background": 0, "a": []}}, r"label a has the value \[\]"),
        ({"labels": {"background": 0, "a": [0, 1]}}, "labels background and a have a value in common"),
        ({"labels": {"background": 0, "a": [1, 2], "ignore": 2}}, "labels ignore and a have a value in common"),
        ({"labels": {"background": 0, "a": 1, "ignore": [2, 3]}}, "label ignore has several values"),
    ],
)
def test_a_wrong_dataset_json_is_one_sentence(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dataset.json.*{message}"):
        nnunet_task(write(tmp_path, **content))


def test_a_missing_or_damaged_dataset_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no dataset\.json at .*Check the path"):
        nnunet_task(tmp_path)
    for text, message in (("{", "is not JSON"), ("[]", "is not the dataset.json")):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            nnunet_task(tmp_path)


@pytest.mark.parametrize(
    ("labels", "ignore", "words"),
    [
        ([[0], [1], [2, 3]], 4, ""),
        ([[0], [1], [2]], 4, "only dataset.json has the value(s) 3. Correct"),
        ([[0], [1], [2, 3], [5, 6]], 4, "only the task has the value(s) 5, 6. Correct"),
        ([[0], [1], [2], [7]], 4, "only the task has the value(s) 7; only dataset.json has the value(s) 3. Correct"),
        ([[0], [1], [2, 3]], None, "ignores 4, but the task ignores no value. Set"),
    ],
)
def test_labels_that_contradict_the_task_are_one_sentence(
    labels: list[list[float]], ignore: float | None, words: str, tmp_path: Path
) -> None:
    root = write(tmp_path, labels={**BRATS, "ignore": 4})
    assert words in label_contradiction(root, labels, ignore)
    assert bool(label_contradiction(root, labels, ignore)) == bool(words)
