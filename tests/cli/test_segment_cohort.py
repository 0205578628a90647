# SPDX-License-Identifier: Apache-2.0
"""``segment`` of a cohort: resumed, listed, named; what cannot be meant is refused."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.cli import segment_cohort as batch
from scripts.cli.main import main
from scripts.metrics.lesion_measures import read_measures
from scripts.networks import Student
from scripts.runtime import memory_check
from scripts.runtime.memory_check import SharedMemoryError
from scripts.utils.checksums import sha256
from tests.report_cases import case_html

WORKFLOW = Path(__file__).parents[2] / "examples" / "snakemake"
FEATURES, NORM = (4, 8, 8, 8), ("group", {"num_groups": 4})
TINY = [
    "--threads", "1", "--device", "cpu", "--set", "patch=[32,32,32]", "--set", f"student_features={list(FEATURES)}",
    "--set", 'student_norm=["group",{"num_groups":4}]', "--set", "spacing=[6,6,6]",
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": Student(3, 2, FEATURES, norm=NORM).state_dict()}, path)
    return str(path)


def _mask(path: Path) -> Any:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def test_the_workflow_calls_what_the_program_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Its command lines, with a word for each placeholder."""
    text = (WORKFLOW / "Snakefile").read_text()
    commands = ["".join(re.findall(r'"(.*?)"', block)) for block in re.findall(r"shell:((?:\s*\".*\")+)", text)]
    assert len(commands) == text.count("shell:") == 2
    words = [
        shlex.split(re.sub(r"{[^}]*}", lambda word: re.sub(r"\W", "", word[0]) + ".nii.gz", command).split(" > ")[0])
        for command in commands
    ]
    assert words[0][1] == "examples/snakemake/volumes.py"
    assert words[1][1:4] == ["-m", "scripts", "segment"]
    assert main([*words[1][3:], "--dry-run"]) == 0
    assert '"mr": "inputmrq.nii.gz"' in capsys.readouterr().out


def test_the_workflow_tells_volumes_in_ml(tmp_path: Path) -> None:
    """12 voxels of 2 x 2.5 x 4 mm are 240 mm^3."""
    voxels = np.zeros((5, 6, 7), np.uint8)
    voxels[1:3, 1:3, 1:4] = 1
    nib.save(nib.Nifti1Image(voxels, np.diag([-2, -2.5, 4, 1])), tmp_path / "P1.nii.gz")
    command = [sys.executable, str(WORKFLOW / "volumes.py"), str(tmp_path / "volumes.csv"), str(tmp_path / "P1.nii.gz")]
    subprocess.run(command, check=True)
    assert (tmp_path / "volumes.csv").read_text().split() == ["case_id,volume_ml", "P1,0.24"]


