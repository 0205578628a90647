# SPDX-License-Identifier: Apache-2.0
"""Teachers' predictions on disk: each teacher runs once per case, and training reads what it said.

``FOLDER/<teacher>/<case>.pt`` holds fp16 tensors of the case's preprocessed, un-augmented volume: ``logits`` and, where
asked, ``<tap>``, a one-channel attention map. ``FOLDER/<teacher>/manifest.json`` says of what: weights, preprocessing,
spacing, versions, and per case its shape, size and checksum. ``teacher_cache_writer`` writes both. In training the
cached tensors take the same patch, flips and affine as the image. That is an approximation: a network's answer to a
flipped image is not quite its flipped answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.engines import PrepareBatchExtraInput
from torch import nn
from tqdm import tqdm

from scripts.data.case_list import source_files
from scripts.utils.checksums import sha256
from scripts.utils.tensor_files import load_plain

LOGITS = "logits"
FORMAT = 1  # raised when the files' layout changes
Case = Mapping[str, Any]


class CachedTeacher(nn.Module):
    """A teacher that is not asked: its place in a ``Distiller``, filled by the cache.

    Args:
        channels: the channels of the image that it saw.
        outputs: what the cache holds of it: ``logits`` and names of taps.
        sha256: of its weights.
    """

    def __init__(self, channels: Sequence[int], outputs: Sequence[str], sha256: str | None) -> None:
        super().__init__()
        self.channels, self.outputs, self.sha256 = list(channels), tuple(outputs), sha256

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Refuse: there is no network.

        Raises:
            ValueError: always.
        """
        raise ValueError("A cached teacher cannot be asked: train without the cache.")


def cached_teachers(
    specs: Mapping[str, Mapping[str, Any]], folder: str, channels: Sequence[str]
) -> dict[str, CachedTeacher]:
    """The teachers of a distillation from their cache, without building a network.

    Args:
        specs: teacher name -> ``architecture``, ``modalities``, ``weights``, as for ``load_teachers``.
        folder: of the cache.
        channels: the image's modalities, in their order.

    Raises:
        ValueError: a cache is of other weights, another architecture or other modalities; the reason is named.
        FileNotFoundError: a teacher has no cache, or no weights to compare it with.
    """
    found = {}
    for name, spec in specs.items():
        manifest = read_manifest(Path(folder), name)
        for key in ("architecture", "modalities"):
            require_same(manifest, name, key, spec[key])
        require_same(manifest, name, "weights_sha256", sha256(spec["weights"]) if spec.get("weights") else None)
        seen = [list(channels).index(m) for m in spec["modalities"]]
        found[name] = CachedTeacher(seen, manifest["outputs"], manifest["weights_sha256"])
    return found


def read_manifest(folder: Path, teacher: str) -> dict[str, Any]:
    """What a teacher's cache says of itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has another format, or none.
    """
    path = folder / teacher / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no cache of the teacher {teacher} at {path}: run cache-teachers first.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} cannot be read: make the cache again by cache-teachers --rebuild.") from error
    require_same(manifest, teacher, "format", FORMAT)
    return manifest


def require_same(manifest: Mapping[str, Any], teacher: str, key: str, wanted: Any) -> None:
    """Raise ValueError where a cache was made with another value of ``key``; both are named."""
    if manifest.get(key) != wanted:
        raise ValueError(
            f"The cache of the teacher {teacher} is stale: its {key.replace('_', ' ')} is {_short(manifest.get(key))}, "
            f"this run's {_short(wanted)}. Make it again by cache-teachers --rebuild."
        )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


