# SPDX-License-Identifier: Apache-2.0
"""A cohort as a table: read as it is written, refused where it leads astray, and used by every verb that takes one."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from scripts.cli.main import main
from scripts.data.case_list import source_files
from scripts.data.case_table import read_list
from scripts.networks import Student

KEYS = ["ct", "pet", "mr", "image", "label"]
SHAPE = (18, 16, 16)
TINY = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[16,16,16]", "--set", "spacing=[6,6,6]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
]  # fmt: skip
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
Row = dict[str, Any]


def write_table(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps({"training": rows} if path.stem == "monai" else rows))
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["list.csv", "list.json", "monai.json"])
def test_a_table_gives_its_cases_with_paths_below_its_own_folder(name: str, tmp_path: Path) -> None:
    rows = [
        {"case_id": "A-1", "patient_id": "P1", "ct": "a/ct.nii.gz", "pet": "", "label": "a/../b/label.nii.gz"},
        {"case_id": "", "patient_id": "", "ct": "", "pet": "second.nii.gz", "label": ""},
    ]
    assert read_list(write_table(tmp_path / name, rows), "", KEYS) == [
        {
            "case_id": "A-1", "patient_id": "P1", "image": f"{tmp_path}/a/ct.nii.gz", "ct": f"{tmp_path}/a/ct.nii.gz",
            "label": f"{tmp_path}/a/../b/label.nii.gz",
        },
        {
            "case_id": "second", "patient_id": "second", "image": f"{tmp_path}/second.nii.gz",
            "pet": f"{tmp_path}/second.nii.gz",
        },
    ]  # fmt: skip


def test_paths_are_relative_to_the_root_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    table = write_table(tmp_path / "lists" / "list.csv", [{"image": "ct.nii.gz"}])
    assert read_list(table, tmp_path / "data", KEYS)[0]["image"] == str(tmp_path / "data" / "ct.nii.gz")


def test_a_table_of_a_spreadsheet_is_read_with_its_mark_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("\ufeffcase_id, ct\r\nÄ1, a.nii.gz\r\n".encode())
    (item,) = read_list(tmp_path / "list.csv", "", KEYS)
    assert (item["case_id"], item["ct"]) == ("Ä1", str(tmp_path / "a.nii.gz"))


@pytest.mark.parametrize(("name", "box"), [("list.csv", "1 2 3.5 4 5 6"), ("list.json", [1, 2, 3.5, 4, 5, 6])])
def test_a_bounding_box_is_six_numbers_and_two_crops_of_an_image_may_be_two_cases(
    name: str, box: Any, tmp_path: Path
) -> None:
    other = "0 0 0 1 1 1" if name.endswith("csv") else [0, 0, 0, 1, 1, 1]
    rows = [{"case_id": "A", "ct": "ct.nii", "bbox_mm": box}, {"case_id": "B", "ct": "ct.nii", "bbox_mm": other}]
    assert [item["bbox_mm"] for item in read_list(write_table(tmp_path / name, rows), "", KEYS)] == [
        [1.0, 2.0, 3.5, 4.0, 5.0, 6.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
    ]  # fmt: skip


def test_an_image_may_repeat_the_reference_and_two_crops_may_share_all_files(tmp_path: Path) -> None:
    files = {"image": "ct.nii", "ct": "x/../ct.nii", "pet": "pet.nii", "label": "l.nii"}
    boxes = {"A": "0 0 0 1 1 1", "B": "1 1 1 2 2 2", "C": ""}
    rows = [{"case_id": case, **files, "bbox_mm": box} for case, box in boxes.items()]
    rows[1]["ct"] = ""  # the reference by the image's column alone
    items = read_list(write_table(tmp_path / "list.csv", rows), "", KEYS)
    assert [item["case_id"] for item in items] == ["A", "B", "C"]
    assert {item["pet"] for item in items} == {str(tmp_path / "pet.nii")}


A, B = {"case_id": "A", "ct": "a.nii"}, {"case_id": "B", "ct": "b.nii"}
UNFIT = {
    "..": ([A, {**B, "mr": "../mr.nii"}], "case 2, mr: ../mr.nii leads out of"),
    ".. inside": ([{**A, "label": "x/../../l.nii"}], "case 1, label: x/../../l.nii leads out of"),
    "absolute": ([{**A, "pet": "/data/pet.nii"}], "case 1, pet: /data/pet.nii is absolute"),
    "link": ([{**A, "ct": "link/ct.nii"}], "case 1, ct: link/ct.nii leads out of"),
    "id that climbs": ([{**A, "case_id": "../x"}], "case 1: '../x' cannot be a file's name"),
    "id with a slash": ([B, {**A, "case_id": "x/y"}], "case 2: 'x/y' cannot be a file's name"),
    "id with a space": ([{**A, "case_id": "x y"}], "case 1: 'x y' cannot be a file's name"),
    "id that is hidden": ([{**A, "case_id": ".x"}], "case 1: '.x' cannot be a file's name"),
    "duplicate id": ([A, B, {**A, "ct": "c.nii"}], "lists the case A twice, as cases 1 and 3: keep one"),
    "duplicate image": (
        [A, B, {**B, "case_id": "C"}],
        "b.nii twice, as ct of case 2 (B) and as ct of case 3 (C): keep",
    ),
    "a file in two spellings": (
        [A, {**B, "ct": "x/../a.nii"}],
        "a.nii twice, as ct of case 1 (A) and as ct of case 2 (B)",
    ),
    "a label as an image": (
        [{**A, "mr": "l.nii", "label": "./l.nii"}],
        "l.nii twice, as mr of case 1 (A) and as label of",
    ),
    "the label as reference": (
        [{"image": "l.nii", "label": "l.nii"}],
        "l.nii twice, as ct of case 1 (l) and as label of",
    ),
    "two modalities": ([B, {**A, "pet": "y/../a.nii"}], "a.nii twice, as ct of case 2 (A) and as pet of case 2 (A)"),
    "another's PET": ([{**A, "pet": "p.nii"}, {**B, "mr": "p.nii"}], "as pet of case 1 (A) and as mr of case 2 (B)"),
    "another's label": ([{**A, "label": "p.nii"}, {**B, "label": "p.nii"}], "as label of case 1 (A) and as label of"),
    "two crops, two modalities": (
        [{**A, "bbox_mm": "0 0 0 1 1 1"}, {**B, "pet": "a.nii", "bbox_mm": "1 1 1 2 2 2"}],
        "as ct of case 1 (A) and as pet",
    ),
    "a crop twice": (
        [{**A, "bbox_mm": "0 0 0 1 1 1"}, {"case_id": "B", "ct": "a.nii", "bbox_mm": "0 0 0 1 1 1.0"}],
        "as ct of case 2 (B)",
    ),
    "unknown columns": ([{**A, "t2w": "t.nii", "x": "1"}], "case 1: unknown column t2w, x: use case_id, patient_id"),
    "no image": ([A, {"case_id": "B", "label": "b.nii"}], "case 2 names no image: fill in one of ct, pet, mr, image"),
    "box": ([{**A, "bbox_mm": "1 2 3"}], "case 1: bbox_mm is '1 2 3': give x1 y1 z1 x2 y2 z2"),
    "box of NaN": ([{**A, "bbox_mm": "0 0 0 1 1 nan"}], "case 1: bbox_mm is '0 0 0 1 1 nan': give x1 y1 z1 x2 y2 z2"),
    "NUL in a path": ([A, {**B, "pet": "p\0.nii"}], "case 2, pet holds a character that no text has (NUL)"),
    "NUL elsewhere": ([{**A, "centre": "x\0"}], "case 1, centre holds a character that no text has (NUL)"),
    "nothing": ([], "lists no case"),
}
UNREADABLE = {
    "list.csv": (b"case_id,ct\nA,a.nii,b.nii\n", "case 1 has more cells than the table has columns"),
    "half.json": (b'[{"ct": "a.nii"', "half.json is no readable table"),
    "one.json": (b'{"ct": "a.nii"}', "one.json holds no list of cases"),
    "names.json": (b'["a.nii", "b.nii"]', "names.json holds no list of cases"),
    "latin.csv": ("case_id,ct\nA,\u00e4.nii\n".encode("latin-1"), "latin.csv is no readable table"),
    "twice.csv": (
        b"case_id,ct,pet,ct\nA,a.nii,,b.nii\n",
        "twice.csv is no readable table (the column 'ct' occurs twice)",
    ),
    "twice.json": (
        b'[{"ct": "a.nii", "ct": "b.nii"}]',
        "twice.json is no readable table (the column 'ct' occurs twice)",
    ),
    "deep.json": (b"[" * 100_000, "deep.json is no readable table (maximum recursion depth"),
    "half a pair.json": (b'[{"ct": "\\ud800.nii"}]', "case 1, ct holds a character that no text has"),
    "list.xlsx": (b"PK\x03\x04\x14\x00\xff\xfe", "list.xlsx is no readable table"),
}


def refusal(arguments: list[Any], capsys: pytest.CaptureFixture[str], output: Path | None = None) -> str:
    """The one sentence of a refusal that leaves nothing behind."""
    assert main([str(each) for each in arguments]) == 1
    errors = capsys.readouterr().err
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "Traceback" not in errors
    assert output is None or [path.name for path in output.rglob("*") if not path.name.startswith(".")] == []
    return told[0]


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("fault", UNFIT)
def test_a_table_that_leads_astray_is_refused_with_its_name_and_the_row(
    fault: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, words = UNFIT[fault]
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    table = write_table(tmp_path / "root" / f"list.{suffix}", rows)
    out = tmp_path / "out"
    told = refusal(["train", *TINY, "--data-list", table, "--output-dir", out], capsys, out)
    assert str(table) in told
    assert words in told


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_table_is_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    assert words in refusal(["train", *TINY, "--data-list", tmp_path / name, "--output-dir", out], capsys, out)


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_table_that_is_not_there_is_refused_by_name(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = refusal([verb, *TINY, "--data-list", tmp_path / "none.csv", "--output-dir", out], capsys, out)
    assert f"There is no data list at {tmp_path / 'none.csv'}" in told


def test_ways_out_of_the_folder_are_open_where_they_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    row = {"case_id": "A", "ct": "../ct.nii", "pet": "/data/pet.nii", "mr": "link/mr.nii"}
    (item,) = read_list(write_table(tmp_path / "root" / "list.json", [row]), "", KEYS, allow_outside=True)
    assert (tmp_path / "ct.nii").resolve() == Path(item["ct"]).resolve()
    assert item["pet"] == "/data/pet.nii"
    assert Path(item["mr"]).resolve() == tmp_path.resolve() / "mr.nii"


def write_dicom(folder: Path, voxels: np.ndarray) -> None:
    """A CT whose grid is ``LPS diag(3, 3, 3)`` from the origin, as that of the NIfTI files here."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(voxels.shape[2]):
        image = sitk.GetImageFromArray(voxels[:, :, k].T[None])
        image.SetSpacing((3.0, 3.0, 3.0))
        tags = {
            "0020|000d": "1.2.3.1",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{k}",
            "0008|0016": CT_STORAGE,
            "0020|0032": f"0\\0\\{3 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(image)


@pytest.fixture
def listed(tmp_path: Path) -> list[Row]:
    """Six cases of noise below ``data``; the rows of their table, the CT of case F a folder of DICOM files."""
    rng, rows, affine = np.random.default_rng(0), [], np.diag([-3.0, -3, 3, 1])
    for case in "ABCDEF":
        folder = tmp_path / "data" / case
        folder.mkdir(parents=True)
        label = np.zeros(SHAPE, np.uint8)
        label[5:10, 5:10, 5:10] = 1
        volumes = {
            "ct": rng.integers(-900, 900, SHAPE).astype(np.int16), "pet": rng.uniform(0, 9, SHAPE).astype(np.float32),
            "mr": rng.uniform(0, 900, SHAPE).astype(np.float32), "label": label,
        }  # fmt: skip
        if case == "F":
            write_dicom(folder / "ct", volumes.pop("ct"))
        for key, voxels in volumes.items():
            nib.save(nib.Nifti1Image(voxels, affine), folder / f"{key}.nii")
        paths = {key: f"{case}/{key}.nii" for key in ("ct", "pet", "mr", "label")}
        rows.append({"case_id": case, "patient_id": f"P{case}", **paths})
    rows[-1]["ct"] = "F/ct"
    return rows


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of the tiny student, random."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save({"model": Student(3, 2, (4, 8, 8, 8), norm=("group", {"num_groups": 4})).state_dict()}, path)
    return path


def test_a_table_is_trained_on_evaluated_and_checked_folders_of_dicom_files_included(
    listed: list[Row], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "data" / "list.csv", listed)
    shared = [*TINY, "--data-list", str(table), "--output-dir"]
    assert main(["train", *shared, str(tmp_path / "trained"), "--epochs", "1"]) == 0
    assert (tmp_path / "trained" / "model.pt").is_file()
    folds = json.loads((tmp_path / "trained" / "splits.json").read_text())["folds"]
    assert sorted(patient for fold in folds for patient in fold) == [f"P{case}" for case in "ABCDEF"]
    assert main(["evaluate", *shared, str(tmp_path / "scored"), "--weights", str(weights)]) == 0
    masks = sorted((tmp_path / "scored" / "masks").iterdir())
    assert [path.name for path in masks] == [f"{case}.nii.gz" for case in "ABCDEF"]
    for mask in map(nib.load, masks):
        assert mask.shape == SHAPE
        np.testing.assert_allclose(mask.affine, np.diag([-3.0, -3, 3, 1]), atol=1e-5)
    assert (tmp_path / "scored" / "report.html").is_file()
    assert main(["check", *shared[:-1], "--workers", "1"]) == 0
    assert "6 cases: 0 errors" in capsys.readouterr().out


def test_paths_that_lead_out_are_used_where_they_are_allowed(
    listed: list[Row], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lists").mkdir()
    keys = ("ct", "pet", "mr", "label")
    rows = [{**row, **{key: f"../data/{row[key]}" for key in keys}} for row in listed[:2]]
    rows[1]["ct"] = str(tmp_path / "data" / "B" / "ct.nii")
    table = write_table(tmp_path / "lists" / "list.json", rows)
    arguments = [
        "evaluate", *TINY, "--data-list", table, "--weights", weights, "--output-dir", tmp_path / "out",
    ]  # fmt: skip
    told = refusal(arguments, capsys, tmp_path / "out")
    assert "case 1, ct: ../data/A/ct.nii leads out of" in told
    assert "--allow-outside" in told
    assert main([str(each) for each in (*arguments, "--allow-outside")]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["A.nii.gz", "B.nii.gz"]


def test_files_in_a_folder_of_dicom_files_count_as_a_cases_files(listed: list[Row], tmp_path: Path) -> None:
    """A cache of preprocessed cases is known by them, so that a slice that changes makes it anew."""
    table = write_table(tmp_path / "data" / "list.csv", listed)
    found = source_files(read_list(table, "", KEYS)[-1])
    assert found["ct/3.dcm"] == tmp_path / "data" / "F" / "ct" / "3.dcm"
    assert sum(key.startswith("ct/") for key in found) == SHAPE[2]


@pytest.fixture
def incomplete(listed: list[Row], tmp_path: Path) -> Path:
    """A table that names five files which are not there, one of each kind, and leaves out an MR and a CT."""
    for name in ("A/pet.nii", "B/mr.nii", "C/label.nii", "D/ct.nii", "D/pet.nii"):
        (tmp_path / "data" / name).unlink()
    return write_table(tmp_path / "data" / "list.csv", [*listed[:4], {**listed[4], "mr": ""}, {**listed[5], "ct": ""}])


def test_all_missing_files_and_keys_of_a_cohort_are_named_at_once_by_train_and_evaluate(
    incomplete: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for verb in (["train"], ["evaluate", "--weights", weights]):
        told = refusal([*verb, *TINY, "--data-list", incomplete, "--output-dir", out], capsys, out)
        for words in ("Case A", "A/pet.nii", "B/mr.nii", "C/label.nii", "D/ct.nii", "D/pet.nii", "(E: mr)"):
            assert words in told
        assert "Case F needs 'image' or 'ct'" in told
        for words in ("A/ct.nii", "B/pet.nii", "C/ct.nii", "E/ct.nii", "D/label.nii"):
            assert words not in told
        assert "Add the files, or take these cases out" in told


def test_all_cases_without_a_label_are_named_before_a_training(
    listed: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in listed[1:3]:
        row["label"] = ""
    table, out = write_table(tmp_path / "data" / "list.csv", listed), tmp_path / "out"
    told = refusal(["train", *TINY, "--data-list", table, "--output-dir", out], capsys, out)
    assert "Labels are absent (B; C): add the files, or take these cases out." in told


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_absent_modalities_are_read_as_zeros_where_it_is_allowed_and_named(
    verb: str, listed: list[Row], weights: Path, tmp_path: Path, caplog: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    listed[1]["mr"], listed[3]["pet"] = "", ""
    table, out = write_table(tmp_path / "data" / "list.csv", listed), tmp_path / "out"
    more = ["--epochs", "1"] if verb == "train" else ["--weights", weights]
    arguments = [verb, *TINY, "--data-list", table, "--output-dir", out, *more]
    told = refusal(arguments, capsys, out)
    assert (
        "Modalities are absent (B: mr; D: pet): add the files, or allow it by --allow_missing True (--allow-missing)."
        in told
    )
    with caplog.at_level(logging.WARNING):
        assert main([str(each) for each in (*arguments, "--allow-missing")]) == 0
    assert "absent modalities, read as zeros: B: mr; D: pet" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        ([["PA", "PB"], ["PC", "PB", "PD"], ["PE", "PF"]], "names patients more than once: PB (folds 0, 1)"),
        ([["PA", "PB", "PA"], ["PC", "PD", "PE", "PF"]], "names patients more than once: PA (folds 0, 0)"),
    ],
)
def test_a_patient_in_two_folds_is_refused_with_both_places(
    folds: list[list[str]], words: str, listed: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out, splits = write_table(tmp_path / "data" / "list.csv", listed), tmp_path / "out", tmp_path / "splits.json"
    splits.write_text(json.dumps({"seed": 0, "folds": folds}))
    told = refusal(
        ["train", *TINY, "--data-list", table, "--output-dir", out, "--set", f"splits_file={splits}"], capsys, out
    )
    assert str(splits) in told
    assert words in told


def test_a_patient_with_two_cases_of_a_table_is_never_on_both_sides_of_a_fold(
    listed: list[Row], tmp_path: Path
) -> None:
    from scripts.data.folds import fold_split

    for row in listed:
        row["patient_id"] = "PA" if row["case_id"] in "ADF" else f"P{row['case_id']}"
    cases = read_list(write_table(tmp_path / "data" / "list.csv", listed), "", KEYS)
    for fold in range(4):
        sides = [{case["patient_id"] for case in part} for part in fold_split(cases, fold, folds=4)]
        assert sides[0].isdisjoint(sides[1])
        assert sum(len(part) for part in fold_split(cases, fold, folds=4)) == 6
