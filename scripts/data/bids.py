# SPDX-License-Identifier: Apache-2.0
"""Masks as a data set of BIDS derivatives (BIDS 1.10, derivatives/imaging): names, sidecars, tables, description.

BIDS calls a file of 0 and 1 a mask (``_mask``) and one of several values a discrete segmentation (``_dseg``). A task
with one class that masks hold as 1 gives the first, named like its region, every other task the second: its values are
those of the classes, since regions may overlap.

Images are named by BIDS URIs, ``bids:SOURCE:PATH``. ``DatasetLinks`` in the description says where each source lies,
relative to the masks, so that no file holds an absolute path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from scripts.image_io.dicom_codes import is_lesion
from scripts.runtime.regions import class_mask_values, region_values
from scripts.utils.atomic_files import write_json, write_text
from scripts.utils.colours import region_colour
from scripts.utils.json_files import read_object
from scripts.utils.run_manifest import code_version

# Files that BIDS does not define: the record of the run, and each mask's manifest and report.
BIDS_IGNORE = ("segment.json", "*.manifest.json", "*.report.html", "measures.csv", "*.measures.csv")
BACKGROUND = "#000000"
SUFFIX = ".nii.gz"
DESCRIPTION = "dataset_description.json"  # which makes a folder a data set of BIDS
GENERATOR = "multi-teacher-distillation-bundle"
README = """# {name}

These masks were made automatically. Nobody has checked or corrected them. They are for research only: not for
diagnosis, treatment planning or any decision about a patient.

- `sub-*/[ses-*/]anat/*.nii.gz` are the masks: 0 is background, {values}.
- The `.json` beside a mask names the images that it was made from, and the image whose grid it has. The sources in
  these BIDS URIs are found by `DatasetLinks` in `dataset_description.json`.
- The `.manifest.json` beside a mask records the run: settings, versions and checksums.
- `measures.csv` and the `.measures.csv` beside a mask have volumes and other measures of each region and lesion, if
  they were wanted.
- `segment.json` lists the result of each case. All were made by {generator}
  {version}.

`Authors` in `dataset_description.json` names those of the images and of the network. Replace them by the people who
are responsible for this data set before you share it, and add the licence of the images.
"""


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

    ``desc-auto`` tells it from a mask that somebody drew. The subject is the patient. Where a case has an id of its
    own, what its id adds to the patient's is the session: ``sub-01_ses-2`` of ``sub-01`` is session 2, and ``P1_pre``
    of ``P1`` is session pre.

    Raises:
        ValueError: an id or the region's name contains no ASCII letter or digit, so it gives no label.
    """
    space = next((key for key in modalities if case.get(key) == case["image"]), modalities[0])
    ending = f"label-{_label(task.regions[0], 'name of the region')}_desc-auto_mask" if task.type else "desc-auto_dseg"
    entities = _entities(str(case["case_id"]), str(case.get("patient_id") or case["case_id"]))
    return Path(*entities, "anat", "_".join([*entities, f"space-{_label(space, 'modality')}", ending]) + SUFFIX)


def _entities(case_id: str, patient_id: str) -> list[str]:
    """The subject of a case, and its session if there is one."""
    named = re.fullmatch(r"(sub-[A-Za-z0-9]+)_(ses-[A-Za-z0-9]+)", case_id)
    if named:
        return [*named.groups()]
    subject = f"sub-{_label(patient_id.removeprefix('sub-'), 'id of case')}"
    session = case_id.removeprefix(patient_id)
    return [subject, f"ses-{_label(session, 'id of case')}"] if session else [subject]


def _label(text: str, what: str) -> str:
    label = re.sub(r"[^A-Za-z0-9]", "", text)
    if not label:
        raise ValueError(f"The {what} {text} contains no ASCII letter or digit. BIDS requires one.")
    return label


