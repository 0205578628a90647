# SPDX-License-Identifier: Apache-2.0
"""One transform factory for training, validation and inference.

Every file is resampled by its full affine, with one interpolation, from its own grid to the network's grid, before the
modalities are stacked into ``image``. The reference modality and the target spacing define the network's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from monai import transforms as mt

from scripts.data.case_files import CaseFiles
from scripts.data.case_io import LoadModalitiesd, SaveMaskd
from scripts.data.modalities import (
    CropToBoxd,
    FillLabeld,
    GatherModalitiesd,
    MapLabelsd,
    NormaliseModalityd,
    SplitStackd,
    StackModalitiesd,
)
from scripts.data.resampling import OntoGridd, RestoreGridd
from scripts.data.settings_check import check_settings
from scripts.data.training_set import CentreCandidatesd, Pipeline
from scripts.image_io.checks import LABEL, Rules
from scripts.runtime.intensity import value_outside
from scripts.runtime.memory_check import require_memory

Intensity = Mapping[str, Sequence[float] | str]
CANDIDATES = ("foreground", "background")
FORMAT = 2  # increase it when the fixed transforms give different volumes for the same settings


def _load_and_resample(
    modalities: Sequence[str],
    intensity: Intensity,
    spacing: Sequence[float],
    naming: Sequence[Mapping[str, str]],
    map_label: MapLabelsd | None,
    allow_missing: bool,
    reference: str,
    present: Sequence[str] | None,
    load: partial[LoadModalitiesd],
) -> list[mt.Transform]:
    """From file paths to normalised volumes on the reference's grid at ``spacing``, with one key per modality."""
    label = [LABEL] if map_label else []
    used = {key: intensity[key] for key in modalities}
    # Outside its field of view a modality is 0 after normalisation, like an absent one.
    outside = {key: value_outside(rule) for key, rule in used.items()}
    return [
        GatherModalitiesd(modalities, naming, allow_missing, reference, present, bool(load.keywords["stacked"])),
        load([*modalities, *label], reference),
        CropToBoxd(reference),
        *([map_label] if map_label else []),
        OntoGridd([*modalities, *label], reference, spacing, outside, nearest=label),
        *(NormaliseModalityd(key, rule) for key, rule in used.items()),
    ]


def _end_of_fixed_part(modalities: Sequence[str], patch: Sequence[int]) -> list[mt.Transform]:
    """The last fixed transforms of training: plain tensors of at least a patch, and voxels to centre patches on."""
    volumes = [*modalities, LABEL]
    return [
        mt.SpatialPadd(volumes, patch, allow_missing_keys=True),
        FillLabeld(LABEL, modalities[0]),
        # Drop the metadata here: everything derived from these tensors must be loadable with weights_only=True.
        mt.EnsureTyped(volumes, dtype=[torch.float32] * len(modalities) + [torch.uint8], track_meta=False),
        CentreCandidatesd(LABEL),
        mt.SelectItemsd([*volumes, "presence", "case_id", *CANDIDATES], allow_missing_keys=True),
    ]


def _augment(
    modalities: Sequence[str],
    patch: Sequence[int],
    positives: int,
    negatives: int,
    cached: Any,
    flips: Sequence[int],
    rotation: Sequence[float],
) -> list[Callable[..., Any]]:
    """Random patch, flips, small rotations and scaling for all keys; gain, blur, contrast and noise per modality.

    Cached teacher predictions get the same patch and the same spatial transforms.
    """
    volumes = [*modalities, *(cached.keys if cached else ())]
    foreground, background = CANDIDATES
    crop = mt.RandCropByPosNegLabeld(
        [*volumes, LABEL], LABEL, patch, positives, negatives, fg_indices_key=foreground, bg_indices_key=background
    )
    # One stack: the affine transform's grid is computed once for all volumes.
    spatial: dict[str, Any] = {"keys": ["stack", LABEL], "prob": 0.5}
    steps: list[Callable[..., Any]] = [
        *([cached] if cached else []),
        crop,
        mt.ConcatItemsd(volumes, "stack"),
        mt.CastToTyped("stack", torch.float32),
        mt.RandAffined(
            **spatial,
            rotate_range=np.deg2rad(rotation).tolist(),
            scale_range=(0.15,) * 3,
            mode=["bilinear", "nearest"],
            padding_mode="border",
        ),
        *(mt.RandFlipd(**spatial, spatial_axis=axis) for axis in flips),
        SplitStackd("stack", modalities, rest="cached" if cached else None),
    ]
    for key in modalities:
        steps += [
            mt.RandScaleIntensityd(key, factors=0.2, prob=0.5),
            mt.RandAdjustContrastd(key, prob=0.2, gamma=(0.7, 1.4)),
            mt.RandGaussianSmoothd(key, prob=0.1),
            mt.RandGaussianNoised(key, prob=0.2, std=0.05),
        ]
    return steps


