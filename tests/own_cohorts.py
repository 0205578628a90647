# SPDX-License-Identifier: Apache-2.0
"""Small cohorts in the layouts of users: BraTS, nnU-Net, MONAI data lists, folders of CT, BIDS. Lesions are boxes.

Each writer makes ``FOLDER/data`` and ``FOLDER/task.json``, and returns a ``Story``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Story:
    """A cohort on disk.

    Attributes:
        task: the task file.
        data: folder of the data set.
        masks: case -> reference mask.
        images: modality -> image of the first case.
        regions: name -> values of the label files.
        modality: of DICOM, per modality of the task.
    """

    task: Path
    data: Path
    masks: dict[str, Path]
    images: dict[str, Path]
    regions: dict[str, list[int]]
    modality: dict[str, str]

    @property
    def case(self) -> str:
        """The first case."""
        return next(iter(self.masks))


def _save(voxels: Array, affine: Array, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def nested_boxes(rng: np.random.Generator, shape: Sequence[int], values: Sequence[int]) -> Array:
    """Boxes inside each other, the first value outside."""
    label = np.zeros(shape, np.uint8)
    centre = [int(rng.integers(0.4 * n, 0.6 * n)) for n in shape]
    for k, value in enumerate(values):
        half = [max(1, round(0.34 * n * (1 - k / len(values)))) for n in shape]
        label[tuple(slice(max(0, c - h), c + h) for c, h in zip(centre, half, strict=True))] = value
    return label


def _image(rng: np.random.Generator, label: Array, levels: Mapping[int, float], base: float, noise: float) -> Array:
    image = rng.normal(base, noise, label.shape)
    for value, level in levels.items():
        image[label == value] += level
    return image.astype(np.float32)


def _write_task(folder: Path, task: Mapping[str, Any]) -> Path:
    path = folder / "task.json"
    path.write_text(json.dumps(task))
    return path


def write_brats(folder: Path, cases: int = 6) -> Story:
    """Four modalities of MR and three overlapping regions, one folder per case."""
    names = ("t1", "t1ce", "t2", "flair")
    levels = {"t1": {1: -10, 2: -20, 4: 5}, "t1ce": {1: 5, 2: 0, 4: 60}, "t2": {1: 30, 2: 50, 4: 20}}
    levels["flair"] = {1: 20, 2: 60, 4: 30}
    regions = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
    masks, images = {}, {}
    for number in range(1, cases + 1):
        rng, case = np.random.default_rng(number), f"BraTS_{number:03d}"
        label, affine = nested_boxes(rng, (32, 32, 24), (2, 1, 4)), np.diag([-1.0, -1.0, 1.0, 1.0])
        for name in names:
            path = folder / "data" / case / f"{case}_{name}.nii.gz"
            images.setdefault(name, _save(_image(rng, label, levels[name], 100, 5), affine, path))
        masks[case] = _save(label, affine, folder / "data" / case / f"{case}_seg.nii.gz")
    layout = {name: f"{{case}}/{{case}}_{name}.nii.gz" for name in names}
    task = {
        "cohort": "files",
        "layout": {**layout, "label": "{case}/{case}_seg.nii.gz"},
        "modalities": list(names),
        "intensity": dict.fromkeys(names, "zscore"),
        "labels": [[0], [1], [2], [4]],
        "classes": ["background", "necrosis", "oedema", "enhancing"],
        "regions": regions,
        "spacing": [1, 1, 1],
        "patch": [16, 16, 16],
        "dicom": {name: {"Modality": "MR", "SeriesDescription": name} for name in names},
    }
    return Story(_write_task(folder, task), folder / "data", masks, images, regions, dict.fromkeys(names, "MR"))


def _pet_ct(number: int) -> tuple[Array, Array, dict[str, Array]]:
    """Label (1: primary, 2: node), affine and images of a head and neck tumour."""
    rng = np.random.default_rng(100 + number)
    label = nested_boxes(rng, (24, 24, 24), (1,))
    label[:6, :8, :8] = 2
    images = {
        "CT": _image(rng, label, {1: 40, 2: 20}, 0, 15),
        "PET": np.maximum(_image(rng, label, {1: 9, 2: 6}, 1, 0.3), 0),
    }
    return label, np.diag([-2.0, -2.0, 2.0, 1.0]), images


def write_hecktor22(folder: Path, cases: int = 6) -> Story:
    """CT, PET and two classes in nnU-Net's layout; the task repeats nothing that dataset.json says."""
    masks, images = {}, {}
    for number in range(1, cases + 2):
        label, affine, volumes = _pet_ct(number)
        case, part = f"HN_{number:03d}", "Tr" if number <= cases else "Ts"
        for channel, (name, volume) in enumerate(volumes.items()):
            path = folder / "data" / f"images{part}" / f"{case}_{channel:04d}.nii.gz"
            images.setdefault(name.lower(), _save(volume, affine, path))
        if part == "Tr":
            masks[case] = _save(label, affine, folder / "data" / "labelsTr" / f"{case}.nii.gz")
    names = [*masks]
    description = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "GTVp": 1, "GTVn": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "data" / "dataset.json").write_text(json.dumps(description))
    splits = [{"train": [c for c in names if c not in names[k::3]], "val": names[k::3]} for k in range(3)]
    (folder / "data" / "splits_final.json").write_text(json.dumps(splits))
    task = {
        "cohort": "nnunet",
        "modalities": ["ct", "pet"],
        "intensity": {"ct": [-200, 300], "pet": [0, 15]},
        "spacing": [2, 2, 2],
        "patch": [16, 16, 16],
    }
    regions, modality = {"GTVp": [1], "GTVn": [2]}, {"ct": "CT", "pet": "PT"}
    return Story(_write_task(folder, task), folder / "data", masks, images, regions, modality)