def image_sources(cases: Iterable[Mapping[str, Any]], modalities: Sequence[str]) -> dict[str, Path]:
    """The data sets that the images come from: name in BIDS URIs -> folder.

    Images in a data set of BIDS belong to the folder with its description, all others to the folder that they share.

    Args:
        cases: the data list.
        modalities: of the task.
    """
    paths = [path for case in cases for path in (Path(os.path.abspath(case["image"])), *_image_paths(case, modalities))]
    folders = {folder: _bids_folder(folder) for folder in {path.parent for path in paths}}
    found = {bids for bids in folders.values() if bids}
    others = [str(folder) for folder, bids in folders.items() if not bids]
    roots = sorted(found | ({Path(os.path.commonpath(others))} if others else set()))
    return {f"source{number or ''}": root for number, root in enumerate(roots)}


def _image_paths(case: Mapping[str, Any], modalities: Sequence[str]) -> list[Path]:
    """The absolute paths of a case's images. Links stay: in a data set under version control, all files are links."""
    named = [case[key] for key in modalities if key in case] or [case["image"]]
    return [Path(os.path.abspath(path)) for path in named]


def _bids_folder(folder: Path) -> Path | None:
    """The data set of BIDS that a folder belongs to; None if there is none."""
    return next((each for each in (folder, *folder.parents) if (each / DESCRIPTION).is_file()), None)


def _uri(path: str | Path, sources: Mapping[str, Path]) -> str:
    """The BIDS URI of an image."""
    path = Path(os.path.abspath(path))
    roots = [(len(root.parts), name) for name, root in sources.items() if path.is_relative_to(root)]
    name = max(roots)[1]
    return f"bids:{name}:{quote(path.relative_to(sources[name]).as_posix())}"


def write_dataset_files(output: Path, task: BidsTask, sources: Mapping[str, Path]) -> None:
    """Write the files of the data set: its description, which BIDS requires, ``README.md`` and ``.bidsignore``.

    What somebody has changed in the description or the README of an earlier run stays.

    Args:
        output: folder of the data set.
        task: what the masks show.
        sources: from ``image_sources``.

    Raises:
        ValueError: the folder is a data set that this bundle has not made, or its description is damaged.
    """
    path = output / DESCRIPTION
    existing = read_object(path, "description of a BIDS data set") if path.is_file() else {}
    makers = [each.get("Name") for each in existing.get("GeneratedBy", []) if isinstance(each, dict)]
    if existing and GENERATOR not in makers:
        raise ValueError(
            f"{output} is a data set of its own ({path.name} names no {GENERATOR}). Choose another --output-dir, such "
            f"as {output / 'derivatives' / task.regions[0]}."
        )
    name = f"Segmentation of {', '.join(task.regions)}, research only"
    description = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "derivative", "Authors": _authors(sources)}
    described = {
        "GeneratedBy": [{"Name": GENERATOR, "Version": code_version()}],
        "DatasetLinks": {key: quote(Path(os.path.relpath(root, output)).as_posix()) for key, root in sources.items()},
    }
    write_json({**description, **existing, **described}, path)
    write_text("\n".join(BIDS_IGNORE) + "\n", output / ".bidsignore")
    if not list(output.glob("README*")):
        values = ", ".join(f"{value:.0f} is {name}" for name, value in task.classes.items())
        text = README.format(name=name, generator=GENERATOR, version=code_version(), values=values)
        write_text(text, output / "README.md")


def _authors(sources: Mapping[str, Path]) -> list[str]:
    """Those of the images, by name where their data set names them, and of this bundle."""
    names: list[str] = []
    for root in sources.values():
        path = root / DESCRIPTION
        authors = read_object(path, "description of a BIDS data set").get("Authors") if path.is_file() else None
        named = [each for each in authors if isinstance(each, str)] if isinstance(authors, list) else []
        names += named or ["The authors of the images"]
    return list(dict.fromkeys([*names, f"The authors of {GENERATOR}"]))


def describe_mask(
    mask: Path, case: Mapping[str, Any], modalities: Sequence[str], task: BidsTask, sources: Mapping[str, Path]
) -> None:
    """Write what BIDS wants beside an existing mask.

    This is a JSON sidecar with the image whose grid it has and its source images; of a discrete segmentation also the
    lookup table of its values (``_dseg.tsv``).
    """
    if not mask.is_file():
        return
    sidecar = {
        "Description": f"Automatic segmentation of {', '.join(task.regions)}, not checked, for research only",
        "SpatialReference": _uri(case["image"], sources),
        "Sources": [_uri(path, sources) for path in _image_paths(case, modalities)],
    }
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
