# SPDX-License-Identifier: Apache-2.0
"""Cached teacher predictions: each teacher runs once per case, and training reads the predictions from disk.

``FOLDER/<teacher>/<case>.pt`` holds fp16 tensors of the case's preprocessed volume before augmentation: ``logits`` and
optionally ``<tap>``, an attention map with one channel. ``FOLDER/<teacher>/manifest.json`` describes them: weights,
preprocessing, spacing, versions, and for each case its shape, size and checksum. ``teacher_cache_writer`` writes both.

During training the cached tensors get the same patch, flips and affine transform as the image. That is an
approximation: a network's prediction for a flipped image differs slightly from the flipped prediction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.engines import PrepareBatchExtraInput
from torch import nn
from tqdm import tqdm

from scripts.distillation.teacher_origin import Case, Origin, origin_of
from scripts.networks.label_teacher import LabelTeacher
from scripts.networks.teacher_spec import IDENTITY, check_spec, spec_channels
from scripts.utils.checksums import sha256
from scripts.utils.tensor_files import load_plain

LOGITS = "logits"
FORMAT = 1  # raised when the layout of the files changes
# Of a manifest: notes, what has a checksum beside it, and what may be a path.
NOT_RECORDED = ("version", "approximate", "cases", "preprocessing", "architecture")
NOTES = ("version", "approximate", "cases")  # of a manifest: what need not be the same for another case


class CachedTeacher(nn.Module):
    """Stands for a teacher in a ``Distiller``; it has no network, and its outputs come from the cache.

    Args:
        channels: the channels of the image that the teacher used.
        outputs: names of its cached outputs: ``logits`` and taps.
        sha256: checksum of its weights.
        attention_power: power of its attention maps.
        origin: what it is; by default a network.
    """

    def __init__(
        self,
        channels: Sequence[int],
        outputs: Sequence[str],
        sha256: str | None,
        attention_power: float = 2.0,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.outputs, self.sha256 = list(channels), tuple(outputs), sha256
        self.attention_power, self.origin = attention_power, origin or Origin()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Raise an error, because there is no network.

        Raises:
            ValueError: always.
        """
        raise ValueError("A cached teacher cannot predict: train without the cache.")


def cached_teachers(
    specs: Mapping[str, Mapping[str, Any]],
    folder: str,
    channels: Sequence[str],
    classes: int,
    regions: Sequence[Sequence[int]] | None = None,
) -> dict[str, CachedTeacher | LabelTeacher]:
    """Return the teachers of a distillation from their cache, without building a network.

    Args:
        specs: teacher name -> ``architecture``, ``modalities``, ``weights``, as for ``load_teachers``.
        folder: folder of the cache.
        channels: the image's modalities, in order.
        classes: number of classes of the task, including the background.
        regions: the classes of each channel of a task with a sigmoid head, whose logits the caches hold.

    Raises:
        ValueError: a cache was made with other weights, another architecture, other modalities or other regions.
        FileNotFoundError: a teacher has no cache, or its weights are missing.
    """
    teachers: dict[str, CachedTeacher | LabelTeacher] = {}
    for name, spec in specs.items():
        check_spec(name, spec)
        if spec.get("label"):
            teachers[name] = LabelTeacher(classes, regions)
            continue
        manifest = read_manifest(Path(folder), name)
        origin = origin_of(name, spec, manifest.get("out_of_fold", False))
        expected = {**origin.identity, "weights_sha256": origin.sha256, "regions": regions}
        for key in dict.fromkeys([*expected, *(f"own_{key}" for key in IDENTITY)]):
            require_same(manifest, name, key, expected.get(key))
        used = spec_channels(name, spec, channels)
        power = manifest.get("attention_power", 2.0)  # version 0.8 wrote none
        teachers[name] = CachedTeacher(used, manifest["outputs"], origin.sha256, power, origin)
    return teachers


def cache_settings(
    folder: str, specs: Mapping[str, Mapping[str, Any]], cases: Sequence[Case]
) -> dict[str, dict[str, Any]]:
    """How the answers of a cache were made, for the record of a training.

    Args:
        folder: of the cache.
        specs: name of a teacher -> its specification. One without a manifest, which ``cached_teachers`` refuses, is
            left out.
        cases: the training cases.

    Returns:
        Name of a teacher -> the settings of its manifest, and a checksum of what the answers of the cases were made of.
    """
    found = {}
    for name in specs:
        if (Path(folder) / name / "manifest.json").is_file():
            manifest = read_manifest(Path(folder), name)
            ids = sorted(str(case["case_id"]) for case in cases)
            sources = {case: manifest["cases"][case]["sources"] for case in ids if case in manifest["cases"]}
            digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
            settings = {key: value for key, value in manifest.items() if key not in NOT_RECORDED}
            found[name] = {**settings, "sources_sha256": digest}
    return found


def read_manifest(folder: Path, teacher: str) -> dict[str, Any]:
    """Read the manifest of a teacher's cache.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: it cannot be read, or has another format.
    """
    path = folder / teacher / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"No cache of the teacher {teacher} at {path}. Run cache-teachers first.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} cannot be read. Rebuild the cache with cache-teachers --rebuild.") from error
    require_same(manifest, teacher, "format", FORMAT)
    return manifest


