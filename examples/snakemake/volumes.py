# SPDX-License-Identifier: Apache-2.0
"""Write the foreground volume of masks as a table: ``python examples/snakemake/volumes.py TABLE MASK...``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import nibabel as nib
import numpy as np


def volume_ml(mask: str) -> float:
    """Volume of the foreground of a mask in ml."""
    image = nib.load(mask)
    voxel_mm3 = abs(np.linalg.det(image.affine[:3, :3]))
    return float(np.count_nonzero(image.dataobj) * voxel_mm3 / 1000)


if __name__ == "__main__":
    table, *masks = sys.argv[1:]
    rows = [(Path(mask).name.removesuffix(".nii.gz"), f"{volume_ml(mask):.2f}") for mask in masks]
    with Path(table).open("w", newline="") as file:
        csv.writer(file).writerows([("case_id", "volume_ml"), *rows])
