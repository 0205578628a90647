# SPDX-License-Identifier: Apache-2.0
"""The record of a training: in the checkpoint, beside the weights, and its comparison with commands and configs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from scripts.cli.main import main
from scripts.evaluation.training_cases import trained_on
from scripts.training.record_comparison import differences
from scripts.training.training_record import definition, training_record
from scripts.utils.checksums import sha256
from scripts.utils.task_file import read_task, task_path

TINY = [
    "--data", "phantom", "--threads", "1", "--device", "cpu", "--set", "patch=[16,16,16]",
    "--set", "spacing=[12,12,12]", "--set", "student_features=[4,8,8,8]", "--set", "val_interval=100",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--epochs", "1",
]  # fmt: skip
DYNUNET = ["--set", "patch=[32,32,32]", "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]},"uxnet":{}}']
STUDENT = {
    "_target_": "scripts.networks.Student",
    "in_channels": 3,
    "out_channels": 2,
    "features": [4, 8, 8, 8],
    "norm": ["group", {"num_groups": 4}],
    "full_features": 8,
    "strides": None,
    "selective_fusion": False,
    "modality_dropout": 0.0,
}


def test_a_training_keeps_its_record_in_the_checkpoint_and_beside_the_weights(cohort: Path, tmp_path: Path) -> None:
    assert main(["train", *TINY, "--fold", "1", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path)]) == 0
    task = json.loads((tmp_path / "model.task.json").read_text())
    expected = {
        "weights_sha256": sha256(tmp_path / "model.pt"),
        "cohort": "phantom",
        "modalities": ["ct", "pet", "mr"],
        "intensity": {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]},
        "labels": [[0], [1]],
        "spacing": [12, 12, 12],
        "patch": [16, 16, 16],
        "fold": 1,
        "seed": 0,
        "epochs": 1,
        "batch_size": 2,
        "learning_rate": 0.001,
        "network": STUDENT,
        "segmentation_loss": {
            "_target_": "scripts.losses.SegmentationLoss", "regions": None, "ignored": 254, "include_background": False,
            "batch": False,
        },
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }  # fmt: skip
    assert {key: task[key] for key in expected} == expected
    assert "loss" not in task
    assert "teachers_sha256" not in task
    splits = json.loads((tmp_path / "splits.json").read_text())["folds"]
    assert [case["patient_id"] for case in task["validation_cases"]] == splits[1]
    ids = [case["case_id"] for key in ("training_cases", "validation_cases") for case in task[key]]
    assert sorted(ids) == [f"PHANTOM_{i:03d}" for i in range(1, 7)]
    record = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["record"]
    assert record == {key: value for key, value in task.items() if key != "weights_sha256"}
    assert read_task(tmp_path / "model.pt") == task


def test_a_distillation_also_keeps_its_terms_and_teachers(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*TINY, *DYNUNET, "--dataset-dir", str(cohort)]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert (
        main(["teacher", *common, "--architecture", "dynunet", "--modalities", "pet", "--output-dir", str(teacher)])
        == 0
    )
    network = read_task(teacher / "model.pt")["network"]  # type: ignore[index]
    assert network["options"] == {"dynunet": {"filters": [2, 4, 4, 4, 4]}, "uxnet": {}}
    assert (network["architecture"], network["modalities"]) == ("dynunet", ["pet"])
    wrong = ["distill", *common, "--method", "hinton", "--teacher", f"dynunet:mr={teacher / 'model.pt'}"]
    assert main([*wrong, "--output-dir", str(tmp_path / "wrong")]) == 1
    assert "its modalities is ['pet'], this run's is ['mr']" in capsys.readouterr().err
    asked = ["--method", "hinton", "--teacher", f"dynunet:pet={teacher / 'model.pt'}"]
    assert main(["distill", *common, *asked, "--output-dir", str(student)]) == 0
    task: Any = read_task(student / "model.pt")
    assert task["teachers_sha256"] == {"dynunet_pet": sha256(teacher / "model.pt")}
    term = {"tap": "logits", "weight": 0.5, "loss": {"_target_": "scripts.losses.SoftPredictionLoss"}}
    assert task["loss"] == {
        "_target_": "scripts.distillation.loss.DistillationLoss",
        "weighting": "mean",
        "static": None,
        "regions": None,
        "unlabelled": False,
        "terms": {"hinton": term},
    }
    assert task["network"] == STUDENT


def test_a_definition_follows_references_and_builds_nothing() -> None:
    config = {
        "imports": ["$import math"],
        "sizes": [1, 2, 3],
        "last": "$@sizes[-1] + math.floor(0.5)",
        "built": {"_target_": "does.not.Exist"},
        "norm": {"name": "group", "sizes": "@sizes"},
        "net": {
            "_target_": "does.not.Exist", "a": "@last", "b": ["@sizes", "@norm"], "c": "$@built.size", "d": "@built",
            "e": "user@place",
        },
    }  # fmt: skip
    assert definition(ConfigParser(config), "net") == {
        "_target_": "does.not.Exist",
        "a": 3,
        "b": [[1, 2, 3], {"name": "group", "sizes": [1, 2, 3]}],
        "c": "$@built.size",
        "d": {"_target_": "does.not.Exist"},
        "e": "user@place",
    }


def test_without_a_config_the_record_holds_the_settings_and_the_cases() -> None:
    case = {"case_id": "A", "patient_id": "P", "image": "a.nii"}
    record = training_record([[case], []], {"spacing": (1.0, 2.0), "device": torch.device("cpu"), "pi": math.pi})
    versions = {"bundle_version", "git_commit"}
    assert {key: value for key, value in record.items() if key not in versions} == {
        "spacing": [1.0, 2.0],
        "device": "cpu",
        "pi": math.pi,
        "training_cases": [{"case_id": "A", "patient_id": "P"}],
        "validation_cases": [],
        "inherited_cases": [],
    }


def test_the_record_names_the_cases_of_all_networks_that_this_one_learned_from(
    cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A teacher left out fold 1; its student started from weights that left out fold 0; a third starts from it."""
    small = ["--set", "patch=[16,16,16]", "--set", 'architectures={"segresnet":{"init_filters":8}}']
    common, split = [*TINY, *small, "--dataset-dir", str(cohort)], tmp_path / "splits.json"
    names = [f"PHANTOM_{i:03d}" for i in range(1, 7)]
    split.write_text(json.dumps({"seed": 0, "folds": [names[:2], names[2:4], names[4:]]}))
    common += ["--set", f"splits_file={split}"]
    teacher, first, second, third = (tmp_path / name for name in ("teacher", "first", "second", "third"))
    options = ["--architecture", "segresnet", "--modalities", "pet", "--fold", "1", "--output-dir", str(teacher)]
    assert main(["teacher", *common, *options]) == 0
    assert main(["train", *common, "--fold", "0", "--output-dir", str(first)]) == 0
    distil = ["distill", *common, "--method", "hinton", "--teacher", f"segresnet:pet={teacher / 'model.pt'}"]
    start = ["--pretrained", str(first / "model.pt")]
    assert main([*distil, *start, "--fold", "2", "--output-dir", str(second)]) == 0
    task: Any = read_task(second / "model.pt")
    assert [case["case_id"] for case in task["training_cases"]] == names[:4]
    assert [case["case_id"] for case in task["inherited_cases"]] == names  # 1, 2, 5, 6 by the teacher, 3 to 6 before
    assert task["built_on_sha256"] == {"pretrained": sha256(first / "model.pt")}
    assert f"The weights {first / 'model.pt'} were trained on the patients of 2 of the 2 validation" in caplog.text
    assert (task["teacher_names"], task["teachers"]) == (["segresnet_pet"], {"segresnet_pet": {"modalities": ["pet"]}})
    assert main(["train", *common, "--pretrained", str(second / "model.pt"), "--output-dir", str(third)]) == 0
    task = read_task(third / "model.pt")
    assert [case["case_id"] for case in task["inherited_cases"]] == names
    cases = [{"case_id": "other study", "patient_id": "PHANTOM_001"}, {"case_id": "PHANTOM_007"}]
    assert trained_on(third / "model.pt", cases) == ({"other study": "yes", "PHANTOM_007": "no"}, "")