@pytest.fixture
def table(phantoms: list[dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Three phantoms as a table; ``table(pet=path)`` gives the second another PET."""

    def make(**other: Path) -> Path:
        path = tmp_path / "cohort.csv"
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["case_id", "ct", "pet", "mr"])
            for number, case in enumerate(phantoms[:3]):
                files = {key: case[key] for key in ("ct", "pet", "mr")} | (other if number == 1 else {})
                writer.writerow([case["case_id"], *files.values()])
        return path

    return make


def test_the_command_segments_a_table_in_processes_of_its_own(
    table: Callable[..., Path], weights: str, tmp_path: Path
) -> None:
    """As a user types it: the verbs are then in a module that a pool's processes have to find."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts", "segment", "--data", "phantom", "--weights", weights]
    command += [*TINY, "--allow-outside", "--output-dir", str(tmp_path / "masks"), "--data-list", str(table())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 cases: 3 segmented, 0 already there, 0 failed"]


@pytest.mark.usefixtures("_here")
def test_an_absent_reference_is_refused_or_stood_in_for_as_it_is_for_one_case(
    table: Callable[..., Path], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = table(), tmp_path / "masks"
    with path.open(newline="") as stream:
        rows = [{**row, "ct": ""} for row in csv.DictReader(stream)][:1]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plain = ["segment", "--data", "phantom", "--weights", weights, *TINY]
    command = [*plain, "--output-dir", str(output), "--allow-outside", "--data-list", str(path)]
    assert main(command) == 1
    assert "Missing images: --ct" in capsys.readouterr().err
    assert main([*command, "--allow-missing"]) == 0
    assert "PHANTOM_001: absent modalities, read as zeros: PHANTOM_001: ct" in capsys.readouterr().out
    single = [*plain, "--pet", rows[0]["pet"], "--mr", rows[0]["mr"], "--output", str(tmp_path / "one.nii.gz")]
    assert main([*single, "--allow-missing"]) == 0
    np.testing.assert_array_equal(_mask(output / "PHANTOM_001.nii.gz"), _mask(tmp_path / "one.nii.gz"))


@pytest.mark.usefixtures("_here")
def test_each_mask_has_the_manifest_and_the_report_of_its_own_case(
    table: Callable[..., Path], weights: str, tmp_path: Path
) -> None:
    output = tmp_path / "masks"
    command = ["segment", "--data", "phantom", "--output-dir", str(output), "--weights", weights, "--allow-outside"]
    command += [*TINY, "--workers", "2", "--data-list", str(table())]
    assert main(command) == 0
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    assert main([*command, "--report"]) == 0  # which no mask had
    assert all(path.stat().st_mtime_ns > before for path, before in kept.items())
    names = [f"PHANTOM_00{k}" for k in (1, 2, 3)]
    for name in names:
        manifest = json.loads((output / f"{name}.manifest.json").read_text())
        assert [case["case_id"] for case in manifest["data"]] == [name]
        page = (output / f"{name}.report.html").read_text()
        html = case_html(output / f"{name}.report.html")
        assert ">volume ml</th>" in html.replace(' class="number"', "")  # of the measures
        assert [other for other in names if f"/{other}/" in page] == [name]


@pytest.mark.usefixtures("_here")
def test_a_mask_without_its_measures_is_not_complete_unless_none_are_wanted(
    table: Callable[..., Path], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "masks"
    command = ["segment", "--data", "phantom", "--output-dir", str(output), "--weights", weights, "--allow-outside"]
    command += [*TINY, "--data-list", str(table())]
    assert main([*command, "--no-measures"]) == 0
    assert not list(output.glob("*measures.csv"))
    assert main([*command, "--no-measures"]) == 0
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("3 cases")]
    assert [line.partition(": ")[2][:11] for line in lines] == ["3 segmented", "0 segmented", "3 segmented"]
    assert len(list(output.glob("*measures.csv"))) == 4
    assert main([*command, "--no-measures"]) == 0
    assert not (output / "measures.csv").exists()  # it may be of earlier masks


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("error", [MemoryError("no room"), AttributeError("no room"), ValueError("no room")])
def test_any_error_of_a_case_becomes_its_result_and_warnings_are_kept(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def segment(args: argparse.Namespace) -> None:
        logging.getLogger("scripts.stub").warning("odd")
        raise error

    monkeypatch.setattr(batch, "segment_case", segment)
    assert batch.segment_quietly(argparse.Namespace(workers=1)) == ("no room", ("odd",))


@pytest.mark.usefixtures("_here")
def test_masks_of_other_weights_and_images_are_not_taken_for_done(
    table: Callable[..., Path], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "masks"
    command = ["segment", "--data", "phantom", "--allow-outside", *TINY, "--data-list", str(table())]
    assert main([*command, "--output-dir", str(output), "--weights", weights]) == 0
    torch.manual_seed(4)
    torch.save(Student(3, 2, FEATURES, norm=NORM).state_dict(), tmp_path / "other.pt")
    assert main([*command, "--output-dir", str(output), "--weights", str(tmp_path / "other.pt")]) == 1
    assert "holds masks of other weights" in capsys.readouterr().err
    (tmp_path / "flat.csv").write_text(f"case_id,ct\na,{output / 'PHANTOM_001.nii.gz'}\n")
    (output / "PHANTOM_001.nii.gz").rename(output / "a.nii.gz")
    (tmp_path / "flat.csv").write_text(f"case_id,ct\na,{output / 'a.nii.gz'}\n")
    flat = ["segment", "--data", "phantom", "--allow-outside", "--data-list", str(tmp_path / "flat.csv")]
    assert main([*flat, "--output-dir", str(output), "--weights", weights]) == 1
    assert "would overwrite the image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            ["--output", "a.nii.gz", "--ct", "ct.nii.gz", "--output-dir", "out"],
            "--output-dir is the folder of several m",
        ),
        (
            ["--output", "a.nii.gz", "--ct", "ct.nii.gz", "--set", "output_dir=out"],
            "--set output_dir cannot be used here",
        ),
        (["--data-list", "cases.csv", "--set", "+output_dir=out"], "--set output_dir cannot be used here"),
    ],
)
def test_a_mask_has_one_folder(options: list[str], named: str, weights: str, capsys: Any) -> None:
    """Otherwise the mask lay in one folder, and another mask of its name was measured."""
    assert main(["segment", "--data", "phantom", *TINY, "--weights", weights, *options]) == 1
    assert named in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_only_masks_of_the_same_images_and_settings_are_taken_for_done(
    table: Callable[..., Path], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], phantoms: Any
) -> None:
    output = tmp_path / "masks"
    command = ["segment", "--data", "phantom", "--allow-outside", *TINY, "--output-dir", str(output)]
    command += ["--weights", weights, "--data-list"]
    assert main([*command, str(table())]) == 0
    capsys.readouterr()
    assert main([*command, str(table(pet=phantoms[4]["pet"]))]) == 0
    assert "3 cases: 1 segmented, 2 already there" in capsys.readouterr().out
    newer = tmp_path / "newer.nii.gz"
    newer.write_bytes(Path(phantoms[4]["pet"]).read_bytes())
    assert main([*command, str(table(pet=newer))]) == 0
    time = (output / "PHANTOM_002.nii.gz").stat().st_mtime
    os.utime(newer, (time + 10, time + 10))
    capsys.readouterr()
    assert main([*command, str(table(pet=newer))]) == 0
    assert "3 cases: 1 segmented, 2 already there" in capsys.readouterr().out
    assert main([*command, str(table()), "--set", "overlap=0.5"]) == 1
    words = "holds masks of other settings: its overlap is 0.25, this run's is 0.5. Use the same settings, or"
    assert words in capsys.readouterr().err
    inferer = {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "mode": "constant"}
    assert main([*command, str(table()), "--set", f"inferer={json.dumps(inferer)}"]) == 1
    assert "holds masks of other settings: its set#inferer is none" in capsys.readouterr().err
    other = tmp_path / "other.csv"  # a case without a mask, in a folder that holds masks of other cases
    other.write_text(re.sub(r"^PHANTOM_00", "OTHER_", table().read_text(), flags=re.MULTILINE))
    assert main([*command, str(other), "--set", "overlap=0.5"]) == 1
    assert words in capsys.readouterr().err
    os.utime(newer, (time, time))
    assert main([*command, str(table(pet=newer)), "--allow-missing"]) == 0
    assert "3 cases: 0 segmented, 3 already there" in capsys.readouterr().out
    assert main([*command, str(table(pet=newer))]) == 1
    assert "its allow_missing is True, this run's is False" in capsys.readouterr().err
    (output / "segment.json").unlink()
    assert main([*command, str(table())]) == 1
    assert "holds PHANTOM_001.nii.gz, but no segment.json that says which weights made it" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_a_batch_that_is_killed_has_said_which_weights_make_its_masks(
    table: Callable[..., Path], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(record: Path, *_: Any) -> None:
        raise Killed

    monkeypatch.setattr(batch, "add_to_record", kill)  # as SIGKILL: nothing is written afterwards
    command = ["segment", "--data", "phantom", "--allow-outside", *TINY, "--data-list", str(table())]
    with pytest.raises(Killed):
        main([*command, "--output-dir", str(tmp_path / "masks"), "--weights", weights])
    record = json.loads((tmp_path / "masks" / "segment.json").read_text())
    assert record["weights_sha256"] == sha256(weights)
    assert record["settings"]["spacing"] == [6, 6, 6]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data-list", "c.csv", "--output", "m.nii.gz"], "--output name one case, and --data-list several"),
        (["--data-list", "c.csv", "--stacked", "s.nii.gz"], "--stacked name one case, and --data-list several"),
        (["--data-list", "c.csv", "--ct", "s.nii.gz"], "--ct name one case, and --data-list several"),
        (["--data-list", "c.csv", "--profile"], "--profile name one case, and --data-list several"),
        (["--dataset-dir", "D", "--output", "m.nii.gz"], "--output name one case, and --dataset-dir several"),
        (["--dataset-dir", "D", "--ct", "s.nii.gz"], "--ct name one case, and --dataset-dir several"),
        (["--ct", "c.nii.gz", "--output", "m.nii.gz", "--workers", "2"], "--workers is how many cases"),
        (["--ct", "c.nii.gz", "--output", "m.nii.gz", "--bids"], "--bids names the masks of several cases"),
        (["--ct", "c.nii.gz", "--output", "c.nii.gz"], "--output c.nii.gz is the ct image itself"),
        (["--ct", "c.nii.gz", "--output", "x/../c.nii.gz"], "is the ct image itself"),
        (["--ct", "c.nii.gz", "--output", "x/.nii.gz"], "is no name of a mask. Use one that ends in .nii.gz"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["segment", *options]) == 1
    assert words in capsys.readouterr().err


def test_a_dry_run_of_a_table_prints_the_command_that_makes_the_same_masks(
    table: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["segment", "--data-list", str(table()), "--output-dir", "OUT", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("python -m monai.bundle run --config_file")
    assert f"--data_list {table()}" in printed
    assert "--output_dir OUT" in printed


def test_a_batch_lists_what_failed_and_goes_on_where_it_was_stopped(
    table: Callable[..., Path], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, output = tmp_path / "pet.nii.gz", tmp_path / "masks"
    bad.write_bytes(b"")
    command = ["segment", "--data", "phantom", "--output-dir", str(output), "--weights", weights, "--allow-outside"]
    command += [*TINY, "--workers", "2", "--data-list"]
    assert main([*command, str(table(pet=bad))]) == 1
    printed = capsys.readouterr()
    assert "3 cases: 2 segmented, 0 already there, 1 failed" in printed.out
    sentence = f"1 of 3 cases failed. Correct them and run the command again. PHANTOM_002: {bad} is an empty file"
    assert sentence in printed.err
    assert sorted(path.name for path in output.glob("*.nii.gz")) == ["PHANTOM_001.nii.gz", "PHANTOM_003.nii.gz"]
    assert {row["case_id"] for row in read_measures(output / "measures.csv")} == {"PHANTOM_001", "PHANTOM_003"}
    (output / "PHANTOM_003.nii.gz").write_bytes((output / "PHANTOM_003.nii.gz").read_bytes()[:-9])  # stopped half way
    kept = (output / "PHANTOM_001.nii.gz").stat().st_mtime_ns
    assert main([*command, str(table())]) == 0
    assert "3 cases: 2 segmented, 1 already there, 0 failed" in capsys.readouterr().out
    assert (output / "PHANTOM_001.nii.gz").stat().st_mtime_ns == kept
    record = json.loads((output / "segment.json").read_text())
    results = record["cases"]
    assert [each["result"] for each in results.values()] == ["already there", "segmented", "segmented"]
    assert all(_mask(output / f"PHANTOM_00{k}.nii.gz").ndim == 3 for k in (1, 2, 3))
    rows = read_measures(output / "measures.csv")
    assert [row["case_id"] for row in rows if row["lesion"] == "all"] == ["PHANTOM_001", "PHANTOM_002", "PHANTOM_003"]

    results["PHANTOM_001"]["warnings"] = ["a test"]
    (output / "segment.json").write_text(json.dumps(record))
    first = tmp_path / "first.csv"
    first.write_text("".join(table().read_text().splitlines(keepends=True)[:2]))
    assert main([*command, str(first)]) == 0
    again = json.loads((output / "segment.json").read_text())["cases"]
    assert again == results  # of the other cases, too, and with their warnings
    assert rows == [row for k in (1, 2, 3) for row in read_measures(output / f"PHANTOM_00{k}.measures.csv")]
    for row in rows:
        volume = nib.Nifti1Image.from_filename(output / f"{row['case_id']}.nii.gz")
        if row["lesion"] == "all":
            voxel_ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
            assert row["volume_ml"] == pytest.approx((np.asanyarray(volume.dataobj) > 0).sum() * voxel_ml, rel=1e-4)


@pytest.mark.usefixtures("_here")
def test_a_case_that_is_too_large_for_its_share_of_the_memory_is_segmented_alone(
    table: Callable[..., Path], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tried = []

    def segment(args: argparse.Namespace) -> None:
        name = Path(args.output).name
        tried.append((name, args.workers, memory_check._processes))
        if name == "PHANTOM_002.nii.gz" and args.workers > 1:
            raise RuntimeError("as MONAI wraps it") from SharedMemoryError("large")

    monkeypatch.setattr(batch, "segment_case", segment)
    monkeypatch.setattr(memory_check, "_processes", 1)
    command = ["segment", "--data", "phantom", "--output-dir", str(tmp_path / "out"), "--weights", weights]
    assert (
        main([*command, *TINY, "--no-measures", "--workers", "2", "--allow-outside", "--data-list", str(table())]) == 0
    )
    assert "3 cases: 3 segmented" in capsys.readouterr().out
    assert sorted(tried[:3]) == [(f"PHANTOM_00{k}.nii.gz", 2, 2) for k in (1, 2, 3)]
    assert tried[3:] == [("PHANTOM_002.nii.gz", 1, 1)]


@pytest.mark.usefixtures("_here")
def test_a_batch_is_named_as_bids_derivatives(table: Callable[..., Path], weights: str, tmp_path: Path) -> None:
    output = tmp_path / "bids"
    command = ["segment", "--data", "phantom", "--output-dir", str(output), "--weights", weights, "--allow-outside"]
    assert main([*command, *TINY, "--bids", "--data-list", str(table())]) == 0
    names = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.nii.gz"))
    assert names[0] == "sub-PHANTOM001/anat/sub-PHANTOM001_space-ct_label-tumour_desc-auto_mask.nii.gz"
    assert {row["case_id"] for row in read_measures(output / "measures.csv")} == {f"PHANTOM_00{k}" for k in (1, 2, 3)}
    assert len(names) == 3
    assert json.loads((output / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    sidecar = json.loads((output / names[0].replace(".nii.gz", ".json")).read_text())
    assert [Path(each).name for each in sidecar["Sources"]] == [
        "CT_image.nii.gz",
        "PET_image.nii.gz",
        "MR_T1_image.nii.gz",
    ]
    assert sidecar["SpatialReference"] == sidecar["Sources"][0]
    assert sidecar["Type"] == "Lesion"
    ignored = (output / ".bidsignore").read_text().split()
    named = re.compile(
        r"sub-[A-Za-z0-9]+_space-ct_label-tumour_desc-auto_mask\.(nii\.gz|json)|dataset_description\.json|README\.md"
    )
    for path in output.rglob("[!.]*"):
        known = named.fullmatch(path.name) or any(fnmatch(path.name, pattern) for pattern in ignored)
        assert path.is_dir() or known, path


def test_the_column_of_the_reference_wins_over_the_column_image() -> None:
    """As in check, train and evaluate; ``image`` stands in for a reference that is absent."""
    case = {"image": "other.nii.gz", "ct": "ct.nii.gz", "pet": "pet.nii.gz"}
    assert batch._images(case, ["ct", "pet"]) == {"ct": "ct.nii.gz", "pet": "pet.nii.gz"}
    del case["ct"]
    assert batch._images(case, ["ct", "pet"]) == {"ct": "other.nii.gz", "pet": "pet.nii.gz"}


@pytest.mark.parametrize("verb", ["check", "evaluate"])
def test_images_that_a_table_does_not_name_are_not_looked_for(
    verb: str, phantoms: Any, tiny_student: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They lie beside the CT under the names of the data set."""
    (tmp_path / "t.csv").write_text(f"case_id,ct,label\nA,{phantoms[0]['ct']},{phantoms[0]['label']}\n")
    command = [verb, "--data", "phantom", "--data-list", str(tmp_path / "t.csv"), "--allow-outside"]
    command += tiny_student if verb == "evaluate" else []
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    words = "pet, mr is absent" if verb == "check" else "Modalities are absent (A: pet; A: mr)"
    assert words in printed.out + printed.err
