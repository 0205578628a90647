# SPDX-License-Identifier: Apache-2.0
"""One pass, parts and windows: what each sees, and what comes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from scripts.inference.sliding_window import GIB, WholeVolumeInferer, part_size


class Local(nn.Module):
    """Two channels of a 3^3 mean of the image: whatever the window, the inside is the same. Notes the sizes it saw."""

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


def test_a_volume_goes_through_at_once_padded_to_what_the_network_takes() -> None:
    network, volume = Local(), image(33, 20, 16)
    found = WholeVolumeInferer((16, 16, 16))(volume, network)
    assert network.sizes == [(48, 32, 16)]
    padded = nn.functional.pad(volume, (0, 0, 6, 6, 7, 8))  # half on either side
    assert torch.equal(found, Local()(padded)[:, :, 7:40, 6:26])


def test_metadata_are_left_behind() -> None:
    volume = MetaTensor(image(16, 16, 16))
    assert type(WholeVolumeInferer((16, 16, 16))(volume, Local())) is torch.Tensor


def test_what_does_not_fit_is_cut_into_parts_that_agree_with_the_whole() -> None:
    volume = image(64, 48, 32)
    whole = WholeVolumeInferer((16, 16, 16))(volume, Local())
    network = Local()
    limit = 48 * 48 * 32 / GIB
    found = WholeVolumeInferer((16, 16, 16), overlap=0.25, memory_gib=limit)(volume, network)
    assert len(network.sizes) > 1
    assert max(math.prod(size) for size in network.sizes) <= 48 * 48 * 32
    # Parts see zeros beyond their faces, whose weight in the blend is small but not nothing.
    assert (found - whole).abs().max() < 0.2
    assert (found - whole).abs().median() < 1e-6


@pytest.mark.parametrize("size", [[256, 256, 192], [512, 512, 304], [48, 48, 48], [64, 16, 16]])
@pytest.mark.parametrize("limit", [1e4, 2e5, 3e6, 1e8])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_parts_are_within_the_limit_and_cover_the_volume(size: list[int], limit: float, overlap: float) -> None:
    part = part_size(size, limit, overlap, 16)
    assert math.prod(part) <= limit
    assert all(p % 16 == 0 and p <= n for p, n in zip(part, size, strict=True))
    if math.prod(size) <= limit:
        assert part == size


def test_memory_is_counted_by_the_networks_own_figure() -> None:
    volume, modest, greedy = image(32, 32, 32), Local(bytes_per_voxel=10), Local(bytes_per_voxel=100)
    inferer = WholeVolumeInferer((16, 16, 16), memory_gib=32**3 * 50 / GIB)
    inferer(volume, modest)
    inferer(volume, greedy)
    assert modest.sizes == [(32, 32, 32)]
    assert len(greedy.sizes) > 1


def test_windows_are_monais() -> None:
    volume = image(40, 24, 20)
    wanted = SlidingWindowInferer((16, 16, 16), overlap=0.5, mode="gaussian")(volume, Local())
    network = Local()
    found = WholeVolumeInferer((16, 16, 16), overlap=0.5, whole=False, sw_batch_size=3)(volume, network)
    assert set(network.sizes) == {(16, 16, 16)}
    assert max(network.batches) == 3
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_a_network_of_one_size_gets_windows_of_that_size_or_is_refused() -> None:
    network = Local(window=(16, 16, 16))
    WholeVolumeInferer((16, 16, 16))(image(32, 16, 16), network)
    assert set(network.sizes) == {(16, 16, 16)}
    with pytest.raises(ValueError, match=r"windows of \(16, 16, 16\) voxels only, and patch is \(32, 16, 16\)"):
        WholeVolumeInferer((32, 16, 16))(image(32, 16, 16), network)


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("batch", [1, 4])
def test_of_the_windows_of_air_one_is_run_and_nothing_changes(batch: int, overlap: float) -> None:
    volume = image(64, 32, 32)
    volume[:, :, :40] = 0
    settings: dict[str, Any] = {"overlap": overlap, "whole": False, "sw_batch_size": batch}
    every, alive = Local(), Local()
    wanted = WholeVolumeInferer((16, 16, 16), skip_air=False, **settings)(volume, every)
    found = WholeVolumeInferer((16, 16, 16), **settings)(volume, alive)
    assert torch.equal(found, wanted)
    assert sum(alive.batches) < 0.8 * sum(every.batches)


def test_nothing_but_air_is_one_run() -> None:
    network = Local()
    found = WholeVolumeInferer((16, 16, 16), whole=False)(torch.zeros(1, 2, 32, 16, 16), network)
    torch.testing.assert_close(found, Local()(torch.zeros(1, 2, 32, 16, 16)))
    assert network.batches == [1]
