# SPDX-License-Identifier: Apache-2.0
"""The server of MONAI Label with this bundle, through its REST interface: ``make label-test``."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import requests
import torch

pytestmark = [pytest.mark.label, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-label" / "bin" / "python"
MODEL = "distilled_segmentation"


class Server(NamedTuple):
    """A running server: its address, and the folder that ``monai_label/install.py`` has written."""

    url: str
    folder: Path

    @property
    def bundle(self) -> Path:
        """Folder of the bundle that is served."""
        return self.folder / "apps" / "monaibundle" / "model" / MODEL

    @property
    def weights(self) -> Path:
        """Path of the weights that are served."""
        return self.bundle / "models" / "model.pt"

    def infer(self, image: str, **options: Any) -> requests.Response:
        """Request a mask."""
        address = f"{self.url}/infer/{MODEL}?image={image}&output=image"
        return requests.post(address, files={"params": (None, _json(options))}, timeout=120)

    def mask(self, image: str, folder: Path, **options: Any) -> np.ndarray:
        """Voxels of a mask, after a check that it has the grid of the CT."""
        answer = self.infer(image, **options)
        assert answer.status_code == 200, answer.text
        path = folder / "answer.nii.gz"
        path.write_bytes(answer.content)
        mask, reference = nib.load(path), nib.load(self.folder / "studies" / f"{image}.nii.gz")
        np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
        return _voxels(path)

    def train(self, **options: Any) -> dict[str, Any]:
        """Train, wait for the end, and return the task as the server reports it."""
        assert requests.post(f"{self.url}/train/{MODEL}", json=options, timeout=60).status_code == 200
        for _ in range(400):
            task = requests.get(f"{self.url}/train/", timeout=60).json()
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(0.5)
        return task


def _json(options: dict[str, Any]) -> str:
    return requests.models.complexjson.dumps(options)


def _voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).copy()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with three phantoms as studies."""
    if not PYTHON.is_file():
        pytest.fail("MONAI Label's environment is missing: run `make label-test`.")
    folder = tmp_path_factory.mktemp("label")
    install = [PYTHON, "-m", "monai_label.install", folder, "--cases", "3"]
    subprocess.run(install, cwd=ROOT, check=True, timeout=200)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "monailabel.main", "start_server", "--app", folder / "apps" / "monaibundle"]
    command += ["--studies", folder / "studies", "--conf", "models", MODEL, "--conf", "zoo_source", "local"]
    command += ["--conf", "sam2", "false", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for_server(address, process, log)
        yield Server(address, folder)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_for_server(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            requests.get(f"{url}/info/", timeout=60)
        except requests.ConnectionError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(log.read_text()[-3000:])


@pytest.fixture
def other_weights(server: Server) -> Iterator[Path]:
    """Path of the served weights, which a test may change; the shipped weights are restored afterwards."""
    yield server.weights
    shutil.copy(ROOT / "models" / "model.pt", server.weights)
    shutil.rmtree(server.bundle / "runs", ignore_errors=True)


def test_info_lists_the_model_with_its_label_and_its_option(server: Server) -> None:
    info = requests.get(f"{server.url}/info/", timeout=60).json()
    assert list(info["models"]) == list(info["trainers"]) == [MODEL]
    assert info["labels"] == ["tumour"]
    assert info["models"][MODEL]["labels"] == {"tumour": 1}
    assert info["models"][MODEL]["config"]["allow_missing"] is False
    assert info["datastore"]["total"] == 3


def test_a_mask_equals_that_of_monai_bundle_run(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    command += ["--config_file", ROOT / "configs" / "inference.json", "--cohort", "phantom", "--engine", "torch"]
    command += ["--dataset_dir", server.folder / "phantoms", "--output_dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    for case in ("PHANTOM_001", "PHANTOM_002"):
        own = _voxels(tmp_path / f"{case}.nii.gz")
        assert 0 < own.sum() < own.size / 4
        np.testing.assert_array_equal(server.mask(case, tmp_path), own)


def test_a_missing_modality_is_refused_unless_the_request_allows_it(server: Server, tmp_path: Path) -> None:
    studies = server.folder / "studies"
    away = shutil.move(studies / "mr" / "PHANTOM_003.nii.gz", tmp_path / "mr.nii.gz")
    try:
        for _ in range(2):  # before and after a request with the option, which is valid for one request only
            refused = server.infer("PHANTOM_003")
            assert refused.status_code == 422
            words = f"Case PHANTOM_003: no mr was given or found next to {studies / 'PHANTOM_003.nii.gz'}."
            assert refused.json()["detail"].startswith(words)
            without = server.mask("PHANTOM_003", tmp_path, allow_missing=True)
    finally:
        shutil.move(away, studies / "mr" / "PHANTOM_003.nii.gz")
    assert set(np.unique(without)) <= {0, 1}
    assert (without != server.mask("PHANTOM_003", tmp_path)).any()


@pytest.mark.parametrize(
    ("image", "status", "words"),
    [
        ("PHANTOM_009", 404, "The store has no study named 'PHANTOM_009'."),
        ("PHANTOM_002", 422, "PHANTOM_002.nii.gz is truncated or damaged"),
    ],
)
def test_a_study_that_cannot_be_read_is_named(
    image: str, status: int, words: str, server: Server, tmp_path: Path
) -> None:
    pet = server.folder / "studies" / "pet" / "PHANTOM_002.nii.gz"
    whole = pet.read_bytes()
    pet.write_bytes(whole[: len(whole) // 2])
    try:
        answer = server.infer(image)
    finally:
        pet.write_bytes(whole)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def _other_names(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({f"student.{name}": value for name, value in state.items()}, path)


def _other_widths(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({name: value[:1] for name, value in state.items()}, path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(_other_names, "Missing key(s)"), (_other_widths, "size mismatch"), (_cut, "PytorchStreamReader failed")],
)
def test_wrong_weights_are_refused_and_named(spoil: Any, words: str, server: Server, other_weights: Path) -> None:
    spoil(other_weights)
    answer = server.infer("PHANTOM_001")
    assert answer.status_code == 500
    sentence = answer.json()["detail"]
    assert f"the weights {other_weights}" in sentence
    assert words in sentence


def _save_label(server: Server, case: str) -> Path:
    label = server.folder / "phantoms" / case / "CT_mask.nii.gz"
    address = f"{server.url}/datastore/label?image={case}&tag=final"
    with label.open("rb") as file:
        answer = requests.put(address, files={"label": ("label.nii.gz", file), "params": (None, "{}")}, timeout=60)
    assert answer.json() == {"image": case, "label": case}
    return label


def test_labels_are_returned_as_they_were_saved(server: Server, tmp_path: Path) -> None:
    label = _save_label(server, "PHANTOM_001")
    answer = requests.get(f"{server.url}/datastore/label?label=PHANTOM_001&tag=final", timeout=60)
    path = tmp_path / "label.nii.gz"
    path.write_bytes(answer.content)
    np.testing.assert_array_equal(_voxels(path), _voxels(label))
    train = requests.get(f"{server.url}/datastore/?output=train", timeout=60).json()
    assert [Path(item["image"]).name for item in train] == ["PHANTOM_001.nii.gz"]


def test_the_next_mask_uses_the_weights_of_a_training_on_saved_labels(
    server: Server, other_weights: Path, tmp_path: Path
) -> None:
    for case in ("PHANTOM_001", "PHANTOM_002", "PHANTOM_003"):
        _save_label(server, case)
    before = server.mask("PHANTOM_001", tmp_path)
    task = server.train(max_epochs=1)
    assert task["status"] == "DONE", task["details"]
    state = torch.load(other_weights, weights_only=True)
    shipped = torch.load(ROOT / "models" / "model.pt", weights_only=True)
    assert state.keys() == shipped.keys()
    # One epoch of AdamW with learning rate 0.001 changes no weight by much. Random weights would differ more.
    changes = torch.cat([(state[name] - shipped[name]).abs().flatten() for name in shipped])
    assert 0 < changes.max() < 0.02
    after = server.mask("PHANTOM_001", tmp_path)
    assert (after != before).any()
    np.testing.assert_array_equal(after, _independent_mask(server, tmp_path / "independent"))


def _independent_mask(server: Server, folder: Path) -> np.ndarray:
    """The mask of the same weights by ``python -m scripts segment``."""
    case = server.folder / "phantoms" / "PHANTOM_001"
    files = ["--ct", case / "CT_image.nii.gz", "--pet", case / "PET_image.nii.gz", "--mr", case / "MR_T1_image.nii.gz"]
    command = [sys.executable, "-W", "ignore", "-m", "scripts", "segment", *files, "--weights", server.weights]
    command += ["--engine", "torch", "--output", folder / "mask.nii.gz"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return _voxels(folder / "mask.nii.gz")


def test_a_training_that_cannot_start_reports_the_cause(server: Server, other_weights: Path) -> None:
    _save_label(server, "PHANTOM_001")
    _other_names(other_weights)
    spoiled = other_weights.read_bytes()
    task = server.train(max_epochs=1)
    assert task["status"] == "ERROR"
    assert "The training failed: " in task["details"][-1]
    assert "Missing key(s)" in task["details"][-1]
    assert other_weights.read_bytes() == spoiled
