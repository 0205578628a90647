# SPDX-License-Identifier: Apache-2.0
"""Soft-tissue sarcoma (STS): CT, FDG-PET and T1-weighted MR, each on its own grid, in common world coordinates.

Layout of `ibsi_validation/nifti` in theibsi/data_sets (Vallières et al. 2015, doi:10.7937/K9/TCIA.2015.7GO2GSKS):

    <root>/STS_001/CT_image.nii.gz      HU             CT_mask.nii.gz      {0, 1}, gross tumour volume
    <root>/STS_001/PET_image.nii.gz     SUV (g/mL)     PET_mask.nii.gz
    <root>/STS_001/MR_T1_image.nii.gz   a.u.           MR_T1_mask.nii.gz

The label is the mask on the CT grid. The phantom has the same layout and uses the same reader.
"""

from __future__ import annotations

from pathlib import Path

from scripts.data.case_list import Item, check_cases, make_item, require_folder

MODALITIES = ("ct", "pet", "mr")  # the reference first
PREFIXES = {"ct": "CT", "pet": "PET", "mr": "MR_T1"}
LAYOUT = "<case>/CT_image.nii.gz (reference), PET_image.nii.gz, MR_T1_image.nii.gz and CT_mask.nii.gz"


def image_name(modality: str) -> str:
    """File name of a modality's image inside the case folder."""
    return f"{PREFIXES[modality]}_image.nii.gz"


def mask_name(modality: str) -> str:
    """File name of the tumour mask on a modality's own grid."""
    return f"{PREFIXES[modality]}_mask.nii.gz"


def datalist(root: Path, *_: object) -> list[Item]:
    """List the cases: keys `ct` (reference), `pet`, `mr`; `label` is the mask on the CT grid.

    Raises:
        FileNotFoundError: no folder, no case, or a case without CT; the message names every missing image.
    """
    return read_layout(root, "sts", "STS_")


def read_layout(root: Path, name: str, prefix: str) -> list[Item]:
    """List the cases: folders whose name begins with `prefix`, or that contain at least one of the layout's files."""
    root = require_folder(root, name, LAYOUT)
    known = {file_name(modality) for modality in MODALITIES for file_name in (image_name, mask_name)}
    cases = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):  # macOS creates "._" entries
            continue
        if folder.name.startswith(prefix) or any((folder / file).is_file() for file in known):
            files = {modality: folder / image_name(modality) for modality in MODALITIES}
            item = make_item(folder.name, folder.name, files, folder / mask_name(MODALITIES[0]))
            cases.append((item, files))
    return check_cases(cases, root, name, LAYOUT)
