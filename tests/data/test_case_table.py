# SPDX-License-Identifier: Apache-2.0
"""Case tables: parsed, refused if invalid, and used by every verb that accepts one."""

from __future__ import annotations

import csv
import json
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from scripts.cli.main import main
from scripts.data.case_list import source_files
from scripts.data.case_table import read_case_table
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
    assert read_case_table(write_table(tmp_path / name, rows), "", KEYS) == [
        {
            "case_id": "A-1", "patient_id": "P1", "image": f"{tmp_path}/a/ct.nii.gz", "ct": f"{tmp_path}/a/ct.nii.gz",
            "label": f"{tmp_path}/a/../b/label.nii.gz",
        },
        {
            "case_id": "second", "patient_id": "second", "image": f"{tmp_path}/second.nii.gz",
            "pet": f"{tmp_path}/second.nii.gz",
        },
    ]  # fmt: skip


def test_paths_are_relative_to_the_root_if_given(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    table = write_table(tmp_path / "lists" / "list.csv", [{"image": "ct.nii.gz"}])
    assert read_case_table(table, tmp_path / "data", KEYS)[0]["image"] == str(tmp_path / "data" / "ct.nii.gz")


def test_a_csv_of_a_spreadsheet_is_read_despite_its_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("\ufeffcase_id, ct\r\nÄ1, a.nii.gz\r\n".encode())
    (item,) = read_case_table(tmp_path / "list.csv", "", KEYS)
    assert (item["case_id"], item["ct"]) == ("Ä1", str(tmp_path / "a.nii.gz"))


@pytest.mark.parametrize(("name", "box"), [("list.csv", "1 2 3.5 4 5 6"), ("list.json", [1, 2, 3.5, 4, 5, 6])])
def test_a_bounding_box_is_six_numbers_and_two_crops_of_an_image_may_be_two_cases(
    name: str, box: Any, tmp_path: Path
) -> None:
    other = "0 0 0 1 1 1" if name.endswith("csv") else [0, 0, 0, 1, 1, 1]
    rows = [{"case_id": "A", "ct": "ct.nii", "bbox_mm": box}, {"case_id": "B", "ct": "ct.nii", "bbox_mm": other}]
    assert [item["bbox_mm"] for item in read_case_table(write_table(tmp_path / name, rows), "", KEYS)] == [
        [1.0, 2.0, 3.5, 4.0, 5.0, 6.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "modalities", "reference"),
    [
        ({"image": "a.nii.gz", "pet": "p.nii.gz"}, ["ct", "pet"], "a.nii.gz"),
        ({"image": "a.nii.gz"}, ["ct"], "a.nii.gz"),
        ({"image": "p.nii.gz", "pet": "p.nii.gz"}, ["ct", "pet"], None),  # the PET stands in for a missing CT
        ({"image": "a.nii.gz"}, ["ct", "pet"], None),  # a 4D file of all modalities
    ],
)
def test_an_image_that_is_no_other_modality_is_the_reference(
    row: dict[str, str], modalities: list[str], reference: str | None, tmp_path: Path
) -> None:
    (tmp_path / "t.json").write_text(json.dumps([{"case_id": "A", **row}]))
    (item,) = read_case_table(tmp_path / "t.json", "", [*modalities, "image", "label"])
    assert item.get("ct") == (None if reference is None else str(tmp_path / reference))


def test_an_image_may_repeat_the_reference_and_two_crops_may_share_all_files(tmp_path: Path) -> None:
    files = {"image": "ct.nii", "ct": "x/../ct.nii", "pet": "pet.nii", "label": "l.nii"}
    boxes = {"A": "0 0 0 1 1 1", "B": "1 1 1 2 2 2", "C": ""}
    rows = [{"case_id": case, **files, "bbox_mm": box} for case, box in boxes.items()]
    rows[1]["ct"] = ""  # the reference by the image's column alone
    items = read_case_table(write_table(tmp_path / "list.csv", rows), "", KEYS)
    assert [item["case_id"] for item in items] == ["A", "B", "C"]
    assert {item["pet"] for item in items} == {str(tmp_path / "pet.nii")}


ROWS = [["A", "P1", "a/ct.nii", "a/pet.nii", "a/label.nii"], ["B", "P2", "b/ct.nii", "b/pet.nii", "b/label.nii"]]
COLUMNS = ["case_id", "patient_id", "ct", "pet", "label"]
OBJECTS = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]


