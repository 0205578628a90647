# SPDX-License-Identifier: Apache-2.0
"""Two runs at once on one output, one volumes folder or one cache, as real processes; and what they leave behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.cli.main import main
from scripts.utils.output_lock import acquire, hold, release

SPACING = ["--set", "spacing=[12,12,12]"]
TRAINING = ["--set", "val_interval=100"]
TEACHER = ["--set", "patch=[16,16,16]", "--set", 'architectures={"segresnet":{"init_filters":8}}']
COLUMNS = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz", "mr": "MR_T1_image.nii.gz"}


def wait_for(path: Path, process: Any = None) -> None:
    """Wait until a file exists; the test's time limit ends the test otherwise."""
    while not path.exists():
        assert process is None or process.alive()
        time.sleep(0.002)


def hidden(folder: Path) -> list[str]:
    """Files that begin with a dot, in a folder and below."""
    return [path.name for path in folder.rglob(".*")]


@pytest.fixture
def line(tiny: list[str], cohort: Path) -> Callable[..., list[str]]:
    """``line(verb, *more)``: a command on the phantoms at 12 mm."""
    return lambda verb, *more: [str(each) for each in (verb, *tiny, *SPACING, "--dataset-dir", cohort, *more)]


def test_of_two_segmentations_of_one_mask_one_is_refused_and_no_file_is_left(
    child: Any, noise_case: Any, segment_arguments: Any, sentence: Any, tmp_path: Path
) -> None:
    files, mask, go = noise_case(tmp_path / "in", 48), tmp_path / "out" / "mask.nii.gz", tmp_path / "go"

    def work() -> int:
        wait_for(go)
        return main(segment_arguments(files, mask, "--set", "overlap=0.75"))

    processes = [child(work) for _ in range(2)]
    go.touch()
    ends = sorted(process.end() for process in processes)
    assert [code for code, _ in ends] == [0, 1], ends
    error = sentence(ends[1][1])
    assert any(f"{mask} is in use by process {process.pid} on " in error for process in processes)
    written = ["mask.manifest.json", "mask.measures.csv", "mask.nii.gz"]
    assert sorted(path.name for path in mask.parent.iterdir()) == written


def test_a_batch_is_refused_while_the_same_batch_runs_and_ends_complete(
    start_python: Any, line: Any, cohort: Path, weights: Path, refused: Any, tmp_path: Path
) -> None:
    rows = [f"P{i},P{i},{','.join(f'PHANTOM_00{i}/{name}' for name in COLUMNS.values())}" for i in (1, 2, 3)]
    table, output = tmp_path / "cases.csv", tmp_path / "masks"
    rows = [",".join(each if i < 2 else str(cohort / each) for i, each in enumerate(row.split(","))) for row in rows]
    table.write_text("\n".join(["case_id,patient_id,ct,pet,mr", *rows]) + "\n")
    command = line("segment", "--data-list", table, "--allow-outside", "--weights", weights, "--output-dir", output)
    first = start_python("-m", "scripts", *command, output=tmp_path / "log")
    while not (output / ".run.json").exists():
        assert first.is_alive(), (tmp_path / "log.err").read_text()
        time.sleep(0.002)
    assert f"{output} is in use by process {first.pid} on " in refused(*command)
    first.join(200)
    assert first.exitcode == 0, (tmp_path / "log.err").read_text()
    assert sorted(path.name for path in output.glob("*.nii.gz")) == ["P1.nii.gz", "P2.nii.gz", "P3.nii.gz"]
    assert hidden(output) == []
    assert main(command) == 0  # the resume has nothing to do
    assert hidden(output) == []


def test_evaluation_into_the_folder_of_a_running_training_is_refused(
    child: Any, line: Any, weights: Path, refused: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    training = child(lambda: main(line("train", "--epochs", 30, *TRAINING, "--output-dir", output)))
    wait_for(output / ".run.json", training)
    error = refused(*line("evaluate", "--weights", weights, "--output-dir", output))
    assert f"{output} is in use by process {training.pid} on " in error
    code, printed = training.end()
    assert code == 0, printed
    assert main(line("evaluate", "--weights", output / "model.pt", "--output-dir", output)) == 0
    assert hidden(output) == []


def test_two_trainings_with_one_volumes_folder_end_with_the_weights_of_one_alone(
    child: Any, line: Any, tmp_path: Path
) -> None:
    volumes, go = tmp_path / "volumes", tmp_path / "go"

    def start(name: str) -> Any:
        def work() -> int:
            wait_for(go)
            return main(
                line("train", "--epochs", 2, *TRAINING, "--volumes-dir", volumes, "--output-dir", tmp_path / name)
            )

        return child(work)

    processes = [start(name) for name in ("one", "two")]
    go.touch()
    for process in processes:
        code, printed = process.end()
        assert code == 0, printed
    assert main(line("train", "--epochs", 2, *TRAINING, "--output-dir", tmp_path / "alone")) == 0
    alone, *others = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("alone", "one", "two"))
    assert all(torch.equal(other[name], alone[name]) for other in others for name in alone)
    assert len(list(volumes.glob("*.pt"))) == 4
    assert hidden(tmp_path) == []


def test_a_second_writer_of_a_cache_is_refused(child: Any, line: Any, refused: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = line("cache-teachers", *TEACHER, "--teacher", "segresnet:pet=random", "--output-dir", cache)
    first = child(lambda: main([*command, "--set", "overlap=0.9"]))
    wait_for(cache / ".run.json", first)
    assert f"{cache} is in use by process {first.pid} on " in refused(*command)
    code, printed = first.end()
    assert code == 0, printed
    assert hidden(cache) == []
    assert "its overlap is 0.9, this run's is 0.5" in refused(*command)


def test_a_terminated_run_leaves_neither_a_lock_nor_a_part_of_a_file(
    start_python: Any, noise_case: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    files, mask = noise_case(tmp_path / "in", 96), tmp_path / "out" / "mask.nii.gz"
    arguments = segment_arguments(files, mask, "--set", "overlap=0.9")
    process = start_python("-m", "scripts", *arguments, output=tmp_path / "log")
    wait_for(mask.parent / ".mask.nii.gz.run.json")
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert list(mask.parent.iterdir()) == []
    assert "Traceback" not in (tmp_path / "log.err").read_text()


def test_a_lock_that_cannot_name_its_owner_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scripts.utils.output_lock.write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        acquire(tmp_path / "mask.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_an_outer_lock_stays_while_runs_inside_it_end(tmp_path: Path) -> None:
    with hold(tmp_path / "out"):
        acquire(tmp_path / "out" / "mask.nii.gz")
        release()
        assert sorted(hidden(tmp_path / "out")) == [".lock", ".run.json"]
        with hold(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / ".lock").exists()
    assert hidden(tmp_path / "out") == []


def test_the_takeover_of_a_folder_keeps_files_that_other_processes_are_writing(child: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = child(lambda: acquire(out) or os.kill(os.getpid(), signal.SIGKILL) or 0)
    killed.end()
    alive, dead = out / f".a.nii.gz.{os.getpid()}.part", out / "deep" / f".b.nii.gz.{killed.pid}.part"
    dead.parent.mkdir()
    alive.touch()
    dead.touch()
    acquire(out)
    assert (alive.exists(), dead.exists()) == (True, False)
