# SPDX-License-Identifier: Apache-2.0
"""Every engine gives PyTorch's logits for each batch and size that it runs on; the choice of the engine is logged."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from scripts.cli.main import main
from scripts.inference.engine_choice import Engine, choose_engine
from scripts.inference.engines import ExportedEngine, TorchEngine
from scripts.networks import Student
from scripts.runtime import ENGINES, PRECISIONS, engines, exported_files
from scripts.runtime.engines import ONNXRuntimeEngine, OpenVINOEngine, UnavailableError
from scripts.utils.checksums import sha256

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("nncf")

ROOT = Path(__file__).parents[2]
WINDOW = (32, 32, 16)


def _student(seed: int = 0) -> Student:
    torch.manual_seed(seed)
    return Student(3, 2, (8, 16, 16, 16)).eval()


def _image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _answer(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(image)


@pytest.fixture(scope="module")
def student() -> Student:
    return _student()


@pytest.fixture(scope="module")
def files(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.pt`` and ``model_export`` with float32, bf16 and int8 models, on any CPU; read only."""
    root = tmp_path_factory.mktemp("weights")
    shutil.copytree(exported.parent, root, dirs_exist_ok=True)
    path = root / "model_export" / "export.json"
    record = json.loads(path.read_text())
    record["models"]["openvino bf16"] = record["models"]["openvino fp32"]  # a CPU without bf16 has not exported it
    path.write_text(json.dumps(record))
    return root


