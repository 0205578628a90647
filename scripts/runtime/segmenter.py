# SPDX-License-Identifier: Apache-2.0
"""Segment cases with the exported files of weights: files in, masks out, as the bundle's evaluator does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.image_io.checks import Rules
from scripts.image_io.headers import Affine
from scripts.image_io.nifti import mask_table, write_nifti
from scripts.runtime.case_files import Image, read_images
from scripts.runtime.engines import NumpyEngine
from scripts.runtime.grids import OwnGrid, network_grid, own_grid
from scripts.runtime.intensity import Rule, normalise, value_outside
from scripts.runtime.memory_check import require_memory
from scripts.runtime.modalities import GatherModalities, modalities_used
from scripts.runtime.regions import mask_values, sigmoid_regions
from scripts.runtime.resampling import copy_between_layouts, resample, restore_mask
from scripts.runtime.sliding_window import WindowPlan, predict_volume


@dataclass(frozen=True)
class Settings:
    """What inference needs to know of a task and of a run; the names are those of configs/inference.json.

    Attributes:
        modalities: channels of the network, in order.
        intensity: per modality the range that the network gets, or ``"zscore"``.
        spacing: of the network's grid in mm.
        labels, classes, regions, head: of the task, see ``scripts.runtime.regions``.
        mask_values: what written masks hold: ``"file"`` or ``"index"``.
        patch: size of the windows in voxels.
        overlap, whole_volume, memory_gib: see ``scripts.runtime.sliding_window.WindowPlan``.
        divisor: see ``WindowPlan``.
        reference: the modality on whose grid the mask lies; None for the first.
        present: the modalities to use; None for all.
        naming: see ``scripts.runtime.modalities.GatherModalities``.
        allow_missing: accept absent modalities.
        stacked: the image is one 4D file of all modalities.
        rules: what is accepted of files.
        threads: number of CPU threads of resampling; 0 leaves it to SimpleITK.
    """

    modalities: Sequence[str]
    intensity: Mapping[str, Rule]
    spacing: Sequence[float]
    labels: Sequence[Sequence[float]]
    patch: Sequence[int]
    classes: Sequence[str] | None = None
    regions: Mapping[str, Sequence[float]] | None = None
    head: str = "softmax"
    mask_values: str = "file"
    overlap: float = 0.25
    whole_volume: bool = False
    memory_gib: float = 1.25
    divisor: Sequence[int] = (16, 16, 16)
    reference: str | None = None
    present: Sequence[str] | None = None
    naming: Sequence[Mapping[str, str]] = ()
    allow_missing: bool = False
    stacked: bool = False
    rules: Rules = field(default_factory=Rules)
    threads: int = 0

    @property
    def reference_key(self) -> str:
        """The modality on whose grid the mask lies."""
        return self.reference or self.modalities[0]

    @property
    def plan(self) -> WindowPlan:
        """How volumes are cut into windows."""
        divisor = tuple(self.divisor)
        return WindowPlan(tuple(self.patch), self.overlap, self.whole_volume, self.memory_gib, divisor)


def segment_item(
    item: Mapping[Any, Any], settings: Settings, start_engine: Callable[[], NumpyEngine], mask_path: str | Path
) -> dict[str, float]:
    """Segment a case, and write its mask on the grid of its reference image.

    Args:
        item: ``image``, and optionally one key per modality, ``case_id`` and ``bbox_mm``.
        settings: of the task.
        start_engine: returns the engine that runs the network. It is called in a thread of its own, so that the
            engine starts while the images are read.
        mask_path: .nii.gz or .nii.

    Returns:
        Seconds of each stage.

    Raises:
        ValueError: a file is refused.
        OSError: a file is missing or cannot be written.
    """
    clock = _Clock()
    gather = GatherModalities(
        settings.modalities,
        settings.naming,
        settings.allow_missing,
        settings.reference,
        settings.present,
        settings.stacked,
    )
    case = gather(item)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start_engine)
        images = _read(case, settings)
        clock.end_stage("read, check, decompress")
        header = images[settings.reference_key].header
        own = own_grid(case, header.affine, header.shape)
        image, affine = network_input(images, own, settings)
        clock.end_stage("resample, normalise")
        engine = starting.result()
        clock.end_stage("wait for the engine")
    logits = predict_volume(image[None], engine, settings.plan)[0]
    clock.end_stage("network")
    regions = sigmoid_regions(settings.labels, settings.head, settings.classes, settings.regions)
    mask = restore_mask(logits, affine, own, regions, settings.threads)
    clock.end_stage("decide, bring back")
    table = mask_table(mask_values(settings.labels, settings.mask_values))
    write_nifti(mask if table is None else table[mask], own.affine, mask_path)
    clock.end_stage("compress, write")
    return clock.seconds


def _read(case: Mapping[Any, Any], settings: Settings) -> dict[str, Image]:
    paths = {key: str(case[key]) for key in settings.modalities if key in case}
    used = modalities_used(settings.modalities, settings.present)
    check_memory = partial(
        require_memory,
        reference=settings.reference_key,
        spacing=settings.spacing,
        classes=len(settings.labels),
        pass_gib=settings.memory_gib,
    )
    return read_images(
        paths,
        settings.reference_key,
        settings.rules,
        settings.modalities if settings.stacked else (),
        check_memory,
        [key for key in settings.modalities if key not in used],
        log_notes=True,
        intensity=settings.intensity,
    )


def network_input(images: Mapping[str, Image], own: OwnGrid, settings: Settings) -> tuple[NDArray[np.float32], Affine]:
    """The network's image, and the affine of its grid.

    Args:
        images: by modality; absent ones become zeros.
        own: grid of the reference image, and the part of it that is segmented.
        settings: of the task.

    Returns:
        ``M H W D``, and the affine, voxel to world in mm.
    """
    affine, shape = network_grid(own.part_affine, own.part, settings.spacing)
    stacked = np.zeros((len(settings.modalities), *shape), dtype=np.float32)
    used = modalities_used(settings.modalities, settings.present)
    for channel, key in zip(stacked, settings.modalities, strict=True):
        if key not in images or key not in used:
            continue
        voxels, header = images[key]
        is_reference, source = key == settings.reference_key, header.affine
        if is_reference:
            voxels = voxels[tuple(slice(a, a + n) for a, n in zip(own.start, own.part, strict=True))]
            source = own.part_affine
        rule = settings.intensity[key]
        outside = None if is_reference else value_outside(rule)
        volume = resample(voxels, np.linalg.solve(source, affine), shape, outside, threads=settings.threads)
        copy_between_layouts(channel, normalise(volume, rule))
    return stacked, affine


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end_stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._began = now - self._began, now
