# SPDX-License-Identifier: Apache-2.0
"""A student of the user's own, by the command line: the page docs/how_to/own_student.md and what it promises."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNetDS, UNet
from torch import nn

from monai_label.install import install_bundle
from scripts.cli.main import main
from scripts.data import postprocessing, preprocessing
from scripts.networks.weights import load_weights
from scripts.report.curves import read_curves
from scripts.utils.task_file import task_path

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "own_student.md"
FILES = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz", "mr": "MR_T1_image.nii.gz"}
SPACING, PATCH = [12, 12, 12], [16, 16, 16]
INTENSITY = {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]}
RUN = ["--threads", "1", "--device", "cpu"]
TINY = [
    *RUN, "--set", "patch=[16,16,16]", "--set", "spacing=[12,12,12]", "--set", "val_interval=100", "--epochs", "1",
    "--set", 'architectures={"segresnet":{"init_filters":8}}',
]  # fmt: skip
# What the page's two files define, built by hand.
BUILT: dict[str, Callable[[], nn.Module]] = {
    "student.json": lambda: UNet(3, 3, 2, (8, 16, 32), (2, 2), norm="instance"),
    "deep.json": lambda: SegResNetDS(3, 8, 3, 2, norm="instance", blocks_down=(1, 1, 1), dsdepth=2),
}


def page_files(folder: Path) -> None:
    """Write the JSON files of the page."""
    for name, text in re.findall(r"`(\w+\.json)`:\n\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        (folder / name).write_text(text, encoding="utf-8")


def first_commands() -> list[list[str]]:
    """The five commands of the page's first block."""
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    commands = [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]
    assert [command[:4] for command in commands] == [
        ["python", "-m", "scripts", verb] for verb in ("phantom", "teacher", "distill", "evaluate", "segment")
    ]
    return [command[3:] for command in commands]


def voxels(path: Path) -> Any:
    return np.asarray(nib.load(path).dataobj)


def own_mask(network: nn.Module, weights: Path, folder: Path, output: Path) -> Any:
    """The mask of a case by a network that is built here, without a config."""
    load_weights(network, weights)
    case = {"case_id": "own", "image": str(folder / FILES["ct"]), **{key: str(folder / FILES[key]) for key in FILES}}
    data = preprocessing(mode="infer", spacing=SPACING, modalities=list(FILES), intensity=INTENSITY)(case)
    network.eval().to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        data["pred"] = SlidingWindowInferer(PATCH, 1, 0.25, mode="gaussian")(data["image"][None], network)[0]
    postprocessing(str(output))(data)
    return voxels(output / "own.nii.gz")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """A folder with the page's files, the phantoms as DATA and the page's teacher, after one epoch at 12 mm."""
    folder = tmp_path_factory.mktemp("own_student")
    page_files(folder)
    (folder / "DATA").symlink_to(cohort)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*first_commands()[1], *TINY]) == 0
    return folder


@pytest.fixture(scope="module", params=BUILT)
def student(request: pytest.FixtureRequest, here: Path) -> tuple[str, Path]:
    """The name of a network's file, and the folder in which the page's commands ran with it."""
    folder = here / request.param.removesuffix(".json")
    folder.mkdir()
    (folder / "DATA").symlink_to(here / "DATA")
    shutil.copytree(here / "RUNS", folder / "RUNS")
    page_files(folder)
    (folder / "student.json").write_text((here / request.param).read_text())
    _, _, distill, evaluate, segment = first_commands()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*distill, *TINY, "--segmentation-loss", "loss.json"]) == 0
        if request.param == "student.json":  # once, since scoring starts processes
            assert main([*evaluate, *RUN]) == 0  # nothing of the network, the spacing or the data set is repeated
        assert main([*segment, *RUN]) == 0
    return request.param, folder


