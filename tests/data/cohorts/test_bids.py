# SPDX-License-Identifier: Apache-2.0
"""The reader of BIDS."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.data.case_list import ContradictionError, IncompleteError, datalist

LAYOUT = {"t1": "T1w", "t1ce": "ce-gd_T1w", "label": "*label-tumour_mask"}
MODALITIES = ["t1", "t1ce"]
Tree = Callable[..., Path]


def test_sessions_are_cases_of_a_patient(tree: Tree) -> None:
    root = tree(
        "sub-02/anat/sub-02_T1w.nii",
        *(f"sub-01/ses-{n}/anat/sub-01_ses-{n}_{name}.nii.gz" for n in "12" for name in ("T1w", "ce-gd_T1w")),
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.json",
        "derivatives/masks/sub-01/ses-2/anat/sub-01_ses-2_space-T1w_label-tumour_mask.nii.gz",
        "derivatives/masks/sub-01/ses-1/anat/sub-01_ses-1_label-tumour_mask.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_label-tumour_mask.nii.gz",
    )
    first, second, third = datalist("bids", root, modalities=MODALITIES, layout=LAYOUT)
    assert first == {
        "case_id": "sub-01_ses-1",
        "patient_id": "sub-01",
        "image": str(root / "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"),
        "t1": str(root / "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"),
        "t1ce": str(root / "sub-01/ses-1/anat/sub-01_ses-1_ce-gd_T1w.nii.gz"),
        "label": str(root / "sub-01/ses-1/anat/sub-01_ses-1_label-tumour_mask.nii.gz"),  # beside the images first
    }
    assert (second["case_id"], second["patient_id"]) == ("sub-01_ses-2", "sub-01")
    assert second["label"].endswith("masks/sub-01/ses-2/anat/sub-01_ses-2_space-T1w_label-tumour_mask.nii.gz")
    assert third == {
        "case_id": "sub-02",
        "patient_id": "sub-02",
        "image": str(root / "sub-02/anat/sub-02_T1w.nii"),
        "t1": str(root / "sub-02/anat/sub-02_T1w.nii"),
    }


def test_two_files_for_one_modality_are_refused_with_both_names(tree: Tree) -> None:
    root = tree("sub-1/anat/sub-1_T1w.nii", "sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii")
    message = r"Case sub-1 has 2 files for t1, \S+sub-1_T1w\.nii and \S+sub-1_T1w\.nii\.gz\. Remove one"
    with pytest.raises(ContradictionError, match=message):
        datalist("bids", root, modalities=["t1"], layout={"t1": "T1w"})


def test_a_file_that_fits_two_patterns_belongs_to_the_more_specific_one(tree: Tree) -> None:
    root = tree("sub-1/anat/sub-1_acq-3d_T1w.nii.gz", "sub-1/anat/sub-1_ce-gd_T1w.nii.gz")
    (item,) = datalist("bids", root, modalities=MODALITIES, layout={"t1": "*T1w", "t1ce": "ce-gd_T1w"})
    assert (Path(item["t1"]).name, Path(item["t1ce"]).name) == ("sub-1_acq-3d_T1w.nii.gz", "sub-1_ce-gd_T1w.nii.gz")


def test_a_case_without_its_reference_is_named(tree: Tree) -> None:
    root = tree("sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_ce-gd_T1w.nii.gz")
    with pytest.raises(IncompleteError, match=r"sub-2/\*/sub-2_T1w\.nii\.gz") as caught:
        datalist("bids", root, modalities=MODALITIES, layout=LAYOUT)
    assert [case["case_id"] for case in caught.value.cases] == ["sub-1"]


def test_subjects_that_do_not_fit_the_layout_are_logged(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    root = tree("sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_run-1_T1w.nii.gz")
    with caplog.at_level(logging.WARNING, "scripts"):
        assert len(datalist("bids", root, modalities=["t1"], layout={"t1": "T1w"})) == 1
    assert "fits the layout, so they are not read: sub-2" in caplog.text


def test_a_wrong_layout_and_an_empty_folder_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layout has no pattern for t1\. Add one, such as \"T1w\""):
        datalist("bids", tmp_path, modalities=["t1"], layout={})
    with pytest.raises(FileNotFoundError, match=r"No cases of the data set 'bids'.*Expected: sub-X"):
        datalist("bids", tmp_path, modalities=["t1"], layout={"t1": "T1w"})


@pytest.mark.parametrize(
    "missing", ["sub-2/anat/sub-2_T1w.nii", "derivatives/m/sub-2/anat/sub-2_label-tumour_mask.nii"]
)
def test_links_to_nothing_are_missing_files(missing: str, tree: Tree) -> None:
    """As a data set of git-annex holds them before its files are fetched."""
    files = [f"sub-{n}/anat/sub-{n}_T1w.nii" for n in (1, 2)]
    root = tree(*files, *(f"derivatives/m/sub-{n}/anat/sub-{n}_label-tumour_mask.nii" for n in (1, 2)))
    (root / missing).unlink()
    (root / missing).symlink_to("nowhere.nii")
    with pytest.raises((IncompleteError, ContradictionError), match=missing):
        datalist("bids", root, modalities=["t1"], layout={key: LAYOUT[key] for key in ("t1", "label")})
