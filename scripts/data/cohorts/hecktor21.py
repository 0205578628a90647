# SPDX-License-Identifier: Apache-2.0
"""HECKTOR 2021: CT and FDG-PET of head and neck tumours, with the primary gross tumour volume (GTVt) on the CT grid.

    hecktor2021_train/hecktor_nii/CHUM001_ct.nii.gz     HU, the reference
    hecktor2021_train/hecktor_nii/CHUM001_pt.nii.gz     SUV (g/mL), on its own grid
    hecktor2021_train/hecktor_nii/CHUM001_gtvt.nii.gz   {0, 1}, missing for test cases
    hecktor2021_train/hecktor2021_bbox_training.csv     PatientID,x1,x2,y1,y2,z1,z2 in mm

The boxes are 144 mm wide and given in world coordinates with LPS axes, as in ITK and SimpleITK. NIfTI affines are RAS:
with nibabel or MONAI (affine_lps_to_ras=True), negate x and y and swap their ends.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from scripts.data.case_list import Item, check_cases, make_item, require_folder

MODALITIES = ("ct", "pet")  # the reference first
SUFFIXES = {"ct": "ct", "pet": "pt"}
BOXES = "hecktor2021_bbox_training.csv"
CORNERS = ("x1", "y1", "z1", "x2", "y2", "z2")
LAYOUT = "hecktor2021_train/hecktor_nii/<patient>_ct.nii.gz (reference), _pt.nii.gz and _gtvt.nii.gz"


def datalist(root: Path, *_: object) -> list[Item]:
    """List the cases: keys `ct` (reference), `pet`, `label`.

    Each item also has `centre`, the leading letters of the patient id (CHUM001 -> CHUM), and `bbox_mm` = [x1, y1, z1,
    x2, y2, z2] in mm, LPS, if the table of boxes contains the patient.

    Args:
        root: the parent folder of hecktor2021_train, hecktor2021_train itself, or hecktor_nii.

    Raises:
        FileNotFoundError: no folder, no case, or a case without CT; the message names every missing image.
        ValueError: the table of boxes cannot be parsed.
    """
    root = require_folder(root, "hecktor21", LAYOUT)
    candidates = (root / "hecktor2021_train" / "hecktor_nii", root / "hecktor_nii")
    folder = next((path for path in candidates if path.is_dir()), root)
    names = [re.fullmatch(r"([^.].*)_(ct|pt|gtvt)\.nii\.gz", path.name) for path in folder.iterdir()]
    boxes = read_boxes(folder.parent / BOXES)
    cases = []
    for patient in sorted({name[1] for name in names if name}):
        files = {modality: folder / f"{patient}_{suffix}.nii.gz" for modality, suffix in SUFFIXES.items()}
        item = make_item(patient, patient, files, folder / f"{patient}_gtvt.nii.gz")
        letters = re.match(r"[A-Za-z]*", patient)
        item["centre"] = letters[0] if letters else ""
        if patient in boxes:
            item["bbox_mm"] = boxes[patient]
        cases.append((item, files))
    return check_cases(cases, root, "hecktor21", LAYOUT)


def read_boxes(path: Path) -> dict[str, list[float]]:
    """Read the table of boxes: patient id to [x1, y1, z1, x2, y2, z2] (mm, LPS); {} if there is no file.

    Raises:
        ValueError: a column is missing, a patient occurs twice, or a box is not six numbers with x1 < x2 etc.
    """
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        absent = sorted({"PatientID", *CORNERS} - set(reader.fieldnames or ()))
        rows = list(reader) if not absent else []
    if absent:
        raise ValueError(
            f"{path} has no column(s) {', '.join(absent)}. The header must name PatientID and each corner."
        )
    boxes: dict[str, list[float]] = {}
    for row in rows:
        patient = row["PatientID"]
        try:
            box = [float(row[corner]) for corner in CORNERS]
        except (TypeError, ValueError):  # TypeError: the row is too short
            box = [math.nan] * 6
        if not all(low < high < math.inf and low > -math.inf for low, high in zip(box[:3], box[3:], strict=True)):
            raise ValueError(
                f"{path} has no valid box for {patient}. Give six numbers in mm, with x1 < x2, y1 < y2, z1 < z2."
            )
        if patient in boxes:
            raise ValueError(f"{path} has two boxes for {patient}. Keep one.")
        boxes[patient] = box
    return boxes