def joined(separator: str, end: str = "\n", rows: Any = (COLUMNS, *ROWS)) -> str:
    return "".join(separator.join(row) + end for row in rows)


WRITTEN = {
    "semicolon.csv": joined(";").encode(),
    "tab.csv": joined("\t").encode(),
    "tab.tsv": joined("\t").encode(),
    "bar.txt": joined("|").encode(),
    "excel.csv": ("sep=;\n" + joined(";")).encode(),
    "upper.CSV": joined(",").encode(),
    "upper.TSV": joined("\t").encode(),
    "upper.JSON": json.dumps(OBJECTS).encode(),
    "utf16.csv": joined(",").encode("utf-16"),
    "utf16 of excel.txt": joined("\t", "\r\n").encode("utf-16"),
    "big endian.csv": b"\xfe\xff" + joined(",").encode("utf-16-be"),
    "utf32.csv": joined(",").encode("utf-32"),
    "bom.json": json.dumps(OBJECTS).encode("utf-8-sig"),
    "utf16.json": json.dumps(OBJECTS).encode("utf-16"),
    "windows.csv": joined(",").replace("/", "\\").encode(),
    "windows.json": json.dumps(OBJECTS).replace("/", "\\\\").encode(),
    "old mac.csv": joined(",", "\r").encode(),
    "spaces.csv": joined(" , ", " \n").encode(),
    "spaces.json": json.dumps(OBJECTS).replace(".nii", ".nii ").replace("P1", " P1 ").encode(),
    "no-break spaces.csv": joined("\u00a0,").encode(),
    "commas.csv": joined(",", ",\n").encode(),
    "many commas.csv": joined(",", ",,,\n").encode(),
    "blank rows.csv": ("\n,,,,\n" + joined(",").replace("B,", ",,,,\n\nB,", 1) + ",,,,\n  \n").lstrip("\n,").encode(),
    "header.csv": joined(",", rows=(["Case ID", "Patient-ID", "CT", "Pet", "LABEL"], *ROWS)).encode(),
    "header.json": json.dumps([{key.upper(): value for key, value in each.items()} for each in OBJECTS]).encode(),
    "quoted.csv": joined(",", rows=[[f'"{cell}"' for cell in row] for row in (COLUMNS, *ROWS)]).encode(),
    "comment.csv": ("# made by hand\n\n# twice\n" + joined(",")).encode(),
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files that ``ROWS`` name; they are empty."""
    for row in ROWS:
        for name in row[2:]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("name", WRITTEN)
def test_tables_are_read_as_other_programs_write_them(name: str, files: Path) -> None:
    (files / name).write_bytes(WRITTEN[name])
    wanted = [{key: str(files / v) if "/" in v else v for key, v in each.items()} for each in OBJECTS]
    assert read_case_table(files / name, "", KEYS) == [{**each, "image": each["ct"]} for each in wanted]


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "NA", "n/a", "<NA>", "#N/A", ""])
def test_a_word_for_no_value_is_an_empty_cell(word: str, files: Path) -> None:
    (files / "list.csv").write_text(joined(",").replace("b/pet.nii", word))
    first, second = read_case_table(files / "list.csv", "", KEYS)
    assert ("pet" in first, "pet" in second) == (True, False)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_null_and_nan_of_a_json_are_empty_cells(value: Any, files: Path) -> None:
    rows = [OBJECTS[0], {**OBJECTS[1], "pet": value, "patient_id": value}]
    (files / "list.json").write_text(json.dumps(rows))
    second = read_case_table(files / "list.json", "", KEYS)[1]
    assert ("pet" in second, second["patient_id"]) == (False, "B")


def test_numbers_are_ids(files: Path) -> None:
    rows = [{**each, "case_id": number, "patient_id": 7} for number, each in enumerate(OBJECTS)]
    (files / "list.json").write_text(json.dumps(rows))
    assert [(each["case_id"], each["patient_id"]) for each in read_case_table(files / "list.json", "", KEYS)] == [
        ("0", "7"), ("1", "7"),
    ]  # fmt: skip


def test_a_path_with_spaces_or_a_backslash_of_its_own_is_kept(tmp_path: Path) -> None:
    for name in ("a\\b.nii", " c.nii "):
        (tmp_path / name).touch()
    (tmp_path / "list.json").write_text(
        json.dumps([{"case_id": "A", "ct": "a\\b.nii"}, {"case_id": "C", "ct": " c.nii "}])
    )
    items = read_case_table(tmp_path / "list.json", "", KEYS)
    assert [each["ct"] for each in items] == [f"{tmp_path}/a\\b.nii", f"{tmp_path}/ c.nii "]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_are_the_same_in_both_unicode_forms(forms: tuple[Any, Any], tmp_path: Path) -> None:
    """macOS decomposes the names of files. The case's id is composed, and its path is that on disk."""
    in_table, on_disk = (unicodedata.normalize(form, "M\u00fcller") for form in forms)
    (tmp_path / on_disk).mkdir()
    (tmp_path / on_disk / f"{on_disk}.nii").touch()
    (tmp_path / "list.csv").write_text(f"case_id,ct\n{in_table},{in_table}/{in_table}.nii\n", encoding="utf-8")
    (item,) = read_case_table(tmp_path / "list.csv", "", KEYS)
    assert (item["case_id"], item["patient_id"]) == ("M\u00fcller", "M\u00fcller")
    assert item["ct"] == f"{tmp_path}/{on_disk}/{on_disk}.nii"
    (tmp_path / "list.json").write_text(json.dumps([{"case_id": "A", "ct": "a"}, {"ct": f"{in_table}/{in_table}.nii"}]))
    assert read_case_table(tmp_path / "list.json", "", KEYS)[1]["case_id"] == "M\u00fcller"


def test_one_id_in_two_unicode_forms_is_a_duplicate(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("case_id,ct\n\u00fc,a.nii\nu\u0308,b.nii\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lists case \u00fc twice, as cases 1 and 2"):
        read_case_table(tmp_path / "list.csv", "", KEYS)


def test_a_short_row_and_a_list_that_is_not_read_are_reported(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    (files / "short.csv").write_text(joined(",").removesuffix(",b/label.nii\n"))
    assert "label" not in read_case_table(files / "short.csv", "", KEYS)[1]
    assert "case 2 has fewer cells than the table has columns: label is read as empty" in caplog.text
    (files / "monai.json").write_text(
        json.dumps({"training": OBJECTS, "test": ["x.nii"], "labels": {"0": "background"}})
    )
    assert len(read_case_table(files / "monai.json", "", KEYS)) == 2
    assert (
        "only the cases under 'training' are read, and divided into folds by patient. Not read: test (1)" in caplog.text
    )


A, B = {"case_id": "A", "ct": "a.nii"}, {"case_id": "B", "ct": "b.nii"}
INVALID = {
    "..": ([A, {**B, "mr": "../mr.nii"}], "case 2, mr: ../mr.nii leads out of"),
    ".. inside": ([{**A, "label": "x/../../l.nii"}], "case 1, label: x/../../l.nii leads out of"),
    "absolute": ([{**A, "pet": "/data/pet.nii"}], "case 1, pet: /data/pet.nii is absolute"),
    "link": ([{**A, "ct": "link/ct.nii"}], "case 1, ct: link/ct.nii leads out of"),
    "id that climbs": ([{**A, "case_id": "../x"}], "case 1: '../x' cannot be a file name"),
    "id with a slash": ([B, {**A, "case_id": "x/y"}], "case 2: 'x/y' cannot be a file name"),
    "id with a space": ([{**A, "case_id": "x y"}], "case 1: 'x y' cannot be a file name"),
    "id that is hidden": ([{**A, "case_id": ".x"}], "case 1: '.x' cannot be a file name"),
    "duplicate id": ([A, B, {**A, "ct": "c.nii"}], "lists case A twice, as cases 1 and 3. Keep one"),
    "duplicate image": (
        [A, B, {**B, "case_id": "C"}],
        "b.nii twice, as ct of case 2 (B) and as ct of case 3 (C). Keep",
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
    "unknown columns": ([{**A, "t2w": "t.nii", "x": "1"}], "case 1: unknown column t2w, x. Use case_id, patient_id"),
    "no image": ([A, {"case_id": "B", "label": "b.nii"}], "case 2 names no image. Fill in one of ct, pet, mr, image"),
    "box": ([{**A, "bbox_mm": "1 2 3"}], "case 1: bbox_mm is '1 2 3'. Give x1 y1 z1 x2 y2 z2"),
    "box of NaN": ([{**A, "bbox_mm": "0 0 0 1 1 nan"}], "case 1: bbox_mm is '0 0 0 1 1 nan'. Give x1 y1 z1 x2 y2 z2"),
    "NUL in a path": ([A, {**B, "pet": "p\0.nii"}], "case 2: pet contains an invalid character, such as NUL"),
    "NUL elsewhere": ([{**A, "centre": "x\0"}], "case 1: centre contains an invalid character, such as NUL"),
    "an id of no value": ([A, {**B, "case_id": "nan"}], "case 2: case_id is 'nan'. Fill it in, or leave it empty"),
    "a path of Windows": ([{**A, "pet": "C:\\data\\p.nii"}], "case 1, pet: C:\\data\\p.nii is a path of Windows"),
    "a server of Windows": ([{**A, "pet": "\\\\pacs\\x\\p.nii"}], "is a path of Windows. Give a path relative to"),
    ".. of Windows": ([{**A, "pet": "..\\p.nii"}], "case 1, pet: ../p.nii leads out of"),
    "folds": ([{**A, "fold": "0"}], "case 1: the column fold is not read, because folds are made by patient. Remove"),
    "nothing": ([], "lists no cases"),
}
UNREADABLE = {
    "utf16 without mark.csv": ("case_id,ct\nA,a.nii\n".encode("utf-16-le"), "it is not UTF-8 (every other byte is 0)"),
    "latin line.csv": ("case_id,ct\nA,b.nii\nB,\u00e4.nii\n".encode("latin-1"), "is not UTF-8 (line 3, byte 0xe4)"),
    "open quote.csv": (b'case_id,ct\nA,"a.nii\nB,b.nii\n', "is not a readable table (unexpected end of data)"),
    "index.csv": (b",case_id,ct\n0,A,a.nii\n", "case 1: '0' stands in a column without a name. Name or remove"),
    "late comment.csv": (b"case_id,ct\n# end\n", "case 1: '# end' is a comment. Write comments before the header"),
    "both spellings.csv": (b"case_id,ct,CT\nA,a.nii,b.nii\n", "(the column 'ct' occurs twice). Rename or remove one"),
    "list.json": (
        b'[{"image": ["a.nii", "b.nii"]}]',
        "case 1: image is a list of 2 files. Name each by its modality: ",
    ),
    "number.json": (b'[{"ct": 3}]', "case 1: ct is 3. Give the path of a file"),
    "bool.json": (b'[{"ct": "a", "case_id": true}]', "case 1: case_id is True. Give text or a number"),
    "validation.json": (
        b'{"training": [], "validation": [{"ct": "a.nii"}]}',
        "contains no list of cases under 'training', but others: validation (1). Only 'training' is read",
    ),
    "list.csv": (b"case_id,ct\nA,a.nii,b.nii\n", "case 1 has more cells than the table has columns"),
    "half.json": (b'[{"ct": "a.nii"', "half.json is not a readable table"),
    "one.json": (b'{"ct": "a.nii"}', "one.json contains no list of cases"),
    "names.json": (b'["a.nii", "b.nii"]', "names.json contains no list of cases"),
    "latin.csv": ("case_id,ct\nA,\u00e4.nii\n".encode("latin-1"), "latin.csv is not a readable table"),
    "twice.csv": (
        b"case_id,ct,pet,ct\nA,a.nii,,b.nii\n",
        "twice.csv is not a readable table (the column 'ct' occurs twice)",
    ),
    "twice.json": (
        b'[{"ct": "a.nii", "ct": "b.nii"}]',
        "twice.json is not a readable table (the column 'ct' occurs twice)",
    ),
    "deep.json": (b"[" * 100_000, "deep.json is not a readable table (maximum recursion depth"),
    "half a pair.json": (b'[{"ct": "\\ud800.nii"}]', "case 1: ct contains an invalid character"),
    "list.xlsx": (b"PK\x03\x04\x14\x00\xff\xfe", "list.xlsx is not a readable table"),
}


def refusal(arguments: list[Any], capsys: pytest.CaptureFixture[str], output: Path | None = None) -> str:
    """The error message of a verb that fails without writing a file."""
    assert main([str(each) for each in arguments]) == 1
    errors = capsys.readouterr().err
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "Traceback" not in errors
    assert output is None or [path.name for path in output.rglob("*") if not path.name.startswith(".")] == []
    return messages[0]


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_table_is_refused_with_its_name_and_the_row(fault: str, suffix: str, tmp_path: Path) -> None:
    rows, words = INVALID[fault]
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    table = write_table(tmp_path / "root" / f"list.{suffix}", rows)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        read_case_table(table, "", KEYS)
    assert str(table) in str(refused.value)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_not_a_table_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_case_table(tmp_path / name, "", KEYS)


def test_a_table_of_other_modalities_leads_to_a_task_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "cases.csv"
    table.write_text("case_id,t1,flair,label\nA,a.nii.gz,b.nii.gz,c.nii.gz\n")
    assert main(["check", "--data-list", str(table)]) == 1
    assert "For other modalities describe the data in a task file, for --data (docs/" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_every_verb_refuses_a_missing_or_invalid_table_by_name(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    missing, invalid = tmp_path / "none.csv", write_table(tmp_path / "list.csv", INVALID["duplicate id"][0])
    for table, words in ((missing, f"There is no data list at {missing}"), (invalid, f"{invalid} lists case A twice")):
        assert words in refusal([verb, *TINY, "--data-list", table, "--output-dir", out], capsys, out)


def test_paths_may_lead_out_of_the_folder_if_allowed(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    row = {"case_id": "A", "ct": "../ct.nii", "pet": "/data/pet.nii", "mr": "link/mr.nii"}
    (item,) = read_case_table(write_table(tmp_path / "root" / "list.json", [row]), "", KEYS, allow_outside=True)
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
    """The rows of a table of six cases of noise in ``data``; the CT of case F is a folder of DICOM files."""
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


def test_train_evaluate_and_check_use_a_table_that_names_a_dicom_folder(
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


def test_evaluate_reads_absent_modalities_and_paths_outside_the_folder_if_allowed(
    listed: list[Row], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    (tmp_path / "lists").mkdir()
    keys = ("ct", "pet", "mr", "label")
    rows = [{**row, **{key: f"../data/{row[key]}" for key in keys}} for row in listed[:2]]
    rows[1] |= {"ct": str(tmp_path / "data" / "B" / "ct.nii"), "mr": ""}
    table = write_table(tmp_path / "lists" / "list.json", rows)
    arguments = [
        "evaluate", *TINY, "--data-list", table, "--weights", weights, "--output-dir", tmp_path / "out",
    ]  # fmt: skip
    message = refusal(arguments, capsys, tmp_path / "out")
    assert "case 1, ct: ../data/A/ct.nii leads out of" in message
    assert "--allow-outside" in message
    message = refusal([*arguments, "--allow-outside"], capsys, tmp_path / "out")
    assert "Modalities are absent (B: mr). Add the files, or use --allow_missing True (--allow-missing)." in message
    assert main([str(each) for each in (*arguments, "--allow-outside", "--allow-missing")]) == 0
    assert "absent modalities, read as zeros: B: mr" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["A.nii.gz", "B.nii.gz"]


def test_the_files_of_a_dicom_folder_are_source_files_of_the_case(listed: list[Row], tmp_path: Path) -> None:
    """Stored preprocessed cases depend on them: a changed slice must cause a new file."""
    table = write_table(tmp_path / "data" / "list.csv", listed)
    found = source_files(read_case_table(table, "", KEYS)[-1])
    assert found["ct/3.dcm"] == tmp_path / "data" / "F" / "ct" / "3.dcm"
    assert sum(key.startswith("ct/") for key in found) == SHAPE[2]


@pytest.fixture
def incomplete(listed: list[Row], tmp_path: Path) -> Path:
    """A table that names five missing files, and leaves out an MR and a CT."""
    for name in ("A/pet.nii", "B/mr.nii", "C/label.nii", "D/ct.nii", "D/pet.nii"):
        (tmp_path / "data" / name).unlink()
    return write_table(tmp_path / "data" / "list.csv", [*listed[:4], {**listed[4], "mr": ""}, {**listed[5], "ct": ""}])


def test_all_missing_files_and_keys_of_a_cohort_are_named_at_once_by_train_and_evaluate(
    incomplete: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for verb in (["train"], ["evaluate", "--weights", weights]):
        message = refusal([*verb, *TINY, "--data-list", incomplete, "--output-dir", out], capsys, out)
        for words in ("Case A", "A/pet.nii", "B/mr.nii", "C/label.nii", "D/ct.nii", "D/pet.nii", "(E: mr)"):
            assert words in message
        assert "Case F has no ct, the reference modality" in message
        for words in ("A/ct.nii", "B/pet.nii", "C/ct.nii", "E/ct.nii", "D/label.nii"):
            assert words not in message
        assert "Add the files, or remove these cases from the list" in message


def test_all_cases_without_a_label_are_named_before_a_training(
    listed: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in listed[1:3]:
        row["label"] = ""
    table, out = write_table(tmp_path / "data" / "list.csv", listed), tmp_path / "out"
    message = refusal(["train", *TINY, "--data-list", table, "--output-dir", out], capsys, out)
    assert (
        "Labels are absent (B; C). Add the files, or remove these cases; distill takes them with --unlabelled."
        in message
    )


def test_train_reads_absent_modalities_as_zeros_if_allowed(
    listed: list[Row], tmp_path: Path, caplog: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    listed[1]["mr"], listed[3]["pet"] = "", ""
    table, out = write_table(tmp_path / "data" / "list.csv", listed), tmp_path / "out"
    arguments = ["train", *TINY, "--data-list", table, "--output-dir", out, "--epochs", "1"]
    message = refusal(arguments, capsys, out)
    assert (
        "Modalities are absent (B: mr; D: pet). Add the files, or use --allow_missing True (--allow-missing)."
        in message
    )
    with caplog.at_level(logging.WARNING):
        assert main([str(each) for each in (*arguments, "--allow-missing")]) == 0
    assert "absent modalities, read as zeros: B: mr; D: pet" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        ([["PA", "PB"], ["PC", "PB", "PD"], ["PE", "PF"]], "lists patients more than once: PB (folds 0, 1)"),
        ([["PA", "PB", "PA"], ["PC", "PD", "PE", "PF"]], "lists patients more than once: PA (folds 0, 0)"),
    ],
)
def test_a_patient_in_two_folds_is_refused_with_both_folds(
    folds: list[list[str]], words: str, listed: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out, splits = write_table(tmp_path / "data" / "list.csv", listed), tmp_path / "out", tmp_path / "splits.json"
    splits.write_text(json.dumps({"seed": 0, "folds": folds}))
    message = refusal(
        ["train", *TINY, "--data-list", table, "--output-dir", out, "--set", f"splits_file={splits}"], capsys, out
    )
    assert str(splits) in message
    assert words in message


def test_cases_of_one_patient_are_never_in_both_training_and_validation(listed: list[Row], tmp_path: Path) -> None:
    from scripts.data.folds import fold_split

    for row in listed:
        row["patient_id"] = "PA" if row["case_id"] in "ADF" else f"P{row['case_id']}"
    cases = read_case_table(write_table(tmp_path / "data" / "list.csv", listed), "", KEYS)
    for fold in range(4):
        training, validation = ({case["patient_id"] for case in part} for part in fold_split(cases, fold, folds=4))
        assert training.isdisjoint(validation)
        assert sum(len(part) for part in fold_split(cases, fold, folds=4)) == 6
