# SPDX-License-Identifier: Apache-2.0
"""``dicom --dicomweb`` on a phantom's study, against a small server by real HTTP."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from scripts.cli import finished_masks, segment_study_list
from scripts.cli.main import main
from scripts.cli.segment_study_list import read_study_list
from tests.dicom_phantom import MARKER, write_study
from tests.fake_pacs import FakePacs, fake_pacs

pytest.importorskip("dicomweb_client")


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DICOMWEB_USER", "DICOMWEB_PASSWORD", "DICOMWEB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("scripts.image_io.dicomweb.WAIT_MS", 1)


@pytest.fixture(scope="module")
def study(phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study, with a second CT whose slices are thicker."""
    folder = write_study(phantoms[0], tmp_path_factory.mktemp("study")) / "dicom"
    thick = pydicom.uid.generate_uid()
    for path in sorted(folder.glob("CT_*.dcm"))[::2]:
        head = pydicom.dcmread(path)
        head.SeriesInstanceUID, head.SliceThickness = thick, 2 * head.SliceThickness
        head.SOPInstanceUID = head.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        head.save_as(folder / f"thick_{path.name}")
    return folder


@pytest.fixture(scope="module")
def uid(study: Path) -> str:
    return _uid(study)


def _uid(study: Path) -> str:
    return str(pydicom.dcmread(next(study.glob("*.dcm")), stop_before_pixels=True).StudyInstanceUID)


@pytest.fixture(scope="module")
def local(study: Path, tiny_student: list[str]) -> Path:
    """The mask of the same study in a folder."""
    output = study.parent / "local"
    assert main(["dicom", "--study", str(study), "--output-dir", str(output), *tiny_student]) == 0
    return output


@pytest.fixture
def pacs(study: Path) -> Iterator[FakePacs]:
    with fake_pacs() as server:
        server.add_folder(study)
        yield server


def _mask(path: Path) -> Any:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def _objects(pacs: FakePacs, modality: str) -> list[Any]:
    kinds = {uid: head.get("Modality") for uid, head in pacs.heads.items()}
    return [
        pydicom.dcmread(pydicom.filebase.DicomBytesIO(pacs.objects[each])) for each in kinds if kinds[each] == modality
    ]