class TeacherCache:
    """Gives each training sample the cached predictions of its case; a step of the training pipeline.

    Args:
        folder: of the cache.
        teachers: name -> ``CachedTeacher``.
        verify: ``"full"`` compares the checksums of every cached file and of every image when training starts,
            ``"size"`` only their sizes.
    """

    def __init__(self, folder: str, teachers: Mapping[str, CachedTeacher], verify: str = "full") -> None:
        if verify not in ("full", "size"):
            raise ValueError(f"Unknown verify {verify!r}: choose full or size.")
        self.folder, self.teachers, self.verify = Path(folder), dict(teachers), verify
        self.manifests = {name: read_manifest(self.folder, name) for name in teachers}
        self.keys = [f"{name}.{output}" for name, each in teachers.items() for output in each.outputs]
        self.widths = [
            self.manifests[name]["channels"] if output == LOGITS else 1
            for name, each in teachers.items()
            for output in each.outputs
        ]

    def check(self, cases: Sequence[Case], preprocessing: Mapping[str, Any]) -> None:
        """Refuse what does not belong to these cases and this preprocessing, or is not whole.

        Args:
            cases: the training cases; every one must be in the cache.
            preprocessing: settings of the training pipeline, see ``scripts.data.training_set.Pipeline``.

        Raises:
            ValueError: the cache is of another preprocessing, of other image files, lacks cases, or is damaged.
        """
        for name, manifest in self.manifests.items():
            for key, value in preprocessing.items():
                require_same(manifest["preprocessing"], name, key, value)
            lacking = [str(case["case_id"]) for case in cases if case["case_id"] not in manifest["cases"]]
            if lacking:
                raise ValueError(
                    f"The cache of the teacher {name} lacks {len(lacking)} case(s): {', '.join(lacking[:5])}: "
                    "run cache-teachers again with this run's --fold, it adds what is missing."
                )
        every = [(name, case) for name in self.manifests for case in cases]
        for name, case in tqdm(every, desc="checking the cache", unit="file", delay=2):
            self._check_case(name, case)

    def _check_case(self, name: str, case: Case) -> None:
        noted, path = self.manifests[name]["cases"][case["case_id"]], case_path(self.folder, name, case)
        size = path.stat().st_size if path.is_file() else None
        if size != noted["bytes"] or (self.verify == "full" and sha256(path) != noted["sha256"]):
            found = "is missing" if size is None else "is damaged"
            raise ValueError(f"{path} {found}: run cache-teachers again, it makes what is not whole anew.")
        found_sources = source_states(case, checksums=self.verify == "full")
        if found_sources != {key: value for key, value in noted["sources"].items() if key in found_sources}:
            raise ValueError(
                f"The image files of case {case['case_id']} have changed since {path} was made: "
                "run cache-teachers again."
            )

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Add the case's predictions, mapped into memory, as ``<teacher>.<output>``."""
        added: dict[str, torch.Tensor] = {}
        for name, each in self.teachers.items():
            kept = load_plain(case_path(self.folder, name, item), mmap=True)
            added |= {f"{name}.{output}": kept[output] for output in each.outputs}
        return {**item, **added}

    def prepare_batch(
        self, batch: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> Any:
        """What a trainer gives the ``Distiller``: image, label, ``presence`` and ``cached`` by name."""
        extra = {"presence": "presence", "cached": "cached"}
        image, label, rest, named = PrepareBatchExtraInput(extra)(dict(batch), device, non_blocking, **kwargs)
        split = named["cached"].split(self.widths, dim=1)
        return image, label, rest, {**named, "cached": dict(zip(self.keys, split, strict=True))}


def case_path(folder: Path, teacher: str, case: Case) -> Path:
    """File of a case's predictions."""
    return folder / teacher / f"{case['case_id']}.pt"


def source_states(case: Case, checksums: bool = True) -> dict[str, Any]:
    """What a case's images are: the bytes of every file, its checksum, and values such as ``bbox_mm``."""
    files = {key: path for key, path in source_files(case).items() if key != "label"}
    found: dict[str, Any] = {f"{key} bytes": path.stat().st_size for key, path in files.items()}
    if checksums:
        found |= {f"{key} sha256": sha256(path) for key, path in files.items()}
    others = {key: value for key, value in case.items() if not isinstance(value, str)}
    return {**found, **json.loads(json.dumps(others, sort_keys=True, default=str))}
