# SPDX-License-Identifier: Apache-2.0
"""The bundle as MONAI Label uses it: only some ids of inference.json, from any folder, without ``initialize``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from monai_label.install import install_bundle, install_studies
from scripts.cli.main import main
from scripts.networks import Student

ROOT = Path(__file__).parents[2]
FILES = {"ct": "CT_image", "pet": "PET_image", "mr": "MR_T1_image"}
# The steps of MONAI Label 0.8.5 with a bundle (tasks/infer/bundle.py, basic_infer.py, transform/pre.py), in its order.
IMITATION = """
import json, sys
import numpy, torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, LoadImaged, SaveImaged

bundle, image, changes, target = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
sys.path.insert(0, bundle)
parser = ConfigParser()
parser.read_config(f"{bundle}/configs/inference.json")
parser.config.update({"bundle_root": bundle, **changes})
network = parser.get_parsed_content("network_def", instantiate=True)
parser.config.update({"device": "cpu"})
pre = parser.get_parsed_content("preprocessing", instantiate=True)
assert isinstance(pre, Compose)
loaders = [t for t in pre.transforms if isinstance(t, LoadImaged)]
assert len(loaders) == 1
loaders[0]._loader.image_only = False
data = {"image": image, "image_path": image, "model": "m", "device": "cpu", "description": "d"}
for transform in pre.transforms:
    if transform in loaders:
        assert all(isinstance(data[key], str) for key in transform.keys)
    data = transform(data)
inferer = parser.get_parsed_content("inferer", instantiate=True)
checkpoint = torch.load(f"{bundle}/models/model.pt", map_location="cpu")
network.load_state_dict(checkpoint.get("model", checkpoint), strict=False)
network.eval()
with torch.no_grad():
    data["pred"] = inferer(data["image"][None], network)[0]
post = list(parser.get_parsed_content("postprocessing", instantiate=True).transforms)
kept = [t for t in post if not isinstance(t, SaveImaged)]
assert len(kept) == len(post) - 1
for transform in kept:
    data = transform(data)
meta = data["image"].meta
assert tuple(meta["spatial_shape"]) == tuple(data["pred"].shape[1:])
import scripts
assert scripts.__file__.startswith(bundle)
numpy.savez(target, mask=data["pred"][0].numpy(), affine=meta["original_affine"])
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The bundle in a new folder."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("configs", "scripts", "models"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def study(cohort: Path, tmp_path: Path) -> Path:
    """The CT of a phantom, with PET and MR in sub folders under the same name."""
    for key, name in FILES.items():
        path = tmp_path / "studies" / ("" if key == "ct" else key) / "case.nii.gz"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.symlink_to(cohort / "PHANTOM_001" / f"{name}.nii.gz")
    return tmp_path / "studies" / "case.nii.gz"


@pytest.fixture
def imitate(bundle: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the imitation in a separate process in "/"; it writes mask.npz."""

    def run(image: Path, **changes: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-c", IMITATION, str(bundle), str(image), json.dumps(changes)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [*command, str(tmp_path / "mask.npz")],
            cwd="/", env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("absent", ["", "mr"])
def test_monai_label_gets_the_same_mask_as_segment(
    absent: str, imitate: Callable[..., subprocess.CompletedProcess[str]], study: Path, bundle: Path, tmp_path: Path
) -> None:
    if absent:
        (study.parent / absent / study.name).unlink()
    done = imitate(study, allow_missing=bool(absent))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in bundle.iterdir()) == ["configs", "models", "scripts"], "something was written"
    files = [text for key in FILES if key != absent for text in (f"--{key}", _file(study, key))]
    output = tmp_path / "own.nii.gz"
    allowed = ["--allow-missing"] if absent else []
    assert main(["segment", *files, *allowed, "--engine", "torch", "--output", str(output)]) == 0
    own, served = nib.load(output), np.load(tmp_path / "mask.npz")
    np.testing.assert_array_equal(served["mask"], np.asarray(own.dataobj))
    np.testing.assert_allclose(served["affine"], own.affine, atol=1e-4)
    assert served["mask"].any()


def _file(study: Path, key: str) -> str:
    return str(study if key == "ct" else study.parent / key / study.name)


def test_a_missing_modality_is_refused_by_name(
    imitate: Callable[..., subprocess.CompletedProcess[str]], study: Path, tmp_path: Path
) -> None:
    (study.parent / "pet" / study.name).unlink()
    done = imitate(study)
    assert done.returncode != 0
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith(f"ValueError: Case case: no pet was given or found next to {study}. Add the file")
    assert not (tmp_path / "mask.npz").exists()


@pytest.mark.parametrize("absent", ["", "mr"])
def test_a_training_takes_its_cases_from_the_label_store(
    absent: str, study: Path, cohort: Path, tmp_path: Path
) -> None:
    """MONAI Label sets the paths of images and labels in the bundle that ``monai_label/install.py`` has written."""
    if absent:
        (study.parent / absent / study.name).unlink()
    bundle = install_bundle(tmp_path / "app", ROOT / "models" / "model.pt")
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    stored = [{"image": str(study), "label": str(cohort / "PHANTOM_001" / "CT_mask.nii.gz")}]
    parser["train#dataset#data"] = stored
    if absent:
        with pytest.raises(RuntimeError) as refused:
            parser.get_parsed_content("required")
        assert f": {absent}). Add the files" in str(refused.value.__cause__)
    else:
        parser.get_parsed_content("required")
        assert parser.get_parsed_content("split") == [stored, []]
        assert parser["overwrite"] is True  # so that a second training is not refused


def test_the_app_has_the_labels_and_the_modalities_of_the_weights(tmp_path: Path) -> None:
    """Labels by the values of the label files, although the task's masks hold indices."""
    weights, record = tmp_path / "own.pt", tmp_path / "own.task.json"
    weights.write_bytes(b"weights")
    modalities = ["t1", "t1ce", "flair"]
    task = {
        "cohort": "files", "modalities": modalities, "intensity": dict.fromkeys(modalities, "zscore"),
        "labels": [[0], [1], [2], [4]], "classes": ["background", "necrosis", "oedema", "$enhancing"],
        "regions": {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}, "mask_values": "index", "spacing": [1, 1, 1],
    }  # fmt: skip
    record.write_text(json.dumps(task))
    bundle = install_bundle(tmp_path / "app", weights)
    formats = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]
    labels = {"0": "background", "1": "necrosis", "2": "oedema", "4": "$enhancing"}
    assert formats["outputs"]["pred"]["channel_def"] == labels
    assert formats["inputs"]["image"]["channel_def"] == {"0": "t1", "1": "t1ce", "2": "flair"}
    for name in ("inference", "train"):
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / f"{name}.json"))
        for key in ("modalities", "labels", "classes", "regions", "spacing"):
            assert parser.get_parsed_content(key) == task[key]
        assert parser["naming"] == [{"t1": "{case}", "t1ce": "t1ce/{case}", "flair": "flair/{case}"}]