def require_same(manifest: Mapping[str, Any], teacher: str, key: str, expected: Any) -> None:
    """Raise a ValueError with both values if a cache was made with another value of ``key``."""
    if manifest.get(key) != expected:
        raise ValueError(
            f"The cache of the teacher {teacher} is outdated: its {key.replace('_', ' ')} is "
            f"{_shorten(manifest.get(key))}, this run's is {_shorten(expected)}. Rebuild it with cache-teachers "
            "--rebuild."
        )


def _shorten(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


class TeacherCache:
    """Add the cached predictions of its case to each training sample; a step of the training pipeline.

    Args:
        folder: folder of the cache.
        teachers: name -> ``CachedTeacher``; a ``LabelTeacher`` is not cached.
        verify: ``"full"`` compares the checksums of every cached file and of every image when training starts,
            ``"size"`` only their sizes.
    """

    def __init__(self, folder: str, teachers: Mapping[str, nn.Module], verify: str = "full") -> None:
        if verify not in ("full", "size"):
            raise ValueError(f"Unknown verify {verify!r}: choose full or size.")
        self.folder, self.verify = Path(folder), verify
        self.teachers = {name: each for name, each in teachers.items() if isinstance(each, CachedTeacher)}
        if not self.teachers:
            raise ValueError("No teacher of this run is cached: remove --cache-dir.")
        self.manifests = {name: read_manifest(self.folder, name) for name in self.teachers}
        self.checked: dict[Path, str] = {}  # file -> what it was made of, when the training started
        self.keys = [f"{name}.{output}" for name, teacher in self.teachers.items() for output in teacher.outputs]
        self.widths = [
            self.manifests[name]["channels"] if output == LOGITS else 1
            for name, teacher in self.teachers.items()
            for output in teacher.outputs
        ]

    def check(self, cases: Sequence[Case], preprocessing: Mapping[str, Any]) -> None:
        """Check that the cache belongs to these cases and this preprocessing, and that it is undamaged.

        Args:
            cases: the training cases; the cache must contain all of them.
            preprocessing: settings of the training pipeline, see ``scripts.data.training_set.Pipeline``.

        Raises:
            ValueError: the cache was made with other preprocessing or other image files, lacks cases, or is damaged.
        """
        for name, manifest in self.manifests.items():
            for key in dict.fromkeys([*preprocessing, *manifest["preprocessing"]]):
                require_same(manifest["preprocessing"], name, key, preprocessing.get(key))
            missing = [str(case["case_id"]) for case in cases if case["case_id"] not in manifest["cases"]]
            if missing:
                raise ValueError(
                    f"The cache of the teacher {name} lacks {len(missing)} case(s): {', '.join(missing[:5])}. "
                    "Run cache-teachers again with this run's --fold; it adds the missing cases."
                )
        files = [(name, case) for name in self.manifests for case in cases]
        for name, case in tqdm(files, desc="checking the cache", unit="file", delay=2):
            self._check_case(name, case)

    def _check_case(self, name: str, case: Case) -> None:
        entry, path = self.manifests[name]["cases"][case["case_id"]], case_path(self.folder, name, case)
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"] or (self.verify == "full" and sha256(path) != entry["sha256"]):
            problem = "is missing" if size is None else "is damaged"
            raise ValueError(f"{path} {problem}. Run cache-teachers again; it replaces missing and damaged files.")
        origin = self.teachers[name].origin
        sources = origin.sources(case, checksums=self.verify == "full")
        if sources != {key: value for key, value in entry["sources"].items() if key in sources}:
            raise ValueError(
                f"The {origin.ingredients} of case {case['case_id']} have changed since {path} was written. "
                "Run cache-teachers again."
            )
        self.checked[path] = load_plain(path, mmap=True).get("made_of", "")

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Add the case's predictions, mapped into memory, as ``<teacher>.<output>``."""
        predictions: dict[str, torch.Tensor] = {}
        for name, teacher in self.teachers.items():
            path = case_path(self.folder, name, item)
            tensors = load_plain(path, mmap=True)
            if tensors.get("made_of", "") != self.checked.get(path, tensors.get("made_of", "")):
                raise ValueError(
                    f"{path} was replaced during this training, by cache-teachers with other settings. Start the "
                    "training again, and keep a cache for each setting."
                )
            predictions |= {f"{name}.{output}": tensors[output] for output in teacher.outputs}
        return {**item, **predictions}

    def prepare_batch(
        self, batch: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> Any:
        """``prepare_batch`` of a trainer: image, label, and ``presence`` and ``cached`` for the ``Distiller``."""
        extra = {"presence": "presence", "cached": "cached", "label": "label"}
        image, label, args, named = PrepareBatchExtraInput(extra)(dict(batch), device, non_blocking, **kwargs)
        tensors = named["cached"].split(self.widths, dim=1)
        return image, label, args, {**named, "cached": dict(zip(self.keys, tensors, strict=True))}


def case_path(folder: Path, teacher: str, case: Case) -> Path:
    """Return the file of a case's predictions."""
    return folder / teacher / f"{case['case_id']}.pt"
