# SPDX-License-Identifier: Apache-2.0
"""Cases without a label learn from the teachers alone: drawn uniformly, without a segmentation loss."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from scripts.cli.main import main
from scripts.data import fold_split, preprocessing
from scripts.data.modalities import UNLABELLED
from scripts.data.training_set import training_set
from scripts.distillation.distiller import Distiller
from scripts.distillation.loss import DistillationLoss
from scripts.losses import IntraClassVariationLoss, SoftPredictionLoss
from scripts.networks.label_teacher import LabelTeacher
from scripts.report.curves import read_curves

TINY = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[16,16,16]", "--set", "spacing=[12,12,12]",
    "--set", "student_features=[4,8,8,8]", "--set", 'student_norm=["group",{"num_groups":4}]',
    "--set", "val_interval=100",
]  # fmt: skip


def test_patches_of_an_unlabelled_case_cover_it_evenly(tmp_path: Path, write_nifti: Any) -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None] / 40, (40, 12, 12))
    case = {"case_id": "A", "ct": str(write_nifti(tmp_path / "ct.nii.gz", ramp.copy()))}
    settings: dict[str, Any] = {"intensity": {"ct": [0, 1]}, "spacing": (1, 1, 1), "mode": "train", "patch": [8, 8, 20]}
    with pytest.raises(RuntimeError, match="applying transform") as caught:
        preprocessing(["ct"], labels=[[0], [1]], **settings).prepare(case)
    assert "Case A has no label" in str(caught.value.__cause__)
    pipeline = preprocessing(["ct"], labels=[[0], [1]], unlabelled=True, **settings)
    data = training_set([case], pipeline)
    samples = [data[draw][0] for draw in range(200)]
    assert {tuple(sample["label"].unique().tolist()) for sample in samples} == {(UNLABELLED,)}
    centres = [float(sample["image"].median()) * 40 for sample in samples]
    counts = np.histogram(centres, bins=4, range=(0, 40))[0]
    assert counts.min() > 20  # centres are moved inwards from the borders, so that the outer bins have fewer


class Net(nn.Conv3d):
    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(1, 2, 1)
        self.channels, self.sha256, self.network = [0], None, nn.Identity()


def terms() -> dict[str, Any]:
    return {
        "soft": {"tap": "logits", "weight": 2.0, "loss": SoftPredictionLoss()},
        "classes": {"tap": "logits", "weight": 0.5, "loss": IntraClassVariationLoss()},
    }


@pytest.mark.parametrize("labelled", [[True, False, True], [False, False, True], [False, False, False]])
def test_the_segmentation_loss_is_that_of_the_labelled_samples_and_the_terms_that_of_all(labelled: list[bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 1, 6, 6, 6, generator=generator)
    label = (image > 0.3).float()
    label[~torch.tensor(labelled)] = UNLABELLED
    student, teacher = Net(0), Net(1)
    segmentation = DiceCELoss(to_onehot_y=True, softmax=True)
    loss = DistillationLoss(segmentation, Distiller(student, {"t": teacher}), terms(), unlabelled=True)
    total = loss(Distiller(student, {"t": teacher}).train()(image), label)
    with torch.no_grad():
        mine, theirs = student(image), teacher(image)
        expected = 2.0 * SoftPredictionLoss()(mine, theirs)
        if any(labelled):
            expected += segmentation(mine[labelled], label[labelled])
            expected += 0.5 * IntraClassVariationLoss()(mine[labelled], theirs[labelled], label[labelled])
    torch.testing.assert_close(total.detach(), expected)
    assert ("segmentation" in loss.logged) == any(labelled)
    total.backward()
    assert student.weight.grad is not None
    assert bool(student.weight.grad.isfinite().all())


def test_every_output_takes_part_in_the_loss_of_a_batch_without_labels() -> None:
    """DistributedDataParallel waits for the gradient of each parameter: also of further heads and of adapters."""
    student, teacher = Net(0), Net(1)
    loss = DistillationLoss(nn.Identity(), Distiller(student, {"t": teacher}), terms(), unlabelled=True)
    outputs = Distiller(student, {"t": teacher}).train()(torch.ones(2, 1, 3, 3, 3))
    extra = {name: torch.ones(2, 3, requires_grad=True) for name in ("logits.1", "student.memory@t")}
    loss({**outputs, **extra}, torch.full((2, 1, 3, 3, 3), float(UNLABELLED))).backward()
    for value in extra.values():
        assert value.grad is not None
        assert not value.grad.any()


def test_what_needs_every_label_is_refused() -> None:
    distiller = Distiller(Net(0), {"t": Net(1)})
    with pytest.raises(ValueError, match="The weighting confidence needs the label of every case"):
        DistillationLoss(nn.Identity(), distiller, terms(), weighting="confidence", unlabelled=True)
    control = Distiller(Net(0), {"control": LabelTeacher(2)})
    with pytest.raises(ValueError, match=r"The teacher control is the label, and there are cases without one\. Remove"):
        DistillationLoss(nn.Identity(), control, terms(), unlabelled=True)


def test_folds_are_those_of_the_labelled_patients(tmp_path: Path) -> None:
    labelled = [{"case_id": f"c{i}", "patient_id": f"p{i}", "label": "x"} for i in range(10)]
    others = [{"case_id": f"u{i}", "patient_id": f"q{i}"} for i in range(4)]
    second = [{"case_id": f"second{i}", "patient_id": f"p{i}"} for i in range(10)]
    training, validation = fold_split(labelled, 1, file=tmp_path / "splits.json")
    both = fold_split([*labelled, *others, *second], 1, file=tmp_path / "splits.json")
    assert both[1] == validation
    patients = {case["patient_id"] for case in validation}
    assert both[0] == [*training, *others, *(case for case in second if case["patient_id"] not in patients)]
    assert fold_split([*labelled, *others, *second], 1) == both


@pytest.fixture
def table(phantoms: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The phantoms as a table; the last two have no label, and the sixth shall be in no fold."""
    columns = ["case_id", "patient_id", "ct", "pet", "mr", "label"]
    with open(tmp_path / "cases.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for index, case in enumerate(phantoms):
            writer.writerow({**case, "label": case["label"] if index < 4 else ""})
    return tmp_path / "cases.csv"


def test_unlabelled_cases_take_part_in_a_distillation_by_the_command_line(
    table: Path, cohort: Path, tmp_path: Path, phantoms: list[dict[str, Any]], capsys: Any
) -> None:
    common = [*TINY, "--data-list", str(table), "--dataset-dir", str(cohort), "--allow-outside", "--set", "fold=0"]
    small = ["--set", 'architectures={"dynunet":{"filters":[4,8,8]}}', "--teacher", "dynunet=random"]
    split = tmp_path / "splits.json"
    split.write_text(json.dumps({"seed": 0, "folds": [["PHANTOM_001"], [f"PHANTOM_00{i}" for i in (2, 3, 4)]]}))
    common += ["--set", f"splits_file={split}"]
    distill = ["distill", *common, *small, "--method", "hinton", "--epochs", "2"]
    for command in (["train", *common], distill):
        assert main([*command, "--output-dir", str(tmp_path / "refused")]) == 1
        error = capsys.readouterr().err
        assert "Labels are absent (PHANTOM_005; PHANTOM_006). Add the files, or remove these cases; distill" in error
    assert main([*distill, "--unlabelled", "--output-dir", str(tmp_path / "out")]) == 0
    for row in read_curves(tmp_path / "out" / "curves.csv"):
        assert row["loss/hinton"] is not None
        assert row["loss/hinton"] > 0
    task = json.loads((tmp_path / "out" / "model.task.json").read_text())
    assert [case["case_id"] for case in task["training_cases"]] == [f"PHANTOM_00{i}" for i in range(2, 7)]
    assert [case["case_id"] for case in task["validation_cases"]] == ["PHANTOM_001"]
    # And by a cache: with the prediction of a label's file as the teacher of every case.
    (tmp_path / "masks").mkdir()
    for case in phantoms:
        nib.save(nib.load(case["label"]), tmp_path / "masks" / f"{case['case_id']}.nii.gz")
    outside = ["--teacher", f"outside=predictions={tmp_path / 'masks'}", "--unlabelled"]
    cache = ["cache-teachers", *common, *outside, "--smooth", "4", "--output-dir", str(tmp_path / "cache")]
    assert main(cache) == 0
    assert sorted(path.stem for path in (tmp_path / "cache" / "outside").glob("*.pt")) == [
        f"PHANTOM_00{i}" for i in range(2, 7)
    ]
    cached = [
        "distill",
        *common,
        *outside,
        "--method",
        "hinton",
        "--epochs",
        "1",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    assert main([*cached, "--output-dir", str(tmp_path / "from_cache")]) == 0
    for arguments, sentence in (
        (["--teacher", "label", "--method", "hinton"], "The teacher label is the label, and there are cases without"),
        (["--method", "gkd", "--teacher", "dynunet=random"], "The stages of gkd need the label of every case."),
    ):
        assert main(["distill", *common, "--unlabelled", *arguments, "--output-dir", str(tmp_path / "no")]) == 1
        assert sentence in capsys.readouterr().err
