# SPDX-License-Identifier: Apache-2.0
"""The report of one predicted mask without a reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813

from scripts.image_io.checks import Rules
from scripts.report.case_images import load_overlay
from scripts.report.page import write_report


def write_mask_report(
    mask: Path,
    files: Mapping[str, str],
    stacked: bool = False,
    rules: Rules | None = None,
    intensity: Mapping[str, Any] | None = None,
    regions: Mapping[str, Sequence[float]] | None = None,
    measures: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the report of a mask next to it, as the one file ``<mask>.report.html``.

    Args:
        mask: the .nii.gz.
        files: path per modality.
        stacked: whether the files are one 4D file of all modalities, in order.
        rules: which files are accepted; by default all.
        intensity: the network's modalities, each with its intensity range. Modalities without a file are named.
        regions: name -> values of the mask; by default one region of all that is not 0.
        measures: rows of measures, with the name of the mask without .nii.gz as ``case_id``.

    Returns:
        Path of the report.
    """
    grid = sitk.ReadImage(str(mask))
    images = {key: (path, channel if stacked else 0) for channel, (key, path) in enumerate(files.items())}
    case_id = mask.name.removesuffix(".nii.gz")
    prediction = sitk.GetArrayFromImage(grid)
    overlay = load_overlay(case_id, images, grid, prediction, None, intensity, rules, regions=regions)
    overlay = replace(overlay, mask_path=mask)
    manifest_path = mask.with_name(f"{case_id}.manifest.json")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else {}
    missing = [key.upper() for key in intensity or {} if key not in files]
    notes = [f"Segmented without {', '.join(missing)}."] if missing else []
    path = mask.with_name(f"{case_id}.report.html")
    write_report(
        path, f"Segmentation of {case_id}", [], [overlay], {}, manifest, notes, single_file=True, measures=measures
    )
    return path
