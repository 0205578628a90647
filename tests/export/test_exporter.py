# SPDX-License-Identifier: Apache-2.0
"""The export: models that pass are written, others are refused, and the verbs use the exported files."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from scripts.cli.main import main
from scripts.export import converters, exporter
from scripts.export.exporter import _write_probe, comparison_cases
from scripts.export.parity import Comparison, compare_engines, gate_failures, mean_of_defined
from scripts.networks import Student
from scripts.runtime.exported_files import probe_image
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


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights of the tiny student, the only file of their folder."""
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
    """The error sentence; a progress bar may precede it in its line."""
    _, prefix, sentence = capsys.readouterr().err.partition("error: ")
    assert prefix
    assert sentence.count("\n") == 1
    return sentence


def test_the_record_lists_files_measurements_cases_and_versions(exported: Path) -> None:
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
    assert _names(folder) == {
        "export.json",
        "probe.npz",
        *(file for model in record["models"].values() for file in model["files"]),
    }
    assert _names(folder.parent) == {"model.pt", "model_export"}


def test_no_file_contains_a_path_of_this_machine(exported: Path, cohort: Path) -> None:
    assert cohort.is_relative_to(exported.parents[1])
    for path in exported.with_name("model_export").iterdir():
        content = path.read_bytes()
        for secret in (ROOT, exported.parents[1], Path(sys.prefix)):
            assert str(secret).encode() not in content, path