def test_the_five_commands_give_the_mask_of_a_network_built_by_hand(student: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = student
    weights, case = folder / "RUNS" / "student" / "model.pt", folder / "DATA" / "PHANTOM_001"
    expected = own_mask(BUILT[name](), weights, case, tmp_path)
    assert 0.001 < expected.mean() < 0.999
    np.testing.assert_array_equal(voxels(folder / "RUNS" / "mask.nii.gz"), expected)


def test_features_heads_and_the_own_loss_took_part_in_the_distillation(student: tuple[str, Path]) -> None:
    _, folder = student
    (row,) = read_curves(folder / "RUNS" / "student" / "curves.csv")
    assert row["loss/hint"] is not None
    assert row["loss/hint"] > 0
    task = json.loads((folder / "RUNS" / "student" / "model.task.json").read_text())
    expected = {**json.loads((folder / "student.json").read_text()), "in_channels": 3, "out_channels": 2}
    del expected["layers"]
    assert task["network"] == expected
    assert task["segmentation_loss"] == json.loads((folder / "loss.json").read_text())


def segment(folder: Path, output: Path, *more: str) -> int:
    files = [word for key, name in FILES.items() for word in (f"--{key}", str(folder / "DATA/PHANTOM_001" / name))]
    weights = folder / "RUNS" / "student" / "model.pt"
    return main(["segment", "--weights", str(weights), *files, "--output", str(output), *RUN, *more])


def test_naming_the_same_network_again_changes_nothing(student: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = student
    same = ["--network", str(folder / name), "--set", "spacing=[12,12,12]"]
    assert segment(folder, tmp_path / "mask.nii.gz", *same) == 0
    np.testing.assert_array_equal(voxels(tmp_path / "mask.nii.gz"), voxels(folder / "RUNS" / "mask.nii.gz"))


def test_a_contradiction_is_refused_in_one_sentence(
    student: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = student
    other = json.loads((folder / name).read_text()) | {"norm": "batch"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    changes = ["--network", str(tmp_path / "other.json"), "--data", "phantom", "--set", "intensity#ct=[0,1]"]
    assert segment(folder, tmp_path / "mask.nii.gz", *changes) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    for words in (
        "model.task.json contradicts this run: ",
        "its intensity#ct is [-200, 300], this run's is [0, 1]",
        "its spacing is [12, 12, 12], this run's is [3.0, 4.0, 4.0]",
        "its network#norm is instance, this run's is batch",
        "What you do not name is taken from the weights.",
    ):
        assert words in error
    assert not (tmp_path / "mask.nii.gz").exists()


def test_weights_without_their_record_need_the_network_and_give_the_same_mask(
    student: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = student
    weights = str(shutil.copy(folder / "RUNS" / "student" / "model.pt", tmp_path))
    assert segment(folder, tmp_path / "mask.nii.gz", "--weights", weights) == 1
    assert "do not fit Student" in capsys.readouterr().err
    settings = ["--set", "spacing=[12,12,12]", "--set", "patch=[16,16,16]", "--network", str(folder / name)]
    assert segment(folder, tmp_path / "mask.nii.gz", "--weights", weights, *settings) == 0
    np.testing.assert_array_equal(voxels(tmp_path / "mask.nii.gz"), voxels(folder / "RUNS" / "mask.nii.gz"))


def test_monai_label_serves_the_network_and_the_settings_of_the_weights(
    student: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = student
    weights = tmp_path / "model.pt"
    shutil.copy(folder / "RUNS" / "student" / "model.pt", weights)
    record = json.loads((folder / "RUNS" / "student" / "model.task.json").read_text())
    task_path(weights).write_text(json.dumps({**record, "flips": [1, 2]}))  # sides matter
    bundle = install_bundle(tmp_path / "app", weights)
    for config in ("inference", "train"):
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / f"{config}.json"))
        parser.config.update({"bundle_root": str(bundle)})  # as MONAI Label does
        network = parser.get_parsed_content("network_def")
        assert isinstance(network, type(BUILT[name]()))
        with pytest.raises(RuntimeError, match="Missing key"):
            network.load_state_dict({}, strict=False)  # as MONAI Label loads weights
        assert (parser["spacing"], parser["patch"]) == (SPACING, PATCH)
    load_weights(network, bundle / "models" / "model.pt")
    assert parser["flips"] == [1, 2]  # of the training
    parser["split"] = [[{"image": "new.nii.gz", "label": "new.nii.gz"}], []]
    trained = parser.get_parsed_content("record")
    assert trained["training_cases"] == [{"case_id": "new", "patient_id": "new"}]
    assert trained["inherited_cases"] == record["training_cases"]


def test_a_table_and_a_report_need_no_data_set_either(
    student: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = student
    line = ",".join(f"PHANTOM_001/{name}" for name in FILES.values())
    table = folder / "DATA" / "own_student.csv"
    table.write_text(f"case_id,patient_id,ct,pet,mr\nA,A,{line}\n")
    try:
        weights = ["--weights", str(folder / "RUNS" / "student" / "model.pt")]
        assert main(["segment", *weights, "--data-list", str(table), "--output-dir", str(tmp_path), "--dry-run"]) == 0
    finally:
        table.unlink()
    line = capsys.readouterr().out
    assert f'"_target_": "monai.networks.nets.{type(BUILT[name]()).__name__}"' in line
    assert "--spacing '[12, 12, 12]'" in line
    assert "configs/data/phantom.json" in line
    if name != "student.json":
        return
    evaluation = ["--evaluations", str(folder / "RUNS" / "evaluation"), "--dataset-dir", str(folder / "DATA")]
    assert main(["report", *evaluation, "--output-dir", str(tmp_path / "report")]) == 0
    assert "PHANTOM_" in (tmp_path / "report" / "report.html").read_text()


REFUSED: dict[str, tuple[Any, str]] = {
    "no class": ({"spatial_dims": 3}, 'names no network. Add its class, such as "_target_": "monai.networks'),
    "a list": ([1], "is not the definition of a network. Write an object"),
    "input": ({"in_channels": 2}, "UNet cannot segment an image of 3 channels, one per modality"),
    "output": ({"out_channels": 5}, "UNet returns [5, 16, 16, 16] for a patch, not [2, 16, 16, 16]"),
    "patch": ({"strides": [3, 2]}, "UNet "),
    "argument": (
        {"chanels": [1]},
        "net.json: monai.networks.nets.UNet has no argument 'chanels'. Did you mean channels?",
    ),
    "class": ({"_target_": "monai.networks.nets.Missing"}, "monai.networks.nets.Missing"),
    "layers": ({"layers": {"deepest": "model.1"}}, "layers must name the layer of deep, middle, fine"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_wrong_network_is_refused_before_anything_is_read_or_written(
    fault: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the data set does not exist, which would be the next error."""
    change, words = REFUSED[fault]
    unet = json.loads((here / "student.json").read_text())
    (tmp_path / "net.json").write_text(json.dumps({**unet, **change} if isinstance(change, dict) else change))
    if fault == "no class":
        (tmp_path / "net.json").write_text(json.dumps(change))
    verb = ["distill", "--teacher", "segresnet=random", "--method", "hint"] if fault == "layers" else ["train"]
    command = [*verb, "--data", "phantom", *TINY, "--network", str(tmp_path / "net.json")]
    assert main([*command, "--dataset-dir", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert words in error
    assert not (tmp_path / "out").exists()


def test_a_network_that_names_no_layers_is_asked_for_them(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not tapped at layers of the included student, whose names it may have by chance."""
    unet = json.loads((here / "student.json").read_text())
    (tmp_path / "net.json").write_text(json.dumps({key: value for key, value in unet.items() if key != "layers"}))
    command = ["distill", "--data", "phantom", *TINY, "--network", str(tmp_path / "net.json"), "--method", "hint"]
    command += ["--teacher", "segresnet=random", "--dataset-dir", str(here / "DATA")]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 1
    sentence = "The student names no layer 'middle'. Name it under \"layers\" in the file of --network"
    assert sentence in capsys.readouterr().err


def test_an_unknown_argument_of_a_loss_is_refused_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loss.json").write_text('{"_target_": "DiceFocalLoss", "softmaxx": true}')
    assert main(["train", "--segmentation-loss", str(tmp_path / "loss.json"), "--dry-run"]) == 1
    sentence = "loss.json: DiceFocalLoss has no argument 'softmaxx'. Did you mean softmax?"
    assert sentence in capsys.readouterr().err


def test_options_of_the_included_student_are_refused_beside_a_network(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["--network", str(here / "student.json"), "--dataset-dir", str(here / "DATA")]
    assert main(["train", "--data", "phantom", *network, "--modality-dropout", "0.2"]) == 1
    assert "--modality-dropout works with the included student only" in capsys.readouterr().err
    assert main(["evaluate", *network, "--architecture", "unetr", "--output-dir", str(tmp_path)]) == 1
    assert "--network and --architecture both name the network" in capsys.readouterr().err


def test_the_record_of_weights_from_elsewhere_runs_no_code(
    student: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = student
    monkeypatch.chdir(tmp_path)
    weights = shutil.copy(folder / "RUNS" / "student" / "model.pt", tmp_path)
    task = json.loads((folder / "RUNS" / "student" / "model.task.json").read_text())
    command = {"_target_": "os.system", "command": "touch RAN"}
    for network in (command, {**task["network"], "norm": "$open('RAN', 'w')"}):
        (tmp_path / "model.task.json").write_text(json.dumps({**task, "network": network}))
        assert segment(folder, tmp_path / "mask.nii.gz", "--weights", str(weights)) == 1
        assert "model.task.json: the network cannot be built" in capsys.readouterr().err
        assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    "formats", [["openvino", "torchscript"], pytest.param(["onnx"], marks=pytest.mark.slow)], ids=" ".join
)
def test_an_own_student_is_exported(formats: list[str], here: Path, tmp_path: Path) -> None:
    for package in ("openvino", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    network = {"_target_": "monai.networks.nets.UNet", "spatial_dims": 3, "in_channels": 3, "out_channels": 2}
    network |= {"channels": [4, 8], "strides": [2], "norm": "instance"}
    torch.save(UNet(3, 3, 2, (4, 8), (2,), norm="instance").state_dict(), tmp_path / "model.pt")
    settings = {"modalities": list(FILES), "labels": [[0], [1]], "spacing": [8, 8, 8], "patch": PATCH}
    task = {**settings, "intensity": INTENSITY, "cohort": "phantom", "network": network}
    (tmp_path / "model.task.json").write_text(json.dumps(task))
    weights = ["--weights", str(tmp_path / "model.pt"), *RUN]
    options = ["--formats", *formats, "--precisions", "fp32", "--dataset-dir", str(here / "DATA")]
    assert main(["export", *weights, *options]) == 0
    record = json.loads((tmp_path / "model_export" / "export.json").read_text())
    assert sorted(record["models"]) == [f"{name.replace('onnx', 'onnxruntime')} fp32" for name in formats]
    assert record["window"] == PATCH
