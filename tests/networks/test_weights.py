# SPDX-License-Identifier: Apache-2.0
"""load_weights and WeightsLoader: formats, prefixes, checksums, finite values, loading when the engine starts."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.networks.nets import UNet
from torch import Tensor, nn

from scripts.networks import Student
from scripts.networks.weights import WeightsLoader, load_weights, strict_network
from scripts.utils.checksums import sha256
from scripts.utils.tensor_files import write_atomically

State = dict[str, Tensor]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    write_atomically({"model": nn.Conv2d(1, 1, 1).state_dict()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def write_checksum(weights: Path, text: str) -> None:
    weights.with_name("model.pt.sha256").write_text(text)


def start_engine(loader: WeightsLoader) -> None:
    engine = Engine(lambda engine, batch: None)
    loader.attach(engine)
    engine.run([0])


def copy_of(network: nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(network: nn.Module, state: State) -> None:
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("with_checksum", [True, False])
def test_weights_are_loaded_when_the_engine_starts(with_checksum: bool, weights: Path) -> None:
    if with_checksum:
        write_checksum(weights, f"{sha256(weights)}  model.pt\n")
    network = nn.Conv2d(1, 1, 1)
    start_engine(WeightsLoader(network, str(weights)))
    assert_equal(network, torch.load(weights, weights_only=True)["model"])


def test_the_file_is_not_needed_before_the_engine_starts(tmp_path: Path) -> None:
    loader = WeightsLoader(nn.Conv2d(1, 1, 1), str(tmp_path / "later.pt"))
    with pytest.raises(FileNotFoundError, match=r"No weights at .*later\.pt: train the network first or check"):
        start_engine(loader)


def test_weights_with_another_checksum_than_in_the_file_are_refused(weights: Path) -> None:
    write_checksum(weights, f"{'0' * 64}  model.pt\n")
    network = nn.Conv2d(1, 1, 1)
    before = copy_of(network)
    with pytest.raises(ValueError, match=r"has the sha256 .* not 000000000000"):
        start_engine(WeightsLoader(network, str(weights)))
    assert_equal(network, before)


def test_an_explicit_checksum_takes_precedence_over_the_file(weights: Path) -> None:
    write_checksum(weights, f"{'0' * 64}  model.pt\n")
    start_engine(WeightsLoader(nn.Conv2d(1, 1, 1), str(weights), sha256(weights)))


def test_a_checksum_in_upper_case_is_accepted(weights: Path) -> None:
    assert load_weights(nn.Conv2d(1, 1, 1), weights, sha256(weights).upper()) == sha256(weights)
    write_checksum(weights, f"{sha256(weights).upper()}  model.pt\n")
    assert load_weights(nn.Conv2d(1, 1, 1), weights) == sha256(weights)


@pytest.mark.parametrize("content", [b"", b"\n", b"\x80\xff\x00", b"none", b"a" * 63, b"a" * 65, b"g" * 64])
def test_a_checksum_file_without_a_checksum_is_refused(content: bytes, weights: Path) -> None:
    weights.with_name("model.pt.sha256").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt\.sha256 .*64 hexadecimal digits"):
        load_weights(nn.Conv2d(1, 1, 1), weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("in_checkpoint", [True, False])
def test_weights_that_are_not_finite_are_refused_and_the_network_is_unchanged(
    in_checkpoint: bool, value: float, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))  # 2 + 5 tensors, one of them of integers
    before, state = copy_of(network), copy_of(network)
    state["0.weight"][0], state["1.running_mean"][1] = value, value
    write_atomically({"model": state} if in_checkpoint else state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt holds NaN or infinite values in 2 of its 7 tensors: take weights"):
        load_weights(network, tmp_path / "bad.pt")
    assert_equal(network, before)


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "timm#2003": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    "Lightning": lambda state: {
        "state_dict": {f"net._orig_mod.{name}": value for name, value in state.items()},
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 0.1},
    },
    "whole checkpoint": lambda state: {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "score as a NumPy number": lambda state: {"state_dict": state, "best": np.float64(0.5), "step": np.int64(3)},
    "nnU-Net": lambda state: {"network_weights": state, "init_args": {"fold": 0}},
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "bfloat16": lambda state: {"model": {name: value.bfloat16() for name, value in state.items()}},
    "twice": lambda state: {"model": state, "state_dict": {key: value.clone() for key, value in state.items()}},
    **{key: lambda state, key=key: {key: state} for key in ("model", "net", "network")},
}  # fmt: skip


def networks() -> dict[str, nn.Module]:
    """Networks without a common prefix in their names, and with one that other programs add as well."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4))
    inner = nn.Module()
    inner.network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4))
    return {
        "plain": plain,
        "under network": inner,
        "UNet": UNet(3, 2, 2, (4, 8), (2,)),
        "Student": Student(2, 2, (8, 8)),
    }


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["plain", "under network", "UNet", "Student"])
def test_weights_are_found_and_named_as_other_programs_save_them(wrapper: str, kind: str, tmp_path: Path) -> None:
    network, path = networks()[kind], tmp_path / "model.pt"
    rounded = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(wrapper, torch.float32)
    expected = {
        name: value.to(rounded).to(value.dtype) if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    torch.save(WRAPPERS[wrapper](copy_of(network)), path)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.zero_()
    load_weights(network, path)
    assert_equal(network, expected)


def test_weights_of_the_inner_network_and_of_a_wrapper_of_the_network_fit_as_well(tmp_path: Path) -> None:
    network = networks()["under network"]
    for number, state in enumerate(
        [network.network.state_dict(), {f"module.{name}": value for name, value in network.state_dict().items()}]  # type: ignore[union-attr]
    ):
        torch.save(state, tmp_path / f"{number}.pt")
        other = networks()["under network"]
        with torch.no_grad():
            other.network[0].weight.zero_()  # type: ignore[index]
        load_weights(other, tmp_path / f"{number}.pt")
        assert_equal(other, copy_of(network))


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_a_safetensors_file_is_loaded_whatever_its_name(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    network = networks()["plain"]
    safetensors.save_file({f"module.{key}": value for key, value in copy_of(network).items()}, tmp_path / name)
    other = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4))
    assert load_weights(other, tmp_path / name) == sha256(tmp_path / name)
    assert_equal(other, copy_of(network))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a file of plain weights"):
        load_weights(other, tmp_path / name)