@pytest.fixture
def own_files(files: Path, tmp_path: Path) -> Path:
    """A copy of ``files`` that a test may change."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [(32, 32, 16), (16, 32, 48), (16, 16, 16)])
def test_openvino_gives_pytorchs_logits_at_any_batch_and_size(
    student: Student, files: Path, batch: int, size: tuple[int, ...]
) -> None:
    # With 32 x 32 x 16 the deepest grid has as many cells as the attention has heads: there OpenVINO's fused attention
    # is wrong.
    image = _image(batch, 3, *size)
    engine = ExportedEngine(OpenVINOEngine(files / "model_export" / "fp32.xml", "fp32", 1))
    assert engine.window is None
    torch.testing.assert_close(engine(image), _answer(student, image), atol=1e-5, rtol=1e-5)


def test_a_large_image_gets_a_model_of_its_own_size_with_the_same_logits(
    student: Student, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LARGE_IMAGE_VOXELS", 48 * 32 * 32)
    engine = ExportedEngine(OpenVINOEngine(files / "model_export" / "fp32.xml", "fp32", 1))
    for size in ((48, 32, 32), (32, 32, 32), (64, 32, 32), (48, 32, 32)):
        image = _image(1, 3, *size)
        torch.testing.assert_close(engine(image), _answer(student, image), atol=1e-5, rtol=1e-5)
    assert engine.engine.large_shape == (1, 3, 48, 32, 32)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_onnx_runtime_gives_pytorchs_logits_at_any_batch_for_its_window(
    student: Student, files: Path, batch: int
) -> None:
    engine = ExportedEngine(ONNXRuntimeEngine(files / "model_export" / "model.onnx", 1))
    assert engine.window == WINDOW
    image = _image(batch, 3, *WINDOW)
    torch.testing.assert_close(engine(image), _answer(student, image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.03), ("int8", 0.3)])
def test_bf16_and_int8_stay_close_to_pytorch(student: Student, files: Path, precision: str, share: float) -> None:
    name = "int8.xml" if precision == "int8" else "fp32.xml"
    image = _image(2, 3, *WINDOW, seed=5)
    expected = _answer(student, image)
    logits = ExportedEngine(OpenVINOEngine(files / "model_export" / name, precision, 1))(image)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    assert difference < share
    assert difference > 1e-5 or not engines.cpu_has_bf16()  # otherwise the precision hint had no effect


@pytest.mark.skipif(not engines.cpu_has_bf16(), reason="the CPU has no bf16")
def test_in_bf16_the_first_and_the_last_convolution_stay_in_float32(files: Path) -> None:
    engine = ExportedEngine(OpenVINOEngine(files / "model_export" / "fp32.xml", "bf16", 1))
    engine(_image(1, 3, *WINDOW))
    precisions = {}
    for op in engine.engine.request.get_compiled_model().get_runtime_model().get_ops():
        info = {
            key: op.get_rt_info()[key].astype(str) for key in ("layerType", "originalLayersNames", "runtimePrecision")
        }
        if info["layerType"] == "Convolution":
            name = next(part for part in info["originalLayersNames"].split(",") if "_convolution" in part)
            precisions[name.removeprefix("__module.").split("/")[0]] = info["runtimePrecision"]
    kept = {name for name, precision in precisions.items() if precision == "f32"}
    assert kept == {"encoder.0.0.conv", "head.conv"}
    assert precisions["encoder.0.1.conv"] == "bf16"


def test_a_signal_after_the_engines_are_freed_does_not_crash(files: Path) -> None:
    """OpenVINO's Cores restore a freed signal stack when they end in the order in which they began."""
    code = f"""
import gc, os, signal
from scripts.runtime.engines import OpenVINOEngine, cpu_has_bf16
first, second = (OpenVINOEngine({str(files / "model_export" / "fp32.xml")!r}, threads=1) for _ in range(2))
cpu_has_bf16()
for name in ("first", "second"):
    del globals()[name]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("caught"))
os.kill(os.getpid(), signal.SIGCHLD)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "caught\n"), ran.stderr


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_the_result_of_a_call_is_not_overwritten_by_the_next_call(files: Path, name: str) -> None:
    engine = choose_engine(name, "fp32", files / "model.pt", _student(), 1)
    first = engine(_image(1, 3, *WINDOW, seed=1))
    kept = first.clone()
    second = engine(_image(1, 3, *WINDOW, seed=2))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    assert not torch.equal(first, second)


def test_openvino_accepts_any_memory_layout_and_dtype(student: Student, files: Path) -> None:
    engine = ExportedEngine(OpenVINOEngine(files / "model_export" / "fp32.xml", "fp32", 1))
    image = _image(2, 3, *WINDOW)
    expected = _answer(student, image)
    strided = image.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(engine(strided), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(engine(image.double()), expected, atol=1e-5, rtol=1e-5)


def test_a_sliding_window_over_every_engine_gives_pytorchs_mask(student: Student, files: Path) -> None:
    inferer = SlidingWindowInferer(WINDOW, sw_batch_size=2, overlap=0.5, mode="gaussian")
    image = _image(1, 3, 40, 36, 20)
    expected = inferer(image, lambda window: _answer(student, window))
    for name in ("torch", "openvino", "onnxruntime"):
        logits = inferer(image, Engine(student, str(files / "model.pt"), name, "fp32", 1))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_torch_engine_runs_in_float32_or_bf16(student: Student) -> None:
    image = _image(1, 3, *WINDOW)
    torch.testing.assert_close(TorchEngine(student)(image), student(image), rtol=0, atol=0)
    lowered = TorchEngine(student, "bf16")(image)
    assert lowered.dtype == torch.float32
    assert 0 < float((lowered - student(image)).abs().max()) < 0.05 * float(student(image).abs().max())
    with pytest.raises(UnavailableError, match="int8 needs OpenVINO"):
        TorchEngine(student, "int8")


def test_an_unsupported_size_is_refused_with_both_sizes(files: Path) -> None:
    with pytest.raises(ValueError, match=r"1 x 3 x 40 x 32 x 16.*divisible by 16"):
        ExportedEngine(OpenVINOEngine(files / "model_export" / "fp32.xml"))(_image(1, 3, 40, 32, 16))
    with pytest.raises(ValueError, match="1 x 2 x 32 x 32 x 16"):
        ExportedEngine(OpenVINOEngine(files / "model_export" / "fp32.xml"))(_image(1, 2, *WINDOW))
    with pytest.raises(
        ValueError, match=r"windows of 32 x 32 x 16 voxels, not 32 x 32 x 32. Set patch to \[32, 32, 16\]"
    ):
        ExportedEngine(ONNXRuntimeEngine(files / "model_export" / "model.onnx"))(_image(1, 3, 32, 32, 32))


def test_auto_chooses_openvino_where_it_is_available_and_logs_the_reason(
    student: Student, files: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "scripts.inference.engine_choice")
    monkeypatch.setattr(exported_files, "cpu_has_bf16", lambda: True)
    assert choose_engine("auto", "auto", files / "model.pt", student).description == "openvino bf16"
    assert caplog.messages[-1] == f"engine openvino bf16: exported files {files / 'model_export'}, this CPU has bf16"
    monkeypatch.setattr(exported_files, "cpu_has_bf16", lambda: False)
    assert choose_engine("auto", "auto", files / "model.pt", student).description == "openvino fp32"
    with pytest.raises(UnavailableError, match="this CPU has no bf16"):
        choose_engine("openvino", "bf16", files / "model.pt", student)
    assert choose_engine("auto", "int8", files / "model.pt", student).description == "openvino int8"
    assert choose_engine("onnxruntime", "auto", files / "model.pt", student).description == "onnxruntime fp32"
    with pytest.raises(UnavailableError, match="contains no onnxruntime int8"):
        choose_engine("onnxruntime", "int8", files / "model.pt", student)


def test_a_precision_that_was_refused_at_export_is_not_chosen(student: Student, own_files: Path) -> None:
    path = own_files / "model_export" / "export.json"
    record = json.loads(path.read_text())
    del record["models"]["openvino bf16"], record["models"]["openvino int8"]
    path.write_text(json.dumps(record))
    assert choose_engine("auto", "auto", own_files / "model.pt", student).description == "openvino fp32"
    for precision in ("bf16", "int8"):
        with pytest.raises(UnavailableError, match=precision):
            choose_engine("openvino", precision, own_files / "model.pt", student)


def _remove_files(root: Path) -> str:
    shutil.rmtree(root / "model_export")
    weights = root / "model.pt"
    return f"no exported files next to {weights}. Create them with: python -m scripts export --weights {weights}"


def _change_weights(root: Path) -> str:
    before = sha256(root / "model.pt")
    torch.save({"model": _student(1).state_dict()}, root / "model.pt")
    return f"weights with the sha256 {before[:12]}..., but {root / 'model.pt'} has {sha256(root / 'model.pt')[:12]}..."


def _damage_file(root: Path) -> str:
    path = root / "model_export" / "fp32.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return f"{path} is damaged or missing"


@pytest.mark.parametrize("spoil", [_remove_files, _change_weights, _damage_file])
def test_missing_stale_or_damaged_files_are_refused_and_auto_falls_back_to_pytorch(
    own_files: Path, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reason = spoil(own_files)
    caplog.set_level(logging.INFO, "scripts.inference.engine_choice")
    assert choose_engine("auto", "auto", own_files / "model.pt", _student()).description == "torch fp32"
    assert caplog.messages[-1].startswith("engine torch fp32: ")
    assert reason in caplog.messages[-1]
    with pytest.raises(UnavailableError) as error:
        choose_engine("openvino", "fp32", own_files / "model.pt", _student())
    assert reason in str(error.value)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    student: Student, files: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=rf'{name} is not installed: pip install -e "\.\[fast\]"'):
        choose_engine(name, "auto", files / "model.pt", student)
    if name == "openvino":
        assert choose_engine("auto", "auto", files / "model.pt", student).description == "torch fp32"
        with pytest.raises(UnavailableError, match="not installed"):
            choose_engine("auto", "int8", files / "model.pt", student)


def test_unknown_names_are_refused_at_construction(student: Student) -> None:
    with pytest.raises(ValueError, match="Unknown engine 'tensorrt'"):
        Engine(student, "model.pt", "tensorrt")
    with pytest.raises(ValueError, match="Unknown engine precision 'fp8'"):
        Engine(student, "model.pt", "torch", "fp8")


def test_the_command_line_accepts_every_engine_and_precision(capsys: pytest.CaptureFixture[str]) -> None:
    for option, names in (("--engine", ENGINES), ("--precision", PRECISIONS)):
        for name in names:
            assert main(["evaluate", "--dry-run", option, name]) == 0
            assert name in capsys.readouterr().out


def test_the_names_of_engines_are_imported_without_pytorch_and_numpy() -> None:
    code = "import sys, scripts.runtime; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_engine_is_chosen_at_the_first_call_when_the_network_has_its_weights(files: Path) -> None:
    network = _student(9)  # as from a config: the weights are loaded when the run starts
    engine = Engine(network, str(files / "model.pt"), "auto", "fp32", 1)
    assert engine.selected is None
    network.load_state_dict(torch.load(files / "model.pt", weights_only=True)["model"])
    image = _image(1, 3, *WINDOW)
    torch.testing.assert_close(engine(image), _answer(network, image), atol=1e-5, rtol=1e-5)
    assert engine.description == "openvino fp32"
    assert engine.window is None
    engine.train()
    assert network.training
    engine.eval()
    assert not network.training


def test_files_exported_with_other_settings_are_detected_at_the_first_window(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Student(3, 2, (8, 16, 16, 16), norm=("group", {"num_groups": 2})).eval()  # accepts the same weights
    other.load_state_dict(torch.load(files / "model.pt", weights_only=True)["model"])
    image = _image(1, 3, *WINDOW)
    with pytest.raises(ValueError, match="openvino fp32 differs from PyTorch by"):
        Engine(other, str(files / "model.pt"), "openvino", "fp32", 1)(image)
    engine = Engine(other, str(files / "model.pt"), "auto", "fp32", 1)
    torch.testing.assert_close(engine(image), _answer(other, image))
    assert "PyTorch is used instead" in caplog.text
    assert engine.description == "torch fp32"


def test_threads_and_precision_are_passed_to_openvino(files: Path) -> None:
    engine = ExportedEngine(OpenVINOEngine(files / "model_export" / "fp32.xml", "fp32", 1))
    engine(_image(1, 3, *WINDOW))
    compiled = engine.engine.request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert not compiled.get_property("ENABLE_CPU_PINNING")  # two processes would share one core
    assert str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string()) == "f32"
