# SPDX-License-Identifier: Apache-2.0
"""``python examples/snakemake/volumes.py TABLE MASK...``: the foreground of each mask in ml, as a table."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import nibabel as nib
import numpy as np


def volume_ml(mask: str) -> float:
    """Foreground of a mask in ml."""
    image = nib.load(mask)
    voxel = abs(np.linalg.det(image.affine[:3, :3]))  # mm^3
    return float(np.count_nonzero(image.dataobj) * voxel / 1000)


if __name__ == "__main__":
    table, *masks = sys.argv[1:]
    with Path(table).open("w", newline="") as stream:
        rows = [(Path(mask).name.removesuffix(".nii.gz"), f"{volume_ml(mask):.2f}") for mask in masks]
        csv.writer(stream).writerows([("case_id", "volume_ml"), *rows])
