# SPDX-License-Identifier: Apache-2.0
"""A small case of three modalities and a label, ways to damage a file, and the commands that must detect it."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scripts.cli.main import main
from scripts.data.cohort_check import Criteria, check_case
from scripts.image_io.checks import Finding, Rules
from scripts.networks import Student

Array = NDArray[Any]
Files = dict[str, Path]

SHAPES = {"ct": (24, 20, 16), "pet": (20, 18, 16), "mr": (24, 22, 14), "label": (24, 20, 16)}
SPACINGS = {"ct": (4, 4, 5), "pet": (5, 5, 5.5), "mr": (4, 4, 6), "label": (4, 4, 5)}
LPS = np.diag([-1.0, -1.0, 1.0])
FEATURES, NORM = [4, 8, 8, 8], ["group", {"num_groups": 4}]
TINY = [
    "--data", "phantom", "--threads", "1", "--set", "spacing=[4,4,5]", "--set", "patch=[16,16,16]",
    "--set", f"student_features={json.dumps(FEATURES)}", "--set", f"student_norm={json.dumps(NORM)}",
]  # fmt: skip


class Outcome(NamedTuple):
    """The result of a command: exit code, both streams, written files except locks, findings of ``check``, log."""

    code: int
    out: str
    err: str
    files: list[str]
    findings: list[dict[str, str]] = []  # noqa: RUF012
    mask: Path = Path()
    log: list[logging.LogRecord] = []  # noqa: RUF012

    @property
    def errors(self) -> list[str]:
        return re.findall(r"^.*?(error: .*)$", self.err, re.MULTILINE)  # a progress bar may precede it

    def warned(self, *words: str) -> bool:
        """Whether one warning in the log or in the findings contains all of these words."""
        messages = [record.getMessage() for record in self.log if record.levelno == logging.WARNING]
        messages += [finding["what"] for finding in self.findings if finding["level"] == "warning"]
        return any(all(word in message for word in words) for message in messages)

    def noted(self, pattern: str) -> bool:
        """Whether a message in the log matches a regular expression."""
        return any(re.search(pattern, record.getMessage()) for record in self.log)


@pytest.fixture(scope="session")
def make_case(write_nifti: Any, make_affine: Any, world: Any) -> Callable[..., Files]:
    """``make_case(folder, seed)`` writes plausible HU, SUV and a.u. and a ball as label, each on its own grid."""

    def make(folder: Path, seed: int = 0) -> Files:
        rng, files = np.random.default_rng(seed), {}
        for key, shape in SHAPES.items():
            affine = make_affine(LPS, SPACINGS[key], shape)
            distance = np.linalg.norm(world(affine, shape), axis=-1)
            voxels = {
                "ct": np.where(distance < 34, 40, -1000) + rng.normal(0, 20, shape),
                "pet": np.maximum(8 - distance / 5, 0) + rng.uniform(0, 0.5, shape),
                "mr": np.where(distance < 34, 500, 0) + rng.uniform(0, 90, shape),
                "label": distance < 12,
            }[key]
            kind = {"pet": np.float32, "label": np.uint8}.get(key, np.int16)
            files[key] = write_nifti(folder / f"{key}.nii.gz", voxels.astype(kind), affine)
        return files

    return make


@pytest.fixture
def case(make_case: Any, tmp_path: Path) -> Files:
    """One undamaged case."""
    files: Files = make_case(tmp_path / "case")
    return files


@pytest.fixture(scope="session")
def findings_of() -> Callable[..., list[Finding]]:
    """``findings_of(files, rules)``: what ``check`` finds in one case, without the command."""

    def find(files: Mapping[str, Path], rules: Rules | None = None) -> list[Finding]:
        case = {"case_id": "A", "image": str(files["ct"]), **{key: str(path) for key, path in files.items()}}
        return check_case(case, Criteria(["ct", "pet", "mr"], [[0], [1]], rules or Rules()))

    return find


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny student."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": Student(3, 2, tuple(FEATURES), norm=NORM).state_dict()}, path)
    return path


@pytest.fixture
def threshold(tmp_path: Path) -> Callable[[str, float], list[str]]:
    """``threshold("ct", 0.4)``: a network instead of the student; its mask is where the scaled CT exceeds 0.4."""

    def arguments(key: str, value: float) -> list[str]:
        network = torch.nn.Conv3d(3, 2, 1)
        for parameter in network.parameters():
            parameter.data.zero_()
        network.weight.data[1, ["ct", "pet", "mr"].index(key)] = 50.0
        network.bias.data[1] = -50.0 * value  # type: ignore[union-attr]
        torch.save({"model": network.state_dict()}, tmp_path / "threshold.pt")
        definition = {"_target_": "torch.nn.Conv3d", "in_channels": 3, "out_channels": 2, "kernel_size": 1}
        return ["--weights", str(tmp_path / "threshold.pt"), "--set", f"network_def={json.dumps(definition)}"]

    return arguments


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[..., Outcome]:
    """Run a verb with the tiny settings, and list the files in its folder."""

    def run(verb: str, folder: Path, *arguments: Any) -> Outcome:
        capsys.readouterr()
        caplog.clear()
        code = main([verb, *TINY, *(str(each) for each in arguments)])
        out, err = capsys.readouterr()
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")] if folder.is_dir() else []
        return Outcome(
            code, out, err, sorted(name for name in names if not name.endswith("lock")), log=[*caplog.records]
        )

    return run


@pytest.fixture
def segment(command: Any, weights: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """``segment(files, *more)`` segments a case, with the tiny student unless ``--weights`` is given."""

    def run(files: Mapping[str, Path], *more: Any, name: str = "mask") -> Outcome:
        folder = tmp_path / "output"
        images = [each for key, path in files.items() if key != "label" for each in (f"--{key}", path)]
        own = [] if "--weights" in more else ["--weights", weights]
        output = folder / f"{name}.nii.gz"
        outcome = command("segment", folder, *images, "--engine", "torch", "--output", output, *own, *more)
        return outcome._replace(mask=output)

    return run


@pytest.fixture
def write_list(tmp_path: Path) -> Callable[[Mapping[str, Files]], list[Any]]:
    """``write_list(cases)`` writes the table of a cohort and returns the arguments for it."""

    def write(cases: Mapping[str, Files]) -> list[Any]:
        keys = list(dict.fromkeys(key for files in cases.values() for key in files))
        with open(tmp_path / "cohort.csv", "w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["case_id", *keys])
            for name, files in cases.items():
                table.writerow([name, *(files[key].relative_to(tmp_path) if key in files else "" for key in keys)])
        return ["--data-list", tmp_path / "cohort.csv", "--dataset-dir", tmp_path]

    return write


@pytest.fixture
def check(command: Any, write_list: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """``check(cases, *more)``: the findings of a cohort."""

    def run(cases: Mapping[str, Files], *more: Any) -> Outcome:
        file = tmp_path / "found" / "findings.json"
        outcome = command("check", file.parent, *write_list(cases), "--json", file, *more)
        report = json.loads(file.read_text())
        assert report["cases"] == len(cases)
        return outcome._replace(findings=report["findings"])

    return run


@pytest.fixture
def cohort_of(make_case: Any, tmp_path: Path) -> Callable[..., dict[str, Files]]:
    """``cohort_of(n)``: n undamaged cases; ``A`` is the first."""

    def make(number: int = 3) -> dict[str, Files]:
        names = "ABCDEFGH"[:number]
        return {name: make_case(tmp_path / name, seed) for seed, name in enumerate(names)}

    return make


@pytest.fixture
def train(command: Any, write_list: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """``train(cases, *more)``: one epoch of the tiny student."""

    def run(cases: Mapping[str, Files], *more: Any) -> Outcome:
        folder = tmp_path / "run"
        arguments = [*write_list(cases), "--output-dir", folder, "--epochs", 1, "--set", "val_interval=1"]
        outcome: Outcome = command("train", folder, *arguments, *more)
        return outcome

    return run


@pytest.fixture(scope="session")
def assert_refused() -> Callable[..., None]:
    """Exit code 1, one line that contains all the words, no traceback, and no output file."""

    def check_outcome(outcome: Outcome, *words: str) -> None:
        assert outcome.code == 1, outcome.err
        assert len(outcome.errors) == 1, outcome.err
        for word in words:
            assert word in outcome.errors[0]
        assert "Traceback" not in outcome.err
        written = [Path(name).name for name in outcome.files]
        assert not {
            "mask.nii.gz",
            "mask.manifest.json",
            "manifest.json",
            "checkpoint.pt",
            "model.pt",
            "curves.csv",
        } & set(written)
        assert not [name for name in written if name.endswith(".part")]

    return check_outcome


@pytest.fixture(scope="session")
def patch_nifti() -> Callable[..., Path]:
    """``patch_nifti(path, offset, format, *values)`` overwrites bytes in the header of a compressed NIfTI file."""

    def patch(path: Path, offset: int, form: str, *values: float) -> Path:
        data = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into(f"<{form}", data, offset, *values)
        path.write_bytes(gzip.compress(bytes(data)))
        return path

    return patch


@pytest.fixture(scope="session")
def change_voxels(write_nifti: Any) -> Callable[..., Path]:
    """``change_voxels(path, function)`` rewrites the file with other voxels and the same affine."""

    def change(path: Path, function: Callable[[Array], Array]) -> Path:
        image = nib.Nifti1Image.from_filename(path)
        written: Path = write_nifti(path, function(np.array(image.dataobj)), image.affine)
        return written

    return change
