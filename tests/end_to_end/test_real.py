# SPDX-License-Identifier: Apache-2.0
"""The shipped weights on real patients (``make test-real``)."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.cli.main import main
from scripts.utils.checksums import sha256

ROOT = Path(__file__).parents[2]
STS = ROOT.parent / "shared/data/sts"
real = pytest.mark.skipif(not STS.is_dir(), reason="the sarcoma patients (shared/data/sts) are not on this machine")


def test_the_shipped_weights_have_their_checksum() -> None:
    assert sha256(ROOT / "models/model.pt") == (ROOT / "models/model.pt.sha256").read_text().split()[0]


@real
@pytest.mark.real
def test_evaluation_of_the_validation_fold_gives_the_published_dice(tmp_path: Path) -> None:
    arguments = ["evaluate", "--data", "sts", "--dataset-dir", str(STS), "--fold", "0", "--output-dir", str(tmp_path)]
    assert main(arguments) == 0
    published = json.loads((ROOT / "docs/results/shipped/summary.json").read_text())["aggregate"]["metrics"]
    metrics = json.loads((tmp_path / "summary.json").read_text())["aggregate"]["metrics"]
    for metric in ("dice", "hd95_mm", "assd_mm"):
        assert metrics[metric]["defined"]["mean"] == pytest.approx(published[metric]["defined"]["mean"], rel=0.02)


@real
@pytest.mark.real
def test_segment_brings_the_mask_to_the_reference_grid_whichever_file_is_the_finest(tmp_path: Path) -> None:
    case = STS / "STS_002"
    output = tmp_path / "mask.nii.gz"
    files = ["--ct", "CT_image.nii.gz", "--pet", "PET_image.nii.gz", "--mr", "MR_T1_image.nii.gz"]
    arguments = [str(case / part) if part.endswith(".gz") else part for part in files]
    assert main(["segment", *arguments, "--output", str(output)]) == 0
    mask, reference = nib.load(output), nib.load(case / "CT_image.nii.gz")
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-3)
    assert np.asarray(mask.dataobj).any()
