# SPDX-License-Identifier: Apache-2.0
"""PI-CAI 2022: biparametric prostate MR (T2W, ADC, high b-value), with delineated clinically significant cancer.

    images/<patient>/<patient>_<study>_t2w.mha     the reference; a.u.
    images/<patient>/<patient>_<study>_adc.mha     1e-6 mm^2/s, on its own oblique grid
    images/<patient>/<patient>_<study>_hbv.mha     a.u.
    picai_labels/csPCa_lesion_delineations/human_expert/resampled/<patient>_<study>.nii.gz

The images may also lie in folders of the published folds (public_images_fold0/<patient>/...).

Labels are on the T2W grid. Some are shifted by up to 0.385 mm (less than half a voxel) and must be resampled. Their
values are 0, 2, 3, 4, 5 (the ISUP grade), some as float64; every value >= 1 is foreground. Only paths are listed here;
transforms map the values. A study without a human delineation has no `label`. The AI delineations (Bosma22a) are never
used instead, because a model would then be scored against another model.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from scripts.data.case_list import Item, check_cases, make_item, require_folder

MODALITIES = ("t2w", "adc", "hbv")  # the reference first
LABELS = Path("picai_labels/csPCa_lesion_delineations/human_expert/resampled")
LAYOUT = f"images/<patient>/<patient>_<study>_t2w.mha (reference), _adc.mha, _hbv.mha; labels in {LABELS.as_posix()}"


def datalist(root: Path, *_: object) -> list[Item]:
    """List the studies: keys `t2w` (reference), `adc`, `hbv`; `label` if there is a human delineation.

    `case_id` is "<patient>_<study>". Split by `patient_id`: 1476 patients have 1500 studies.

    Raises:
        FileNotFoundError: no folder, no study, or a study without T2W; the message names every missing image.
        ValueError: a study is in two folders.
    """
    root = require_folder(root, "picai22", LAYOUT)
    studies = set()
    # glob follows links, unlike Path.rglob, and skips "._" files (created by macOS)
    for path in map(root.joinpath, glob.iglob("**/*.mha", root_dir=root, recursive=True)):
        name = re.fullmatch(r"([^_]+)_([^_]+)_(t2w|adc|hbv)\.mha", path.name)
        if name:
            studies.add((path.parent, name[1], name[2]))
    cases = []
    for folder, patient, study in sorted(studies):
        case_id = f"{patient}_{study}"
        files = {modality: folder / f"{case_id}_{modality}.mha" for modality in MODALITIES}
        cases.append((make_item(case_id, patient, files, root / LABELS / f"{case_id}.nii.gz"), files))
    return check_cases(cases, root, "picai22", LAYOUT)
