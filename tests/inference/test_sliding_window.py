# SPDX-License-Identifier: Apache-2.0
"""Inference in one pass, in parts and in windows: the sizes that the network runs on, and the logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from scripts.inference.sliding_window import WholeVolumeInferer
from scripts.runtime import GIB
from scripts.runtime.sliding_window import part_size


class Local(nn.Module):
    """Two channels from a 3^3 mean of the image, independent of the window except at its border. Records its inputs."""

    def __init__(self, window: tuple[int, ...] | None = None, bytes_per_voxel: float = 1.0) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []
        self.batches: list[int] = []
        self.bytes_per_voxel = bytes_per_voxel
        if window:
            self.window = window

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(image.shape[2:]))
        self.batches.append(len(image))
        mean = nn.functional.avg_pool3d(image.mean(1, keepdim=True), 3, 1, 1)
        return torch.cat([mean, 1 - mean], 1)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 2, *shape, generator=torch.Generator().manual_seed(seed))


def test_a_volume_runs_in_one_pass_padded_to_a_multiple_of_the_divisor() -> None:
    network, volume = Local(), image(33, 20, 16)
    logits = WholeVolumeInferer((16, 16, 16))(volume, network)
    assert network.sizes == [(48, 32, 16)]
    padded = nn.functional.pad(volume, (0, 0, 6, 6, 7, 8))  # half on each side
    assert torch.equal(logits, Local()(padded)[:, :, 7:40, 6:26])


def test_the_result_is_a_plain_tensor() -> None:
    volume = MetaTensor(image(16, 16, 16))
    assert type(WholeVolumeInferer((16, 16, 16))(volume, Local())) is torch.Tensor


def test_a_volume_beyond_the_memory_limit_is_cut_into_parts_that_agree_with_one_pass() -> None:
    volume = image(64, 48, 32)
    whole = WholeVolumeInferer((16, 16, 16))(volume, Local())
    network = Local()
    limit = 48 * 48 * 32 / GIB
    logits = WholeVolumeInferer((16, 16, 16), overlap=0.25, memory_gib=limit)(volume, network)
    assert len(network.sizes) > 1
    assert max(math.prod(size) for size in network.sizes) <= 48 * 48 * 32
    # A part has zeros beyond its faces; their weight in the blend is small but not zero.
    assert (logits - whole).abs().max() < 0.2
    assert (logits - whole).abs().median() < 1e-6


def test_each_axis_has_its_own_divisor() -> None:
    volume, network = image(40, 24, 9), Local()
    WholeVolumeInferer((16, 16, 16), divisor=(16, 8, 2))(volume, network)
    assert network.sizes == [(48, 24, 10)]
    assert part_size([48, 24, 10], 1000, 0.0, [16, 8, 2]) == [16, 8, 6]
    assert part_size([48, 24, 10], 1, 0.0, [16, 8, 2]) == [16, 8, 2]


@pytest.mark.parametrize("size", [[256, 256, 192], [512, 512, 304], [48, 48, 48], [64, 16, 16]])
@pytest.mark.parametrize("limit", [1e4, 2e5, 3e6, 1e8])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_parts_keep_to_the_limit(size: list[int], limit: float, overlap: float) -> None:
    part = part_size(size, limit, overlap, [16] * 3)
    assert math.prod(part) <= limit
    assert all(p % 16 == 0 and p <= n for p, n in zip(part, size, strict=True))
    if math.prod(size) <= limit:
        assert part == size


def test_the_networks_bytes_per_voxel_decide_whether_a_volume_is_cut() -> None:
    volume, modest, greedy = image(32, 32, 32), Local(bytes_per_voxel=10), Local(bytes_per_voxel=100)
    inferer = WholeVolumeInferer((16, 16, 16), memory_gib=32**3 * 50 / GIB)
    inferer(volume, modest)
    inferer(volume, greedy)
    assert modest.sizes == [(32, 32, 32)]
    assert len(greedy.sizes) > 1


def test_sliding_windows_give_monais_logits() -> None:
    volume = image(40, 24, 20)
    expected = SlidingWindowInferer((16, 16, 16), overlap=0.5, mode="gaussian")(volume, Local())
    network = Local()
    logits = WholeVolumeInferer((16, 16, 16), overlap=0.5, whole=False, sw_batch_size=3)(volume, network)
    assert set(network.sizes) == {(16, 16, 16)}
    assert max(network.batches) == 3
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_a_network_of_one_window_size_gets_this_size_or_is_refused() -> None:
    network = Local(window=(16, 16, 16))
    WholeVolumeInferer((16, 16, 16))(image(32, 16, 16), network)
    assert set(network.sizes) == {(16, 16, 16)}
    with pytest.raises(ValueError, match=r"windows of \(16, 16, 16\) voxels only, but patch is \(32, 16, 16\)"):
        WholeVolumeInferer((32, 16, 16))(image(32, 16, 16), network)


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("batch", [1, 4])
def test_only_one_window_of_air_is_run_and_the_logits_are_the_same(batch: int, overlap: float) -> None:
    volume = image(64, 32, 32)
    volume[:, :, :40] = 0
    settings: dict[str, Any] = {"overlap": overlap, "whole": False, "sw_batch_size": batch}
    all_windows, without_air = Local(), Local()
    expected = WholeVolumeInferer((16, 16, 16), skip_air=False, **settings)(volume, all_windows)
    logits = WholeVolumeInferer((16, 16, 16), **settings)(volume, without_air)
    assert torch.equal(logits, expected)
    assert sum(without_air.batches) < 0.8 * sum(all_windows.batches)


def test_a_volume_of_air_only_is_one_run() -> None:
    network = Local()
    logits = WholeVolumeInferer((16, 16, 16), whole=False)(torch.zeros(1, 2, 32, 16, 16), network)
    torch.testing.assert_close(logits, Local()(torch.zeros(1, 2, 32, 16, 16)))
    assert network.batches == [1]
