# SPDX-License-Identifier: Apache-2.0
"""Writing the cache of ``scripts.teacher_cache``: every teacher runs once per case, by sliding window."""

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

from scripts.checkpoint import is_whole, load_plain, sha256, write_atomically
from scripts.manifest import code_version
from scripts.metrics import write_json
from scripts.taps import Tap, layers_of, listening
from scripts.teacher_cache import FORMAT, LOGITS, Case, case_path, read_manifest, require_same, source_states

logger = logging.getLogger(__name__)

Inferer = Callable[[torch.Tensor, nn.Module], torch.Tensor]


def attention_map(features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Root of the channels' mean square, ``B 1 size``: one channel with the energy of them all.

    ``AttentionMapLoss`` (p = 2) of this map is that of the features, but for the interpolation to ``size``.

    Args:
        features: ``B C H W [D]``.
        size: grid of the result.
    """
    energy = features.float().square().mean(dim=1, keepdim=True).sqrt()
    mode = "trilinear" if features.dim() == 5 else "bilinear"
    return functional.interpolate(energy, size=tuple(size), mode=mode, align_corners=False)


class _Answers(nn.Module):
    """A teacher's logits and attention maps on the window's grid, one tensor, for the sliding window."""

    def __init__(self, teacher: nn.Module, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.teacher, self.taps = teacher, dict(taps)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        with listening(self.taps.values()) as heard:
            logits = self.teacher(window)
        maps = [attention_map(tap.value(heard), window.shape[2:]) for tap in self.taps.values()]
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
    """Run every teacher once per case and keep what it says; what is there and whole is not made again.

    Args:
        cases: data list.
        preprocessing: the training pipeline (``scripts.data.volumes.Pipeline``), whose fixed part is run.
        teachers: name -> ``scripts.teachers.Teacher``.
        specs: name -> ``architecture`` and ``modalities``, which the manifest notes.
        inferer: sliding window of (image, network).
        folder: of the cache.
        settings: ``modalities`` (the image's channels), ``classes``, ``spacing`` in mm and the windows' ``overlap``.
        taps: tap name -> layer per network, for attention maps; by default only logits are kept.
        device: that the teachers run on.
        rebuild: make a cache of other weights or other preprocessing anew instead of refusing it.

    Raises:
        ValueError: there is a cache of something else and ``rebuild`` is off, or an answer is not finite in fp16.
    """
    for name, teacher in teachers.items():
        network = cast(nn.Module, teacher.network)
        layers = {tap: layers_of(name, network, tap, table) for tap, table in (taps or {}).items()}
        found = {tap: Tap(name, network, layer) for tap, layer in layers.items() if layer}
        head = {
            "format": FORMAT,
            "architecture": specs[name]["architecture"],
            "modalities": list(specs[name]["modalities"]),
            "weights_sha256": teacher.sha256,
            "preprocessing_sha256": preprocessing.fingerprint,
            "outputs": [LOGITS, *found],
            "channels": settings["classes"],
            "spacing": list(settings["spacing"]),
            "overlap": settings["overlap"],
        }
        _claim(Path(folder), name, head, rebuild)
        answers = _Answers(teacher, found).to(device).eval()

        def ask(case: Case, answers: nn.Module = answers) -> torch.Tensor:
            volumes = preprocessing.prepare(case)
            image = torch.cat([volumes[key] for key in settings["modalities"]])
            with torch.no_grad():
                return inferer(image[None].to(device), answers)[0].half().cpu()

        entries = {}
        for case in tqdm(cases, desc=f"caching {name}", unit="case"):
            path = case_path(Path(folder), name, case)
            identity = json.dumps({**head, "sources": source_states(case)}, sort_keys=True)
            if not _whole(path, identity):
                _write(path, ask(case), head["outputs"], settings["classes"], identity)
            entries[str(case["case_id"])] = _entry(path, case)
        _write_manifest(Path(folder) / name, head, entries)


def _claim(folder: Path, name: str, head: Mapping[str, Any], rebuild: bool) -> None:
    """Refuse a cache of another teacher or preprocessing, or take its manifest away before its files are replaced."""
    path = folder / name / "manifest.json"
    if not path.is_file():
        return
    try:
        manifest = read_manifest(folder, name)
        for key, value in head.items():
            require_same(manifest, name, key, value)
    except ValueError:
        if not rebuild:
            raise
        path.unlink()


def _whole(path: Path, identity: str) -> bool:
    """Whether a file is there, undamaged (every member's CRC) and of this teacher, preprocessing and case."""
    return is_whole(path) and load_plain(path).get("made_of") == identity


def _write(path: Path, said: torch.Tensor, outputs: Sequence[str], classes: int, identity: str) -> None:
    if not bool(said.isfinite().all()):
        raise ValueError(f"What would go into {path} is not finite in half precision: check that teacher's weights.")
    parts = said.split([classes, *[1] * (len(outputs) - 1)])
    write_atomically({**{o: p.clone() for o, p in zip(outputs, parts, strict=True)}, "made_of": identity}, path)


def _entry(path: Path, case: Case) -> dict[str, Any]:
    """A case's line in the manifest."""
    shape = list(torch.load(path, mmap=True, weights_only=True)[LOGITS].shape)
    return {"shape": shape, "bytes": path.stat().st_size, "sha256": sha256(path), "sources": source_states(case)}


def _write_manifest(folder: Path, head: Mapping[str, Any], entries: dict[str, Any]) -> None:
    """Entries of cases that were not asked for this time stay."""
    path = folder / "manifest.json"
    kept = json.loads(path.read_text())["cases"] if path.is_file() else {}  # of the same head, see ``_claim``
    approximate = "under flips, rotations and scaling: training applies them to what the teacher said"
    write_json({**head, "version": code_version(), "approximate": approximate, "cases": {**kept, **entries}}, path)
    logger.info("%s: %d cases, %.1f MB", folder, len(entries), sum(e["bytes"] for e in entries.values()) / 1e6)
