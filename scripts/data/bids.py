# SPDX-License-Identifier: Apache-2.0
"""Masks named and described as BIDS derivatives (BIDS 1.10, derivatives/imaging)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.utils.atomic_files import write_json, write_text
from scripts.utils.run_manifest import code_version

# What BIDS has no name for: the record of the run, the manifest and the report of each mask.
IGNORED = ("segment.json", "*.manifest.json", "*.report.html")


def bids_name(case: dict[str, Any], modalities: Sequence[str]) -> Path:
    """Where a case's mask goes, relative to the data set; ValueError where nothing of its id is left for a label."""
    space = next((key for key in modalities if case.get(key) == case["image"]), modalities[0])
    label = re.sub(r"[^A-Za-z0-9]", "", str(case["case_id"]).removeprefix("sub-"))
    if not label:
        raise ValueError(f"The case {case['case_id']} has no letter or digit of ASCII, which is what BIDS names by.")
    return Path(f"sub-{label}/anat/sub-{label}_space-{space}_label-tumour_mask.nii.gz")


def describe(output: Path) -> None:
    """The description that BIDS asks of derivatives, and what its validator is to pass over."""
    made_by = {"Name": "multi-teacher-distillation-bundle", "Version": code_version()}
    description = {"Name": "Tumour masks, research only", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
    write_json({**description, "GeneratedBy": [made_by]}, output / "dataset_description.json")
    write_text("\n".join(IGNORED) + "\n", output / ".bidsignore")


def describe_mask(mask: Path, case: dict[str, Any], modalities: Sequence[str]) -> None:
    """The sidecar of a mask that is there: on whose grid it lies, and what it was made of."""
    if mask.is_file():
        sources = [str(Path(case[key]).resolve()) for key in modalities if key in case]
        told = {"SpatialReference": str(Path(case["image"]).resolve()), "Sources": sources or [case["image"]]}
        write_json({"Type": "Lesion", **told}, mask.with_name(mask.name.replace(".nii.gz", ".json")))
