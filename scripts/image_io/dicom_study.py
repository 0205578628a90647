# SPDX-License-Identifier: Apache-2.0
"""Find the image series of a DICOM study, and choose one for each modality of a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.image_io.checks import DICOM_MODALITIES
from scripts.image_io.dicom_classes import ENHANCED, no_image
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_structure import read_structure

TAGS = (
    *("Modality", "SeriesInstanceUID", "PatientID", "FrameOfReferenceUID", "SeriesDescription", "Rows", "ImageType"),
    "SOPClassUID",
)


class Series(NamedTuple):
    """The images of one series in one folder."""

    uid: str
    kind: str
    folder: Path
    patient: str
    frame: str
    description: str
    slices: int
    enhanced: bool = False


def find_series(study: str | Path) -> list[Series]:
    """Every image series below a folder. Structure sets, segmentations, scouts and other files are skipped.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image series, or a series that is spread over several folders.
    """
    root = Path(study)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    images: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for path, head in _image_heads(root):
        images[str(head.SeriesInstanceUID)].append((path, head))
    if not images:
        raise ValueError(f"{root} contains no series of DICOM images. Give the folder of one study.")
    return [_series(uid, images[uid]) for uid in sorted(images)]


def _image_heads(root: Path) -> Iterator[tuple[Path, Any]]:
    pydicom = dicom_package("pydicom")
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            if read_structure(path) is None:
                continue
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
            values = [str(head.get(tag, "")) for tag in TAGS]  # raises for values of another type than the element's
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


def _series(uid: str, images: Sequence[tuple[Path, Any]]) -> Series:
    folders = sorted({path.parent for path, _ in images})
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders[:4])
        raise ValueError(f"The series {uid} is spread over {len(folders)} folders ({names}). Put it into one.")
    head = images[0][1]
    patient, frame, description = (
        str(head.get(tag, "") or "") for tag in ("PatientID", "FrameOfReferenceUID", "SeriesDescription")
    )
    enhanced = any(str(h.get("SOPClassUID")) in ENHANCED for _, h in images)
    return Series(uid, str(head.Modality), folders[0], patient, frame, description, len(images), enhanced)


def choose_series(
    study: Sequence[Series], modalities: Sequence[str], series_uids: Sequence[str] = ()
) -> dict[str, Series]:
    """Choose one series per modality; modalities without a series are left out.

    Args:
        study: series of a study, from ``find_series``.
        modalities: of the network: ``ct``, ``pet``, ``mr``.
        series_uids: series to choose if there are several of one modality.

    Raises:
        ValueError: DICOM cannot distinguish a modality; there are several series of one; a UID does not exist; a chosen
            series has no frame of reference; or the chosen series have different patients or frames
            of reference. The messages do not contain patient ids.
    """
    unsupported = [key for key in modalities if key not in DICOM_MODALITIES]
    if unsupported:
        raise ValueError(
            f"DICOM headers do not identify {', '.join(unsupported)}. Use `segment` with the folders of the series."
        )
    unknown = sorted(set(series_uids) - {series.uid for series in study})
    if unknown:
        uids = ", ".join(series.uid for series in study)
        raise ValueError(f"The study has no series {', '.join(unknown)}. It has {uids}.")
    chosen = {}
    for key in modalities:
        candidates = [series for series in study if series.kind == DICOM_MODALITIES[key]]
        candidates = [series for series in candidates if series.uid in series_uids] or candidates
        if len(candidates) > 1:
            listed = "; ".join(f"{s.uid} ({s.description or 'no description'}, {s.slices} images)" for s in candidates)
            kind = DICOM_MODALITIES[key]
            raise ValueError(f"The study has {len(candidates)} {kind} series. Choose one with --series-uid: {listed}.")
        if candidates:
            chosen[key] = candidates[0]
    _refuse_unusable(list(chosen.values()))
    return chosen


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