def test_masks_of_the_app_have_the_values_of_the_label_files(cohort: Path, tmp_path: Path) -> None:
    """By random weights of four classes; ``segment`` writes the same mask."""
    torch.manual_seed(2)
    network = {"in_channels": 2, "out_channels": 4, "features": [4, 8, 8, 8], "norm": ["group", {"num_groups": 4}]}
    torch.save(Student(**network).state_dict(), tmp_path / "own.pt")
    task = {
        "cohort": "files", "modalities": ["ct", "mr"], "intensity": {"ct": [-200, 300], "mr": "zscore"},
        "labels": [[0], [1], [2], [400]], "spacing": [6, 6, 6], "patch": [32, 32, 32],
        "network": {"_target_": "scripts.networks.Student", **network},
    }  # fmt: skip
    (tmp_path / "own.task.json").write_text(json.dumps(task))
    bundle = install_bundle(tmp_path / "app", tmp_path / "own.pt")
    (tmp_path / "mr").mkdir()
    for path, name in ((tmp_path / "case.nii.gz", "CT_image"), (tmp_path / "mr" / "case.nii.gz", "MR_T1_image")):
        path.symlink_to(cohort / "PHANTOM_001" / f"{name}.nii.gz")
    images = [str(tmp_path / "case.nii.gz"), str(tmp_path / "mr" / "case.nii.gz")]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        IMITATION,
        str(bundle),
        images[0],
        "{}",
        str(tmp_path / "mask.npz"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    arguments = ["segment", "--weights", str(tmp_path / "own.pt"), "--ct", images[0], "--mr", images[1]]
    assert main([*arguments, "--engine", "torch", "--device", "cpu", "--output", str(tmp_path / "own.nii.gz")]) == 0
    served, own = np.load(tmp_path / "mask.npz")["mask"], np.asarray(nib.load(tmp_path / "own.nii.gz").dataobj)
    assert set(np.unique(served)) <= {0, 1, 2, 400}
    assert 400 in served
    np.testing.assert_array_equal(served, own)


def test_the_app_of_the_shipped_weights_has_one_label(tmp_path: Path) -> None:
    bundle = install_bundle(tmp_path / "app", ROOT / "models" / "model.pt")
    formats = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]
    assert formats["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "tumour"}


@pytest.mark.parametrize("modalities", [["mr", "ct"], ["t1"]])
def test_phantoms_are_studies_where_they_have_the_modalities(modalities: list[str], tmp_path: Path) -> None:
    studies = install_studies(tmp_path, 1, modalities)
    found = sorted(path.relative_to(studies).as_posix() for path in studies.rglob("*.nii.gz"))
    assert found == (["PHANTOM_001.nii.gz", "ct/PHANTOM_001.nii.gz"] if "ct" in modalities else [])


def test_the_student_refuses_weights_of_other_names_even_with_strict_false() -> None:
    torch.manual_seed(0)
    student = Student(3, 2, (8, 16, 24, 32))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    renamed = {f"student.{name}": value + 1 for name, value in before.items()}
    with pytest.raises(RuntimeError, match="Missing key"):
        student.load_state_dict(renamed, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    fitting = {name: value + 1 for name, value in before.items()}
    student.load_state_dict(fitting, strict=False)
    assert all(torch.equal(value, fitting[name]) for name, value in student.state_dict().items())