def test_a_study_is_fetched_segmented_and_stored(
    pacs: FakePacs,
    uid: str,
    tiny_student: list[str],
    local: Path,
    study: Path,
    tmp_path: Path,
    capsys: Any,
    caplog: Any,
) -> None:
    output = tmp_path / "out"
    killed = output / ".images-killed" / "ct"  # of a run that could not remove it
    killed.mkdir(parents=True)
    (killed / "000000.dcm").write_bytes(b"half an image")
    command = [
        "dicom",
        "--dicomweb",
        pacs.url,
        "--study-uid",
        uid,
        "--store",
        "--output-dir",
        str(output),
        *tiny_student,
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "ct   CT" in out
    assert "thinnest of 2 (" in out
    assert "fits ct, thicker slices" in out
    assert f"stored in the study {uid}: seg.dcm" in out
    assert MARKER not in out + err + caplog.text
    np.testing.assert_array_equal(_mask(output / "mask.nii.gz"), _mask(local / "mask.nii.gz"))
    (stored,) = _objects(pacs, "SEG")
    assert stored == pydicom.dcmread(output / "seg.dcm")
    assert stored.StudyInstanceUID == uid
    heads = sorted((pydicom.dcmread(path) for path in study.glob("CT_*.dcm")), key=lambda h: h.ImagePositionPatient[2])
    pixels = highdicom.seg.segread(output / "seg.dcm").get_pixels_by_source_instance(
        [each.SOPInstanceUID for each in heads],
        combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True,
    )  # fmt: skip
    np.testing.assert_array_equal(pixels > 0, _mask(local / "mask.nii.gz").transpose(2, 1, 0) > 0)
    series = {str(pydicom.dcmread(next(study.glob(f"{kind}_*"))).SeriesInstanceUID) for kind in ("CT", "PT", "MR")}
    assert pacs.fetched() == series  # and not the CT with thicker slices
    assert {path.name for path in output.iterdir()} == {"mask.nii.gz", "mask.manifest.json", "measures.csv", "seg.dcm"}


def test_the_series_are_listed_and_nothing_is_fetched(
    pacs: FakePacs, uid: str, tiny_student: list[str], study: Path, tmp_path: Path, capsys: Any
) -> None:
    thick = str(pydicom.dcmread(next(study.glob("thick_*")), stop_before_pixels=True).SeriesInstanceUID)
    command = [
        "dicom",
        "--dicomweb",
        pacs.url,
        "--study-uid",
        uid,
        "--series-uid",
        thick,
        "--list-series",
        *tiny_student,
    ]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert "named by --series-uid" in capsys.readouterr().out
    assert not pacs.fetched()
    assert (
        main(["dicom", "--study", str(study), "--list-series", "--output-dir", str(tmp_path / "out"), *tiny_student])
        == 0
    )
    assert "thinnest of 2 (" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    pacs.requests.clear()
    assert main([*command, "--dry-run"]) == 0
    assert "monai.bundle run" in capsys.readouterr().out
    assert not pacs.requests


@pytest.mark.parametrize(
    ("faults", "arguments", "message"),
    [
        ({"cut": {"/instances/|/series/[^/]+$": 900}}, [], "The connection with http://127.0.0.1"),
        (
            {"refuse": 0xA700},
            ["--store"],
            "refused seg.dcm (out of resources, A700) (409, conflict). The results lie in",
        ),
        ({"statuses": {"metadata": 401}}, [], "wants another login (401). Set DICOMWEB_USER and DICOMWEB_PASSWORD"),
        ({}, ["--series-uid", "1.2.3"], "The study has no series 1.2.3. It has"),
    ],
)
def test_what_fails_is_one_sentence_and_leaves_no_images(
    faults: dict[str, Any], arguments: list[str], message: str, pacs: FakePacs, uid: str, tiny_student: list[str],
    tmp_path: Path, capsys: Any,
) -> None:  # fmt: skip
    for name, value in faults.items():
        setattr(pacs.faults, name, value)
    command = ["dicom", "--dicomweb", pacs.url, "--study-uid", uid, *arguments, "--output-dir", str(tmp_path / "out")]
    assert main([*command, *tiny_student]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    left = [path.name for path in tmp_path.rglob("*.dcm")]
    assert left == (["seg.dcm"] if "refuse" in faults else [])


def test_a_study_without_a_modality_is_refused_or_segmented_without_it(
    study: Path, uid: str, tiny_student: list[str], tmp_path: Path, capsys: Any
) -> None:
    with fake_pacs() as pacs:
        for path in [*study.glob("CT_*"), *study.glob("PT_*")]:
            pacs.add(path.read_bytes())
        command = [
            "dicom",
            "--dicomweb",
            pacs.url,
            "--study-uid",
            uid,
            "--output-dir",
            str(tmp_path / "out"),
            *tiny_student,
        ]
        assert main(command) == 1
        assert (
            f"The study {uid} has no series for mr (Modality MR). Add it, use --allow-missing"
            in capsys.readouterr().err
        )
        assert not pacs.fetched()
        assert main([*command, "--allow-missing"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study-uid", "1.2", "--data-list", "x.csv"], "Remove --data-list"),
        ([], "Which study of the server? Give --study-uid UID, or --study-list FILE."),
        (["--study-uid", "patient"], "'patient' is no DICOM UID"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, tiny_student: list[str], capsys: Any
) -> None:
    assert main(["dicom", "--dicomweb", "http://127.0.0.1:9/x", *arguments, *tiny_student]) == 1
    assert message in capsys.readouterr().err


def test_options_of_a_server_need_one(tiny_student: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main(["dicom", "--study", str(tmp_path), "--store", *tiny_student]) == 1
    assert "--store is an option of a server. Add --dicomweb URL, or remove it." in capsys.readouterr().err


@pytest.fixture
def studies(pacs: FakePacs, uid: str, study: Path, phantoms: list[dict[str, Any]], tmp_path: Path) -> list[str]:
    """Three studies on the server: the second one's PET has no weight, the third has no PET."""
    second = write_study(phantoms[1], tmp_path / "second") / "dicom"
    for path in second.glob("*.dcm"):
        head = pydicom.dcmread(path)
        if head.Modality == "PT":
            del head.PatientWeight
            head.save_as(path)
    third = write_study(phantoms[2], tmp_path / "third") / "dicom"
    for path in third.glob("PT_*"):
        path.unlink()
    pacs.add_folder(second)
    pacs.add_folder(third)
    return [uid, _uid(second), _uid(third)]


def test_a_list_of_studies_is_done_and_gone_on_with(
    pacs: FakePacs, studies: list[str], tiny_student: list[str], local: Path, tmp_path: Path, capsys: Any
) -> None:
    output, table = tmp_path / "cohort", tmp_path / "studies.csv"
    table.write_text("patient,study_uid\n" + "".join(f"{MARKER}{n},{each}\n" for n, each in enumerate(studies)))
    command = ["dicom", "--dicomweb", pacs.url, "--study-list", str(table), "--output-dir", str(output), *tiny_student]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "3 studies: 1 segmented, 0 already there, 2 failed" in out, err
    error = err.splitlines()[-1]
    assert error.startswith("error: 2 of 3 studies failed. Correct them and run the command again.")
    assert f"{studies[1]}: " in error
    assert "has no PatientWeight, which SUV requires. Give --patient-weight (in a table" in error
    assert f"{studies[2]}: The study {studies[2]} has no series for pet" in error
    record = json.loads((output / "dicom.json").read_text())["studies"]
    assert record[studies[0]]["result"] == "segmented"
    assert record[studies[0]]["objects"] == ["seg.dcm"]
    assert set(record[studies[0]]["series"]) == {"ct", "pet", "mr"}
    assert "PatientWeight" in record[studies[1]]["result"]
    np.testing.assert_array_equal(_mask(output / studies[0] / "mask.nii.gz"), _mask(local / "mask.nii.gz"))
    assert not _objects(pacs, "SEG")

    # The weight is in the table now, results are to be stored: nothing is segmented twice.
    weights = ["", "70", ""]
    table.write_text(
        "study_uid,patient_weight\n" + "".join(f"{u},{w}\n" for u, w in zip(studies, weights, strict=True))
    )
    pacs.requests.clear()
    assert main([*command, "--store", "--allow-missing"]) == 0
    assert "3 studies: 2 segmented, 1 already there, 0 failed" in capsys.readouterr().out
    assert not any(f"GET /dicom-web/studies/{studies[0]}/" in each for each in pacs.requests)
    assert {str(each.StudyInstanceUID) for each in _objects(pacs, "SEG")} == set(studies)
    manifest = json.loads((output / studies[1] / "mask.manifest.json").read_text())
    assert manifest["config"]["checks"]["suv"] == {"patient_weight": 70.0}
    record = json.loads((output / "dicom.json").read_text())["studies"]
    assert all(each["stored"] for each in record.values())
    assert MARKER not in (output / "dicom.json").read_text()

    pacs.requests.clear()
    assert main([*command, "--store", "--allow-missing"]) == 0
    assert "3 studies: 0 segmented, 3 already there, 0 failed" in capsys.readouterr().out
    assert pacs.requests == []
    record_path = output / "dicom.json"
    whole = json.loads(record_path.read_text())
    assert {name for each in whole["studies"].values() for name in each["stored"]} == {"seg.dcm"}
    (output / studies[0] / "rtstruct.dcm").write_bytes((output / studies[0] / "seg.dcm").read_bytes())
    entry = whole["studies"][studies[0]]  # as if segmented with --rtstruct, and stored by 0.11.0 without it
    entry |= {"objects": ["seg.dcm", "rtstruct.dcm"], "wanted": ["seg.dcm", "rtstruct.dcm"]}
    entry["stored"] = [*entry["stored"].values()]
    record_path.write_text(json.dumps(whole))
    (tmp_path / "one.txt").write_text(studies[0])
    command[command.index(str(table))] = str(tmp_path / "one.txt")
    assert main([*command, "--store", "--allow-missing", "--rtstruct"]) == 0
    assert "1 studies: 0 segmented, 1 already there" in capsys.readouterr().out
    assert sum("POST" in each for each in pacs.requests) == 1
    assert set(json.loads(record_path.read_text())["studies"][studies[0]]["stored"]) == {"seg.dcm", "rtstruct.dcm"}
    command[command.index(str(tmp_path / "one.txt"))] = str(table)
    shutil.copy(output / studies[0] / "seg.dcm", tmp_path / "kept.dcm")
    (output / studies[0] / "mask.nii.gz").write_bytes(b"damaged")
    assert main([*command, "--store", "--allow-missing"]) == 0
    assert "3 studies: 1 segmented, 2 already there, 0 failed" in capsys.readouterr().out

    assert main([*command, "--allow-missing", "--set", "overlap=0.5"]) == 1
    error = capsys.readouterr().err
    assert "holds masks of other settings: its overlap is 0.25, this run's is 0.5. Use the same settings" in error
    assert main([*command, "--allow-missing", "--precision", "fp32"]) == 1
    assert "its engine_precision is auto, this run's is fp32" in capsys.readouterr().err
    assert main(command) == 1
    assert "its allow_missing is True, this run's is False" in capsys.readouterr().err
    table.write_text(table.read_text().replace(",70", ",80"))
    assert main([*command, "--allow-missing"]) == 0
    assert "3 studies: 1 segmented, 2 already there, 0 failed" in capsys.readouterr().out
    manifest = json.loads((output / studies[1] / "mask.manifest.json").read_text())
    assert manifest["config"]["checks"]["suv"] == {"patient_weight": 80.0}


def test_the_series_of_every_study_of_a_list_are_listed(
    pacs: FakePacs, studies: list[str], tiny_student: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "studies.txt").write_text("\n".join([studies[2], studies[0]]))  # the first has no PET
    command = ["dicom", "--dicomweb", pacs.url, "--study-list", str(tmp_path / "studies.txt"), "--list-series"]
    assert main([*command, "--output-dir", str(tmp_path / "out"), *tiny_student]) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("study ")] == [
        f"study 1 of 2: {studies[2]}",
        f"study 2 of 2: {studies[0]}",
    ]
    assert err.endswith(
        f"error: 1 of 2 studies cannot be segmented. {studies[2]}: The study {studies[2]} has no series for pet "
        "(Modality PT). Add it, use --allow-missing, or correct the rules in the task's dicom.\n"
    )
    assert not pacs.fetched()


def test_an_object_that_was_not_stored_before_a_kill_is_stored_by_the_next_run(
    pacs: FakePacs, studies: list[str], tiny_student: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if an earlier object of the study has been stored."""
    table = tmp_path / "studies.csv"
    table.write_text(f"study_uid,suv_factor\n{studies[0]},\n")
    command = ["dicom", "--dicomweb", pacs.url, "--study-list", str(table), "--output-dir", str(tmp_path / "cohort")]
    command += [*tiny_student, "--store"]
    assert main(command) == 0
    (stored,) = (str(each.SOPInstanceUID) for each in _objects(pacs, "SEG"))
    table.write_text(f"study_uid,suv_factor\n{studies[0]},0.001\n")

    def kill(*_: Any) -> None:  # as SIGKILL: nothing is written afterwards
        monkeypatch.setattr(segment_study_list, "add_to_record", lambda *_: None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(segment_study_list, "store", kill)
        with contextlib.suppress(KeyboardInterrupt):
            main(command)
        monkeypatch.setattr(segment_study_list, "add_to_record", finished_masks.add_to_record)
    assert len(_objects(pacs, "SEG")) == 1
    assert main(command) == 0
    assert len({str(each.SOPInstanceUID) for each in _objects(pacs, "SEG")} - {stored}) == 1


def test_a_server_that_cannot_be_used_ends_the_list(
    pacs: FakePacs, studies: list[str], tiny_student: list[str], tmp_path: Path, capsys: Any
) -> None:
    pacs.login = "Bearer other"
    (tmp_path / "studies.txt").write_text("\n".join(studies))
    command = ["dicom", "--dicomweb", pacs.url, "--study-list", str(tmp_path / "studies.txt")]
    assert main([*command, "--output-dir", str(tmp_path / "out"), *tiny_student]) == 1
    assert "wants another login (401)" in capsys.readouterr().err
    assert len({each.split("/")[3] for each in pacs.requests}) == 1


def test_the_values_of_one_patient_are_not_for_a_list(tiny_student: list[str], tmp_path: Path, capsys: Any) -> None:
    command = ["dicom", "--dicomweb", "http://127.0.0.1:9/x", "--study-list", "x.csv", *tiny_student]
    assert main([*command, "--patient-weight", "70"]) == 1
    assert "--patient-weight is the value of one patient. With --study-list, give it" in capsys.readouterr().err
    assert main([*command, "--series-uid", "1.2"]) == 1
    assert "--series-uid names series of one study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "# the cohort\n1.2.3\n\n1.2.4  # second\n", {"1.2.3": {}, "1.2.4": {}}),
        ("a.csv", "Study UID;age\n1.2.3;7\n", {"1.2.3": {}}),
        ("a.csv", "study_uid,half_life,suv_factor\n1.2.3,,0.5\n", {"1.2.3": {"suv_factor": 0.5}}),
        ("a.json", '[{"study_uid": "1.2.3", "patient_weight": 70}]', {"1.2.3": {"patient_weight": 70.0}}),
    ],
)
def test_a_list_is_lines_or_a_table(name: str, text: str, expected: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_study_list(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.2.3\n1.2.3\n", "study 2: the study 1.2.3 is listed twice"),
        ("1.2.3\nMueller\n", "study 2: 'Mueller' is no DICOM UID"),
        ("study_uid\n../..\n", r"study 1: '\.\./\.\.' is no DICOM UID"),
        ("uid,x\n1.2.3,5\n", "study 1: there is no study_uid"),
        ("study_uid\n", "lists no studies"),
        ("study_uid,patient_weight\n1.2,heavy\n", "study 1: patient_weight is 'heavy'"),
    ],
)
def test_what_is_no_list_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study_list(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="There is no list of studies at"):
        read_study_list(tmp_path / "b.csv")
