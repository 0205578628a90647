# SPDX-License-Identifier: Apache-2.0
"""Write the cache that ``teacher_cache`` reads: every teacher runs once per case, with a sliding window."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from scripts.distillation.feature_taps import Tap, layers_for, record_outputs
from scripts.distillation.teacher_cache import (
    FORMAT,
    LOGITS,
    Case,
    case_path,
    read_manifest,
    require_same,
    source_fingerprint,
    teacher_identity,
)
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import code_version
from scripts.utils.tensor_files import is_whole, load_plain, write_atomically

logger = logging.getLogger(__name__)

Inferer = Callable[[torch.Tensor, nn.Module], torch.Tensor]


def attention_map(features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the root mean square over the channels, interpolated to ``size``: ``B 1 size``.

    ``AttentionMapLoss`` (p = 2) has the same value on this map as on the features, except for the interpolation.

    Args:
        features: ``B C H W [D]``.
        size: grid of the result.
    """
    energy = features.float().square().mean(dim=1, keepdim=True).sqrt()
    mode = "trilinear" if features.dim() == 5 else "bilinear"
    return functional.interpolate(energy, size=tuple(size), mode=mode, align_corners=False)


class _LogitsAndMaps(nn.Module):
    """Return a teacher's logits and attention maps as one tensor on the window's grid, for the sliding window."""

    def __init__(self, teacher: nn.Module, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.teacher, self.taps = teacher, dict(taps)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        with record_outputs(self.taps.values()) as recorded:
            logits = self.teacher(window)
        maps = [attention_map(tap.output(recorded), window.shape[2:]) for tap in self.taps.values()]
        return torch.cat([logits, *maps], dim=1)


def cache_teachers(
    cases: Sequence[Case],
    preprocessing: Any,
    teachers: Mapping[str, nn.Module],
    specs: Mapping[str, Mapping[str, Any]],
    inferer: Inferer,
    folder: str,
    settings: Mapping[str, Any],
    taps: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | torch.device = "cpu",
    rebuild: bool = False,
) -> None:
    """Run every teacher once per case and save its predictions; undamaged files of an earlier run are kept.

    Args:
        cases: data list.
        preprocessing: the training pipeline (``scripts.data.training_set.Pipeline``); its fixed part is run.
        teachers: name -> ``scripts.networks.teacher.Teacher``.
        specs: name -> ``architecture`` and ``modalities``, which are stored in the manifest.
        inferer: sliding window, called with image and network.
        folder: folder of the cache.
        settings: ``modalities`` (the image's channels), ``classes``, ``spacing`` in mm and the windows' ``overlap``.
        taps: tap name -> layer per network, for attention maps; by default only logits are saved.
        device: device of the teachers.
        rebuild: replace a cache that was made with other weights or other preprocessing, instead of rejecting it.

    Raises:
        ValueError: the folder holds another cache and ``rebuild`` is off, or a prediction is not finite in fp16.
    """
    common = {
        "preprocessing_sha256": preprocessing.fingerprint,
        "preprocessing": preprocessing.settings,
        "channels": settings["classes"],
        "spacing": [float(x) for x in settings["spacing"]],
        "overlap": float(settings["overlap"]),
    }
    writers = []
    for name, teacher in teachers.items():
        if getattr(teacher, "uses_label", False):
            raise ValueError(f"The teacher {name} is the label, which needs no cache: leave it out.")
        identity = teacher_identity(specs[name])
        writer = _Writer(Path(folder), name, teacher.to(device).eval(), {**identity, **common}, taps or {})
        writer.require_same_cache(rebuild)
        writers.append(writer)

    for case in tqdm(cases, desc="caching", unit="case"):
        image = None
        for writer in writers:
            if writer.has(case):
                continue
            if image is None:  # preprocess once for all teachers
                volumes = preprocessing.prepare(case)
                image = torch.cat([volumes[key] for key in settings["modalities"]])[None].to(device)
            with torch.no_grad():
                writer.write(case, inferer(image, writer.network)[0].half().cpu())
    for writer in writers:
        writer.finish(cases)


class _Writer:
    """One teacher's folder of the cache."""

    def __init__(
        self, folder: Path, name: str, teacher: nn.Module, settings: Mapping[str, Any], taps: Mapping[str, Any]
    ) -> None:
        network = cast(nn.Module, teacher.network)
        layers = {tap: layers_for(name, network, tap, table) for tap, table in taps.items()}
        maps = {tap: Tap(name, network, layer) for tap, layer in layers.items() if layer}
        self.folder, self.name, self.network = folder, name, _LogitsAndMaps(teacher, maps)
        self.outputs = [LOGITS, *maps]
        self.head = {"format": FORMAT, **settings, "weights_sha256": teacher.sha256, "outputs": self.outputs}
        self.manifest = folder / name / "manifest.json"

    def require_same_cache(self, rebuild: bool) -> None:
        """Reject a cache made with other settings or, with ``rebuild``, remove its manifest before its files change."""
        if not self.manifest.is_file():
            return
        try:
            manifest = read_manifest(self.folder, self.name)
            for key in dict.fromkeys([*self.head["preprocessing"], *manifest["preprocessing"]]):
                require_same(manifest["preprocessing"], self.name, key, self.head["preprocessing"].get(key))
            for key, value in self.head.items():
                require_same(manifest, self.name, key, value)
        except (ValueError, KeyError):
            if not rebuild:
                raise
            self.manifest.unlink()

    def _identity(self, case: Case) -> str:
        return json.dumps({**self.head, "sources": source_fingerprint(case)}, sort_keys=True)

    def has(self, case: Case) -> bool:
        """Return whether the case's file exists, is undamaged, and fits teacher, preprocessing and images."""
        path = case_path(self.folder, self.name, case)
        return is_whole(path) and load_plain(path).get("made_of") == self._identity(case)

    def write(self, case: Case, prediction: torch.Tensor) -> None:
        """Save a case's logits and attention maps (channels first, fp16)."""
        path = case_path(self.folder, self.name, case)
        if not bool(prediction.isfinite().all()):
            raise ValueError(
                f"{path} was not written: the prediction is not finite in half precision. Check that teacher's weights."
            )
        parts = prediction.split([self.head["channels"], *[1] * (len(self.outputs) - 1)])
        tensors = {output: part.clone() for output, part in zip(self.outputs, parts, strict=True)}
        write_atomically({**tensors, "made_of": self._identity(case)}, path)

    def finish(self, cases: Sequence[Case]) -> None:
        """Write the manifest; entries of other cases from earlier runs with the same settings are kept."""
        earlier = json.loads(self.manifest.read_text(encoding="utf-8"))["cases"] if self.manifest.is_file() else {}
        entries = {str(case["case_id"]): self._entry(case) for case in cases}
        approximate = "flips, rotations and scaling: training applies them to the cached prediction"
        notes = {"version": code_version(), "approximate": approximate}
        write_json({**self.head, **notes, "cases": {**earlier, **entries}}, self.manifest)
        size = sum(entry["bytes"] for entry in entries.values()) / 1e6
        logger.info("%s: %d cases, %.1f MB", self.manifest.parent, len(entries), size)

    def _entry(self, case: Case) -> dict[str, Any]:
        """Return a case's entry of the manifest."""
        path = case_path(self.folder, self.name, case)
        shape = list(load_plain(path, mmap=True)[LOGITS].shape)
        sources = source_fingerprint(case)
        return {"shape": shape, "bytes": path.stat().st_size, "sha256": sha256(path), "sources": sources}