def test_without_the_package_a_safetensors_file_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(8))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ValueError, match=r"the package safetensors is not installed\. Install it \(pip install safetens"
    ):
        load_weights(nn.Linear(1, 1), path)


SMALL = nn.Linear(2, 1)
MISFITS: dict[str, tuple[Any, str]] = {
    "names": (
        {"state_dict": {"module.net.a": torch.ones(2), "module.net.b": torch.ones(1)}},
        r"do not fit Linear: 2 of its 2 tensors are missing, and 2 are unknown\. Found under state_dict behind the "
        r"prefix module\.net\.: a, b\. Expected: weight, bias\. Check the weights, and the settings of the network",
    ),
    "one more": (
        {"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1), "loss.weight": torch.ones(2)},
        r"Found: module\.weight, module\.bias, loss\.weight\. Expected: weight, bias\.",
    ),
    "shape": (
        {"weight": torch.ones(1, 3), "bias": torch.ones(1)},
        r"do not fit Linear in 1 of 2 tensors: weight is \[1, 3\] of float32, not \[1, 2\] of float32\.",
    ),
    "integers": (
        {"weight": torch.ones(1, 2, dtype=torch.int8), "bias": torch.ones(1)},
        r"weight is \[1, 2\] of int8, not \[1, 2\] of float32\.",
    ),
    "two": (
        {"model": SMALL.state_dict(), "network": nn.Linear(2, 1).state_dict()},
        r"holds two different state dicts, model and network\. Save the one to use alone",
    ),
    "none": ({"epoch": 3, "best": 0.5}, r"holds no state dict, only epoch, best\. Save a state dict, alone or under"),
    "empty": ({}, r"holds no state dict, only nothing\."),
    "tensor": (torch.ones(2), r"holds a Tensor, no state dict\."),
    "numbered": ({0: torch.ones(2)}, r"holds no state dict, only 0\."),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_refused_with_what_was_found_and_expected(kind: str, tmp_path: Path) -> None:
    content, words = MISFITS[kind]
    network, path = nn.Linear(2, 1), tmp_path / "model.pt"
    before = copy_of(network)
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"model\.pt.*{words}"):
        load_weights(network, path)
    assert_equal(network, before)


def test_a_whole_module_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 1), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"is not a file of plain weights\. .* Save the state_dict\(\) of the network"):
        load_weights(nn.Linear(2, 1), tmp_path / "model.pt")


def test_a_strict_network_refuses_weights_that_do_not_fit_whatever_its_caller_asks_for() -> None:
    """MONAI Label asks for strict=False."""
    network = strict_network(nn.Linear(2, 2))
    own = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict({"other": torch.zeros(1)}, strict=False)
    network.load_state_dict({name: value + 1 for name, value in own.items()})
    assert all(torch.equal(value, own[name] + 1) for name, value in network.state_dict().items())
    assert isinstance(network, nn.Linear)
    assert type(network).__name__ == "Linear"
    copied = copy.deepcopy(network)
    copied.load_state_dict(own)
    assert not torch.equal(copied.weight, network.weight)  # of its own, not of the first
