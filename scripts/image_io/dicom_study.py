# SPDX-License-Identifier: Apache-2.0
"""Find the image series of a DICOM study, and choose one for each modality of a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from scripts.image_io.checks import DICOM_MODALITIES
from scripts.image_io.dicom_classes import ENHANCED, no_image
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_rules import Rule, element_texts, matches, rule_text
from scripts.image_io.dicom_structure import read_structure

TAGS = (
    *("Modality", "SeriesInstanceUID", "PatientID", "FrameOfReferenceUID", "SeriesDescription", "Rows", "ImageType"),
    "SOPClassUID",
)


class Series(NamedTuple):
    """The images of one series in one folder; ``elements`` are texts by keyword from the header of its first file."""

    uid: str
    kind: str
    folder: Path
    patient: str
    frame: str
    description: str
    slices: int
    enhanced: bool = False
    elements: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def find_series(study: str | Path, keywords: Iterable[str] = ()) -> list[Series]:
    """Every image series below a folder. Structure sets, segmentations, scouts and other files are skipped.

    Args:
        study: the folder.
        keywords: of DICOM elements to read from the series' headers, beside those that every series needs.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image series, or a series that is spread over several folders.
    """
    root = Path(study)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    images: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    tags = [*TAGS, *(keyword for keyword in keywords if keyword not in TAGS)]
    for path, head in _image_heads(root, tags):
        images[str(head.SeriesInstanceUID)].append((path, head))
    if not images:
        raise ValueError(f"{root} contains no series of DICOM images. Give the folder of one study.")
    return [_series(uid, images[uid], tags) for uid in sorted(images)]


def _image_heads(root: Path, tags: Sequence[str]) -> Iterator[tuple[Path, Any]]:
    pydicom = dicom_package("pydicom")
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            if read_structure(path) is None:
                continue
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
            values = [str(head.get(tag, "")) for tag in tags]  # raises for values of another type than the element's
            is_scout = "LOCALIZER" in list(head.get("ImageType", []) or [])
            is_image = (
                head.get("Rows") and head.get("SeriesInstanceUID") and head.get("Modality") in DICOM_MODALITIES.values()
            ) and not no_image(str(head.get("SOPClassUID", "")))
        # Not DICOM, or damaged: pydicom raises many exception types. The missing slice is noticed when the series is
        # read.
        except Exception:
            continue
        if values and is_image and not is_scout:
            yield path, head


def _series(uid: str, images: Sequence[tuple[Path, Any]], tags: Sequence[str]) -> Series:
    folders = sorted({path.parent for path, _ in images})
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders[:4])
        raise ValueError(f"The series {uid} is spread over {len(folders)} folders ({names}). Put it into one.")
    head = images[0][1]
    patient, frame, description = (
        str(head.get(tag, "") or "") for tag in ("PatientID", "FrameOfReferenceUID", "SeriesDescription")
    )
    enhanced = any(str(h.get("SOPClassUID")) in ENHANCED for _, h in images)
    elements = {tag: element_texts(head.get(tag)) for tag in tags}
    return Series(uid, str(head.Modality), folders[0], patient, frame, description, len(images), enhanced, elements)


def choose_series(
    study: Sequence[Series], rules: Mapping[str, Rule], series_uids: Sequence[str] = ()
) -> dict[str, Series]:
    """Choose one series per modality; modalities without a series are left out.

    A series is of one modality: where it is the only one that fits a modality, it is none of another.

    Args:
        study: series of a study, from ``find_series`` with the keywords of the rules.
        rules: of each modality, from ``series_rules``.
        series_uids: series to choose if several fit one modality.

    Raises:
        ValueError: several series fit one modality, or one series fits two; a UID does not exist; a chosen series has
            no frame of reference; or the chosen series have different patients or frames of reference. The messages do
            not contain patient ids.
    """
    unknown = sorted(set(series_uids) - {series.uid for series in study})
    if unknown:
        uids = ", ".join(series.uid for series in study)
        raise ValueError(f"The study has no series {', '.join(unknown)}. It has {uids}.")
    candidates = {}
    for key, rule in rules.items():
        found = [series for series in study if matches({**series.elements, "Modality": (series.kind,)}, rule)]
        candidates[key] = [series for series in found if series.uid in series_uids] or found
    _leave_out_taken(candidates)
    for key, found in candidates.items():
        if len(found) > 1:
            listed = "; ".join(f"{s.uid} ({s.description or 'no description'}, {s.slices} images)" for s in found)
            advice = "Choose one with --series-uid"
            if all(series.uid in series_uids for series in found):
                advice = "Tell them apart by a rule in the task's dicom"
            raise ValueError(
                f"The study has {len(found)} series for {key} ({rule_text(rules[key])}). {advice}: {listed}."
            )
    chosen = {key: found[0] for key, found in candidates.items() if found}
    _refuse_shared(chosen)
    _refuse_unusable(list(chosen.values()))
    return chosen


def _leave_out_taken(candidates: dict[str, list[Series]]) -> None:
    """Leave out of each modality, while there is another choice, the series that are the only ones of another."""
    before = None
    while before != (counts := [len(found) for found in candidates.values()]):
        before = counts
        taken = {found[0].uid for found in candidates.values() if len(found) == 1}
        for key, found in candidates.items():
            free = [series for series in found if series.uid not in taken]
            if len(found) > 1 and free:
                candidates[key] = free


def _refuse_shared(chosen: Mapping[str, Series]) -> None:
    owners: dict[str, str] = {}
    for key, series in chosen.items():
        other = owners.setdefault(series.uid, key)
        if other != key:
            raise ValueError(
                f"The series {series.uid} ({series.description or 'no description'}) fits both {other} and {key}. Tell "
                "them apart by a rule in the task's dicom."
            )


def _refuse_unusable(chosen: Sequence[Series]) -> None:
    """Refuse series that cannot be read, or whose position relative to each other is unknown."""
    for series in chosen:
        if not series.frame:
            raise ValueError(
                f"The series {series.uid} has no FrameOfReferenceUID, so its position relative to other series is "
                "unknown. Export it with one, or convert it to NIfTI and use `segment`."
            )
    for what, values in (
        ("patients", {series.patient for series in chosen}),
        ("frames of reference", {series.frame for series in chosen}),
    ):
        if len(values) > 1:
            uids = ", ".join(series.uid for series in chosen)
            raise ValueError(
                f"The series {uids} have {len(values)} different {what}. Give one study of one patient and one frame "
                "of reference."
            )
