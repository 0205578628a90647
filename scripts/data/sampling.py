# SPDX-License-Identifier: Apache-2.0
"""Random numbers of a training that depend on nothing but the seed, the epoch and the case.

A draw is one case in one epoch, ``epoch * cases + case``: the sampler gives draws, the data set seeds every random
transform by them. So the same samples come in the same order whatever the number of workers and processes, and a
training that was interrupted goes on with the very samples that it would have seen: there is no random state to save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from monai.transforms import Compose
from torch.utils.data import Dataset, DistributedSampler


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers, such as seed, epoch and case."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Draws(DistributedSampler):
    """The draws of one process: a seeded permutation of the cases per epoch, cut into steps, steps among processes.

    A step of ``batch_size`` per process takes the next ``batch_size * world`` cases of the permutation, each process
    its own part of them, so that two processes with one case each see what one process with two cases sees. Cases that
    fill no step are left out of that epoch. It is a ``DistributedSampler`` since MONAI's trainers tell only those the
    epoch.

    Args:
        cases: number of cases, or the list of them.
        batch_size: cases per step and process.
        seed: of the permutations.
        rank: number of this process.
        world: number of processes.

    Raises:
        ValueError: there are cases, but too few for one step.
    """

    def __init__(self, cases: int | Sized, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.cases = cases if isinstance(cases, int) else len(cases)
        self.batch_size, self.seed, self.rank, self.world, self.epoch = batch_size, seed, rank, world, 1
        self.steps = self.cases // (batch_size * world)
        if self.cases and not self.steps:
            raise ValueError(
                f"{self.cases} training case(s) do not fill one step of {batch_size} on each of {world} process(es): "
                "lower the batch size."
            )

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.cases)
        taken = order[: self.steps * self.world * self.batch_size].reshape(self.steps, self.world, self.batch_size)
        return iter((self.epoch * self.cases + taken[:, self.rank].ravel()).tolist())


class Drawn(Dataset):
    """A data set whose random transforms are seeded by the draw; its index is a draw, see ``Draws``.

    Args:
        dataset: has ``transform``, a ``Compose``.
        seed: of the training.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        if not isinstance(dataset.transform, Compose):
            raise ValueError(f"Its transform must be a Compose, got {type(dataset.transform).__name__}.")
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: int) -> Any:
        epoch, case = divmod(draw, len(self.dataset))
        self.dataset.transform.set_random_state(mixed_seed(self.seed, epoch, case))
        return self.dataset[case]
