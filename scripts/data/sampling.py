# SPDX-License-Identifier: Apache-2.0
"""Reproducible training samples: each depends only on the seed, the epoch and the case.

A sample's index is its draw, ``epoch * cases + case``. The sampler yields draws, and the data set seeds all random
transforms with them. The samples and their order are therefore independent of the number of workers and processes, and
a resumed training sees the samples that it would have seen: no random state has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from monai.transforms import Compose
from torch.utils.data import Dataset, DistributedSampler


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, such as seed, epoch and case."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class CaseSampler(DistributedSampler):
    """Yield the draws of one process: a seeded permutation of the cases per epoch, divided into steps.

    A step takes the next ``batch_size * world`` cases of the permutation, and each process its own part of them. Two
    processes with one case each therefore see what one process with two cases sees. Cases that do not fill a step are
    left out of that epoch. The class is a ``DistributedSampler``, because MONAI's trainers set the epoch only of those.

    Args:
        cases: number of cases, or the list of them.
        batch_size: cases per step and process.
        seed: of the permutations.
        rank: index of this process.
        world: number of processes.
        earlier_epochs: that another training of the same network has had, whose samples are not drawn again.

    Raises:
        ValueError: there are cases, but too few for one step.
    """

    def __init__(
        self, cases: int | Sized, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, earlier_epochs: int = 0
    ) -> None:
        self.earlier_epochs = earlier_epochs
        self.cases = cases if isinstance(cases, int) else len(cases)
        self.batch_size, self.seed, self.rank, self.world, self.epoch = batch_size, seed, rank, world, 1
        self.steps = self.cases // (batch_size * world)
        if self.cases and not self.steps:
            raise ValueError(
                f"{self.cases} training case(s) do not fill one step of {batch_size} on each of {world} process(es). "
                "Use a smaller batch size."
            )

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        epoch = self.earlier_epochs + self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.cases)
        steps = order[: self.steps * self.world * self.batch_size].reshape(self.steps, self.world, self.batch_size)
        return iter((epoch * self.cases + steps[:, self.rank].ravel()).tolist())


class SeededDataset(Dataset):
    """A data set that seeds its random transforms with the draw; its index is a draw, see ``CaseSampler``.

    Args:
        dataset: has an attribute ``transform``, a ``Compose``.
        seed: of the training.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        if not isinstance(dataset.transform, Compose):
            raise ValueError(f"The data set's transform must be a Compose, got {type(dataset.transform).__name__}.")
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> SeededDataset:
        """Change nothing. MONAI's ``DataLoader`` seeds every data set, but here the draw seeds each sample."""
        return self

    def __getitem__(self, draw: int) -> Any:
        epoch, case = divmod(draw, len(self.dataset))
        self.dataset.transform.set_random_state(mixed_seed(self.seed, epoch, case))
        return self.dataset[case]