def test_pretrained_weights_of_other_input_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = tmp_path / "model.pt"
    ranges = {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]}
    task_path(weights).write_text(json.dumps({"modalities": ["ct", "pet"], "intensity": ranges}))
    for modalities, of_pet in ((["ct", "pet"], [0, 10]), (["pet", "ct"], [0, 10]), (["ct", "pet"], [0, 20])):
        settings = {"modalities": modalities, "intensity": {**ranges, "pet": of_pet}}
        training_record([[], []], settings, pretrained=str(weights))
    order = "its modalities is ['ct', 'pet'], this run's is ['pet', 'ct']"
    pet = "its intensity#pet is [0, 10], this run's is [0, 20]"
    expected = [f"The weights {weights} were trained on other input: {clause}." for clause in (order, pet)]
    assert [record.getMessage() for record in caplog.records] == expected


def test_other_checks_teachers_or_their_order_are_another_training(tiny_bundle: Any, tmp_path: Path) -> None:
    specs = {name: {"architecture": "dynunet", "modalities": ["pet"]} for name in ("a", "b")}
    changed = {"b": specs["b"], "a": {**specs["a"], "modalities": ["ct"]}}
    records = [
        tiny_bundle(tmp_path, "distill", "methods/hinton", teacher_specs=teachers, **more).get_parsed_content("record")
        for teachers, more in ((specs, {}), (changed, {"checks#voxel_size": "pixdim"}))
    ]
    assert differences(*records) == [
        "its checks#voxel_size is none, this run's is pixdim",
        "its teacher_names is ['a', 'b'], this run's is ['b', 'a']",
        "its teachers#a#modalities is ['pet'], this run's is ['ct']",
    ]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b""])
