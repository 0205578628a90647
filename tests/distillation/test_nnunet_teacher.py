# SPDX-License-Identifier: Apache-2.0
"""A trained nnU-Net as a teacher; needs nnunetv2 (make nnunet-test)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from scripts.cli.main import main
from scripts.distillation.nnunet_teacher import _require_same_outputs
from scripts.distillation.teacher_origin import NNUNetFolder
from scripts.networks.teacher_loading import load_teachers
from scripts.networks.teacher_spec import check_spec
from scripts.report.curves import read_curves

TINY = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[32,32,32]", "--set", "spacing=[6,6,6]",
    "--set", "student_features=[8,16,16,16]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", "val_interval=100", "--seed", "0",
]  # fmt: skip
FOLDS = ["0", "1"]


def write_dataset(raw: Path, phantoms: list[dict[str, Any]]) -> None:
    """The phantoms in nnU-Net's layout: every modality on the grid of the CT."""
    folder = raw / "Dataset001_Phantom"
    for case in phantoms:
        reference = sitk.ReadImage(case["ct"])
        for index, key in enumerate(("ct", "pet", "mr", "label")):
            kind = sitk.sitkNearestNeighbor if key == "label" else sitk.sitkLinear
            image = sitk.Resample(sitk.ReadImage(case[key]), reference, sitk.Transform(), kind)
            name = f"{case['case_id']}.nii.gz" if key == "label" else f"{case['case_id']}_000{index}.nii.gz"
            target = folder / ("labelsTr" if key == "label" else "imagesTr") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.Cast(image, sitk.sitkUInt8) if key == "label" else image, str(target))
    description = {
        "channel_names": {"0": "CT", "1": "PET", "2": "MR"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(phantoms),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.fixture(scope="module")
def trained(phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a trained nnU-Net, and that of its own predictions."""
    pytest.importorskip("nnunetv2")
    base = tmp_path_factory.mktemp("nnunet")
    write_dataset(base / "raw", phantoms)
    folders = {f"nnUNet_{name}": str(base / name) for name in ("raw", "preprocessed", "results")}
    environment = {**os.environ, **folders, "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    command = [sys.executable, str(Path(__file__).with_name("train_nnunet.py")), str(base), *FOLDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.split()[-1]), base / "predicted"


@pytest.mark.nnunet
@pytest.mark.timeout(1800)
def test_an_nnunet_is_cached_as_it_predicts_itself_and_teaches(
    trained: tuple[Path, Path], cohort: Path, phantoms: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder, predicted = trained
    common = [*TINY, "--dataset-dir", str(cohort), "--set", f"splits_file={tmp_path / 'splits.json'}"]
    ids = [case["case_id"] for case in phantoms]
    (tmp_path / "splits.json").write_text(json.dumps({"seed": 0, "folds": [ids[:2], ids[2:]]}))
    cache = ["cache-teachers", *common, "--output-dir", str(tmp_path / "cache")]
    assert main([*cache, "--cases", "all", "--teacher", f"nn=nnunet={folder}"]) == 0
    # nnU-Net itself has predicted the two cases of the validation.
    assert main([*cache, "--cases", "validation", "--predictions", str(predicted), "--name", "files"]) == 0
    manifest = json.loads((tmp_path / "cache" / "nn" / "manifest.json").read_text())
    assert manifest["architecture"] == "nnunet"
    assert len(manifest["weights_sha256"]) == 64
    for case in phantoms[:2]:
        ours, theirs = (
            torch.load(tmp_path / "cache" / name / f"{case['case_id']}.pt", weights_only=True)["logits"].float()
            for name in ("nn", "files")
        )
        difference = (ours.softmax(0) - theirs.softmax(0)).abs()
        assert float(difference.max()) < 5e-3  # the files hold half precision
        assert float(difference.mean()) < 1e-4
        assert theirs.softmax(0)[1].std() > 1e-3  # it learned something to compare
    distill = ["distill", *common, "--teacher", f"nn=nnunet={folder}", "--method", "hinton", "--epochs", "4"]
    distill += ["--cache-dir", str(tmp_path / "cache"), "--set", "val_interval=4"]
    assert main([*distill, "--output-dir", str(tmp_path / "distilled")]) == 0
    alone = ["train", *common, "--epochs", "4", "--set", "val_interval=4", "--output-dir", str(tmp_path / "alone")]
    assert main(alone) == 0
    last = {name: read_curves(tmp_path / name / "curves.csv")[-1] for name in ("distilled", "alone")}
    print({name: row["val_dice"] for name, row in last.items()})
    assert last["distilled"]["loss/hinton"] > 0  # type: ignore[operator]
    first = read_curves(tmp_path / "distilled" / "curves.csv")[0]
    assert last["distilled"]["loss/hinton"] < first["loss/hinton"]  # type: ignore[operator]


@pytest.mark.nnunet
def test_an_nnunet_of_other_modalities_or_classes_is_refused(
    trained: tuple[Path, Path], cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["cache-teachers", *TINY, "--dataset-dir", str(cohort), "--output-dir", str(tmp_path / "cache")]
    assert main([*cache, "--teacher", f"nn=nnunet:ct+pet={trained[0]}"]) == 1
    assert "reads 3 modalities, the teacher names ct, pet. Name them in the order" in capsys.readouterr().err
    assert main([*cache, "--teacher", f"nn=nnunet={trained[0]}", "--set", "labels=[[0],[1],[2]]"]) == 1
    assert "has 2 classes, this task has 3 classes. Use a network of this task." in capsys.readouterr().err


def test_an_nnunet_of_regions_teaches_the_same_regions_only() -> None:
    labels, regions = [[0], [1], [2, 3]], [[1, 2], [2]]
    heads = SimpleNamespace(has_regions=True, num_segmentation_heads=2, foreground_regions=[(1, 2, 3), (2, 3)])
    _require_same_outputs("nn", heads, labels, regions)
    with pytest.raises(ValueError, match=r"has 2 regions, this task has 3 classes\. Use a network of this task"):
        _require_same_outputs("nn", heads, labels, None)
    heads.foreground_regions = [(2, 3), (1, 2, 3)]
    with pytest.raises(
        ValueError, match=r"has the regions \[\[2, 3\], \[1, 2, 3\]\], this task \[\[1, 2, 3\], \[2, 3\]\]"
    ):
        _require_same_outputs("nn", heads, labels, regions)
    classes = SimpleNamespace(has_regions=False, num_segmentation_heads=3)
    _require_same_outputs("nn", classes, labels, regions)
    _require_same_outputs("nn", classes, [[0], [1], [2]], None)
    with pytest.raises(ValueError, match=r"values 0 to 2 in this order, the labels of this task are \[\[0\], \[2\]"):
        _require_same_outputs("nn", classes, [[0], [2], [1]], None)


def test_an_nnunet_answers_from_a_cache_only_and_by_the_folds_that_it_has(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"nnunet": str(tmp_path), "modalities": ["ct"]}
    with pytest.raises(ValueError, match="The teacher nn answers from a cache only: store its predictions with"):
        load_teachers({"nn": spec}, 2, ["ct"], [16, 16, 16])
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*fold_0/checkpoint_final\.pth\. Give the folder"):
        NNUNetFolder("nn", spec)
    for fold in ("0", "3"):
        (tmp_path / f"fold_{fold}").mkdir()
        (tmp_path / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(fold.encode())
    assert [path.parent.name for path in NNUNetFolder("nn", spec).paths] == ["fold_0", "fold_3"]
    assert [path.parent.name for path in NNUNetFolder("nn", {**spec, "folds": [3]}).paths] == ["fold_3"]
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*fold_1"):
        NNUNetFolder("nn", {**spec, "folds": [0, 1]})
    with pytest.raises(ValueError, match="The teacher a names folds, which only nnunet has"):
        check_spec("a", {"architecture": "unetr", "modalities": ["ct"], "folds": [0]})
