# SPDX-License-Identifier: Apache-2.0
"""``check`` lists every problem of a cohort, and keeps one volume in memory at a time."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.cli.main import main
from scripts.data import Rules, cohort_check, datalist
from scripts.image_io import reader

MODALITIES, LABELS = ["ct", "pet", "mr"], [[0], [1]]
Finding = dict[str, Any]


def check(data: str, folder: Path, found: Path, *more: str) -> tuple[int, list[Finding]]:
    """The verb's exit code, and the findings in its JSON file."""
    arguments = ["check", "--data", data, "--dataset-dir", str(folder), "--workers", "1", "--json", str(found)]
    code = main([*arguments, *more])
    return code, json.loads(found.read_text())["findings"]


def rewrite(path: Path, change: Callable[[Any], Any], **options: Any) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asanyarray(image.dataobj).copy()), image.affine, **options), path)


def put(value: float) -> Callable[[Any], Any]:
    def change(voxels: Any) -> Any:
        voxels = voxels.astype(np.float32)
        voxels[3, 4, 5] = value
        return voxels

    return change


@pytest.fixture
def faulty(cohort: Path, tmp_path: Path) -> Path:
    """The six phantoms. Five have one or more faults each, the fourth has none."""
    root = tmp_path / "faulty"
    shutil.copytree(cohort, root)
    one, two, three, five, six = (root / f"PHANTOM_{number:03d}" for number in (1, 2, 3, 5, 6))
    rewrite(one / "PET_image.nii.gz", put(np.nan))
    data = (one / "MR_T1_image.nii.gz").read_bytes()
    (one / "MR_T1_image.nii.gz").write_bytes(data[: len(data) // 2])
    rewrite(two / "CT_mask.nii.gz", lambda voxels: voxels * 7)
    rewrite(two / "MR_T1_image.nii.gz", lambda voxels: voxels * 0 + 5)
    (three / "PET_image.nii.gz").unlink()
    (three / "MR_T1_image.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\n")
    rewrite(five / "PET_image.nii.gz", lambda voxels: voxels * 5000)
    rewrite(five / "CT_mask.nii.gz", lambda voxels: voxels * 0)
    for path in six.glob("*_image.nii.gz"):
        rewrite(path, lambda voxels: voxels * 0)
    return root


EXPECTED = {  # level, case, file, words
    ("error", "PHANTOM_001", "pet", "PET_image.nii.gz: 1 of"),
    ("error", "PHANTOM_001", "mr", "MR_T1_image.nii.gz is truncated or damaged"),
    ("error", "PHANTOM_002", "label", "CT_mask.nii.gz contains the value 7"),
    ("warning", "PHANTOM_002", "mr", "(mr) is constant: every voxel is 5"),
    ("error", "PHANTOM_003", "", "pet is absent. Add it, or allow it with --allow-missing"),
    ("error", "PHANTOM_003", "mr", "is a Git LFS pointer"),
    ("warning", "PHANTOM_005", "pet", "is it in Bq/ml?"),
    ("note", "PHANTOM_005", "label", "is empty: no voxel is foreground"),
    ("error", "PHANTOM_006", "", "Every image of the case is constant"),
    *(("warning", "PHANTOM_006", key, f"({key}) is constant: every voxel is 0") for key in MODALITIES),
}


def summarised(findings: list[Finding]) -> set[tuple[str, str, str, str]]:
    """The findings with their expected words, or their full text if unexpected; notes on positions are left out."""
    found = set()
    for each in findings:
        if not (each["level"] == "note" and "mm from the reference's" in each["what"]):
            own = (each["level"], each["case_id"], each["key"])
            words = [e[3] for e in EXPECTED if e[:3] == own and e[3] in each["what"]]
            found.add((*own, words[0] if words else each["what"]))
    return found


def test_all_faults_of_all_cases_are_listed_and_nothing_else(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, findings = check("phantom", faulty, tmp_path / "found.json")
    assert code == 1
    assert summarised(findings) == EXPECTED
    written = json.loads((tmp_path / "found.json").read_text())
    levels = [each["level"] for each in findings]
    assert written["cases"] == 6
    assert written["counts"] == {level: levels.count(level) for level in ("error", "warning", "note")}
    out, err = capsys.readouterr()
    assert "6 cases: 6 errors, 5 warnings" in out
    for level, case, key, words in EXPECTED:
        shown = any(line.startswith(f"| {level} | {case} | {key} |") and words in line for line in out.splitlines())
        assert shown == (level != "note")
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: 6 errors found. Correct the files, or remove their cases."
    ]
    assert "Traceback" not in err


def test_absent_modalities_are_warnings_if_allowed(faulty: Path, tmp_path: Path) -> None:
    _, findings = check("phantom", faulty, tmp_path / "found.json", "--allow-missing")
    (absent,) = [each for each in findings if "is absent" in each["what"]]
    assert (absent["level"], absent["case_id"]) == ("warning", "PHANTOM_003")


def test_with_a_missing_reference_all_missing_files_are_listed_and_the_other_cases_checked(
    faulty: Path, tmp_path: Path
) -> None:
    lost = [faulty / "PHANTOM_004" / "CT_image.nii.gz", faulty / "PHANTOM_006" / "PET_image.nii.gz"]
    for path in lost:
        path.unlink()
    code, findings = check("phantom", faulty, tmp_path / "found.json")
    assert code == 1
    every = {*map(str, lost), str(faulty / "PHANTOM_003" / "PET_image.nii.gz")}
    assert {each["what"].partition(" is missing. ")[0] for each in findings if "is missing. " in each["what"]} == every
    assert any(each["case_id"] == "PHANTOM_001" and "is truncated" in each["what"] for each in findings)


def test_a_table_with_missing_files_is_checked_completely(faulty: Path, tmp_path: Path) -> None:
    names = {"ct": "CT_image", "pet": "PET_image", "mr": "MR_T1_image", "label": "CT_mask"}
    cases = [f"PHANTOM_{number:03d}" for number in (1, 3, 4)]
    rows = [{"case_id": case, **{key: f"{case}/{name}.nii.gz" for key, name in names.items()}} for case in cases]
    (faulty / "list.json").write_text(json.dumps(rows))
    (faulty / "PHANTOM_004" / "CT_mask.nii.gz").unlink()
    (faulty / "PHANTOM_001" / "CT_image.nii.gz").unlink()
    code, findings = check("phantom", faulty, tmp_path / "found.json", "--data-list", str(faulty / "list.json"))
    errors = {(each["case_id"], each["key"]): each["what"] for each in findings if each["level"] == "error"}
    assert code == 1
    assert set(errors) == {("PHANTOM_001", "ct"), ("PHANTOM_001", "pet"), ("PHANTOM_001", "mr"), ("PHANTOM_003", "pet"),
                           ("PHANTOM_003", "mr"), ("PHANTOM_004", "label")}  # fmt: skip
    for case, key in (("PHANTOM_001", "ct"), ("PHANTOM_003", "pet"), ("PHANTOM_004", "label")):
        assert errors[case, key] == f"{faulty / case / names[key]}.nii.gz is missing. Add it, or remove the case."


def test_a_cohort_without_faults_has_no_findings(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, findings = check("phantom", cohort, tmp_path / "found.json")
    assert code == 0
    assert summarised(findings) == set()
    assert "6 cases: 0 errors, 0 warnings" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sts", "hecktor21", "picai22"])
def test_the_real_samples_have_no_errors_and_no_warnings(
    name: str, tmp_path: Path, require_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--workers", "2", "--set", "splits_file=folds.json"]  # two samples have fewer than five patients
    code, findings = check(name, require_data(name), tmp_path / "found.json", *more)
    assert [each["what"] for each in findings if each["level"] != "note"] == []
    assert code == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_patients_that_cannot_fill_the_folds_are_a_warning(cohort: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        shutil.copytree(cohort / f"PHANTOM_00{number}", tmp_path / "few" / f"PHANTOM_00{number}")
    for options, expected in (
        ([], ["A training will be refused: 3 patient(s) cannot fill 5 folds."]),
        (["--set", "splits_file=folds.json"], []),
    ):
        code, findings = check("phantom", tmp_path / "few", tmp_path / "found.json", *options)
        texts = [finding["what"].partition(" Write")[0] for finding in findings if finding["level"] == "warning"]
        assert (code, texts) == (0, expected)


def test_check_without_a_data_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--data", "phantom"]) == 1
    assert "error: No data to check. Name a folder with --dataset-dir" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies_affects_only_its_own_case(
    workers: int, faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the kernel kills a process that uses too much memory; the other five cases are checked."""
    original = cohort_check.header_of

    def header_of(path: str, rules: Rules) -> Any:
        if "PHANTOM_002" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, rules)

    monkeypatch.setattr(cohort_check, "header_of", header_of)  # the processes are forked
    code, findings = check("phantom", faulty, tmp_path / "found.json", "--workers", str(workers))
    assert code == 1
    (dead,) = (each for each in findings if each["case_id"] == "PHANTOM_002")
    assert (dead["level"], dead["key"]) == ("error", "")
    assert dead["what"].startswith("Case PHANTOM_002: its process died: killed, or out of memory. ")
    assert summarised([each for each in findings if each is not dead]) == {
        each for each in EXPECTED if each[1] != "PHANTOM_002"
    }
    assert "| error | PHANTOM_002 |  | Case PHANTOM_002: its process died" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["check", "segment"])
@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_less_than_one_worker_is_refused(verb: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--workers", number])
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "argument --workers: " in last
    assert number in last


def test_one_volume_at_a_time_is_in_memory(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes: list[weakref.ref[Any]] = []
    alive_before, read_volume = [], reader.read_volume

    def read(header: Any, rules: Rules) -> Any:
        gc.collect()
        alive_before.append(sum(reference() is not None for reference in volumes))
        volume = read_volume(header, rules)
        volumes.append(weakref.ref(volume))
        return volume

    monkeypatch.setattr(reader, "read_volume", read)
    gc.collect()
    gc.freeze()  # the collections in `read` need not visit every object of the process
    try:
        for case in datalist("phantom", cohort)[:3]:
            cohort_check.check_case(case, cohort_check.Criteria(MODALITIES, LABELS))
    finally:
        gc.unfreeze()
    assert alive_before == [0] * 12


@pytest.fixture
def nnunet(tmp_path: Path, write_nifti: Callable[..., Path]) -> Path:
    """Three cases of CT and PET, 8 x 8 x 8 voxels of 1 mm, with the classes 1 and 2 in each, and an ignored voxel."""
    root, rng = tmp_path / "Dataset001", np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    for case in "abc":
        write_nifti(root / f"imagesTr/{case}_0000.nii.gz", rng.uniform(-1000, 1000, (8, 8, 8)).astype(np.float32))
        write_nifti(root / f"imagesTr/{case}_0001.nii.gz", rng.gamma(1, 1, (8, 8, 8)).astype(np.float32))
        label = np.zeros((8, 8, 8), np.uint8)
        label[2:4, 2:4, 2:4], label[5:7, 5:7, 5:7], label[0, 0, 0] = 1, 2, 3
        write_nifti(root / f"labelsTr/{case}.nii.gz", label)
    labels = {"background": 0, "core": 1, "oedema": 2, "ignore": 3}
    content = {"channel_names": {"0": "CT", "1": "PET"}, "labels": labels, "numTraining": 3}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def check_task(name: str, root: Path, **changed: Any) -> dict[tuple[str, str], str]:
    """Errors and warnings of a task of two classes: level and case -> messages."""
    settings = {"labels": [[0], [1], [2]], "classes": ["background", "core", "oedema"], "ignore": 3, **changed}
    layout = settings.pop("layout", None)
    criteria = cohort_check.Criteria(["ct", "pet"], spacing=[1, 1, 1], **settings)
    findings, _ = cohort_check.check_cohort(name, str(root), criteria, workers=1, layout=layout)
    found: dict[tuple[str, str], str] = {}
    for each in findings:
        if each.level != "note":
            found[each.level, each.case_id] = f"{found.get((each.level, each.case_id), '')} {each.what}".strip()
    return found


def test_a_data_set_of_nnunet_without_faults_has_no_findings(nnunet: Path) -> None:
    assert check_task("nnunet", nnunet) == {}


def test_all_findings_of_a_data_set_of_nnunet_are_listed_at_once(
    nnunet: Path, write_nifti: Callable[..., Path]
) -> None:
    shifted = np.diag([1.0, 1, 1, 1])
    shifted[0, 3] = 1  # one voxel
    for name in ("imagesTr/b_0001", "labelsTr/c"):
        image = nib.load(nnunet / f"{name}.nii.gz")
        write_nifti(nnunet / f"{name}.nii.gz", np.asarray(image.dataobj), shifted)
    rewrite(nnunet / "labelsTr/a.nii.gz", lambda voxels: np.where(voxels == 2, 4, voxels))
    (nnunet / "imagesTr/a_0001.nii.gz").unlink()
    write_nifti(nnunet / "labelsTr/x.nii.gz", np.zeros((8, 8, 8), np.uint8))
    content = json.loads((nnunet / "dataset.json").read_text())
    (nnunet / "dataset.json").write_text(json.dumps({**content, "numTraining": 4}))
    found = check_task("nnunet", nnunet, labels=[[0], [1], [2], [5]], classes=None)
    whole = found.pop(("error", ""))
    assert "contradicts the task's labels: only the task has the value(s) 5." in whole
    assert "numTraining 4, but there are 3 cases" in whole
    assert "labelsTr/x.nii.gz has no image" in whole
    assert "contains the value 4, which the task's labels" in found["error", "a"]
    assert "pet is absent" in found.pop(("error", "a"))
    assert "b_0001.nii.gz lies on another grid, which nnU-Net itself would refuse" in found.pop(("warning", "b"))
    assert "labelsTr/c.nii.gz lies on the grid of none of the case's images" in found.pop(("warning", "c"))
    assert found == {("warning", ""): "No case has class 3 (label value 5): no network can learn it"}


def test_images_on_several_grids_are_no_finding_elsewhere_and_a_class_of_no_case_is(
    nnunet: Path, write_nifti: Callable[..., Path]
) -> None:
    for case in "abc":
        rewrite(nnunet / f"labelsTr/{case}.nii.gz", lambda voxels: np.where(voxels == 2, 1, voxels))
        write_nifti(nnunet / f"imagesTr/{case}_0001.nii.gz", np.random.default_rng(1).gamma(1, 1, (8, 8, 4)))
    layout = {
        "ct": "imagesTr/{case}_0000.nii.gz",
        "pet": "imagesTr/{case}_0001.nii.gz",
        "label": "labelsTr/{case}.nii.gz",
    }
    assert check_task("files", nnunet, layout=layout) == {
        ("warning", ""): "No case has class oedema (label value 2): no network can learn it"
    }


def test_a_folder_that_is_no_data_set_of_nnunet_is_one_error(tmp_path: Path) -> None:
    assert list(check_task("nnunet", tmp_path)) == [("error", "")]


def test_cases_without_a_label_are_counted(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort, tmp_path / "data")
    for number in (2, 3):
        (tmp_path / "data" / f"PHANTOM_{number:03d}" / "CT_mask.nii.gz").unlink()
    code, findings = check("phantom", tmp_path / "data", tmp_path / "found.json")
    assert code == 0
    text = "2 of 6 cases have no label: PHANTOM_002, PHANTOM_003. A training refuses them, unless it is `distill"
    assert [each["level"] for each in findings if text in each["what"]] == ["warning"]


def test_a_box_outside_of_its_image_is_an_error(phantoms: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = ["case_id,ct,pet,mr,label,bbox_mm", *(",".join(row) for row in _boxed(phantoms[:2]))]
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    arguments = ["check", "--data", "phantom", "--data-list", str(tmp_path / "cases.csv"), "--allow-outside"]
    assert main([*arguments, "--workers", "1", "--json", str(tmp_path / "found.json")]) == 1
    findings = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert [each["case_id"] for each in findings if "its bounding box lies outside" in each["what"]] == ["PHANTOM_002"]


def _boxed(cases: list[dict[str, Any]]) -> list[list[str]]:
    """Two rows of a table; the box of the second lies far away."""
    boxes = ("-900 -900 -900 900 900 900", "9000 9000 9000 9100 9100 9100")
    keys = ("case_id", "ct", "pet", "mr", "label")
    return [[*(str(case[key]) for key in keys), box] for case, box in zip(cases, boxes, strict=True)]


def test_a_task_may_allow_absent_modalities(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort, tmp_path / "data")
    (tmp_path / "data" / "PHANTOM_002" / "PET_image.nii.gz").unlink()
    code, _ = check("phantom", tmp_path / "data", tmp_path / "found.json")
    assert code == 1
    code, findings = check("phantom", tmp_path / "data", tmp_path / "found.json", "--set", "allow_missing=true")
    assert code == 0
    assert any(each["case_id"] == "PHANTOM_002" and "absent" in each["what"] for each in findings)