def test_torchscript_gives_pytorchs_logits(exported: Path) -> None:
    student = Student(3, 2, (8, 16, 16, 16)).eval()
    student.load_state_dict(torch.load(exported, weights_only=True)["model"])
    image = torch.rand(2, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scripted = torch.jit.load(str(exported.with_name("model_export") / "model.ts")).eval()
        torch.testing.assert_close(scripted(image), student(image), atol=1e-5, rtol=1e-5)


def test_segment_writes_the_same_mask_with_every_engine(
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
        assert main([str(x) for x in ("segment", "--verbose", *TINY, *files, *options)]) == 0
        assert f"--engine {engine} --engine_precision fp32" in capsys.readouterr().out
        masks[engine] = np.asarray(nib.load(output).dataobj) > 0
    assert masks["torch"].any()
    for engine in ("openvino", "onnxruntime"):
        assert 2 * (masks[engine] & masks["torch"]).sum() >= 0.999 * (masks[engine].sum() + masks["torch"].sum())


def test_evaluate_runs_an_engine_and_refuses_files_of_other_weights(
    exported: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _write_weights(tmp_path, seed=1)
    (tmp_path / "model_export").symlink_to(exported.with_name("model_export"))
    common = ["evaluate", *TINY, "--dataset-dir", str(cohort), "--fold", "0", "--output-dir", str(tmp_path / "out")]
    assert main([*common, "--weights", str(weights), "--engine", "openvino"]) == 1
    assert "were exported from weights with the sha256" in _error(capsys)
    assert main([*common, "--weights", str(exported), "--engine", "openvino", "--precision", "fp32"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["parameters"] > 0


def test_the_patch_must_be_the_window_of_the_onnx_model(
    exported: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset-dir", str(cohort), "--fold", "0", "--output-dir", str(tmp_path), "--weights", str(exported)]
    assert main(["evaluate", *TINY, "--set", "patch=[32,32,32]", *options, "--engine", "onnxruntime"]) == 1
    assert "runs on windows of (32, 32, 16) voxels only, but patch is (32, 32, 32)" in _error(capsys)


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1)).eval()


def _volume(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(case["case_id"]))
    label = torch.zeros(1, 20, 20, 20)
    label[:, 5:15, 5:15, 5:15] = 1
    return {"image": torch.randn(2, 20, 20, 20, generator=generator), "label": label}


def _export_network(folder: Path, **options: Any) -> dict[str, Any]:
    """Export a network of two convolutions for OpenVINO, without a config: 4 training and 2 validation cases."""
    torch.save({"model": _network().state_dict()}, folder / "model.pt")
    cases = [{"case_id": str(i), "label": "label.nii.gz"} for i in range(6)]
    settings: dict[str, Any] = {
        "split": [cases[:4], cases[4:]],
        "preprocessing": _volume,
        "formats": ["openvino"],
        "precisions": ["fp32"],
        **options,
    }
    return exporter.export(
        network=_network(1),
        weights=str(folder / "model.pt"),
        inferer=lambda image, network: network(image),
        modalities=["ct", "pet"],
        window=(16, 16, 16),
        threads=1,
        **settings,
    )


def test_a_float32_model_that_differs_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = converters.to_openvino

    def corrupted(network: nn.Module, *others: Any) -> None:
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed[2].bias += 0.01
        convert(changed, *others)

    monkeypatch.setattr(converters, "to_openvino", corrupted)
    with pytest.raises(
        ValueError, match=r"^Nothing was written: openvino fp32 was refused, since its logits differ by"
    ):
        _export_network(tmp_path)
    assert _names(tmp_path) == {"model.pt"}


def test_an_inaccurate_int8_model_is_refused_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_weights(source: Path, patches: list[torch.Tensor], path: Path) -> None:
        assert len(patches) == 4 * 4  # four training cases
        converters.to_openvino(_network(3), 2, (16, 16, 16), path)

    monkeypatch.setattr(converters, "to_int8", other_weights)
    words = r"^openvino int8 was refused, since its mask Dice .*The other models were written\.$"
    with pytest.raises(ValueError, match=words):
        _export_network(tmp_path, precisions=["fp32", "int8"])
    folder = tmp_path / "model_export"
    assert _names(folder) == {"export.json", "probe.npz", "fp32.xml", "fp32.bin"}
    record = json.loads((folder / "export.json").read_text())
    assert list(record["models"]) == ["openvino fp32"]
    assert record["refused"]["openvino int8"]["mask_dice"] < 0.99


def test_without_a_data_set_the_command_compares_on_phantoms(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter, "PHANTOMS", 1)
    options = ["--formats", "openvino", "--precisions", "fp32", "--output-dir", tmp_path / "elsewhere"]
    assert _export(weights, *options) == 0
    assert "| openvino fp32 |" in capsys.readouterr().out
    record = json.loads((tmp_path / "elsewhere" / "model_export" / "export.json").read_text())
    assert "phantoms of seed 7, no patients" in record["compared_on"]["source"]
    assert _names(weights.parent) == {"model.pt"}


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "model_export"
    folder.mkdir(parents=True)
    (folder / "int8.xml").write_text("of an earlier export")
    _export_network(tmp_path, output_dir=str(folder.parent))
    assert _names(folder) == {"export.json", "probe.npz", "fp32.xml", "fp32.bin"}
    assert _names(folder.parent) == {"model_export"}
    assert _names(tmp_path) == {"model.pt", "elsewhere"}


def test_phantom_images_are_used_for_any_modalities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "PHANTOMS", 1)
    labels = [[5], [2, 7], [9]]
    cases, source = exporter.comparison_cases([[], []], ["t2w", "pet", "adc", "hbv"], tmp_path, labels)
    names = {key: Path(cases[0][key]).name.split("_")[0] for key in ("image", "t2w", "pet", "adc", "hbv")}
    assert names == {"image": "CT", "t2w": "CT", "pet": "PET", "adc": "MR", "hbv": "hbv.nii.gz"}
    assert Path(cases[0]["hbv"]).read_bytes() == Path(cases[0]["t2w"]).read_bytes()  # a copy: no file is two modalities
    assert "no patients" in source
    assert np.unique(np.asanyarray(nib.load(cases[0]["label"]).dataobj)).tolist() == [2, 5]


@pytest.mark.parametrize(
    ("arguments", "absent", "words"),
    [
        (["--precisions", "int8"], "", "int8 is calibrated on training cases"),
        (["--formats", "openvino"], "openvino", 'openvino is not installed: pip install -e ".[fast]"'),
        (["--formats", "onnx"], "onnxscript", 'onnxscript is not installed: pip install -e ".[fast]"'),
        (["--precisions", "int8"], "nncf", 'nncf is not installed: pip install -e ".[fast]"'),
    ],
)
def test_an_impossible_export_is_refused_before_anything_is_written(
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


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown 'tensorrt'\. Choose from: onnx, openvino, torchscript"):
        _export_network(tmp_path, formats=["tensorrt"])


def test_the_printed_line_names_the_four_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--dry-run", "--formats", "onnx", "--fold", "2"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("python -m monai.bundle run --config_file")
    assert "configs/export.json" in line
    assert "--fold 2 --formats '[\"onnx\"]'" in line


def test_the_mean_leaves_out_undefined_values() -> None:
    assert mean_of_defined([0.5, None, 1.0]) == 0.75
    assert mean_of_defined([None]) is None


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
def test_a_model_beyond_a_limit_is_refused_with_the_reason(
    precision: str, figures: tuple[Any, ...], words: str
) -> None:
    keys = ("logits_max_abs", "mask_dice", "validation_dice")
    reasons = gate_failures(precision, dict(zip(keys, figures, strict=True)), {"validation_dice": 0.5})
    assert bool(reasons) == bool(words)
    assert words in " ".join(reasons)


def test_every_class_is_compared_as_the_head_decides_it() -> None:
    """The engine exchanges the two inner classes: the foreground as a whole would be equal."""
    regions = [[1, 2], [2]]
    z = torch.full((1, 2, 4, 4, 4), -1.0)
    z[:, 0, :2], z[:, 1, 0] = 1, 1  # a core in plane 0, its rim in plane 1
    label = torch.zeros(1, 4, 4, 4)
    label[0, 0], label[0, 1], label[0, 2] = 2, 1, 254
    other = z.clone()
    other[:, 1, :2] = z[:, 1, :2].flip(1)
    cases = [{"image": torch.zeros(1, 4, 4, 4), "label": label}]
    logits = {"torch": z, "other": other}
    networks = {name: Fixed(value) for name, value in logits.items()}
    found = compare_engines(
        networks["torch"], {"other": networks["other"]}, cases, lambda image, run: run(image), 1, regions
    )
    assert found["torch fp32"].validation_dice == [1.0, 1.0]
    assert found["other"].mask_dice == [0.0, 0.0]


class Fixed(torch.nn.Module):
    """The same logits for every image."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_nan_logits_have_no_largest_difference() -> None:
    assert Comparison([1e-6, float("nan"), 0.0], [1.0], [1.0], [1.0]).figures()["logits_max_abs"] is None


def test_patches_are_reproducible_and_every_second_one_contains_foreground() -> None:
    label = torch.zeros(1, 40, 40, 10)
    label[0, 2:4, 30:33, 5], label[0, 30:] = 1, 254  # ignored voxels are no foreground
    cases = [{"image": torch.arange(16000.0).view(1, 40, 40, 10), "label": label}]
    patches = converters.draw_patches(cases, (16, 16, 16), each=6)
    again = converters.draw_patches(cases, (16, 16, 16), each=6)
    assert all(torch.equal(a, b) for a, b in zip(patches, again, strict=True))
    assert all(patch.shape == (1, 1, 16, 16, 16) for patch in patches)
    foreground = set(cases[0]["image"][label == 1].tolist())
    assert all(foreground & set(patch.flatten().tolist()) for patch in patches[::2])
    assert all((patch[..., 10:] == 0).all() for patch in patches)


@pytest.mark.real
def test_the_shipped_weights_pass_the_float32_and_bf16_gates_on_patients(require_data: Any, tmp_path: Path) -> None:
    arguments = ["export", "--data", "sts", "--dataset-dir", str(require_data("sts")), "--output-dir", str(tmp_path)]
    assert main([*arguments, "--threads", "1", "--device", "cpu", "--precisions", "fp32", "bf16"]) == 0


def test_a_network_that_runs_on_its_window_only_gets_a_probe_of_that_size(tmp_path: Path) -> None:
    class OfOneSize(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if image.shape[2:] != (40, 40, 40):
                raise ValueError("another size")
            return 2 * image

    entries = _write_probe(OfOneSize(), 1, [40, 40, 40], tmp_path / "probe.npz")
    assert entries["probe_size"] == [40, 40, 40]
    with np.load(tmp_path / "probe.npz") as stored:
        expected = 2 * probe_image(1, [40, 40, 40])[..., ::2, ::2, ::2]
        np.testing.assert_array_equal(stored["small"], expected)
    assert _write_probe(nn.Identity(), 1, [40, 40, 40], tmp_path / "other.npz")["probe_size"] == [32, 32, 32]


def test_phantoms_of_a_fine_spacing_have_no_more_voxels(tmp_path: Path) -> None:
    cases, _ = comparison_cases([[], []], ["ct"], tmp_path, [[0], [1]], spacing=[0.2, 0.3, 0.5])
    sizes = [nib.Nifti1Image.from_filename(cases[0][key]).header.get_zooms() for key in ("ct", "label")]
    plain, _ = comparison_cases([[], []], ["ct"], tmp_path / "plain", [[0], [1]])
    for key, size in zip(("ct", "label"), sizes, strict=True):
        expected = np.array(nib.Nifti1Image.from_filename(plain[0][key]).header.get_zooms())
        np.testing.assert_allclose(size, 0.2 * expected, rtol=1e-5)
