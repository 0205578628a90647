# SPDX-License-Identifier: Apache-2.0
"""The zip of ``make release``, unpacked elsewhere and checked as the MONAI model zoo checks it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

from tools.release import LIMIT, NAME, release

pytestmark = pytest.mark.release
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zipped(release_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip."""
    return release(release_checkout, tmp_path_factory.mktemp("zip"))


@pytest.fixture(scope="module")
def zoo(zipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of the zoo's repository and the unpacked bundle in models/."""
    folder = tmp_path_factory.mktemp("zoo")
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(folder / "models")
    return folder


@pytest.fixture(scope="module")
def results(zoo: Path, phantoms: list[dict[str, Any]], clean_environment: dict[str, str]) -> dict[str, Any]:
    """The results of ``zoo_checks.py``, in a process without the repository and the installed package."""
    (zoo / "models" / NAME / "eval").mkdir()
    shutil.copy(ROOT / "tests/meta_schema_20240725.json", zoo / "models" / NAME / "eval/schema.json")
    shutil.copytree(Path(phantoms[0]["image"]).parent, zoo / "data" / "STS_001")
    command = [sys.executable, "-P", "-W", "ignore", str(ROOT / "tests/tools/zoo_checks.py"), NAME, "data"]
    process = subprocess.run(
        command, cwd=zoo, env=clean_environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads((zoo / "results.json").read_text())


def read_metadata(zoo: Path) -> dict[str, Any]:
    return json.loads((zoo / "models" / NAME / "configs/metadata.json").read_text())


def test_the_zip_is_one_folder_with_the_name_of_the_bundle(zipped: Path, zoo: Path) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", NAME)
    assert "_v" not in NAME  # the zoo splits <name>_v<version> at "_v"
    assert zipped.name == f"{NAME}_v{read_metadata(zoo)['version']}.zip"
    assert [path.name for path in (zoo / "models").iterdir()] == [NAME]
    assert ROOT not in zoo.parents


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE", "configs/metadata.json", "configs/inference.json", "configs/train.json", "configs/logging.conf",
        "models/model.pt", "models/model.pt.sha256", "docs/README.md", "docs/data_license.txt", "scripts/__init__.py",
        "models/model.task.json", "SECURITY.md",
    ],
)  # fmt: skip
def test_the_zip_has_every_file_that_the_zoo_requires(zoo: Path, name: str) -> None:
    assert (zoo / "models" / NAME / name).is_file()


def test_the_zip_has_the_tracked_files_of_the_bundle_and_nothing_else(zipped: Path, release_checkout: Path) -> None:
    listed = subprocess.run(["git", "-C", release_checkout, "ls-files"], capture_output=True, text=True, check=True)
    excluded = {"requirements-label.txt", ".gitignore", "docs/reading_order.md", "benchmarks/__init__.py"}
    excluded |= {name for name in listed.stdout.split() if name.startswith(("configs/benchmark/", "tools/"))}
    with zipfile.ZipFile(zipped) as archive:
        names = [member.filename for member in archive.infolist() if not member.is_dir()]
        assert sorted(names) == [f"{NAME}/{name}" for name in sorted(set(listed.stdout.split()) - excluded)]


def test_the_zip_has_no_links_and_is_not_compressed(zipped: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        members = archive.infolist()
    assert not [each.filename for each in members if stat.S_ISLNK(each.external_attr >> 16)]
    assert {each.compress_type for each in members} == {zipfile.ZIP_STORED}


def test_no_file_is_above_the_zoos_limit(zipped: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        assert max(member.file_size for member in archive.infolist()) <= LIMIT == 25e6
        assert f"{NAME}/large_files.yml" not in archive.namelist()  # it lists files that were left out


def test_the_same_commit_gives_the_same_bytes(
    zipped: Path, release_checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere"
    subprocess.run(["git", "clone", "-q", release_checkout, other], check=True)
    os.utime(other / "LICENSE", (0, 0))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert release(other, tmp_path / "zip").read_bytes() == zipped.read_bytes()


def test_every_link_in_the_docs_leads_to_a_file_of_the_zip(zoo: Path) -> None:
    pages = sorted((zoo / "models" / NAME / "docs").glob("*.md"))
    assert pages
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"docs/{page.name} links to {target}, which is not in the zip: see PARTS in tools/release.py"
            )


def test_the_readme_has_front_matter_and_links_to_files_of_the_zip(zoo: Path) -> None:
    _, front_matter, text = (zoo / "models" / NAME / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    parser = ConfigParser.load_config_file  # MONAI's reader of YAML
    path = zoo / "front_matter.yaml"
    path.write_text(front_matter)
    found = parser(path)
    assert (found["license"], found["pipeline_tag"], found["library_name"]) == (
        "apache-2.0",
        "image-segmentation",
        "monai",
    )
    targets = re.findall(r"\]\(([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    assert "docs/README.md" in targets
    for target in targets:
        assert target.startswith("http") or (zoo / "models" / NAME / target).exists(), target


def test_the_weights_have_the_checksum_of_their_file(zoo: Path) -> None:
    models = zoo / "models" / NAME / "models"
    digest, name = (models / "model.pt.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256((models / "model.pt").read_bytes()).hexdigest(), "model.pt")


def test_the_metadata_the_changelog_and_the_package_have_the_same_version(zoo: Path) -> None:
    metadata = read_metadata(zoo)
    versions = list(metadata["changelog"])
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert metadata["version"] == versions[0]
    assert numbers == sorted(set(numbers), reverse=True)
    assert f'\nversion = "{versions[0]}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {versions[0]}\n" in (ROOT / "CITATION.cff").read_text()


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


def test_the_metadata_passes_its_schema(zoo: Path, results: dict[str, Any]) -> None:
    assert read_metadata(zoo)["schema"].endswith("/meta_schema_20240725.json")
    assert results["metadata"] is None


def test_both_workflows_have_every_property(results: dict[str, Any]) -> None:
    assert results["properties"] == {"train": [], "inference": []}


def test_the_network_has_the_shapes_ofread_metadata(results: dict[str, Any]) -> None:
    assert results["shapes"] is None


def test_the_exported_torchscript_agrees_with_pytorch(results: dict[str, Any]) -> None:
    assert isinstance(results["torchscript"], float), results["torchscript"]
    assert results["torchscript"] <= 1e-5


def test_monai_loads_every_tensor_of_the_weights(results: dict[str, Any]) -> None:
    assert results["loading"] == {"train": [], "inference": []}


def test_inference_writes_a_mask_on_the_reference_grid(zoo: Path, results: dict[str, Any]) -> None:
    assert results["inference"] is None
    (path,) = (zoo / "masks").glob("*.nii.gz")
    mask, reference = nib.load(path), nib.load(zoo / "data/STS_001/CT_image.nii.gz")
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


def test_all_code_came_from_the_unpacked_bundle(zoo: Path, results: dict[str, Any]) -> None:
    assert len(results["code"]) > 10
    assert all((zoo / path).resolve().is_relative_to(zoo / "models" / NAME) for path in results["code"])
