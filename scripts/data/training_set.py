# SPDX-License-Identifier: Apache-2.0
"""Training data: cases preprocessed once, kept in memory or on disk, cut and augmented anew for every sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from monai.data import Dataset
from monai.transforms import Compose, Transform
from tqdm import tqdm

from scripts.data.case_list import Item, source_files
from scripts.data.sampling import Drawn
from scripts.utils.atomic_files import atomic_file


class Pipeline(Compose):
    """A ``Compose`` that knows where chance begins, and what its fixed part was made of.

    Args:
        fixed: transforms whose result can be kept.
        random: transforms that are drawn for each sample.
        settings: everything that the fixed part's result depends on, besides the files; plain values.

    ``cached`` holds what gives cached predictions of teachers, where the random part asks for them.
    """

    cached: Any

    def __init__(self, fixed: Sequence[Any], random: Sequence[Any], settings: Mapping[str, Any]) -> None:
        super().__init__([*fixed, *random])
        self.fixed, self.cached = len(fixed), None
        self.settings: dict[str, Any] = _plain(settings)

    @property
    def fingerprint(self) -> str:
        """Hash of the settings."""
        return _hash(self.settings)

    def prepare(self, case: Item) -> dict[str, Any]:
        """The fixed part."""
        return self(dict(case), end=self.fixed, threading=True)  # type: ignore[no-any-return]

    def draw(self, volumes: Mapping[str, Any]) -> Any:
        """The random part."""
        return self(dict(volumes), start=self.fixed)


def _plain(value: Any) -> Any:
    """Values as JSON knows them, every number a float, so that 3 and 3.0 are one setting."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, bool) else str(value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class CentreCandidatesd(Transform):
    """Voxels that a patch may be centred on, so that no sample has to search its volume for them.

    Adds ``foreground`` and ``background``, flat indices of at most ``count`` voxels each, evenly spread over those of
    the label; ``RandCropByPosNegLabeld`` takes them.
    """

    def __init__(self, label: str, count: int = 20_000) -> None:
        self.label, self.count = label, count

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        inside = torch.as_tensor(data[self.label][0] > 0).flatten()
        return {**data, "foreground": self._spread(inside), "background": self._spread(~inside)}

    def _spread(self, mask: torch.Tensor) -> torch.Tensor:
        found = mask.nonzero()[:, 0]
        # float32 would not tell the voxels beyond 2^24 apart.
        return found[torch.linspace(0, len(found) - 1, min(len(found), self.count), dtype=torch.float64).round().long()]


class Volumes(Dataset):
    """Preprocessed cases; an item is drawn from them by the pipeline's random part, and never changes them.

    Args:
        cases: data list.
        transform: the pipeline; where it has ``cached`` (predictions of teachers), that is checked first.
        folder: keep the volumes in files there, mapped into memory, so that a sample reads about its patch and a cohort
            may be larger than memory; empty: keep them in memory. A file is found again by the sizes and times of the
            case's files, wherever they lie, and the pipeline's settings; one that is broken is made again. Of several
            processes each makes its share.
        workers: threads that preprocess.
    """

    def __init__(self, cases: Sequence[Item], transform: Pipeline, folder: str = "", workers: int = 2) -> None:
        super().__init__(cases, transform)
        self.pipeline = transform
        self.folder = Path(folder) if folder else None
        if transform.cached is not None and cases:
            transform.cached.check(cases, transform.settings)
        shared = self.folder is not None and torch.distributed.is_initialized()
        if shared:
            share = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
            self._prepare(cases[share], workers)
            torch.distributed.barrier()
        self.kept = self._prepare(cases, workers)

    def _prepare(self, cases: Sequence[Item], workers: int) -> list[Any]:
        """Every case's volumes, or their files."""
        with ThreadPoolExecutor(workers) as pool:
            made = pool.map(self._write if self.folder else self.pipeline.prepare, cases)
            return list(tqdm(made, total=len(cases), desc="preprocessing", unit="case", disable=not cases))

    def _file(self, case: Item) -> Path:
        """Where a case's volumes are kept."""
        states = {key: (path.stat().st_size, path.stat().st_mtime_ns) for key, path in source_files(case).items()}
        others = {key: value for key, value in case.items() if not isinstance(value, str)}
        name = f"{case['case_id']}-{_hash([self.pipeline.settings, states, _plain(others)])[:16]}.pt"
        return Path(self.folder or "") / name

    def _write(self, case: Item) -> Path:
        path = self._file(case)
        if not _readable(path):
            with atomic_file(path) as file:
                torch.save(self.pipeline.prepare(case), file)
        return path

    def _transform(self, index: int) -> Any:
        kept = self.kept[index]
        volumes = torch.load(kept, mmap=True, weights_only=True) if isinstance(kept, Path) else kept
        return self.pipeline.draw(volumes)


def _readable(path: Path) -> bool:
    """Whether a file of volumes is there and whole."""
    try:
        torch.load(path, mmap=True, weights_only=True)
    except Exception:  # bytes that are no such file make the reader fail in a dozen ways
        return False
    return True


def training_set(data: Sequence[Item], transform: Pipeline, seed: int = 0, folder: str = "") -> Drawn:
    """The training cases, each sample a function of seed, epoch and case; see ``Volumes`` and ``Drawn``."""
    return Drawn(Volumes(data, transform, folder), seed)
