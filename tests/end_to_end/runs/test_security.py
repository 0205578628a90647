# SPDX-License-Identifier: Apache-2.0
"""Nothing from files is executed or shown as markup, no patient is named, and minimum versions are safe."""

from __future__ import annotations

import ast
import gzip
import locale
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from packaging.requirements import Requirement

from scripts.cli.main import main
from scripts.evaluation.score import score

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "scripts").rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "pandas.read_pickle"}
NAME, NUMBER = "Doe^Secret", "SECRET-4711"


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every call: its dotted name and its keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords if each.arg}
            yield ast.unparse(node.func), keywords


def unsafe(text: str) -> list[str]:
    """The calls of a source that could execute the content of a file."""
    tree, uses = ast.parse(text), []
    for node in ast.walk(tree):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        uses += [name for name in names if name.split(".")[0] in MODULES]
    for name, keywords in calls(tree):
        last = name.rsplit(".", 1)[-1]
        if name in CALLS or keywords.get("allow_pickle", "False") != "False" or keywords.get("shell") == "True":
            uses.append(name)
        if (name == "torch.load" or last == "load_pt") and keywords.get("weights_only") != "True":
            uses.append(name)
    return uses


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_can_execute_the_content_of_a_file(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "eval('1')", "exec('1')", "yaml.load(x)", "torch.load(x)",
        "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_unsafe_calls(text: str) -> None:
    assert unsafe(text) != []
    assert unsafe("torch.load(x, weights_only=True); np.load(x); network.eval(); yaml.safe_load(x)") == []


def test_weights_are_always_loaded_with_weights_only() -> None:
    load_calls = [
        keys
        for path in SOURCES
        for name, keys in calls(ast.parse(path.read_text(encoding="utf-8")))
        if name == "torch.load"
    ]
    assert load_calls
    assert all(keywords["weights_only"] == "True" for keywords in load_calls)


@pytest.mark.parametrize("hostile", ["<script>alert(1)", '"><img src=x onerror=alert(1)>', "&lt;b&gt;"])
def test_case_ids_patients_and_file_names_are_escaped_in_the_report(
    hostile: str, tmp_path: Path, write_nifti: Callable[..., Path]
) -> None:
    mask = np.zeros((12, 10, 8), np.uint8)
    mask[2:8, 2:8, 2:6] = 1
    path = write_nifti(tmp_path / hostile / "ct.nii.gz", mask)
    for name in (hostile, f"extra {hostile}"):
        (tmp_path / "masks").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "masks" / f"{name}.nii.gz")
    case = {"case_id": hostile, "patient_id": hostile, "image": str(path), "ct": str(path), "label": str(path)}
    folders = str(tmp_path / "masks"), str(tmp_path / "out")
    score(f"network {hostile}", [case], [[0], [1]], *folders, {"ct": [0, 1]}, workers=1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert hostile not in page
    assert hostile.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;") in page


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    """A CT series of eight slices, of a patient with a name and an id."""
    folder = tmp_path / "series"
    folder.mkdir()
    before = locale.setlocale(locale.LC_ALL)  # GDCM's writer leaves the process in the locale C, without UTF-8
    voxels = np.random.default_rng(0).integers(-1000, 300, (8, 16, 16)).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    tags = {
        "0010|0010": NAME, "0010|0020": NUMBER, "0008|0060": "CT", "0020|000d": "1.2.3.4", "0020|000e": "1.2.3.4.5",
        "0020|0052": "1.2.3.4.6", "0020|0037": "1\\0\\0\\0\\1\\0", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
    }  # fmt: skip
    for index, plane in enumerate(voxels):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((2.0, 2.0, 2.0))
        own = {"0020|0032": f"0\\0\\{2 * index}", "0020|0013": str(index), "0008|0018": f"1.2.3.4.5.{index + 1}"}
        for key, value in {**tags, **own}.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{index}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)
    return folder


def test_no_patients_name_or_id_is_copied_from_a_dicom_header(
    dicom: Path, segment_arguments: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = (dicom / "0.dcm").read_bytes()
    assert NAME.encode() in first
    assert NUMBER.encode() in first
    output = tmp_path / "out"
    assert main(segment_arguments({"ct": dicom}, output / "mask.nii.gz", "--allow-missing")) == 0
    printed = capfd.readouterr()
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert {"mask.nii.gz", "mask.manifest.json"} <= set(files)
    files |= {"unpacked": gzip.decompress(files["mask.nii.gz"]), "printed": (printed.out + printed.err).encode()}
    for secret in (NAME, NUMBER, "Secret"):
        assert [name for name, content in files.items() if secret.encode() in content] == []


def test_series_of_different_patients_are_refused_without_naming_them(
    dicom: Path, refused: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dicom, other)
    for path in other.iterdir():
        path.write_bytes(path.read_bytes().replace(NUMBER.encode(), NUMBER[::-1].encode()))
    mask = tmp_path / "out" / "mask.nii.gz"
    error = refused(*segment_arguments({"ct": dicom, "mr": other}, mask, "--allow-missing"))
    assert f"{dicom} and {other} belong to different patients" in error
    assert not {NAME, NUMBER, NUMBER[::-1]} & set(error.replace(",", " ").split())
    assert NUMBER not in error
    assert not mask.exists()


@pytest.mark.parametrize(
    ("file", "package", "unsafe_version", "safe_version"),
    [
        ("requirements.txt", "monai", "1.6.0", "1.6.1"),
        ("requirements.txt", "torch", "2.9.1", "2.13.0"),
        ("requirements-dicom.txt", "pydicom", "3.0.1", "3.0.2"),
    ],
)
def test_versions_with_known_vulnerabilities_are_below_the_minimum(
    file: str, package: str, unsafe_version: str, safe_version: str
) -> None:
    lines = (ROOT / file).read_text().splitlines()
    (wanted,) = [Requirement(line) for line in lines if Requirement(line).name == package]
    assert unsafe_version not in wanted.specifier
    assert safe_version in wanted.specifier


def test_every_requirements_file_is_an_installable_extra() -> None:
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    named = {
        *dynamic["dependencies"]["file"],
        *(f for each in dynamic["optional-dependencies"].values() for f in each["file"]),
    }
    own = {"requirements-label.txt"}  # of an environment that holds other versions than the bundle's
    assert named == {path.name for path in ROOT.glob("requirements*.txt")} - own
    assert dynamic["optional-dependencies"]["dicom"]["file"] == ["requirements-dicom.txt"]


def test_the_security_policy_names_the_private_channel_and_the_response_time() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for words in ("weights_only=True", "security advisories", "Supported versions", "sha256"):
        assert words in text