def test_a_damaged_task_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    assert read_task(tmp_path / "model.pt") is None
    assert task_path(tmp_path / "a.b.pt").name == "a.b.task.json"
    task_path(tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.task\.json .*Restore it, or remove it"):
        read_task(tmp_path / "model.pt")


RECORD = {"fold": 0, "spacing": [3, 3, 3], "intensity": {"ct": [-200, 300], "mr": "zscore"}, "network": STUDENT}


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"fold": 1}, "its fold is 0, this run's is 1"),
        ({"spacing": [2.0, 3.0, 3.0]}, "its spacing is [3, 3, 3], this run's is [2.0, 3.0, 3.0]"),
        ({"intensity": {"ct": [-200, 300], "mr": [0, 1200]}}, "its intensity#mr is zscore, this run's is [0, 1200]"),
        (
            {"network": {**STUDENT, "norm": "batch"}},
            "its network#norm is ['group', {'num_groups': 4}], this run's is batch",
        ),
        ({"loss": {"_target_": "a.b.DistillationLoss", "x": 1}}, "its loss is none, this run's is DistillationLoss"),
        ({"teachers_sha256": {"a": "0" * 64}}, "its teachers_sha256 is none, this run's is {a}"),
    ],
)
def test_every_difference_of_two_records_is_named(change: dict[str, Any], clause: str) -> None:
    assert differences(RECORD, {**RECORD, **change}) == [clause]
    assert (
        differences({**RECORD, "epochs": 3, "git_commit": "a"}, {**RECORD, "epochs": 4, "spacing": [3.0, 3.0, 3.0]})
        == []
    )
    assert differences({"fold": 0}, RECORD) == []  # an older record knows less


def test_other_cases_are_named_up_to_five() -> None:
    def cases(*numbers: int) -> list[dict[str, str]]:
        return [{"case_id": f"C{i}", "patient_id": f"P{i}"} for i in numbers]

    one, two = {"training_cases": cases(1, 2)}, {"training_cases": cases(2, *range(3, 10))}
    assert differences(one, two) == [
        "its training cases include C1, this run's do not",
        "this run's training cases include C3, C4, C5, C6, C7 and 2 more, its do not",
    ]
    other_patient = [{"case_id": "C2", "patient_id": "X"}, *cases(1)]
    assert len(differences(one, {"training_cases": other_patient})) == 2


