# SPDX-License-Identifier: Apache-2.0
"""The zip that ``make release`` makes, unpacked elsewhere and put through what the MONAI model zoo checks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.utils import download_url
from monai.bundle import ConfigParser

from tools.release import LIMIT, NAME, main, release

ROOT = Path(__file__).parents[2]
COPIED = ("configs", "docs", "models", "scripts", "CHANGELOG.md", "LICENSE", "pyproject.toml", ".gitignore")
COPIED += tuple(path.name for path in ROOT.glob("requirements*.txt"))
GIT = shutil.which("git")
pytestmark = pytest.mark.skipif(GIT is None, reason="a release is made of what git tracks")
# A hook that runs the tests names its own repository so: none of it may reach the repositories that are made here.
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "PYTHONPATH"))}
CLEAN["GIT_CONFIG_GLOBAL"] = os.devnull  # nor do the developer's own hooks and line ends matter


@pytest.fixture(autouse=True)
def _only_the_repositories_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in set(os.environ) - set(CLEAN):
        monkeypatch.delenv(key)


def _commit(root: Path) -> Path:
    """Make the folder a repository of one commit."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run([GIT, "-C", root, *command], check=True, env=CLEAN)
    return root


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This bundle as it lies here, committed: the working tree itself may have changes."""
    root = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*_export"))
        else:
            shutil.copy(ROOT / name, root / name)
    return _commit(root)


@pytest.fixture(scope="module")
def zipped(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip."""
    with pytest.MonkeyPatch.context() as patch:
        for key in set(os.environ) - set(CLEAN):
            patch.delenv(key)
        return release(checkout, tmp_path_factory.mktemp("zip"))


