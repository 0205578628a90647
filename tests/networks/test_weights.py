# SPDX-License-Identifier: Apache-2.0
"""load_weights and WeightsLoader: checksums, finite values, and loading when the engine starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from torch import Tensor, nn

from scripts.networks.weights import WeightsLoader, load_weights
from scripts.utils.checksums import sha256
from scripts.utils.tensor_files import write_atomically


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


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(network: nn.Module, state: dict[str, Tensor]) -> None:
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
