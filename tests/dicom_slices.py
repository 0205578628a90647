# SPDX-License-Identifier: Apache-2.0
"""A small DICOM series in memory, and masks on its grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SHAPE = (12, 10, 5)  # columns, rows, slices
SPACING = (0.8, 1.2, 4.0)  # mm
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


def series(axes: Any = None, shape: tuple[int, ...] = SHAPE, kind: str = "MR") -> list[Any]:
    """A series of empty images.

    Args:
        axes: unit vectors (LPS) along the row, the column and to the next slice; by default those of the patient.
        shape: columns, rows, slices.
        kind: MR or CT.
    """
    study, series_uid, frame = (generate_uid() for _ in range(3))
    along = np.eye(3) if axes is None else np.asarray(axes)
    images = []
    for number in range(shape[2]):
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = (
            f"1.2.840.10008.5.1.4.1.1.{'4' if kind == 'MR' else '2'}"
        )
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series_uid, frame
        image.PatientID = image.PatientName = image.StudyID = image.AccessionNumber = image.StudyTime = ""
        image.PatientBirthDate = image.PatientSex = image.ReferringPhysicianName = ""
        image.StudyDate, image.Modality, image.SeriesNumber = "20200102", kind, 3
        image.Columns, image.Rows = shape[:2]
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.RescaleSlope, image.RescaleIntercept = 1, 0
        position = np.array([-5.0, 7.0, 0.0]) + along[2] * number * SPACING[2]
        image.ImagePositionPatient = [f"{value:.8f}" for value in position]
        image.ImageOrientationPatient = [f"{value:.10f}" for value in along[:2].ravel()]
        image.PixelSpacing, image.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        image.InstanceNumber, image.PixelData = number + 1, bytes(2 * shape[0] * shape[1])
        images.append(image)
    return images


def write_mask(voxels: Any, folder: Path, axes: Any = None) -> Path:
    """A NIfTI (column, row, slice) on the grid of ``series``."""
    along = np.eye(3) if axes is None else np.asarray(axes)
    affine = np.eye(4)
    affine[:3, :3] = along.T * SPACING
    affine[:3, 3] = [-5.0, 7.0, 0.0]
    nib.save(nib.Nifti1Image(np.asarray(voxels, dtype=np.uint8), LPS_TO_RAS @ affine), folder / "mask.nii.gz")
    return folder / "mask.nii.gz"


def nested() -> Any:
    """A block of value 2 that contains one of 1 that contains one of 4."""
    voxels = np.zeros(SHAPE)
    voxels[1:11, 1:9, :] = 2
    voxels[2:9, 2:7, 1:4] = 1
    voxels[3:6, 3:6, 2] = 4
    return voxels
