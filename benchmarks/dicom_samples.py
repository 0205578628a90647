# SPDX-License-Identifier: Apache-2.0
"""Small DICOM series of noise: single slices, or one enhanced multi-frame file. No real person."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
ENHANCED_CLASSES = {
    **{"CT": "1.2.840.10008.5.1.4.1.1.2.1", "MR": "1.2.840.10008.5.1.4.1.1.4.1", "PT": "1.2.840.10008.5.1.4.1.1.130"}
}
FRAME_TYPES = {"CT": "CTImageFrameTypeSequence", "MR": "MRImageFrameTypeSequence", "PT": "PETFrameTypeSequence"}
ORIGIN, SPACING = (-10.0, 5.0, 30.0), (2.0, 2.5, 3.0)  # mm along x, y, z of LPS
SUV_FACTOR = 70_000 / (370e6 / 2)  # of `pet_tags`: one half life from injection to scan


def item(**values: Any) -> Dataset:
    """A data set of some elements."""
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def pet_tags() -> dict[str, Any]:
    """70 kg, 370 MBq, a half life of 6000 s, 100 minutes from injection to scan."""
    drug = {"RadionuclideTotalDose": 370e6, "RadionuclideHalfLife": 6000, "RadiopharmaceuticalStartTime": "100000"}
    scan = {"SeriesDate": "20200102", "SeriesTime": "114000", "Units": "BQML", "DecayCorrection": "START"}
    return {**scan, "PatientWeight": 70, "RadiopharmaceuticalInformationSequence": [item(**drug)]}


def image(kind: str, sop_class: str, **tags: Any) -> Dataset:
    """What all images of one study share: 16 bits, unsigned, with the sex, date and ids that a SEG needs."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    uid = generate_uid()
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    ids = {
        "PatientID": "TEST-1",
        "PatientName": "Test^Person",
        "PatientSex": "O",
        "PatientBirthDate": "",
        "StudyID": "",
    }
    ids |= {"StudyInstanceUID": "1.2.3.1", "SeriesInstanceUID": f"1.2.3.{ord(kind[0])}", "SeriesNumber": 3}
    dates = {"StudyDate": "20200102", "StudyTime": "110000", "ContentDate": "20200102", "ContentTime": "110000"}
    pixels = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16}
    pixels |= {"HighBit": 15, "PixelRepresentation": 0, "FrameOfReferenceUID": "1.2.3.9", "AccessionNumber": ""}
    for keyword, value in {"Modality": kind, **ids, **dates, **pixels, **tags}.items():
        setattr(dataset, keyword, value)
    return dataset


def write_series(
    folder: Path,
    stored: np.ndarray,
    kind: str = "CT",
    each: Callable[[int, Dataset], object] = lambda k, dataset: None,
    rescale: tuple[float, float] | None = (1, -1024),
    **tags: Any,
) -> list[Path]:
    """Write one file per plane of the last axis.

    Args:
        folder: is created.
        stored: columns, rows, slices; unsigned 16-bit numbers.
        kind: ``CT``, ``PT`` or ``MR``.
        each: changes the data set of a slice before it is written.
        rescale: slope and intercept; None writes neither.
        tags: further elements, by keyword.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    values = {**(pet_tags() if kind == "PT" else {}), "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    if rescale:
        values |= {"RescaleSlope": rescale[0], "RescaleIntercept": rescale[1]}
    for k in range(stored.shape[2]):
        dataset = image(kind, CLASSES[kind], **{**values, **tags})
        dataset.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + k * SPACING[2]]
        dataset.PixelSpacing, dataset.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        dataset.Columns, dataset.Rows, dataset.InstanceNumber = *stored.shape[:2], k + 1
        dataset.PixelData = np.ascontiguousarray(stored[:, :, k].T.astype("<u2")).tobytes()
        dataset["PixelData"].VR = "OW"
        each(k, dataset)
        paths.append(folder / f"{k:03d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def enhanced(
    stored: np.ndarray,
    kind: str = "CT",
    order: Sequence[int] | None = None,
    rescales: Sequence[tuple[float, float]] | None = ((1, -1024),),
    shared: bool = True,
    **tags: Any,
) -> Dataset:
    """One enhanced file.

    Args:
        stored: columns, rows, slices; unsigned 16-bit numbers.
        kind: ``CT``, ``PT`` or ``MR``.
        order: the slice of each frame; by default 0, 1, 2, ...
        rescales: slope and intercept of each slice, or one for all; None writes none.
        shared: whether what all frames have in common is in the shared functional group, or in each frame's.
        tags: further elements, by keyword.
    """
    slices = list(order or range(stored.shape[2]))
    dataset = image(kind, ENHANCED_CLASSES[kind], **{**(pet_tags() if kind == "PT" else {}), **tags})
    dataset.Columns, dataset.Rows, dataset.NumberOfFrames = *stored.shape[:2], len(slices)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    common = {
        "PixelMeasuresSequence": {"PixelSpacing": [SPACING[1], SPACING[0]], "SliceThickness": SPACING[2]},
        "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        FRAME_TYPES[kind]: {"FrameType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]},
    }
    frames = []
    for k in slices:
        position = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + k * SPACING[2]]
        groups: dict[str, dict[str, Any]] = {
            "FrameContentSequence": {
                "StackID": "1",
                "InStackPositionNumber": k + 1,
                "DimensionIndexValues": [1, k + 1],
            },
            "PlanePositionSequence": {"ImagePositionPatient": position},
        }
        if rescales is not None:
            slope, intercept = rescales[k if len(rescales) > 1 else 0]
            groups["PixelValueTransformationSequence"] = {
                **{"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "HU" if kind == "CT" else "US"}
            }
        groups |= {} if shared else common
        frames.append(item(**{sequence: [item(**values)] for sequence, values in groups.items()}))
    dataset.PerFrameFunctionalGroupsSequence = frames
    in_common = {sequence: [item(**values)] for sequence, values in common.items()} if shared else {}
    dataset.SharedFunctionalGroupsSequence = [item(**in_common)]
    dataset.PixelData = np.ascontiguousarray(stored[:, :, slices].T.astype("<u2")).tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def write_enhanced(folder: Path, dataset: Dataset, name: str = "one.dcm") -> Path:
    """Write a data set of ``enhanced`` into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset.save_as(folder / name, enforce_file_format=True)
    return folder / name
