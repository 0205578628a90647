# SPDX-License-Identifier: Apache-2.0
"""Training data: cases are preprocessed once, kept in memory or on disk, then cropped and augmented for each sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from monai.data import Dataset, get_track_meta, set_track_meta
from monai.transforms import Compose, Transform
from tqdm import tqdm

from scripts.data.case_files import CaseFiles
from scripts.data.case_list import Item, source_files
from scripts.data.sampling import SeededDataset
from scripts.runtime.regions import IGNORED
from scripts.utils.atomic_files import atomic_file


class Pipeline(Compose):
    """A ``Compose`` of fixed transforms, followed by random ones.

    Args:
        fixed: transforms whose result can be stored.
        random: transforms that are applied anew to each sample.
        settings: everything that the fixed part's result depends on, apart from the files; plain values.

    Attributes:
        fixed: number of fixed transforms.
        cached: the reader of cached teacher predictions, if the random part uses them.
        files: for training, the image files of cases, for what does not go through the pipeline.
    """

    cached: Any
    files: CaseFiles

    def __init__(self, fixed: Sequence[Any], random: Sequence[Any], settings: Mapping[str, Any]) -> None:
        super().__init__([*fixed, *random])
        self.fixed, self.cached = len(fixed), None
        self.settings: dict[str, Any] = _plain(settings)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return _hash(self.settings)

    def prepare(self, case: Item) -> dict[str, Any]:
        """Apply the fixed transforms."""
        return self(dict(case), end=self.fixed, threading=True)  # type: ignore[no-any-return]

    def draw(self, volumes: Mapping[str, Any]) -> Any:
        """Apply the random transforms. They need no metadata, and tracking it would take 40% of their time."""
        tracked = get_track_meta()
        set_track_meta(False)
        try:
            return self(dict(volumes), start=self.fixed)
        finally:
            set_track_meta(tracked)


def _plain(value: Any) -> Any:
    """Values as JSON knows them. Every number becomes a float, so that 3 and 3.0 are the same setting."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, bool) else str(value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class CentreCandidatesd(Transform):
    """List voxels that a patch may be centred on, so that samples need not search their volume for them.

    Adds ``foreground`` and ``background`` for ``RandCropByPosNegLabeld``: flat indices of at most ``count`` voxels
    each, evenly spread over the label's voxels of that kind. Each foreground class that the case has is listed equally
    often, so that a small class is drawn as often as a large one; its voxels are repeated. Ignored voxels
    (``regions.IGNORED``) are neither, unless the case has no others. Of a case without a label every voxel is a
    candidate.
    """

    def __init__(self, label: str, count: int = 20_000) -> None:
        self.label, self.count = label, count

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        label = torch.as_tensor(data[self.label][0]).flatten()
        occurring = label.to(torch.uint8).bincount().nonzero()[:, 0].tolist()  # unique() would sort all voxels
        classes = [index for index in occurring if index not in (0, IGNORED)]
        voxels = [(label == index).nonzero()[:, 0] for index in classes]
        each = min(self.count // max(1, len(classes)), max(map(len, voxels), default=0))
        foreground = torch.cat([_spread(each, of_class) for of_class in voxels]) if voxels else torch.zeros(0).long()
        background = (label == 0).nonzero()[:, 0]
        if not len(foreground) and not len(background):
            background = torch.arange(len(label))
        return {**data, "foreground": foreground, "background": _spread(min(self.count, len(background)), background)}


def _spread(count: int, voxels: torch.Tensor) -> torch.Tensor:
    """``count`` of the voxels, evenly spread; if there are fewer voxels, each in turn."""
    if count > len(voxels):
        return voxels[torch.arange(count) % len(voxels)]
    # float64, because float32 cannot distinguish indices above 2^24.
    return voxels[torch.linspace(0, len(voxels) - 1, count, dtype=torch.float64).round().long()]


class Volumes(Dataset):
    """Preprocessed cases. An item is the result of the pipeline's random transforms, which do not change the case.

    Args:
        cases: data list.
        transform: the pipeline; its cached teacher predictions, if any, are checked first.
        folder: store the volumes in files in this folder, and map them into memory: a sample reads little more than its
            patch, and a cohort may be larger than memory. If empty, the volumes stay in memory. A file is reused if the
            sizes and modification times of the case's files (at any path) and the pipeline's settings are the same. An
            incomplete file is written again; flipped bits are not found. With several processes, each writes its share.
        workers: threads for preprocessing.
    """

    def __init__(self, cases: Sequence[Item], transform: Pipeline, folder: str = "", workers: int = 2) -> None:
        super().__init__(cases, transform)
        self.pipeline = transform
        self.folder = Path(folder) if folder else None
        if self.folder is not None:
            _make_folder(self.folder)
        if transform.cached is not None and cases:
            transform.cached.check(cases, transform.settings)
        shared = self.folder is not None and torch.distributed.is_initialized()
        if shared:
            share = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
            self._prepare(cases[share], workers)
            torch.distributed.barrier()
        self.prepared = self._prepare(cases, workers)

    def _prepare(self, cases: Sequence[Item], workers: int) -> list[Any]:
        """Preprocess the cases; return their volumes, or the files that contain them."""
        with ThreadPoolExecutor(workers) as pool:
            results = pool.map(self._write if self.folder else self.pipeline.prepare, cases)
            return list(tqdm(results, total=len(cases), desc="preprocessing", unit="case", disable=not cases))

    def _file(self, case: Item) -> Path:
        """The file of a case's volumes."""
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
        prepared = self.prepared[index]
        volumes = torch.load(prepared, mmap=True, weights_only=True) if isinstance(prepared, Path) else prepared
        return self.pipeline.draw(volumes)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"The volumes cannot be kept in {folder} ({error.strerror}). Choose another --volumes-dir."
        raise OSError(error.errno, message) from error


def _readable(path: Path) -> bool:
    """Whether a file of volumes exists and is complete."""
    try:
        torch.load(path, mmap=True, weights_only=True)
    except Exception:  # torch.load raises many exception types on damaged files
        return False
    return True


def training_set(data: Sequence[Item], transform: Pipeline, seed: int = 0, folder: str = "") -> SeededDataset:
    """The training cases; each sample depends on seed, epoch and case only. See ``Volumes`` and ``SeededDataset``."""
    return SeededDataset(Volumes(data, transform, folder), seed)
