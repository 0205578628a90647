# SPDX-License-Identifier: Apache-2.0
"""``tools/release.py`` on a small repository: which states it refuses, and files above the zoo's limit."""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.apps.utils import download_url
from monai.bundle import ConfigParser

from tools.release import NAME, main, release


@pytest.fixture
def small(tmp_path: Path, commit: Callable[[Path], Path]) -> Path:
    """A repository with a few files of every part of a release."""
    root = tmp_path / "small"
    for name in ("configs", "docs", "models", "scripts"):
        (root / name).mkdir(parents=True)
    for name in ("docs/README.md", "scripts/__init__.py", "CHANGELOG.md", "SECURITY.md", "requirements.txt"):
        (root / name).touch()
    (root / "README.md").write_text("# Title\n\nSee [the card](docs/README.md#top) and [how](tests/README.md).\n")
    (root / "configs/metadata.json").write_text('{"version": "1.2.3", "changelog": {"1.2.3": "b", "1.2.2": "a"}}')
    (root / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (root / "LICENSE").write_text("x")
    torch.save({"weight": torch.arange(1000.0)}, root / "models/model.pt")
    return commit(root)


def test_a_file_above_the_limit_is_left_out_and_can_be_downloaded_as_listed(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = release(small, out, limit=2000, url=(out / "upload").as_uri() + "/")
    with zipfile.ZipFile(path) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.namelist() if not name.endswith("/")}
        archive.extractall(tmp_path)
    assert {"LICENSE", "configs/metadata.json", "large_files.yml", "pyproject.toml"} <= names
    assert "models/model.pt" not in names
    parser = ConfigParser()
    parser.read_config(str(tmp_path / NAME / "large_files.yml"))
    (entry,) = parser.get()["large_files"]
    assert sorted(entry) == ["hash_type", "hash_val", "path", "url"]
    path = tmp_path / NAME / entry.pop("path")
    download_url(**entry, filepath=path, progress=False)  # as the zoo does; it checks the checksum
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.arange(1000.0))


def test_a_file_above_the_limit_needs_an_address(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"models/model\.pt: larger than 2000 bytes.* by --url"):
        release(small, tmp_path / "out", limit=2000)


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def replace(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return replace


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_text("configs/metadata.json", '"1.2.3": "b", ', ""), "its changelog starts with 1.2.2"),
        (replace_text("configs/metadata.json", '"1.2.3": "b", "1.2.2": "a"', ""), "its changelog starts with None"),
        (replace_text("configs/metadata.json", '{"1.2.3": "b", "', '{"1.2.4": "b", "1.2.3": "", "'), "with 1.2.4"),
        (replace_text("pyproject.toml", "1.2.3", "1.2.4"), r"has version 1.2.3, but .*pyproject.toml has 1.2.4"),
        (replace_text("configs/metadata.json", "1.2.3", "1.2"), "The version 1.2 in .* is not three numbers"),
    ],
)
def test_versions_that_disagree_are_refused(
    small: Path, tmp_path: Path, commit: Callable[[Path], Path], change: Callable[[Path], None], words: str
) -> None:
    change(small)
    commit(small)
    with pytest.raises(ValueError, match=words):
        release(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "LICENSE").write_text("y"), r"LICENSE differs from the last commit"),
        (lambda root: (root / "LICENSE").unlink(), r"LICENSE differs from the last commit"),
        (lambda root: (root / "configs/new.json").write_text("{}"), r"configs/new.json differs from the last commit"),
        (lambda root: shutil.rmtree(root / ".git"), r"git failed in .*: .*not a git repository.* clone"),
    ],
)
def test_files_that_are_not_committed_are_refused(
    small: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    change(small)
    with pytest.raises(ValueError, match=words):
        release(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.release
def test_a_missing_part_is_refused(small: Path, tmp_path: Path, commit: Callable[[Path], Path]) -> None:
    shutil.rmtree(small / "docs")
    commit(small)
    with pytest.raises(ValueError, match="pathspec 'docs' did not match"):
        release(small, tmp_path / "out")


@pytest.mark.release
def test_files_outside_the_bundle_may_have_changes(small: Path, tmp_path: Path) -> None:
    before = release(small, tmp_path / "before").read_bytes()
    (small / "notes.txt").write_text("x")
    assert release(small, tmp_path / "after").read_bytes() == before


def test_the_command_prints_the_path_of_the_zip_and_an_error_in_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.release.bundle_root", lambda: str(small))
    assert main([]) == 0
    path = small / "runs" / "release" / f"{NAME}_v1.2.3.zip"
    assert capsys.readouterr().out == (
        f"{path}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    )
    (small / "LICENSE").write_text("y")
    assert main([]) == 1
    assert re.fullmatch(r"error: .*LICENSE differs .*\n", capsys.readouterr().err)