def _end_of_random_part(cached: Any) -> list[mt.Transform]:
    """The last random transforms of training: the entries of a batch, as plain tensors."""
    tensors = ["image", LABEL, "presence", *(["cached"] if cached else [])]
    return [
        mt.SelectItemsd([*tensors, "case_id"], allow_missing_keys=True),
        mt.EnsureTyped(tensors, track_meta=False),
        mt.CastToTyped(LABEL, torch.float32),
    ]


def preprocessing(
    modalities: Sequence[str],
    intensity: Intensity,
    spacing: Sequence[float],
    mode: str,
    naming: Sequence[Mapping[str, str]] = (),
    labels: Sequence[Sequence[float]] | None = None,
    patch: Sequence[int] | None = None,
    positives: int = 2,
    negatives: int = 1,
    allow_missing: bool = False,
    reference: str | None = None,
    present: Sequence[str] | None = None,
    cached: Any = None,
    checks: Rules | None = None,
    stacked: bool = False,
    memory_gib: float | None = None,
    unlabelled: bool = False,
    flips: Sequence[int] = (0, 1, 2),
    rotation: Sequence[float] = (15, 15, 15),
    ignore: float | None = None,
) -> Pipeline:
    """Make the transforms from ``{"image": reference file[, modality files][, "label"]}`` to the network's input.

    Args:
        modalities: channel order of ``image``.
        intensity: per modality ``[low, high]`` (HU, SUV, a.u.) or ``"zscore"``.
        spacing: target spacing in mm.
        mode: ``"train"`` (random patches, augmentation, plain tensors), ``"validate"`` (whole volumes, with label) or
            ``"infer"`` (whole volumes; the label, if any, stays a path).
        naming: layouts for modalities that the data list does not name, tried in order; see ``GatherModalitiesd``.
        labels: per class the label file's values, as ``[[0], [1, 2]]``; required for training and validation.
        patch: size of a training patch in voxels.
        positives, negatives: ratio of patches centred on foreground and on background.
        allow_missing: read absent modalities as zeros instead of refusing the case.
        reference: the modality whose grid all others are resampled to; by default the first.
        present: the modalities to use, by default all; any other counts as absent, even if its file exists. The
            reference's file always defines the grid, but its voxels are only used if it is named.
        checks: what is accepted of files, see ``scripts.image_io.checks``.
        stacked: ``image`` names one 4D file whose last axis is ``modalities``.
        memory_gib: limit for one pass of the network; if given, a case that would not fit in memory is refused.
        unlabelled: accept training cases without a label; theirs is ``UNLABELLED`` in every voxel.
        ignore: the label file's value of voxels that count in no loss and no score; they become ``IGNORED``.
        cached: reader of cached teacher predictions for training patches, see ``scripts.distillation.teacher_cache``.
        flips: axes of training patches that may be flipped, in RAS: 0 exchanges left and right.
        rotation: largest angle about each axis of training patches, in degrees.

    Returns:
        A ``Pipeline`` that gives ``image`` (M H W D, one channel per modality), ``presence`` (M, bool) and ``label``
        (1 H W D). With the image's metadata, a prediction can be restored to the reference's own grid.

    Raises:
        ValueError: an unknown mode, reference or ``present``, an invalid intensity rule, or a missing patch size or
            label mapping.
    """
    if mode not in ("train", "validate", "infer"):
        raise ValueError(f"Unknown mode {mode!r}. Choose train, validate or infer.")
    if mode == "train" and patch is None:
        raise ValueError("The mode 'train' needs a patch size.")
    if mode != "infer" and not labels:
        raise ValueError(f"The mode '{mode}' needs the label values of each class (`labels`).")
    given: dict[str, Any] = {"labels": labels, "patch": patch, "ignore": ignore}
    check_settings(
        modalities=modalities,
        intensity=intensity,
        spacing=spacing,
        allow_missing=allow_missing,
        stacked=stacked,
        flips=list(flips),
        rotation=list(rotation),
        **{key: value for key, value in given.items() if value is not None},
    )
    reference = reference or modalities[0]
    settings: dict[str, Any] = {
        "format": FORMAT,
        **{"modalities": list(modalities), "intensity": dict(intensity), "spacing": list(spacing)},
        **{"labels": labels, "patch": patch, "naming": naming, "allow_missing": allow_missing},
        **{"reference": reference, "present": present},
    }
    if checks and checks.replace_nonfinite is not None:
        settings["replace_nonfinite"] = checks.replace_nonfinite
    if checks and checks.series_uids:
        settings["series_uids"] = sorted(checks.series_uids)
    if stacked:
        settings["stacked"] = True
    if len(labels or ()) > 2:
        settings["centres"] = "by class"  # as version 0.9 did not
    if ignore is not None:
        settings["ignore"] = ignore
    if checks and checks.voxel_size is not None:
        settings["voxel_size"] = checks.voxel_size
    if checks and checks.suv:
        settings["suv"] = dict(checks.suv)
    map_label = MapLabelsd(LABEL, labels, unlabelled, ignore) if labels and mode != "infer" else None
    check_memory = partial(require_memory, reference=reference, spacing=spacing, classes=len(labels or ()) or 2)
    load = partial(
        LoadModalitiesd,
        rules=checks,
        stacked=modalities if stacked else (),
        before_reading=None if memory_gib is None else partial(check_memory, pass_gib=memory_gib),
        unchecked=[] if present is None else [key for key in modalities if key not in present],
        log_notes=mode == "infer",
        intensity=intensity,
    )
    fixed = _load_and_resample(
        modalities, intensity, spacing, naming, map_label, allow_missing, reference, present, load
    )
    # Absent modalities become zeros here, because the random transforms expect every key.
    fixed.append(StackModalitiesd(modalities, False, reference, present))
    stack = StackModalitiesd(modalities, True, reference, present)
    if mode != "train" or patch is None:
        select = mt.SelectItemsd(["image", LABEL, "presence", "case_id"], allow_missing_keys=True)
        return Pipeline([*fixed, stack, *([select] if mode == "validate" else [])], [], settings)
    random = _augment(modalities, patch, positives, negatives, cached, flips, rotation)
    fixed += _end_of_fixed_part(modalities, patch)
    pipeline = Pipeline(fixed, [*random, stack, *_end_of_random_part(cached)], settings)
    pipeline.cached = cached
    gather = GatherModalitiesd(modalities, naming, allow_missing, reference, present, stacked)
    pipeline.files = CaseFiles(gather, checks or Rules(), spacing, patch, modalities if stacked else ())
    return pipeline


def postprocessing(
    output_dir: str,
    save: bool = True,
    regions: Sequence[Sequence[int]] | None = None,
    values: Sequence[float] | None = None,
) -> mt.Compose:
    """Make the transforms from logits on the network's grid to a mask on the reference's own grid.

    The mask is written as ``<case_id>.nii.gz``. The returned one holds class indices.

    Args:
        output_dir: folder of the masks.
        save: whether to write them.
        regions: the classes of each channel of a sigmoid head; None for a softmax over the classes.
        values: what to write for each class (``scripts.runtime.regions.mask_values``); by default its index.

    Raises:
        ValueError: a value is no integer, so that no mask can hold it.
    """
    writer = [SaveMaskd("pred", output_dir, values)] if save else []
    return mt.Compose([RestoreGridd("pred", "image", regions), *writer])
