# SPDX-License-Identifier: Apache-2.0
"""Every sample depends on seed, epoch and case only, not on the number of processes and workers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandScaleIntensity
from torch import nn

from scripts.data import CaseSampler, preprocessing
from scripts.data.sampling import SeededDataset
from scripts.data.training_set import training_set


def epoch_of(sampler: CaseSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("cases", "batch"), [(12, 1), (11, 1), (13, 2), (24, 4), (6, 2), (29, 3)])
def test_the_steps_of_all_ranks_are_those_of_one_process_with_the_joint_batch(
    cases: int, batch: int, world: int
) -> None:
    one = CaseSampler(cases, batch * world, seed=7)
    ranks = [CaseSampler(cases, batch, seed=7, rank=rank, world=world) for rank in range(world)]
    for epoch in (1, 2, 9):
        together = iter(epoch_of(one, epoch))
        parts: list[Iterator[int]] = [iter(epoch_of(rank, epoch)) for rank in ranks]
        steps = cases // (batch * world)
        assert len(one) == steps * batch * world
        assert [len(rank) for rank in ranks] == [steps * batch] * world
        for _ in range(steps):
            seen = [next(part) for part in parts for _ in range(batch)]
            assert seen == [next(together) for _ in range(batch * world)]
        assert all(next(part, None) is None for part in (together, *parts))


@pytest.mark.parametrize(("cases", "batch", "world"), [(10, 3, 1), (11, 2, 2), (8, 2, 1), (7, 7, 1)])
def test_an_epoch_takes_every_case_at_most_once_and_leaves_out_only_the_remainder(
    cases: int, batch: int, world: int
) -> None:
    for epoch in (1, 5):
        drawn = [draw for rank in range(world) for draw in epoch_of(CaseSampler(cases, batch, 3, rank, world), epoch)]
        assert {draw // cases for draw in drawn} == {epoch}
        taken = [draw % cases for draw in drawn]
        assert len(taken) == len(set(taken)) == cases - cases % (batch * world)


def test_orders_and_left_out_cases_differ_between_epochs_and_seeds() -> None:
    orders = [
        [draw % 10 for draw in epoch_of(CaseSampler(10, 3, seed), epoch)] for seed in (0, 1) for epoch in range(1, 7)
    ]
    assert len({tuple(order) for order in orders}) == 12
    assert len({case for order in orders for case in set(range(10)) - set(order)}) > 1
    assert orders[0] == [
        draw % 10 for draw in epoch_of(CaseSampler(range(10), 3, 0), 1)
    ]  # a list is taken as its length


def test_too_few_cases_for_a_step_are_refused_and_no_cases_are_accepted() -> None:
    with pytest.raises(ValueError, match=r"3 training case\(s\) do not fill one step of 2 on each of 2 process"):
        CaseSampler(3, 2, world=2)
    assert len(CaseSampler(4, 2, world=2)) == 2
    assert list(CaseSampler([], 2)) == []  # a config that is only inspected has no data
    assert len(CaseSampler(0, 2)) == 0


class Recorder(nn.Module):
    """A network that records the draws that it gets as input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.flatten().int().tolist())
        return x * self.weight


class Echo(torch.utils.data.Dataset):
    """Return the requested draw."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, draw: int) -> dict[str, torch.Tensor]:
        return {"image": torch.tensor([float(draw)]), "label": torch.zeros(1)}


def test_the_trainer_sets_the_epoch_of_the_sampler() -> None:
    network = Recorder()
    SupervisedTrainer(
        torch.device("cpu"), 3, DataLoader(Echo(), batch_size=2, sampler=CaseSampler(5, 2, seed=1)), network,
        torch.optim.SGD(network.parameters(), 0.0), nn.MSELoss(), decollate=False,
    ).run()  # fmt: skip
    assert [[draw // 5 for draw in step] for step in network.seen] == [[1, 1]] * 2 + [[2, 2]] * 2 + [[3, 3]] * 2
    wanted = [draw for epoch in (1, 2, 3) for draw in epoch_of(CaseSampler(5, 2, seed=1), epoch)]
    assert [draw for step in network.seen for draw in step] == wanted


@pytest.fixture(scope="module")
def data(phantoms: list[dict[str, Any]]) -> SeededDataset:
    intensity = {"ct": [-200, 300], "pet": [0, 10]}
    transform = preprocessing(["ct", "pet"], intensity, [10] * 3, "train", labels=[[0], [1]], patch=[12] * 3)
    return training_set(phantoms, transform, seed=2)


def tensors(sample: Any) -> list[torch.Tensor]:
    return [sample[0][key] for key in ("image", "label", "presence")]


def test_a_draw_gives_the_same_sample_after_any_other_draws(data: SeededDataset) -> None:
    for draw in (6, 11, 20):
        first = tensors(data[draw])
        for other in (7, 6, 35):
            data[other]
        torch.rand(3)
        assert all(torch.equal(a, b) for a, b in zip(first, tensors(data[draw]), strict=True))


def test_a_second_training_goes_on_with_the_epochs_of_the_first() -> None:
    first, second = CaseSampler(10, 3, seed=1), CaseSampler(10, 3, seed=1, earlier_epochs=2)
    assert [epoch_of(second, epoch) for epoch in (1, 2)] == [epoch_of(first, epoch) for epoch in (3, 4)]


def test_other_epochs_cases_and_seeds_give_other_samples(phantoms: list[dict[str, Any]], data: SeededDataset) -> None:
    assert len(data) == 6
    images = [data[epoch * 6 + 1][0]["image"] for epoch in range(1, 6)]
    assert data[1 * 6 + 1][0]["case_id"] == data[5 * 6 + 1][0]["case_id"] == phantoms[1]["case_id"]
    images += [data[6][0]["image"], SeededDataset(data.dataset, seed=3)[7][0]["image"]]
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_no_bit(data: SeededDataset, persistent: bool) -> None:
    found: dict[int, list[dict[str, Any]]] = {}
    for workers in (0, 2):
        sampler = CaseSampler(6, 2, seed=5)
        loader = DataLoader(
            data, sampler=sampler, batch_size=2, num_workers=workers, generator=torch.Generator(),
            persistent_workers=persistent and workers > 0,
        )  # fmt: skip
        found[workers] = []
        for epoch in (1, 2):
            sampler.set_epoch(epoch)
            found[workers] += list(loader)
    assert len(found[0]) == len(found[2]) == 6
    for first, second in zip(found[0], found[2], strict=True):
        assert first["case_id"] == second["case_id"]
        assert all(torch.equal(first[key], second[key]) for key in ("image", "label", "presence"))
    assert not torch.equal(found[0][0]["image"], found[0][3]["image"])


def test_only_a_compose_can_be_seeded() -> None:
    with pytest.raises(ValueError, match="must be a Compose, got RandScaleIntensity"):
        SeededDataset(SimpleNamespace(transform=RandScaleIntensity(0.1, 1.0)))
    assert len(SeededDataset(Dataset([torch.ones(1)], Compose([RandScaleIntensity(0.1, 1.0)])))) == 1
