# SPDX-License-Identifier: Apache-2.0
"""File names and sidecars of masks as BIDS derivatives (BIDS 1.10, derivatives/imaging)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.utils.atomic_files import write_json, write_text
from scripts.utils.run_manifest import code_version

# Files that BIDS does not define: the record of the run, and each mask's manifest and report.
BIDS_IGNORE = ("segment.json", "*.manifest.json", "*.report.html")


def bids_name(case: dict[str, Any], modalities: Sequence[str]) -> Path:
    """The path of a case's mask relative to the data set.

    Raises:
        ValueError: the case's id contains no ASCII letter or digit, so it gives no subject label.
    """
    space = next((key for key in modalities if case.get(key) == case["image"]), modalities[0])
    label = re.sub(r"[^A-Za-z0-9]", "", str(case["case_id"]).removeprefix("sub-"))
    if not label:
        raise ValueError(f"The id of case {case['case_id']} contains no ASCII letter or digit. BIDS requires one.")
    return Path(f"sub-{label}/anat/sub-{label}_space-{space}_label-tumour_mask.nii.gz")


def write_dataset_description(output: Path) -> None:
    """Write ``dataset_description.json``, which BIDS requires, and ``.bidsignore`` for its validator."""
    generator = {"Name": "multi-teacher-distillation-bundle", "Version": code_version()}
    description = {"Name": "Tumour masks, research only", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
    write_json({**description, "GeneratedBy": [generator]}, output / "dataset_description.json")
    write_text("\n".join(BIDS_IGNORE) + "\n", output / ".bidsignore")


def write_mask_sidecar(mask: Path, case: dict[str, Any], modalities: Sequence[str]) -> None:
    """Write the JSON sidecar of an existing mask: the image whose grid it has, and its source images."""
    if mask.is_file():
        sources = [str(Path(case[key]).resolve()) for key in modalities if key in case] or [case["image"]]
        sidecar = {"Type": "Lesion", "SpatialReference": str(Path(case["image"]).resolve()), "Sources": sources}
        write_json(sidecar, mask.with_name(mask.name.replace(".nii.gz", ".json")))
