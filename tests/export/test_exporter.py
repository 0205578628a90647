# SPDX-License-Identifier: Apache-2.0
"""The export end to end on phantoms: what passes is written, what fails is not, and the verbs use what was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from scripts.cli.main import main
from scripts.export import converters as conversion
from scripts.export import exporter as export
from scripts.export import parity
from scripts.export.parity import Figures, Gate, dice, failures, mean
from scripts.networks import Student
from scripts.utils.checksums import sha256

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("nncf")

ROOT = Path(__file__).parents[2]
TINY = [
    "--data", "phantom", "--threads", "1", "--device", "cpu", "--set", "patch=[32,32,16]", "--set", "spacing=[8,8,8]",
    "--set", "student_features=[8,16,16,16]",
]  # fmt: skip
LENIENT = {"bf16": Gate(0.9), "int8": Gate(0.5, validation=0.5)}  # random weights decide nothing clearly


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights of the tiny student, alone in their folder."""
    return _write_weights(tmp_path / "run")


def _write_weights(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    torch.save({"model": Student(3, 2, (8, 16, 16, 16)).state_dict()}, folder / "model.pt")
    return folder / "model.pt"


def _export(weights: Path, *arguments: Any) -> int:
    return main(["export", *TINY, "--weights", str(weights), *map(str, arguments)])


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.fixture(scope="module")
def exported(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights with every format and precision beside them; read only."""
    weights = _write_weights(tmp_path_factory.mktemp("exported"))
    with pytest.MonkeyPatch.context() as patch:
        for precision, gate in LENIENT.items():
            patch.setitem(parity.GATES, precision, gate)
        assert _export(weights, "--dataset-dir", cohort, "--precisions", "fp32", "bf16", "int8") == 0
    return weights


def test_the_record_says_what_was_measured_on_what(exported: Path) -> None:
    folder = exported.with_name("model_export")
    record = json.loads((folder / "export.json").read_text())
    assert record["weights_sha256"] == sha256(exported)
    assert record["window"] == [32, 32, 16]
    assert record["compared_on"]["source"] == "validation cases"
    assert len(record["compared_on"]["cases"]) == 2
    assert {"torch", "openvino", "onnx", "nncf"} <= set(record["versions"])
    assert set(record["models"]) >= {"openvino fp32", "openvino int8", "onnxruntime fp32", "torchscript fp32"}
    for name, model in record["models"].items():
        assert model["files"] == {file: sha256(folder / file) for file in model["files"]}
        if name.endswith("fp32"):
            assert model["logits_max_abs"] <= 1e-3
            assert model["mask_dice"] >= 0.9999
    assert _names(folder) == {"export.json", *(file for model in record["models"].values() for file in model["files"])}
    assert _names(folder.parent) == {"model.pt", "model_export"}


def test_no_file_holds_a_path_of_this_machine(exported: Path, cohort: Path) -> None:
    for path in exported.with_name("model_export").iterdir():
        content = path.read_bytes()
        for secret in (ROOT, cohort, exported.parent, Path(sys.prefix)):
            assert str(secret).encode() not in content, path


def test_torchscript_gives_pytorchs_logits(exported: Path) -> None:
    student = Student(3, 2, (8, 16, 16, 16)).eval()
    student.load_state_dict(torch.load(exported, weights_only=True)["model"])
    image = torch.rand(2, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scripted = torch.jit.load(str(exported.with_name("model_export") / "model.ts")).eval()
        torch.testing.assert_close(scripted(image), student(image), atol=1e-5, rtol=1e-5)


def test_segment_gives_the_same_mask_by_every_engine(
    exported: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, masks = cohort / "PHANTOM_001", {}
    files = [
        x
        for key, name in (("ct", "CT"), ("pet", "PET"), ("mr", "MR_T1"))
        for x in (f"--{key}", case / f"{name}_image.nii.gz")
    ]
    for engine in ("torch", "openvino", "onnxruntime"):
        output = tmp_path / f"{engine}.nii.gz"
        options = ["--engine", engine, "--precision", "fp32", "--weights", exported, "--output", output]
        assert main([str(x) for x in ("segment", *TINY, *files, *options)]) == 0
        said = capsys.readouterr()
        assert f"--engine {engine} --engine_precision fp32" in said.out
        masks[engine] = np.asarray(nib.load(output).dataobj) > 0
    assert masks["torch"].any()
    for engine in ("openvino", "onnxruntime"):
        assert 2 * (masks[engine] & masks["torch"]).sum() >= 0.999 * (masks[engine].sum() + masks["torch"].sum())


def test_evaluate_takes_an_engine_and_refuses_a_stale_one_in_one_sentence(
    exported: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _write_weights(tmp_path, seed=1)
    (tmp_path / "model_export").symlink_to(exported.with_name("model_export"))
    common = ["evaluate", *TINY, "--dataset-dir", str(cohort), "--fold", "0", "--output-dir", str(tmp_path / "out")]
    assert main([*common, "--weights", str(weights), "--engine", "openvino"]) == 1
    assert "are of weights with the sha256" in _error(capsys)
    assert main([*common, "--weights", str(exported), "--engine", "openvino", "--precision", "fp32"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["parameters"] > 0


def test_the_onnx_window_has_to_be_the_inferers(
    exported: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset-dir", str(cohort), "--fold", "0", "--output-dir", str(tmp_path), "--weights", str(exported)]
    assert main(["evaluate", *TINY, "--set", "patch=[32,32,32]", *options, "--engine", "onnxruntime"]) == 1
    assert "takes windows of (32, 32, 16) voxels only, and patch is (32, 32, 32)" in _error(capsys)


def test_a_float32_model_that_differs_leaves_nothing_behind(
    weights: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = conversion.to_openvino

    def corrupted(network: nn.Module, *others: Any) -> None:
        with torch.no_grad():
            network.head.conv.bias += 0.01
        convert(network, *others)
        with torch.no_grad():
            network.head.conv.bias -= 0.01

    monkeypatch.setattr(conversion, "to_openvino", corrupted)
    assert _export(weights, "--dataset-dir", cohort, "--formats", "openvino", "--precisions", "fp32") == 1
    error = _error(capsys)
    assert error.startswith("error: Nothing was written: openvino fp32 was refused, since its logits differ by 0.01")
    assert _names(weights.parent) == {"model.pt"}


def test_a_bad_int8_model_is_refused_and_the_others_are_written(
    weights: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(source: Path, patches: list[torch.Tensor], path: Path) -> None:
        assert len(patches) == 4 * 4  # four training cases
        conversion.to_openvino(_load(_write_weights(path.parent.parent / "other", seed=3)), 3, (32, 32, 16), path)

    monkeypatch.setattr(conversion, "to_int8", noisy)
    options = ["--formats", "openvino", "--precisions", "fp32", "int8"]
    assert _export(weights, "--dataset-dir", cohort, *options) == 1
    assert "The others were written, but openvino int8 was refused, since its mask Dice" in _error(capsys)
    folder = weights.with_name("model_export")
    assert _names(folder) == {"export.json", "fp32.xml", "fp32.bin"}
    record = json.loads((folder / "export.json").read_text())
    assert list(record["models"]) == ["openvino fp32"]
    assert record["refused"]["openvino int8"]["mask_dice"] < 0.99


def _load(path: Path) -> Student:
    student = Student(3, 2, (8, 16, 16, 16)).eval()
    student.load_state_dict(torch.load(path, weights_only=True)["model"])
    return student


def test_without_data_phantoms_are_compared_on_and_an_earlier_export_is_replaced(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "PHANTOMS", 1)
    folder = tmp_path / "elsewhere" / "model_export"
    folder.mkdir(parents=True)
    (folder / "int8.xml").write_text("of an earlier export")
    options = ["--formats", "openvino", "--precisions", "fp32", "--output-dir", folder.parent]
    assert _export(weights, *options) == 0
    assert "| openvino fp32 |" in capsys.readouterr().out
    assert (
        "phantoms of seed 7, no patients" in json.loads((folder / "export.json").read_text())["compared_on"]["source"]
    )
    assert _names(folder) == {"export.json", "fp32.xml", "fp32.bin"}
    assert _names(folder.parent) == {"model_export"}
    assert _names(weights.parent) == {"model.pt"}


def test_phantoms_stand_in_for_other_modalities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PHANTOMS", 1)
    cases, source = export._cases([[], []], ["t2w", "pet", "adc", "hbv"], tmp_path)
    names = {key: Path(cases[0][key]).name.split("_")[0] for key in ("image", "t2w", "pet", "adc", "hbv")}
    assert names == {"image": "CT", "t2w": "CT", "pet": "PET", "adc": "MR", "hbv": "CT"}
    assert "no patients" in source


@pytest.mark.parametrize(
    ("arguments", "absent", "words"),
    [
        (["--precisions", "int8"], "", "int8 is calibrated on training cases"),
        (["--formats", "openvino"], "openvino", 'openvino is not installed: pip install ".[fast]"'),
        (["--formats", "onnx"], "onnxscript", 'onnxscript is not installed: pip install ".[fast]"'),
        (["--precisions", "int8"], "nncf", 'nncf is not installed: pip install ".[fast]"'),
    ],
)
def test_what_cannot_be_exported_ends_in_one_sentence(
    weights: Path,
    arguments: list[str],
    absent: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if absent:
        monkeypatch.setitem(sys.modules, absent, None)
    assert _export(weights, *arguments) == 1
    assert words in _error(capsys)
    assert _names(weights.parent) == {"model.pt"}


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown 'tensorrt'"):
        export._check(["tensorrt"], ["fp32"], [[], []])


def test_the_printed_line_names_the_four_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--dry-run", "--formats", "onnx", "--fold", "2"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("python -m monai.bundle run --config_file")
    assert "configs/export.json" in line
    assert "--fold 2 --formats '[\"onnx\"]'" in line


def test_dice_and_its_mean_leave_out_what_is_undefined() -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, True])
    assert dice(a, b) == 0.5
    assert dice(a, ~a) == 0.0
    assert dice(a & ~a, b & ~b) is None
    assert mean([0.5, None, 1.0]) == 0.75
    assert mean([None]) is None


@pytest.mark.parametrize(
    ("precision", "figures", "words"),
    [
        ("fp32", (1e-3, 0.9999, 0.5), ""),
        ("fp32", (1.1e-3, 1.0, 0.5), "its logits differ by 0.0011"),
        ("fp32", (None, 1.0, 0.5), "not finite"),
        ("fp32", (1e-5, None, None), ""),
        ("fp32", (1e-5, 0.9998, 0.5), "its mask Dice is 0.99980"),
        ("bf16", (0.5, 0.9991, 0.1), ""),
        ("bf16", (0.5, 0.9989, 0.5), "its mask Dice is 0.99890"),
        ("bf16", (0.0, None, None), "all masks are empty"),
        ("int8", (5.0, 0.99, 0.4951), ""),
        ("int8", (5.0, 0.999, 0.494), "its validation Dice is 0.494"),
        ("int8", (5.0, 0.989, 0.5), "its mask Dice is 0.98900"),
        ("int8", (5.0, 1.0, None), "its validation Dice is None"),
    ],
)
def test_the_gates(precision: str, figures: tuple[Any, ...], words: str) -> None:
    keys = ("logits_max_abs", "mask_dice", "validation_dice")
    found = failures(precision, dict(zip(keys, figures, strict=True)), {"validation_dice": 0.5})
    assert bool(found) == bool(words)
    assert words in " ".join(found)


def test_logits_that_are_not_numbers_are_not_finite() -> None:
    assert Figures([1e-6, float("nan"), 0.0], [1.0], [1.0], [1.0]).summary()["logits_max_abs"] is None


def test_patches_are_drawn_alike_half_of_them_on_the_foreground() -> None:
    label = torch.zeros(1, 40, 40, 10)
    label[0, 2:4, 30:33, 5] = 1
    cases = [{"image": torch.arange(16000.0).view(1, 40, 40, 10), "label": label}]
    patches = conversion.draw_patches(cases, (16, 16, 16), each=6)
    again = conversion.draw_patches(cases, (16, 16, 16), each=6)
    assert all(torch.equal(a, b) for a, b in zip(patches, again, strict=True))
    assert all(patch.shape == (1, 1, 16, 16, 16) for patch in patches)
    inside = set(cases[0]["image"][label > 0].tolist())
    assert all(inside & set(patch.flatten().tolist()) for patch in patches[::2])
    assert all((patch[..., 10:] == 0).all() for patch in patches)


@pytest.mark.real
def test_the_shipped_weights_pass_every_gate_but_int8s_on_patients(require_data: Any, tmp_path: Path) -> None:
    arguments = ["export", "--data", "sts", "--dataset-dir", str(require_data("sts")), "--output-dir", str(tmp_path)]
    assert main([*arguments, "--threads", "1", "--device", "cpu", "--precisions", "fp32", "bf16"]) == 0
