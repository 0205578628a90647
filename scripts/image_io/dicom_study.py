# SPDX-License-Identifier: Apache-2.0
"""A DICOM study: which of its series a network takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.image_io.dicom_packages import dicom_package

KINDS = {"ct": "CT", "pet": "PT", "mr": "MR"}  # modality of the config -> DICOM's
TAGS = ("Modality", "SeriesInstanceUID", "PatientID", "FrameOfReferenceUID", "SeriesDescription", "Rows", "ImageType",
        "NumberOfFrames", "SharedFunctionalGroupsSequence")  # fmt: skip


class Series(NamedTuple):
    """The images of one series in one folder."""

    uid: str
    kind: str
    folder: Path
    patient: str
    frame: str
    description: str
    slices: int
    multiframe: bool = False


def find_series(study: str | Path) -> list[Series]:
    """Every image series under a folder; structure sets, segmentations, scouts and other files are passed over.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no series of images, or one that is spread over several folders.
    """
    root = Path(study)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    heads: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for path, head in _heads(root):
        heads[str(head.SeriesInstanceUID)].append((path, head))
    found = [_series(uid, each) for uid, each in sorted(heads.items())]
    if not found:
        raise ValueError(f"{root} holds no series of DICOM images: name the folder of one study.")
    return found


def _heads(root: Path) -> Iterator[tuple[Path, Any]]:
    pydicom = dicom_package("pydicom")
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
            scout = "LOCALIZER" in list(head.get("ImageType", []) or [])
            image = head.get("Rows") and head.get("SeriesInstanceUID") and head.get("Modality") in KINDS.values()
        except Exception:  # not DICOM, or damaged, which pydicom says in many ways; a series misses its slices later
            continue
        if image and not scout:
            yield path, head


def _series(uid: str, images: Sequence[tuple[Path, Any]]) -> Series:
    folders = sorted({path.parent for path, _ in images})
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders[:4])
        raise ValueError(f"The series {uid} is spread over {len(folders)} folders ({names}): put it into one.")
    head = images[0][1]
    patient, frame, description = (
        str(head.get(tag, "") or "") for tag in ("PatientID", "FrameOfReferenceUID", "SeriesDescription")
    )
    multiframe = any("SharedFunctionalGroupsSequence" in h or int(h.get("NumberOfFrames") or 1) > 1 for _, h in images)
    return Series(uid, str(head.Modality), folders[0], patient, frame, description, len(images), multiframe)


def choose_series(
    found: Sequence[Series], modalities: Sequence[str], series_uids: Sequence[str] = ()
) -> dict[str, Series]:
    """One series per modality, as far as there is one.

    Args:
        found: series of a study.
        modalities: of the network: ``ct``, ``pet``, ``mr``.
        series_uids: of those to take where there are several of a modality.

    Raises:
        ValueError: a modality that DICOM does not tell apart, several series of one, a chosen series that is not there,
            one that is multi-frame or names no frame of reference, or series of several patients or frames of
            reference. No patient is named.
    """
    unknown = [key for key in modalities if key not in KINDS]
    if unknown:
        raise ValueError(f"DICOM does not tell {', '.join(unknown)} from other series: use segment with their folders.")
    lost = sorted(set(series_uids) - {series.uid for series in found})
    if lost:
        raise ValueError(f"The study has no series {', '.join(lost)}: it has {', '.join(s.uid for s in found)}.")
    chosen = {}
    for key in modalities:
        there = [series for series in found if series.kind == KINDS[key]]
        there = [series for series in there if series.uid in series_uids] or there
        if len(there) > 1:
            listed = "; ".join(f"{s.uid} ({s.description or 'no description'}, {s.slices} images)" for s in there)
            raise ValueError(f"The study has {len(there)} {KINDS[key]} series: choose one by --series-uid: {listed}.")
        if there:
            chosen[key] = there[0]
    _refuse_misfits(list(chosen.values()))
    return chosen


def _refuse_misfits(chosen: Sequence[Series]) -> None:
    """Series that are not read, or that do not say how they lie to each other and to what is written."""
    for series in chosen:
        if series.multiframe:
            raise ValueError(
                f"The series {series.uid} is multi-frame (enhanced) DICOM, which is not read here: export it as one "
                "file per slice, or convert it to NIfTI and use segment."
            )
        if not series.frame:
            raise ValueError(
                f"The series {series.uid} names no FrameOfReferenceUID, so that its place to other series is unknown: "
                "export it with one, or convert it to NIfTI and use segment."
            )
    for what, values in (
        ("patients", {series.patient for series in chosen}),
        ("frames of reference", {series.frame for series in chosen}),
    ):
        if len(values) > 1:
            uids = ", ".join(series.uid for series in chosen)
            raise ValueError(f"The series {uids} are of {len(values)} {what}: give one study of one patient and frame.")
