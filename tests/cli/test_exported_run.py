# SPDX-License-Identifier: Apache-2.0
"""``segment`` by exported files, without MONAI: when, the same masks and refusals, and the export of the first run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.cli import exported_run, segment_cohort
from scripts.cli.main import main
from scripts.utils.checksums import sha256
from tests.exported_weights import copy_with_task

ROOT = Path(__file__).parents[2]
WITHOUT_MONAI = "without loading MONAI"


@pytest.fixture(scope="module")
def weights(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with exported files and a record of their training; read only."""
    return copy_with_task(exported, tmp_path_factory.mktemp("weights"), [[0], [1]])


@pytest.fixture
def own_weights(weights: Path, tmp_path: Path) -> Path:
    """A copy of ``weights`` that a test may change."""
    shutil.copytree(weights.parent, tmp_path / "own")
    return tmp_path / "own" / "model.pt"


@pytest.fixture
def segment(
    weights: Path, phantoms: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``segment(*options, name, bundle, **images)``: exit code and both streams; by default of a phantom's images.

    With ``bundle`` it is ``monai.bundle run`` that segments.
    """

    def run(*options: str, name: str = "mask", bundle: bool = False, **images: str) -> tuple[int, str, str]:
        given = images or {key: str(phantoms[0][key]) for key in ("ct", "pet", "mr")}
        files = [word for key, path in given.items() for word in (f"--{key}", str(path))]
        own = [] if "--weights" in options else ["--weights", str(weights)]
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            if bundle:
                patch.setattr(exported_run, "obstacle", lambda *_: "a test")
            output = str(tmp_path / f"{name}.nii.gz")
            code = main(["segment", *own, *files, "--output", output, "--threads", "1", *options])
        return code, *capsys.readouterr()

    return run


def voxels(path: Path) -> Any:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


@pytest.mark.parametrize("engine", ["auto", "openvino", "onnxruntime"])
def test_a_mask_is_that_of_monai_bundle_run(segment: Any, engine: str, tmp_path: Path) -> None:
    code, out, err = segment("--engine", engine)
    assert (code, WITHOUT_MONAI in out) == (0, True), err
    code, out, err = segment("--engine", engine, name="bundle", bundle=True)
    assert (code, WITHOUT_MONAI in out) == (0, False), err
    assert (tmp_path / "mask.nii.gz").read_bytes() == (tmp_path / "bundle.nii.gz").read_bytes()
    assert set(np.unique(voxels(tmp_path / "mask.nii.gz")).tolist()) == {0, 1}
    manifest, other = (json.loads((tmp_path / f"{name}.manifest.json").read_text()) for name in ("mask", "bundle"))
    assert manifest["data"][0]["ct"] == other["data"][0]["ct"]
    for key in ("modalities", "spacing", "patch", "weights", "engine"):
        assert manifest["config"][key] == other["config"][key], key
    assert manifest["command"].startswith("python -m monai.bundle run --config_file")


@pytest.mark.parametrize("kind", ["nii", "mha", "nrrd"])
def test_every_format_gives_the_same_mask(segment: Any, kind: str, phantoms: Any, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    images = {}
    for key in ("ct", "pet", "mr"):
        images[key] = str(tmp_path / f"{key}.{kind}")
        sitk.WriteImage(sitk.ReadImage(str(phantoms[0][key])), images[key])
    assert segment("--engine", "openvino", **images)[0] == 0
    assert segment("--engine", "openvino", name="bundle", bundle=True, **images)[0] == 0
    assert (tmp_path / "mask.nii.gz").read_bytes() == (tmp_path / "bundle.nii.gz").read_bytes()


REFUSED: dict[str, tuple[list[str], dict[str, str]]] = {
    "a missing file": ([], {"ct": "no/ct.nii.gz", "pet": "no/pet.nii.gz", "mr": "no/mr.nii.gz"}),
    "another spacing": (["--set", "spacing=[4,4,4]"], {}),
    "a wrong spacing": (["--set", "spacing=[4,4]"], {}),
    "a wrong overlap": (["--set", "overlap=1.5"], {}),
    "an unknown id": (["--set", "overlapp=0.5"], {}),
    "no such precision": (["--engine", "onnxruntime", "--precision", "int8"], {}),
    "another window": (["--engine", "onnxruntime", "--set", "patch=[16,16,16]"], {}),
    "too many voxels": (["--max-voxels", "100"], {}),
    "no weights": (["--weights", "no/model.pt"], {}),
}


@pytest.mark.parametrize(("options", "images"), REFUSED.values(), ids=REFUSED)
def test_both_ways_refuse_in_the_same_sentence(segment: Any, options: list[str], images: Any, tmp_path: Path) -> None:
    sentences = []
    for bundle in (False, True):
        code, _, err = segment(*options, bundle=bundle, **images)
        assert code == 1
        sentences.append([line for line in err.splitlines() if line.startswith("error: ")])
    assert len(sentences[0]) == 1
    assert sentences[0] == sentences[1]
    assert not list(tmp_path.glob("*.nii.gz"))


OTHERS = {
    "--engine torch": ["--engine", "torch"],
    "--profile": ["--profile"],
    "--set inferer": ["--set", "+inferer#mode=constant"],
    "a network of its own": ["--set", "student_features=[8,16,16,16]"],
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_what_only_the_bundle_can_do_goes_by_the_bundle(segment: Any, options: list[str]) -> None:
    code, out, err = segment(*options)
    assert (code, WITHOUT_MONAI in out) == (0, False), err


def test_files_that_differ_from_pytorch_here_are_not_used(segment: Any, own_weights: Path) -> None:
    """As if a kernel of this CPU were wrong: the stored logits are others."""
    probe, record_file = (own_weights.parent / "model_export" / name for name in ("probe.npz", "export.json"))
    with np.load(probe) as stored:
        wrong: dict[str, Any] = {name: logits + 1 for name, logits in stored.items()}
    np.savez(probe, **wrong)
    record = json.loads(record_file.read_text())
    record_file.write_text(json.dumps({**record, "probe": sha256(probe)}))
    code, out, _ = segment("--weights", str(own_weights))
    assert (code, WITHOUT_MONAI in out) == (0, False)
    code, _, err = segment("--weights", str(own_weights), "--engine", "openvino")
    assert code == 1
    assert re.search(r"openvino (fp32|bf16) differs from PyTorch by", err)


def test_a_damaged_weights_file_is_refused_although_its_export_is_whole(segment: Any, own_weights: Path) -> None:
    own_weights.with_name("model.pt.sha256").write_text("0" * 64)
    for bundle in (False, True):
        code, _, err = segment("--weights", str(own_weights), bundle=bundle)
        assert code == 1
        assert "not 000000000000...: it is not the expected file." in err


@pytest.mark.usefixtures("first_export")
def test_the_first_run_exports_the_weights_and_the_next_uses_them(segment: Any, own_weights: Path) -> None:
    shutil.rmtree(own_weights.parent / "model_export")
    before = own_weights.with_name("model.task.json").read_text()
    code, out, err = segment("--weights", str(own_weights), "--no-export")
    assert (code, WITHOUT_MONAI in out) == (0, False), err
    code, out, err = segment("--weights", str(own_weights))
    assert code == 0, err
    assert f"Exporting {own_weights} for OpenVINO: once, for all later runs" in out
    record = json.loads((own_weights.parent / "model_export" / "export.json").read_text())
    assert record["weights_sha256"] == sha256(own_weights)
    code, out, err = segment("--weights", str(own_weights))
    assert (code, "Exporting" in out) == (0, False), err
    assert (WITHOUT_MONAI in out) == ("openvino fp32" in record["models"])
    assert own_weights.with_name("model.task.json").read_text() == before


@pytest.mark.usefixtures("first_export")
@pytest.mark.parametrize(("error", "tries"), [(OSError(28, "No space left on device"), 2), (ValueError("no"), 1)])
def test_an_export_is_tried_again_unless_the_weights_were_refused(
    error: Exception, tries: int, segment: Any, own_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are files of other weights, which make no difference."""
    record = own_weights.parent / "model_export" / "export.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "weights_sha256": "0" * 64}))
    calls = []

    def export(args: Any) -> None:
        calls.append(args)
        raise RuntimeError("a config item") from error

    monkeypatch.setattr("scripts.cli.export.run", export)
    for _ in range(2):
        code, _, err = segment("--weights", str(own_weights))
        assert code == 0, err
    assert len(calls) == tries


def test_segmenting_imports_neither_pytorch_nor_monai(weights: Path, phantoms: Any, tmp_path: Path) -> None:
    """In an interpreter of its own: the command line, one case, and a check of a data set's case."""
    images = [word for key in ("ct", "pet", "mr") for word in (f"--{key}", str(phantoms[0][key]))]
    code = (
        "import sys, scripts.cli.main\n"
        "assert not {'torch', 'monai', 'numpy'} & set(sys.modules), 'the command line alone'\n"
        "assert scripts.cli.main.main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'monai', 'ignite'} & set(sys.modules), sorted(sys.modules)\n"
    )
    command = ["segment", "--weights", str(weights), *images, "--output", str(tmp_path / "mask.nii.gz")]
    ran = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert WITHOUT_MONAI in ran.stdout


def test_what_lies_beside_an_earlier_mask_does_not_stay_beside_a_new_one(segment: Any, tmp_path: Path) -> None:
    for name in ("mask.measures.csv", "mask.report.html"):
        (tmp_path / name).write_text("of an earlier mask")
    assert segment("--no-measures")[0] == 0
    assert {path.name for path in tmp_path.glob("mask.*")} == {"mask.nii.gz", "mask.manifest.json"}


def _table(cases: list[dict[str, Any]], path: Path) -> Path:
    keys = ("case_id", "ct", "pet", "mr")
    path.write_text("\n".join([",".join(keys), *(",".join(str(case[key]) for key in keys) for case in cases)]))
    return path


@pytest.mark.parametrize(
    ("options", "cores", "workers", "threads"),
    [([], 4, 2, 2), ([], 1, 1, None), (["--workers", "4"], 4, 4, 1), (["--engine", "torch"], 4, 1, None)],
)
def test_cases_go_two_at_a_time_with_exported_files_the_largest_first(
    options: list[str], cores: int, workers: int, threads: int | None,
    weights: Path, phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    large = tmp_path / "large.nii.gz"
    large.write_bytes(b"0" * 10_000_000)
    cases = [phantoms[0], {**phantoms[1], "ct": str(large)}]
    taken = {}

    def run_jobs(work: Any, jobs: Any, count: int, *_: Any, **__: Any) -> None:
        taken.update(cases=[*jobs], workers=count, threads=jobs[cases[0]["case_id"]].threads)
        raise ValueError("a test")

    monkeypatch.setattr(segment_cohort, "run_jobs", run_jobs)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    table = str(_table(cases, tmp_path / "cases.csv"))
    command = ["segment", "--data-list", table, "--allow-outside", "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--weights", str(weights), *options]) == 1
    expected = [cases[1]["case_id"], cases[0]["case_id"]]
    assert taken == {"cases": expected, "workers": workers, "threads": threads}


def test_a_cohort_is_segmented_without_monai(segment: Any, weights: Path, phantoms: Any, tmp_path: Path) -> None:
    code = (
        "import sys, scripts.cli.main\n"
        "assert scripts.cli.main.main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'monai'} & set(sys.modules), sorted(sys.modules)\n"
    )
    table = str(_table(phantoms[:2], tmp_path / "cases.csv"))
    options = ["--data-list", table, "--allow-outside", "--output-dir", str(tmp_path / "out")]
    command = [sys.executable, "-c", code, "segment", "--weights", str(weights), *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "2 cases: 2 segmented" in ran.stdout
    assert segment(name="one", bundle=True)[0] == 0
    first = phantoms[0]["case_id"]
    assert (tmp_path / "out" / f"{first}.nii.gz").read_bytes() == (tmp_path / "one.nii.gz").read_bytes()


@pytest.mark.usefixtures("_here")
def test_the_box_of_a_case_in_a_list_bounds_its_mask(weights: Path, phantoms: Any, tmp_path: Path) -> None:
    image = nib.Nifti1Image.from_filename(phantoms[0]["ct"])
    corners = (np.array([[8, 8, 8, 1], [23, 25, 20, 1]]) @ image.affine.T)[:, :3] * [-1, -1, 1]  # voxels to LPS
    box = [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
    row = {key: phantoms[0][key] for key in ("case_id", "ct", "pet", "mr")}
    (tmp_path / "cases.json").write_text(json.dumps([{**row, "bbox_mm": box}]))

    masks = []
    for engine in ("auto", "torch"):
        where = ["--data-list", str(tmp_path / "cases.json"), "--allow-outside", "--output-dir", str(tmp_path / engine)]
        assert main(["segment", *where, "--weights", str(weights), "--engine", engine, "--threads", "1"]) == 0
        masks.append(voxels(tmp_path / engine / f"{row['case_id']}.nii.gz"))
    assert masks[0].shape == image.shape
    inside = np.zeros(image.shape, dtype=bool)
    inside[8:24, 8:26, 8:21] = True
    assert masks[0][inside].any()
    assert not masks[0][~inside].any()
    assert (masks[0] == masks[1]).mean() > 0.999
