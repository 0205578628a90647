# SPDX-License-Identifier: Apache-2.0
"""What a report shows of a case: its images and masks, read by any way that the network reads them, on one grid."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.image_io.reader import read_itk
from scripts.metrics import Row
from scripts.report import Overlay, pick_cases, write_report

logger = logging.getLogger(__name__)


def foreground(image: sitk.Image, labels: Sequence[Sequence[float]], source: str) -> np.ndarray:
    """Foreground of a mask with the data set's values, as z y x.

    Raises:
        ValueError: values that ``labels`` does not know.
    """
    values = sitk.GetArrayFromImage(image)
    known = {value for members in labels for value in members}
    strange = sorted(set(np.unique(values).tolist()) - known)
    if strange:
        told = ", ".join(f"{value:.7g}" for value in strange[:5])
        raise ValueError(
            f"{source} holds the values {told}, which the mapping {list(labels)} does not know: correct the file or "
            "the config's `labels`."
        )
    return np.isin(values, [value for members in labels[1:] for value in members])


def onto(image: sitk.Image, grid: sitk.Image, interpolator: int) -> sitk.Image:
    """The image on another grid, itself where it is there already."""
    same = image.GetSize() == grid.GetSize() and all(
        np.allclose(getattr(image, get)(), getattr(grid, get)(), atol=1e-3)
        for get in ("GetOrigin", "GetSpacing", "GetDirection")
    )
    return image if same else sitk.Resample(image, grid, sitk.Transform(), interpolator, 0, image.GetPixelID())


def show(
    title: str,
    images: Mapping[str, tuple[str, int]],
    grid: sitk.Image,
    prediction: np.ndarray,
    reference: np.ndarray | None = None,
    intensity: Mapping[str, Any] | None = None,
    rules: Rules | None = None,
) -> Overlay:
    """A case on the grid of a mask; an image that cannot be read is left out, and named in the log.

    Args:
        title: caption.
        images: path and channel per modality.
        grid: any image on the grid of the masks.
        prediction: z y x, as ``reference``.
        intensity: per modality the ends of the range that is shown, else its percentiles are.
        rules: what is accepted, by default everything.
    """
    arrays = {}
    for key, (path, channel) in images.items():
        try:
            image = sitk.Cast(read_itk(path, rules or Rules(), channel), sitk.sitkFloat32)
        except (ValueError, OSError, RuntimeError) as error:
            logger.warning("%s is not shown in the report: %s", key, error)
            continue
        arrays[key.upper()] = sitk.GetArrayFromImage(onto(image, grid, sitk.sitkLinear)).T
    arrays = arrays or {"no image": np.zeros_like(prediction.T, dtype=np.float32)}
    codes = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(grid.GetDirection())
    ranges = {key.upper(): value for key, value in (intensity or {}).items() if not isinstance(value, str)}
    drawn = None if reference is None else reference.T
    return Overlay(title, arrays, drawn, prediction.T, grid.GetSpacing(), codes, ranges)


def report_mask(
    mask: Path,
    files: Mapping[str, str],
    stacked: bool = False,
    rules: Rules | None = None,
    intensity: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of one mask beside it, as ``<mask>.report.html``; returns where it is.

    Args:
        mask: .nii.gz, whose values are class indices.
        files: path per modality.
        stacked: the files are one 4D file of all modalities, in order.
        rules: what is accepted.
        intensity: the network's modalities, with the ranges that it is given.
    """
    grid = sitk.ReadImage(str(mask))
    images = {key: (path, channel if stacked else 0) for channel, (key, path) in enumerate(files.items())}
    case = mask.name.removesuffix(".nii.gz")
    shown = show(case, images, grid, sitk.GetArrayFromImage(grid) > 0, None, intensity, rules)
    manifest = mask.with_name(f"{case}.manifest.json")
    made = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    path = mask.with_name(f"{case}.report.html")
    absent = [key for key in intensity or {} if key not in files]
    notes = [f"Segmented without {', '.join(absent).upper()}."] if absent else []
    write_report(path, f"Segmentation of {case}", [], [shown], {}, made, notes)
    return path


def case_overlays(
    cases: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    predictions: str,
    intensity: Mapping[str, Any],
    labels: Sequence[Sequence[float]] | None = None,
    rules: Rules | None = None,
) -> list[Overlay]:
    """Best, median and worst case on the label's grid."""
    by_id, rules, drawn = {case["case_id"]: case for case in cases}, rules or Rules(), []
    for kind, case_id in pick_cases(rows).items():
        path = Path(predictions) / f"{case_id}.nii.gz"
        if case_id not in by_id or not path.is_file():
            continue
        case = by_id[case_id]
        label = read_itk(case["label"], rules)
        reference = foreground(label, labels, str(case["label"])) if labels else sitk.GetArrayFromImage(label) > 0
        mask = onto(read_itk(path, rules), label, sitk.sitkNearestNeighbor)
        dice = next(row["dice"] for row in rows if row["case_id"] == case_id)
        images = {key: (str(case[key]), 0) for key in intensity if key in case}
        title = f"{kind}: {case_id}, Dice {dice:.3f}"
        drawn.append(show(title, images, label, sitk.GetArrayFromImage(mask) > 0, reference, intensity, rules))
    return drawn
