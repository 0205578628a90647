# SPDX-License-Identifier: Apache-2.0
"""The manifest of a run, written while the run is active."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import run

from scripts import bundle_root
from scripts.utils.run_manifest import git_commit, running_config, write_manifest

pytestmark = pytest.mark.usefixtures("fake_git")
CASES = [{"case_id": "A", "image": "a.nii"}, {"case_id": "B", "image": "b.nii"}]


def strict(path: Path) -> dict[str, Any]:
    """JSON without NaN or infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)  # type: ignore[no-any-return]


def test_the_written_and_the_returned_manifest_are_equal(tmp_path: Path) -> None:
    teachers: dict[str, str | None] = {"teacher_ct": "ab" * 32}
    returned = write_manifest(tmp_path / "new" / "run", CASES, teachers, seconds=12.345, threads=3)
    written = strict(tmp_path / "new" / "run" / "manifest.json")
    assert written == returned
    assert written["data"] == CASES
    assert written["teachers_sha256"] == {"teacher_ct": "ab" * 32}
    assert written["wall_seconds"] == 12.3
    assert written["threads"] == 3
    assert not list(tmp_path.rglob(".*.tmp"))


def test_versions_are_the_installed_ones(tmp_path: Path) -> None:
    versions = write_manifest(tmp_path, CASES)["versions"]
    assert versions["python"] == platform.python_version()
    assert {name: versions[name] for name in ("torch", "monai", "numpy")} == {
        name: version(name) for name in ("torch", "monai", "numpy")
    }


def test_peak_memory_is_the_peak_of_this_process_in_mib(tmp_path: Path) -> None:
    peak = write_manifest(tmp_path, CASES)["peak_mib"]
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").is_file() else []
    resident = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]
    assert 50 < peak < 1e6
    assert all(peak > 0.9 * mib for mib in resident)
    assert write_manifest(tmp_path, CASES, accelerator_mib=1e5)["peak_mib"] >= peak + 1e5


@pytest.mark.parametrize(("clean", "mark"), [(True, ""), (False, "+")])
def test_the_commit_has_a_plus_if_files_differ(tmp_path: Path, fake_git: Any, clean: bool, mark: str) -> None:
    fake_git("c0ffee" + "0" * 34, clean)
    assert write_manifest(tmp_path, CASES)["git_commit"] == "c0ffee" + "0" * 34 + mark


def test_without_a_checkout_or_git_there_is_no_commit(
    tmp_path: Path, fake_git: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexit 128\n")
    git_commit.cache_clear()
    assert write_manifest(tmp_path, CASES)["git_commit"] is None
    git_commit.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert write_manifest(tmp_path, CASES)["git_commit"] is None


def test_a_process_keeps_the_commit_that_it_began_with(tmp_path: Path, fake_git: Any) -> None:
    assert write_manifest(tmp_path, CASES)["git_commit"] == "0" * 40
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexit 128\n")
    assert write_manifest(tmp_path, CASES)["git_commit"] == "0" * 40


def test_the_data_hash_follows_the_data_list(tmp_path: Path) -> None:
    first = write_manifest(tmp_path, CASES)["data_sha256"]
    assert len(first) == 64
    assert write_manifest(tmp_path, [dict(reversed(case.items())) for case in CASES])["data_sha256"] == first
    for other in (CASES[:1], CASES[::-1], [CASES[0], {**CASES[1], "image": "c.nii"}], [CASES, []]):
        assert write_manifest(tmp_path, other)["data_sha256"] != first


def test_outside_of_a_workflow_there_is_no_config(tmp_path: Path) -> None:
    assert running_config() is None
    manifest = write_manifest(tmp_path, CASES)
    assert (manifest["config"], manifest["seed"]) == (None, None)
    metadata = json.loads((Path(bundle_root()) / "configs" / "metadata.json").read_text())
    assert manifest["bundle_version"] == metadata["version"]


def test_within_a_run_the_merged_config_is_found(tmp_path: Path) -> None:
    base = {
        "seed": 5,
        "spacing": [3.0, 3.0, 3.0],
        "device": "$torch.device('cpu')",
        "imports": ["$import torch"],
        "cases": [{"case_id": "A", "image": "a.nii"}],
        "run": [
            "$@device",
            {
                "_target_": "scripts.utils.run_manifest.write_manifest",
                "output_dir": str(tmp_path / "out"),
                "cases": "@cases",
                "seconds": 1.0,
            },
        ],
    }
    (tmp_path / "base.json").write_text(json.dumps(base))
    (tmp_path / "overlay.json").write_text(json.dumps({"spacing": [2.0, 2.0, 2.0]}))
    (tmp_path / "meta.json").write_text(json.dumps({"version": "1.2.3"}))
    run(
        config_file=[str(tmp_path / "base.json"), str(tmp_path / "overlay.json")],
        meta_file=str(tmp_path / "meta.json"),
        logging_file=False,
        seed=7,
    )
    manifest = strict(tmp_path / "out" / "manifest.json")
    assert (manifest["seed"], manifest["bundle_version"]) == (7, "1.2.3")
    assert manifest["config"]["spacing"] == [2.0, 2.0, 2.0]  # of the overlay
    assert manifest["config"]["device"] == "$torch.device('cpu')"  # as written, not as evaluated
    assert manifest["config"]["run"] == base["run"]
    assert "_meta_" not in manifest["config"]
    assert manifest["data"] == base["cases"]
    assert running_config() is None
