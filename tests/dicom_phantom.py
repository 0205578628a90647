# SPDX-License-Identifier: Apache-2.0
"""A phantom as a DICOM study of CT, PET and MR, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

Array = NDArray[Any]
CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
MARKER = "ZZMARKER"
PERSON = {"PatientName": f"{MARKER}NAME", "PatientID": f"{MARKER}ID", "ReferringPhysicianName": f"{MARKER}DOCTOR",
          "AccessionNumber": f"{MARKER}1", "InstitutionName": f"{MARKER} HOSPITAL", "StudyID": MARKER}  # fmt: skip
# 70 kg, 370 MBq, half gone by the scan: SUV 1 is 370e6 / 2 Bq / 70000 g = 2642.857 Bq/ml. Stored are SUV x 1000.
SLOPE = "2.64285714285714"


def make_slice(kind: str, series: str, frame: str, study: str, **tags: Any) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CLASSES[kind]
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dates = {"StudyDate": "20200102", "StudyTime": "110000", "PatientBirthDate": "", "PatientSex": "O"}
    ids = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "FrameOfReferenceUID": frame, "SeriesNumber": 3}
    pixels = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16,
              "HighBit": 15, "PixelRepresentation": 1, "RescaleIntercept": 0, "RescaleSlope": 1}  # fmt: skip
    for keyword, value in {"Modality": kind, **dates, **ids, **pixels, **PERSON, **tags}.items():
        setattr(dataset, keyword, value)
    return dataset


def pet_tags() -> dict[str, Any]:
    drug = Dataset()
    drug.RadionuclideTotalDose, drug.RadionuclideHalfLife = 370e6, 6000
    drug.RadiopharmaceuticalStartTime = "100000"  # 100 minutes, one half life, before the scan
    scan = {"SeriesDate": "20200102", "SeriesTime": "114000", "Units": "BQML", "DecayCorrection": "START"}
    return {**scan, "PatientWeight": 70, "RescaleSlope": SLOPE, "RadiopharmaceuticalInformationSequence": [drug]}


def write_series(folder: Path, kind: str, stored: Array, affine: Array, ids: tuple[str, str], tags: Any) -> None:
    """One file per plane of the last axis; the affine is RAS, DICOM is LPS."""
    folder.mkdir(parents=True, exist_ok=True)
    series, lps = generate_uid(), np.diag([-1.0, -1, 1, 1]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / sizes
    for k in range(stored.shape[2]):
        dataset = make_slice(kind, series, *ids, **tags)
        dataset.ImagePositionPatient = [f"{x:.9g}" for x in lps[:3, 3] + k * lps[:3, 2]]
        dataset.ImageOrientationPatient = [f"{x:.9g}" for x in axes[:, :2].T.ravel()]
        dataset.PixelSpacing = [f"{sizes[1]:.9g}", f"{sizes[0]:.9g}"]  # between rows, between columns
        dataset.SliceThickness, dataset.InstanceNumber = f"{sizes[2]:.9g}", k + 1
        dataset.Columns, dataset.Rows = stored.shape[:2]
        dataset.PixelData = np.ascontiguousarray(stored[:, :, k].T).tobytes()
        dataset.save_as(folder / f"{kind}_{k:03d}.dcm", enforce_file_format=True)


def write_study(case: dict[str, Any], root: Path) -> Path:
    """Write ``root/dicom`` with all series in one folder, and next to it the same images as NIfTI files, in SUV.

    Every second column of the CT is left out, so that its pixels are twice as wide as they are high.
    """
    ids = (generate_uid(), generate_uid())
    for key, kind, factor in (("ct", "CT", 1), ("pet", "PT", 1000), ("mr", "MR", 1)):
        image = nib.Nifti1Image.from_filename(case[key])
        voxels, affine = np.asanyarray(image.dataobj), image.affine.copy()
        if key == "ct":
            voxels, affine[:3, 0] = voxels[::2], affine[:3, 0] * 2
        stored = np.rint(voxels * float(factor)).astype(np.int16)
        write_series(root / "dicom", kind, stored, affine, ids, pet_tags() if key == "pet" else {})
        nib.save(nib.Nifti1Image(stored.astype(np.float32) / factor, affine), root / f"{key}.nii.gz")
    return root
