# SPDX-License-Identifier: Apache-2.0
"""Write the cache that ``teacher_cache`` reads: every teacher answers once per case."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from scripts.distillation.teacher_cache import FORMAT, LOGITS, NOTES, case_path, read_manifest, require_same
from scripts.distillation.teacher_origin import Case, Origin
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import code_version
from scripts.utils.tensor_files import is_whole, load_plain, write_atomically

logger = logging.getLogger(__name__)

MB = 1e6
BYTES_PER_VALUE = 2  # fp16


class Answers(Protocol):
    """What answers in a teacher's place: networks, files of predictions, or nnU-Net.

    Attributes:
        outputs: names of the outputs, ``logits`` first; every other has one channel.
        settings: what the manifest says about them.
    """

    outputs: list[str]
    settings: dict[str, Any]

    @property
    def origin(self) -> Origin:
        """What the teacher is."""

    def check(self, cases: Sequence[Case]) -> None:
        """Raise an error, before anything is written, if cases cannot be answered."""

    def predict(self, case: Case, image: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The answer to a case, ``channels H W D``; ``image`` returns the preprocessed image, ``1 M H W D``."""


def cache_teachers(
    cases: Sequence[Case],
    preprocessing: Any,
    answers: Mapping[str, Answers],
    folder: str,
    settings: Mapping[str, Any],
    device: str | torch.device = "cpu",
    rebuild: bool = False,
) -> None:
    """Save the answers of every teacher to every case; undamaged files of an earlier run are kept.

    Args:
        cases: data list.
        preprocessing: the training pipeline (``scripts.data.training_set.Pipeline``); its fixed part is run.
        answers: name of a teacher -> what answers in its place.
        folder: folder of the cache.
        settings: ``modalities`` (the image's channels), ``channels`` of the logits, ``spacing`` in mm, the windows'
            ``overlap``, and ``regions``, the classes of each channel of a sigmoid head (None for a softmax).
        device: device of the images.
        rebuild: replace a cache that was made with other weights or other preprocessing, instead of rejecting it.

    Raises:
        ValueError: the folder holds another cache and ``rebuild`` is off, a case cannot be answered, or a prediction is
            not finite in fp16.
        OSError: the cache does not fit on the disk.
    """
    common = {
        "preprocessing_sha256": preprocessing.fingerprint,
        "preprocessing": preprocessing.settings,
        "channels": settings["channels"],
        "spacing": [float(x) for x in settings["spacing"]],
        "overlap": float(settings["overlap"]),
    }
    if settings.get("regions"):
        common["regions"] = settings["regions"]
    writers = [_Writer(Path(folder), name, each, common) for name, each in answers.items()]
    for writer in writers:
        writer.answers.check(cases)
    for writer in writers:
        writer.require_same_cache(rebuild)
    _require_space(cases, preprocessing, writers)
    for case in tqdm(cases, desc="caching", unit="case"):
        image = cache(partial(_image, preprocessing, case, settings["modalities"], device))  # once for all teachers
        for writer in writers:
            if not writer.has(case):
                writer.write(case, writer.answers.predict(case, image).half().cpu())
    for writer in writers:
        writer.finish(cases)


def _image(preprocessing: Any, case: Case, modalities: Sequence[str], device: str | torch.device) -> torch.Tensor:
    volumes = preprocessing.prepare(case)
    return torch.cat([volumes[key] for key in modalities])[None].to(device)


def _require_space(cases: Sequence[Case], preprocessing: Any, writers: Sequence[_Writer]) -> None:
    """Log the size of the cache, and refuse one that does not fit on its disk; existing files count as written.

    Raises:
        OSError: there is too little space.
    """
    total = missing = 0
    for case in cases:
        voxels = math.prod(map(max, preprocessing.files.grid(case)[1], preprocessing.files.patch))
        for writer in writers:
            size = voxels * (writer.head["channels"] + len(writer.answers.outputs) - 1) * BYTES_PER_VALUE
            total += size
            missing += 0 if case_path(writer.folder, writer.name, case).is_file() else size
    folder = writers[0].folder
    free = shutil.disk_usage(
        next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    ).free
    logger.info(
        "%s: %d cases x %d teachers are %.0f MB, %.0f MB of them to be written; %.0f MB are free",
        *(folder, len(cases), len(writers), total / MB, missing / MB, free / MB),
    )
    if missing > free:
        raise OSError(
            errno.ENOSPC,
            f"The cache needs {missing / MB:.0f} MB, but only {free / MB:.0f} MB are free in {folder}. "
            "Free some space, choose another --output-dir, or cache fewer cases or teachers.",
        )


class _Writer:
    """One teacher's folder of the cache."""

    def __init__(self, folder: Path, name: str, answers: Answers, common: Mapping[str, Any]) -> None:
        self.folder, self.name, self.answers, self.origin = folder, name, answers, answers.origin
        network = {**self.origin.identity, **common, "weights_sha256": self.origin.sha256}
        self.head = {"format": FORMAT, **network, "outputs": answers.outputs, **answers.settings}
        self.manifest = folder / name / "manifest.json"

    def require_same_cache(self, rebuild: bool) -> None:
        """Reject a cache made with other settings or, with ``rebuild``, remove its manifest before its files change."""
        if not self.manifest.is_file():
            return
        try:
            manifest = read_manifest(self.folder, self.name)
            for key in dict.fromkeys([*self.head["preprocessing"], *manifest["preprocessing"]]):
                require_same(manifest["preprocessing"], self.name, key, self.head["preprocessing"].get(key))
            for key in dict.fromkeys([*self.head, *manifest]):
                if key not in NOTES:
                    require_same(manifest, self.name, key, self.head.get(key))
        except (ValueError, KeyError):
            if not rebuild:
                raise
            self.manifest.unlink()

    def _identity(self, case: Case) -> str:
        return json.dumps({**self.head, "sources": self.origin.sources(case)}, sort_keys=True)

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
        outputs = self.answers.outputs
        parts = prediction.split([self.head["channels"], *[1] * (len(outputs) - 1)])
        tensors = {output: part.clone() for output, part in zip(outputs, parts, strict=True)}
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
        sources = self.origin.sources(case)
        return {"shape": shape, "bytes": path.stat().st_size, "sha256": sha256(path), "sources": sources}