def write_decathlon(folder: Path, cases: int = 6) -> Story:
    """The cohort of ``write_hecktor22`` in a MONAI data list with folds."""
    masks, images, training, testing = {}, {}, [], []
    for number in range(1, cases + 2):
        label, affine, volumes = _pet_ct(number)
        case = f"HN_{number:03d}"
        files = [_save(v, affine, folder / "data" / "images" / f"{case}_{n}.nii.gz") for n, v in volumes.items()]
        paths = [file.relative_to(folder / "data").as_posix() for file in files]
        if number > cases:
            testing.append({"image": paths})
            continue
        for name, file in zip(("ct", "pet"), files, strict=True):
            images.setdefault(name, file)
        masks[case] = _save(label, affine, folder / "data" / "labels" / f"{case}.nii.gz")
        training.append({"image": paths, "label": f"labels/{case}.nii.gz", "fold": (number - 1) % 3})
    (folder / "data" / "dataset.json").write_text(json.dumps({"training": training, "testing": testing}))
    task = {
        "cohort": "decathlon",
        "modalities": ["ct", "pet"],
        "intensity": {"ct": [-200, 300], "pet": [0, 15]},
        "labels": [[0], [1], [2]],
        "classes": ["background", "GTVp", "GTVn"],
        "spacing": [2, 2, 2],
        "patch": [16, 16, 16],
    }
    regions, modality = {"GTVp": [1], "GTVn": [2]}, {"ct": "CT", "pet": "PT"}
    return Story(_write_task(folder, task), folder / "data", masks, images, regions, modality)


