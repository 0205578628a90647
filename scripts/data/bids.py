# SPDX-License-Identifier: Apache-2.0
"""File names, sidecars and lookup tables of masks as BIDS derivatives (BIDS 1.10, derivatives/imaging).

BIDS calls a file of 0 and 1 a mask (``_mask``) and one of several values a discrete segmentation (``_dseg``). A task
with one class that masks hold as 1 gives the first, named like its region, every other task the second: its values are
those of the classes, since regions may overlap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.image_io.dicom_codes import is_lesion
from scripts.runtime.regions import class_mask_values, region_values
from scripts.utils.atomic_files import write_json, write_text
from scripts.utils.colours import region_colour
from scripts.utils.run_manifest import code_version

# Files that BIDS does not define: the record of the run, and each mask's manifest and report.
BIDS_IGNORE = ("segment.json", "*.manifest.json", "*.report.html", "measures.csv", "*.measures.csv")
BACKGROUND = "#000000"
SUFFIX = ".nii.gz"
_CASE = re.compile(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?")  # a case of a BIDS data set


class BidsTask(NamedTuple):
    """What the masks of a task show.

    Attributes:
        regions: their names.
        classes: name -> value in the masks of each foreground class.
        type: of the one region by BIDS, ``Lesion`` or ``ROI``; empty for a discrete segmentation.
    """

    regions: tuple[str, ...]
    classes: Mapping[str, float]
    type: str


def bids_task(task: Mapping[str, Any]) -> BidsTask:
    """What the masks of a task show.

    Args:
        task: its settings ``labels``, ``classes``, ``regions``, ``mask_values`` and ``codes``.

    Raises:
        ValueError: masks hold a value that is no whole number.
    """
    regions = region_values(task["labels"], task["classes"], task["regions"])
    classes = class_mask_values(task["labels"], task["classes"], task["regions"], task["mask_values"])
    for name, value in classes.items():
        if value != int(value):
            raise ValueError(
                f"BIDS requires whole numbers in masks, but {name} is {value:g}. Use --set mask_values=index."
            )
    if list(classes.values()) != [1]:
        return BidsTask(tuple(regions), classes, "")
    lesion = is_lesion(task["codes"].get(next(iter(regions))))
    return BidsTask(tuple(regions), classes, "Lesion" if lesion else "ROI")


def bids_name(case: Mapping[str, Any], modalities: Sequence[str], task: BidsTask) -> Path:
    """The path of a case's mask relative to the data set.

    Raises:
        ValueError: the case's id or the region's name contains no ASCII letter or digit, so it gives no label.
    """
    space = next((key for key in modalities if case.get(key) == case["image"]), modalities[0])
    named = _CASE.fullmatch(str(case["case_id"]))
    subject = f"sub-{_label(str(case['case_id']).removeprefix('sub-'), 'id of case')}"
    entities = [each for each in named.groups() if each] if named else [subject]
    ending = f"label-{_label(task.regions[0], 'name of the region')}_mask" if task.type else "dseg"
    return Path(*entities, "anat", "_".join([*entities, f"space-{_label(space, 'modality')}", ending]) + SUFFIX)


def _label(text: str, what: str) -> str:
    label = re.sub(r"[^A-Za-z0-9]", "", text)
    if not label:
        raise ValueError(f"The {what} {text} contains no ASCII letter or digit. BIDS requires one.")
    return label


def write_dataset_description(output: Path, task: BidsTask) -> None:
    """Write ``dataset_description.json``, which BIDS requires, and ``.bidsignore`` for its validator."""
    generator = {"Name": "multi-teacher-distillation-bundle", "Version": code_version()}
    name = f"Segmentation of {', '.join(task.regions)}, research only"
    description = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
    write_json({**description, "GeneratedBy": [generator]}, output / "dataset_description.json")
    write_text("\n".join(BIDS_IGNORE) + "\n", output / ".bidsignore")


def describe_mask(mask: Path, case: Mapping[str, Any], modalities: Sequence[str], task: BidsTask) -> None:
    """Write what BIDS wants beside an existing mask.

    This is a JSON sidecar with the image whose grid it has and its source images; of a discrete segmentation also the
    lookup table of its values (``_dseg.tsv``).
    """
    if not mask.is_file():
        return
    sources = [str(Path(case[key]).resolve()) for key in modalities if key in case] or [case["image"]]
    sidecar = {"SpatialReference": str(Path(case["image"]).resolve()), "Sources": sources}
    beside = mask.name.removesuffix(SUFFIX)
    write_json({"Type": task.type, **sidecar} if task.type else sidecar, mask.with_name(f"{beside}.json"))
    if not task.type:
        write_text(_lookup_table(task.classes), mask.with_name(f"{beside}.tsv"))


def _lookup_table(classes: Mapping[str, float]) -> str:
    """Index, name and colour of each value of a discrete segmentation."""
    rows = [("index", "name", "color"), ("0", "background", BACKGROUND)]
    rows += [
        (f"{value:.0f}", " ".join(name.split()), region_colour(k)) for k, (name, value) in enumerate(classes.items())
    ]
    return "".join("\t".join(row) + "\n" for row in rows)