@pytest.fixture(scope="module")
def zoo(zipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is laid out as the zoo's repository, with the unpacked bundle in models/."""
    folder = tmp_path_factory.mktemp("zoo")
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(folder / "models")
    return folder


@pytest.fixture(scope="module")
def facts(zoo: Path, phantoms: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``zoo_checks.py`` found, in a process that knows neither the repository nor the installed package."""
    (zoo / "models" / NAME / "eval").mkdir()
    shutil.copy(ROOT / "tests/meta_schema_20240725.json", zoo / "models" / NAME / "eval/schema.json")
    shutil.copytree(Path(phantoms[0]["image"]).parent, zoo / "data" / "STS_001")
    command = [sys.executable, "-P", "-W", "ignore", str(ROOT / "tests/tools/zoo_checks.py"), NAME, "data"]
    done = subprocess.run(command, cwd=zoo, env=CLEAN, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((zoo / "facts.json").read_text())


def _metadata(zoo: Path) -> dict[str, Any]:
    return json.loads((zoo / "models" / NAME / "configs/metadata.json").read_text())


def test_the_zip_is_one_folder_of_the_bundles_name(zipped: Path, zoo: Path) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", NAME)
    assert "_v" not in NAME  # the zoo splits <name>_v<version> there
    assert zipped.name == f"{NAME}_v{_metadata(zoo)['version']}.zip"
    assert [path.name for path in (zoo / "models").iterdir()] == [NAME]
    assert ROOT not in zoo.parents


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE", "configs/metadata.json", "configs/inference.json", "configs/train.json", "configs/logging.conf",
        "models/model.pt", "models/model.pt.sha256", "docs/README.md", "docs/data_license.txt", "scripts/__init__.py",
    ],
)  # fmt: skip
def test_a_file_that_the_zoo_wants_is_there(zoo: Path, name: str) -> None:
    assert (zoo / "models" / NAME / name).is_file()


def test_the_zip_holds_what_git_tracks_of_the_bundle_and_nothing_else(zipped: Path, checkout: Path) -> None:
    listed = subprocess.run([GIT, "-C", checkout, "ls-files"], capture_output=True, text=True, check=True, env=CLEAN)
    left = {"requirements-label.txt", ".gitignore", "docs/reading_order.md"}
    with zipfile.ZipFile(zipped) as archive:
        assert archive.namelist() == [f"{NAME}/{name}" for name in sorted(set(listed.stdout.split()) - left)]


def test_no_file_is_above_the_zoos_limit(zipped: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        assert max(member.file_size for member in archive.infolist()) <= LIMIT == 25e6
        assert f"{NAME}/large_files.yml" not in archive.namelist()  # none was left out, so none is listed


def test_the_same_commit_gives_the_same_bytes(zipped: Path, checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    subprocess.run([GIT, "clone", "-q", checkout, other], check=True, env=CLEAN)
    os.utime(other / "LICENSE", (0, 0))
    assert release(other, tmp_path / "zip").read_bytes() == zipped.read_bytes()


def test_every_link_of_the_documents_leads_to_a_file_of_the_zip(zoo: Path) -> None:
    pages = sorted((zoo / "models" / NAME / "docs").glob("*.md"))
    assert pages
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"docs/{page.name} links to {target}, which is not in the zip: see PARTS in tools/release.py"
            )


def test_the_weights_have_the_checksum_beside_them(zoo: Path) -> None:
    models = zoo / "models" / NAME / "models"
    digest, name = (models / "model.pt.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256((models / "model.pt").read_bytes()).hexdigest(), "model.pt")


def test_the_version_is_the_newest_of_the_changelog_and_that_of_the_package(zoo: Path) -> None:
    metadata = _metadata(zoo)
    versions = list(metadata["changelog"])
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert metadata["version"] == versions[0]
    assert numbers == sorted(set(numbers), reverse=True)
    assert f'\nversion = "{versions[0]}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ("inference", "bundle_root device network_def inferer output_dir"),
        (
            "train",
            "bundle_root device dataset_dir output_dir val_interval train#trainer train#trainer#max_epochs"
            " train#dataset train#dataset#data train#handlers train#preprocessing train#inferer validate#evaluator"
            " validate#handlers validate#dataset validate#dataset#data validate#preprocessing"
            " validate#postprocessing validate#inferer validate#key_metric",
        ),
    ],
)
def test_the_configs_have_the_keys_that_the_zoo_names(zoo: Path, config: str, keys: str) -> None:
    parser = ConfigParser()
    parser.read_config(str(zoo / "models" / NAME / f"configs/{config}.json"))
    assert [key for key in keys.split() if key not in parser] == []


def test_metadata_passes_the_schema_that_it_names(zoo: Path, facts: dict[str, Any]) -> None:
    assert _metadata(zoo)["schema"].endswith("/meta_schema_20240725.json")
    assert facts["metadata"] is None


def test_both_workflows_have_every_property(facts: dict[str, Any]) -> None:
    assert facts["properties"] == {"train": [], "inference": []}


def test_the_network_has_the_shapes_of_metadata(facts: dict[str, Any]) -> None:
    assert facts["shapes"] is None


def test_the_weights_become_torchscript_that_answers_alike(facts: dict[str, Any]) -> None:
    assert isinstance(facts["torchscript"], float), facts["torchscript"]
    assert facts["torchscript"] <= 1e-5


def test_monai_loads_every_tensor_of_the_weights(facts: dict[str, Any]) -> None:
    assert facts["loading"] == {"train": [], "inference": []}


def test_inference_writes_a_mask_on_the_reference_grid(zoo: Path, facts: dict[str, Any]) -> None:
    assert facts["inference"] is None
    (path,) = (zoo / "masks").glob("*.nii.gz")
    mask, reference = nib.load(path), nib.load(zoo / "data/STS_001/CT_image.nii.gz")
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


def test_all_code_came_from_the_unpacked_bundle(zoo: Path, facts: dict[str, Any]) -> None:
    assert len(facts["code"]) > 10
    assert all((zoo / path).resolve().is_relative_to(zoo / "models" / NAME) for path in facts["code"])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The least that a release is made of, committed."""
    root = tmp_path / "small"
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "configs/metadata.json").write_text('{"version": "1.2.3", "changelog": {"1.2.3": "b", "1.2.2": "a"}}')
    (root / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (root / "LICENSE").write_text("x")
    torch.save({"weight": torch.arange(1000.0)}, root / "models/model.pt")
    return _commit(root)


def test_a_file_above_the_limit_is_left_out_and_comes_back_by_its_list(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = release(small, out, limit=2000, url=(out / "upload").as_uri() + "/")
    with zipfile.ZipFile(path) as archive:
        names = [name.removeprefix(f"{NAME}/") for name in archive.namelist()]
        archive.extractall(tmp_path)
    assert names == ["LICENSE", "configs/metadata.json", "large_files.yml", "pyproject.toml"]
    parser = ConfigParser()
    parser.read_config(str(tmp_path / NAME / "large_files.yml"))
    (entry,) = parser.get()["large_files"]
    assert sorted(entry) == ["hash_type", "hash_val", "path", "url"]
    got = tmp_path / NAME / entry.pop("path")
    download_url(**entry, filepath=got, progress=False)  # as the zoo does; it compares the checksum
    assert torch.equal(torch.load(got, weights_only=True)["weight"], torch.arange(1000.0))


def test_a_file_above_the_limit_needs_an_address(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"models/model\.pt: above the 2000 bytes .* Give --url"):
        release(small, tmp_path / "out", limit=2000)


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))
        _commit(root)

    return edit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_edit("configs/metadata.json", '"1.2.3": "b", ', ""), "is version 1.2.3, but its changelog begins with 1.2.2"),
        (_edit("configs/metadata.json", '"1.2.3": "b", "1.2.2": "a"', ""), "its changelog begins with None"),
        (_edit("configs/metadata.json", '{"1.2.3": "b", "', '{"1.2.4": "b", "1.2.3": "", "'), "begins with 1.2.4"),
        (_edit("pyproject.toml", "1.2.3", "1.2.4"), r"is version 1.2.3, but .*pyproject.toml is 1.2.4"),
        (_edit("configs/metadata.json", "1.2.3", "1.2"), "has the version 1.2: write three numbers"),
        (lambda root: (root / "LICENSE").write_text("y"), r"LICENSE differs from the last commit"),
        (lambda root: (root / "LICENSE").unlink(), r"LICENSE differs from the last commit"),
        (lambda root: (root / "configs/new.json").write_text("{}"), r"configs/new.json differs from the last commit"),
        (lambda root: shutil.rmtree(root / ".git"), r"Git cannot say which files of .* belong to a release"),
    ],
)
def test_what_is_not_ready_for_a_release_is_refused(
    small: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    change(small)
    with pytest.raises(ValueError, match=words):
        release(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_part_of_the_bundle_may_differ(small: Path, tmp_path: Path) -> None:
    before = release(small, tmp_path / "before").read_bytes()
    (small / "notes.txt").write_text("x")
    assert release(small, tmp_path / "after").read_bytes() == before


def test_the_command_prints_where_the_zip_is_and_refuses_in_one_sentence(
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