def write_organs(folder: Path, cases: int = 6) -> Story:
    """CT with three organs, two of them sided; the task leaves spacing, patch, intensity and flips to ``plan``."""
    masks, images = {}, {}
    for number in range(1, cases + 1):
        rng, case = np.random.default_rng(200 + number), f"abdomen{number}"
        label = np.zeros((32, 24, 24), np.uint8)
        label[3:11, 6:16, 4:16], label[21:29, 6:16, 4:16], label[12:20, 4:20, 12:22] = 3, 2, 1  # x grows to the right
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        path = folder / "data" / "ct" / f"{case}.nii.gz"
        images.setdefault("ct", _save(_image(rng, label, {1: 1060, 2: 1150, 3: 1140}, -1000, 20), affine, path))
        masks[case] = _save(label, affine, folder / "data" / "organs" / f"{case}.nii.gz")
    task = {
        "cohort": "files",
        "layout": {"ct": "ct/{case}.nii.gz", "label": "organs/{case}.nii.gz"},
        "modalities": ["ct"],
        "labels": [[0], [1], [2], [3]],
        "classes": ["background", "liver", "kidney_right", "kidney_left"],
        "codes": {"liver": ["10200004", "SCT", "Liver"]},
    }
    regions = {"liver": [1], "kidney_right": [2], "kidney_left": [3]}
    return Story(_write_task(folder, task), folder / "data", masks, images, regions, {"ct": "CT"})


def write_thick_mr(folder: Path, cases: int = 6) -> Story:
    """MR of 0.5 x 0.5 x 5 mm in BIDS; the task leaves spacing, patch and intensity to ``plan``."""
    masks, images = {}, {}
    for number in range(1, cases + 1):
        rng, case = np.random.default_rng(300 + number), f"sub-{number:02d}"
        label, affine = nested_boxes(rng, (48, 48, 8), (1,)), np.diag([0.5, 0.5, 5.0, 1.0])
        path = folder / "data" / case / "anat" / f"{case}_T2w.nii.gz"
        images.setdefault("t2", _save(_image(rng, label, {1: 80}, 100, 10), affine, path))
        mask = folder / "data" / "derivatives" / "experts" / case / "anat" / f"{case}_label-lesion_mask.nii.gz"
        masks[case] = _save(label, affine, mask)
    task = {
        "cohort": "bids",
        "layout": {"t2": "T2w", "label": "label-lesion_mask"},
        "modalities": ["t2"],
        "labels": [[0], [1]],
        "classes": ["background", "lesion"],
        "dicom": {"t2": {"Modality": "MR"}},
    }
    return Story(_write_task(folder, task), folder / "data", masks, images, {"lesion": [1]}, {"t2": "MR"})


def write_dicom_study(story: Story, folder: Path) -> Path:
    """The images of the first case as DICOM series, in one study and frame of reference."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    study, frame = generate_uid(), generate_uid()
    for number, (name, path) in enumerate(story.images.items(), start=1):
        image: Any = nib.load(path)
        volume, series = np.rint(np.asarray(image.dataobj)).astype(np.int16), generate_uid()
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # LPS
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        column, row = (affine[:3, axis] / steps[axis] for axis in (0, 1))
        (folder / name).mkdir(parents=True)
        for k in range(volume.shape[2]):
            dataset = Dataset()
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            kind = {"CT": "2", "MR": "4", "PT": "128"}[story.modality[name]]
            dataset.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{kind}"
            dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
            dataset.Modality, dataset.SeriesDescription, dataset.PatientID = story.modality[name], name, "P1"
            dataset.PatientName, dataset.StudyDate, dataset.StudyTime, dataset.StudyID = (
                "A^B",
                "20200101",
                "120000",
                "1",
            )
            dataset.SeriesNumber, dataset.InstanceNumber = number, k + 1
            dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = volume.shape[1], volume.shape[0], 1
            dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 1
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
            dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
            dataset.PixelSpacing, dataset.SliceThickness = [float(steps[1]), float(steps[0])], float(steps[2])
            dataset.ImageOrientationPatient = [*map(float, column), *map(float, row)]
            dataset.ImagePositionPatient = [float(x) for x in affine[:3, 3] + k * affine[:3, 2]]
            if story.modality[name] == "PT":
                dataset.Units, dataset.CorrectedImage = "GML", ["ATTN", "DECY"]
                dataset.DecayCorrection = "START"
            dataset.PixelData = np.ascontiguousarray(volume[:, :, k].T).tobytes()
            dataset.save_as(folder / name / f"{k:03d}.dcm", enforce_file_format=True)
    return folder