@pytest.fixture(scope="module")
def begun(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of two epochs."""
    folder = tmp_path_factory.mktemp("begun")
    assert main(["train", *TINY, "--epochs", "2", "--dataset-dir", str(cohort), "--output-dir", str(folder)]) == 0
    return folder


CHANGES = {
    "fold": (["--fold", "1"], ["its fold is 0, this run's is 1", "its validation cases include PHANTOM_"]),
    "spacing": (["--set", "spacing=[12,12,10]"], ["its spacing is [12, 12, 12], this run's is [12, 12, 10]"]),
    "patch": (["--set", "patch=[16,16,32]"], ["its patch is [16, 16, 16], this run's is [16, 16, 32]"]),
    "intensity": (["--set", "intensity#ct=[-100,200]"], ["its intensity#ct is [-200, 300], this run's is [-100, 200]"]),
    "labels": (["--set", "labels=[[0],[1,2]]"], ["its labels is [[0], [1]], this run's is [[0], [1, 2]]"]),
    "learning rate": (["--set", "learning_rate=0.1"], ["its learning_rate is 0.001, this run's is 0.1"]),
    "batch size": (["--set", "batch_size=1"], ["its batch_size is 2, this run's is 1"]),
    "loss": (
        ["--set", "segmentation_loss#include_background=true"],
        ["its segmentation_loss#include_background is False, this run's is True"],
    ),
    "network": (
        ["--set", 'student_norm=["group",{"num_groups":2}]'],
        ["its network#norm is ['group', {'num_groups': 4}], this run's is ['group', {'num_groups': 2}]"],
    ),
    "optimizer": (["--set", "optimizer#_target_=torch.optim.SGD"], ["its optimizer#_target_ is torch.optim.AdamW"]),
    "several": (
        ["--set", "spacing=[9,9,9]", "--seed", "4", "--modality-dropout", "0.5"],
        ["its seed is 0, this run's is 4; its spacing is", "its network#modality_dropout is 0.0, this run's is 0.5"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_other_data_or_settings_is_refused_with_every_difference(
    change: str, begun: Path, cohort: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, clauses = CHANGES[change]
    before = {path.name: path.read_bytes() for path in begun.iterdir() if path.is_file() and path.name[0] != "."}
    common = ["--epochs", "2", "--dataset-dir", str(cohort), "--output-dir", str(begun), "--resume"]
    assert main(["train", *TINY, *common, *options]) == 1
    printed = capfd.readouterr().err
    (error,) = (line for line in printed.splitlines() if "error: " in line)
    assert f"error: {begun / 'checkpoint.pt'} is from a different run: " in error
    assert all(clause in error for clause in clauses), error
    assert "Resume with the same settings, data and number of processes, or choose another --output-dir." in error
    assert "preprocessing" not in printed  # it is refused before any case is read
    assert {name: (begun / name).read_bytes() for name in before} == before


def test_a_resume_with_a_method_is_refused_and_one_with_the_same_settings_is_not(
    begun: Path, cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(begun, tmp_path / "copy")
    common = [*TINY, "--epochs", "2", "--dataset-dir", str(cohort), "--output-dir", str(output), "--resume"]
    method = [
        "--method",
        "hint",
        "--teacher",
        "segresnet=random",
        "--set",
        'architectures={"segresnet":{"init_filters":8}}',
    ]
    assert main(["distill", *common, *method]) == 1
    error = capfd.readouterr().err
    assert "its loss is none, this run's is DistillationLoss; its teachers_sha256 is none, this run's is" in error
    assert main(["train", *common]) == 0


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(
    begun: Path, cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.load(begun / "checkpoint.pt", weights_only=True)
    del state["record"]
    torch.save(state, tmp_path / "checkpoint.pt")
    shutil.copy(begun / "splits.json", tmp_path)
    common = ["--epochs", "2", "--dataset-dir", str(cohort), "--output-dir", str(tmp_path), "--resume"]
    assert main(["train", *TINY, *common, "--set", "intensity#ct=[-100,200]"]) == 0
    warning = f"{tmp_path / 'checkpoint.pt'} holds no record of its data and settings, because an older version wrote"
    assert caplog.text.count(warning) == 1


def test_a_teacher_of_another_spacing_is_refused_and_one_that_saw_the_validation_cases_is_a_warning(
    cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    small = ["--set", "patch=[16,16,16]", "--set", 'architectures={"segresnet":{"init_filters":8}}']
    common = [*TINY, *small, "--dataset-dir", str(cohort)]
    teacher, seen = ["teacher", *common, "--architecture", "segresnet", "--modalities", "pet"], tmp_path / "fold 1"
    assert main([*teacher, "--fold", "1", "--output-dir", str(seen)]) == 0
    (tmp_path / "s").mkdir()
    shutil.copy(seen / "splits.json", tmp_path / "s")
    student = ["distill", *common, "--method", "hinton", "--teacher", f"segresnet:pet={seen / 'model.pt'}"]
    student += ["--output-dir", str(tmp_path / "s")]
    assert main([*student, "--set", "spacing=[12,12,9]"]) == 1
    error = capfd.readouterr().err
    assert f"error: {seen / 'model.task.json'} contradicts this run: its spacing is [12, 12, 12], this run's" in error
    assert main([*student, "--set", "intensity#ct=[0,1]"]) == 0  # it does not see the CT
    assert (
        "The teacher segresnet_pet was trained on the patients of 2 of the 2 validation cases of this run: PHANTOM_"
        in caplog.text
    )
    assert main([*student, "--set", "spacing=[12,12,9]", "--set", "ignore_task=true", "--set", "overwrite=true"]) == 0
    assert "this run's is [12, 12, 9]. ignore_task is set." in caplog.text


def test_the_share_of_the_balance_is_part_of_the_record(tiny_bundle: Any, tmp_path: Path) -> None:
    spec = {"pet": {"architecture": "dynunet", "modalities": ["pet"]}}
    records = []
    for configs, more in (((), {}), (("balanced",), {}), (("balanced",), {"balance": 0.5})):
        parser = tiny_bundle(tmp_path, "distill", "methods/hinton", *configs, teacher_specs=spec, **more)
        records.append(parser.get_parsed_content("record"))
    papers, whole, half = records
    assert differences(whole, papers) == ["its balance is 1.0, this run's is none"]
    assert differences(whole, half) == ["its balance is 1.0, this run's is 0.5"]
    older = {key: value for key, value in whole.items() if key != "balance"}
    assert differences(older, whole) == []


def test_the_teachers_of_a_cache_are_compared_as_those_that_run(
    tiny_bundle: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights, seen = tmp_path / "model.pt", [{"case_id": f"PHANTOM_00{i}", "patient_id": "P"} for i in range(1, 7)]
    weights.touch()
    record = {"spacing": [9.0, 9.0, 9.0], "patch": [64, 64, 64], "training_cases": seen}
    task_path(weights).write_text(json.dumps(record))
    options = {"cache_dir": str(tmp_path / "none")}
    options["teacher_specs"] = {"pet": {"architecture": "unetr", "modalities": ["pet"], "weights": str(weights)}}
    configs = ("distill", "methods/hinton", "cached")
    with pytest.raises(RuntimeError) as error:  # of MONAI, which names the component
        tiny_bundle(tmp_path / "a", *configs, **options).get_parsed_content("teachers")
    assert "contradicts this run: its spacing is [9.0, 9.0, 9.0]" in str(error.value.__cause__)
    assert "patch" not in str(error.value.__cause__)  # the cache gives no patch to UNETR, which takes one size only
    with pytest.raises(RuntimeError) as error:
        tiny_bundle(tmp_path / "c", *configs[:2], **options).get_parsed_content("teachers")
    assert "its patch is [64, 64, 64], this run's is [16, 16, 16]" in str(error.value.__cause__)
    with pytest.raises(RuntimeError) as error:
        tiny_bundle(tmp_path / "b", *configs, **options, ignore_task=True).get_parsed_content("teachers")
    assert "No cache of the teacher pet" in str(error.value.__cause__)
    assert (
        "The teacher pet was trained on the patients of 2 of the 2 validation cases of this run: PHANTOM_"
        in caplog.text
    )
