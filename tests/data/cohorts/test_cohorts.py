# SPDX-License-Identifier: Apache-2.0
"""The data sets' readers, on small trees of empty files and on the real samples where they are present."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.data.case_list import DATASETS, FIXED, datalist

SAMPLES = Path(__file__).parents[3].parent / "shared" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the real samples are not in {SAMPLES}")
HEADER = "PatientID,x1,x2,y1,y2,z1,z2\n"


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def sts_case(root: Path, case: str, *names: str) -> None:
    touch(*(root / case / f"{name}.nii.gz" for name in names or ("CT_image", "PET_image", "MR_T1_image", "CT_mask")))


def hecktor_case(folder: Path, patient: str, *suffixes: str) -> None:
    touch(*(folder / f"{patient}_{suffix}.nii.gz" for suffix in suffixes or ("ct", "pt", "gtvt")))


def picai_case(folder: Path, case: str, *names: str) -> None:
    patient = case.split("_")[0]
    touch(*(folder / patient / f"{case}_{name}.mha" for name in names or ("t2w", "adc", "hbv")))


@pytest.mark.parametrize("root", ["", None])
@pytest.mark.parametrize("name", DATASETS)
def test_without_a_root_there_are_no_cases(name: str, root: str | None) -> None:
    assert datalist(name, root) == []


def test_an_unknown_data_set_is_refused_with_the_valid_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'brats'.*phantom, sts, hecktor21, picai22"):
        datalist("brats", tmp_path)


@pytest.mark.parametrize("name", FIXED)
def test_a_folder_that_does_not_exist_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist. Expected: .*(CT|ct|t2w)"):
        datalist(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", FIXED)
def test_a_layout_is_refused_where_it_is_fixed(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"layout of the data set '{name}' is fixed\. Remove layout"):
        datalist(name, tmp_path, layout={"ct": "{case}.nii.gz"})


@pytest.mark.parametrize("name", FIXED)
def test_a_folder_without_a_case_is_named_with_the_expected_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"No cases.*{tmp_path.name}. Expected: .*(CT|ct|t2w)"):
        datalist(name, str(tmp_path))


def test_an_sts_item_has_the_reference_as_image_and_every_modality_on_disk(tmp_path: Path) -> None:
    sts_case(tmp_path, "STS_002", "CT_image", "PET_image")
    sts_case(tmp_path, "STS_001")
    touch(tmp_path / "._STS_001", tmp_path / "STS_001" / "._CT_image.nii.gz", tmp_path / "notes" / "readme.txt")
    first, second = datalist("sts", str(tmp_path))
    assert first == {
        "case_id": "STS_001",
        "patient_id": "STS_001",
        "image": str(tmp_path / "STS_001" / "CT_image.nii.gz"),
        "ct": str(tmp_path / "STS_001" / "CT_image.nii.gz"),
        "pet": str(tmp_path / "STS_001" / "PET_image.nii.gz"),
        "mr": str(tmp_path / "STS_001" / "MR_T1_image.nii.gz"),
        "label": str(tmp_path / "STS_001" / "CT_mask.nii.gz"),
    }
    assert sorted(second) == ["case_id", "ct", "image", "patient_id", "pet"]


def test_a_missing_reference_lists_every_missing_image_of_the_cohort(tmp_path: Path) -> None:
    sts_case(tmp_path, "STS_001", "CT_image", "MR_T1_image")
    sts_case(tmp_path, "STS_002", "PET_image", "MR_T1_image")
    (tmp_path / "STS_003").mkdir()
    with pytest.raises(FileNotFoundError, match=r"5 image file\(s\)") as caught:
        datalist("sts", tmp_path)
    for missing in ("STS_001/PET_image", "STS_002/CT_image", *(f"STS_003/{m}_image" for m in ("CT", "PET", "MR_T1"))):
        assert missing in str(caught.value)
    assert "STS_001/CT_image" not in str(caught.value)


def test_a_dot_underscore_file_is_no_reference(tmp_path: Path) -> None:
    hecktor_case(tmp_path, "CHUM001", "pt")
    touch(tmp_path / "._CHUM001_ct.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"1 image file.*: \S+CHUM001_ct\.nii\.gz\."):
        datalist("hecktor21", tmp_path)


@pytest.mark.parametrize("inside", ["hecktor2021_train/hecktor_nii", "hecktor_nii", "."])
def test_hecktor_is_found_from_each_of_its_folders(inside: str, tmp_path: Path) -> None:
    folder = (tmp_path / "data" / inside).resolve()
    hecktor_case(folder, "CHUM001")
    hecktor_case(folder, "CHUP012", "ct")
    (folder.parent / "hecktor2021_bbox_training.csv").write_text(HEADER + "CHUM001,1,2,3,4,5,6\n")
    touch(folder / "._CHUM001_ct.nii.gz", folder / "._CHGJ001_ct.nii.gz")
    first, second = datalist("hecktor21", tmp_path / "data")
    assert (first["centre"], first["patient_id"], second["centre"]) == ("CHUM", "CHUM001", "CHUP")
    assert first["image"] == first["ct"] != first["pet"]
    assert first["label"].endswith("CHUM001_gtvt.nii.gz")
    assert first["bbox_mm"] == [1, 3, 5, 2, 4, 6]
    assert not {"pet", "label", "bbox_mm"} & set(second)


def test_boxes_are_read_by_column_name(tmp_path: Path) -> None:
    hecktor_case(tmp_path / "hecktor_nii", "CHUM001")
    table = tmp_path / "hecktor2021_bbox_training.csv"
    table.write_text("\ufeffz2, z1,y2,y1,x2,x1,note,PatientID\n6,5,4,3,2,1,,CHUM001\n", encoding="utf-8")
    assert datalist("hecktor21", tmp_path)[0]["bbox_mm"] == [1, 3, 5, 2, 4, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PatientID,x1,x2,y1,y2,z1\nCHUM001,1,2,3,4,5\n", r"has no column\(s\) z2"),
        (HEADER + "CHUM001,1,2,3,4,5,6\nCHUM001,1,2,3,4,5,7\n", "two boxes for CHUM001"),
        (HEADER + "CHUM001,2,1,3,4,5,6\n", "no valid box for CHUM001"),
        (HEADER + "CHUM001,1,2,3,4,5\n", "no valid box for CHUM001"),
        (HEADER + "CHUM001,1,2,3,4,5,nan\n", "no valid box for CHUM001"),
    ],
)
def test_an_invalid_table_of_boxes_is_refused(text: str, message: str, tmp_path: Path) -> None:
    hecktor_case(tmp_path / "hecktor_nii", "CHUM001")
    (tmp_path / "hecktor2021_bbox_training.csv").write_text(text)
    with pytest.raises(ValueError, match=f"hecktor2021_bbox_training.csv .*{message}"):
        datalist("hecktor21", tmp_path)


def test_picai_studies_are_found_in_any_folder_and_keep_their_patient(tmp_path: Path) -> None:
    picai_case(tmp_path / "images" / "public_images_fold0", "10001_1000002")
    picai_case(tmp_path / "images" / "public_images_fold3", "10001_1000001", "t2w", "hbv", "cor", "sag")
    human = tmp_path / "picai_labels" / "csPCa_lesion_delineations" / "human_expert" / "resampled"
    machine = tmp_path / "picai_labels" / "csPCa_lesion_delineations" / "AI" / "Bosma22a"
    touch(human / "10001_1000002.nii.gz", machine / "10001_1000001.nii.gz", tmp_path / "images" / "._9_9_t2w.mha")
    first, second = datalist("picai22", tmp_path)
    assert [first["case_id"], second["case_id"]] == ["10001_1000001", "10001_1000002"]
    assert first["patient_id"] == second["patient_id"] == "10001"
    assert sorted(first) == ["case_id", "hbv", "image", "patient_id", "t2w"]  # neither ADC nor an AI's label
    assert second["image"] == second["t2w"]
    assert second["label"] == str(human / "10001_1000002.nii.gz")


def test_a_picai_study_in_two_folders_is_refused_with_both(tmp_path: Path) -> None:
    for fold in ("public_images_fold0", "public_images_fold1"):
        picai_case(tmp_path / fold, "10001_1000001")
    with pytest.raises(ValueError, match=r"10001_1000001 occurs twice.*fold0.*fold1"):
        datalist("picai22", tmp_path)


def test_a_picai_study_without_t2w_is_named(tmp_path: Path) -> None:
    picai_case(tmp_path / "images", "10001_1000001", "adc")
    with pytest.raises(FileNotFoundError, match=r"10001_1000001_hbv\.mha.*10001_1000001_t2w\.mha"):
        datalist("picai22", tmp_path)


@needs_samples
def test_the_sts_sample_has_38_complete_patients() -> None:
    items = datalist("sts", SAMPLES / "sts")
    assert len(items) == 38
    assert all({"image", "ct", "pet", "mr", "label"} <= set(item) for item in items)
    assert [item["case_id"] for item in items] == sorted(item["case_id"] for item in items)


@needs_samples
def test_the_hecktor_boxes_contain_the_tumours_in_lps() -> None:
    items = datalist("hecktor21", SAMPLES / "hecktor21")
    assert [item["centre"] for item in items] == ["STSA"] * 4
    for item in items:
        label = nib.Nifti1Image.from_filename(item["label"])
        voxel = np.argwhere(np.asarray(label.dataobj)).mean(axis=0)
        ras = label.affine[:3, :3] @ voxel + label.affine[:3, 3]
        low, high = np.reshape(item["bbox_mm"], (2, 3))
        assert np.all(low < ras * [-1, -1, 1])
        assert np.all(ras * [-1, -1, 1] < high)
        assert not (np.all(low < ras) and np.all(ras < high))  # in NIfTI's own frame it would lie outside


@needs_samples
def test_the_picai_sample_is_one_study_with_a_human_label() -> None:
    (item,) = datalist("picai22", SAMPLES / "picai22")
    assert (item["case_id"], item["patient_id"]) == ("11373_1001396", "11373")
    assert {"t2w", "adc", "hbv", "label"} <= set(item)
    assert "human_expert" in item["label"]
