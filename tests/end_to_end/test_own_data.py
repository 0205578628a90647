# SPDX-License-Identifier: Apache-2.0
"""From a user's files to a scored and a segmented case, by the command line as the user types it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813

from scripts.cli.main import main
from scripts.data import datalist
from tests.own_cohorts import (
    Story,
    write_brats,
    write_decathlon,
    write_dicom_study,
    write_hecktor22,
    write_organs,
    write_thick_mr,
)

STORIES = {
    "brats": write_brats,
    "hecktor22": write_hecktor22,
    "decathlon": write_decathlon,
    "organs": write_organs,
    "thick": write_thick_mr,
}
RUN = ["--threads", "1", "--device", "cpu"]
SIZES = {"dynunet": {"filters": [4, 8, 8]}}
TINY = ["--set", "student_features=[8,8,8,8]", "--epochs", "1"]


def voxels(path: Path) -> Any:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=STORIES)
def story(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.chdir(tmp_path)
    writer: Callable[[Path], Story] = STORIES[request.param]
    return writer(tmp_path)


def test_from_files_to_masks(story: Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "planned.json", "--dataset-dir", str(story.data)]
    assert main(["plan", "--data", str(story.task), *data[2:], "--output", "planned.json"]) == 0
    given, planned = (json.loads(Path(name).read_text()) for name in (story.task, "planned.json"))
    assert {key: planned[key] for key in given} == given
    assert main(["check", *data]) == 0
    assert f"{len(story.masks)} cases: 0 errors" in capsys.readouterr().out.replace("7 cases", "6 cases")

    train = [*data, *RUN, "--scale", "demo", "--set", f"architectures={json.dumps(SIZES)}", *TINY]
    assert main(["teacher", *train, "--architecture", "dynunet", "--output-dir", "T"]) == 0
    spec = {"network": {"_target_": "monai.networks.nets.UNet", "spatial_dims": 3, "in_channels": len(story.images)}}
    spec["network"] |= {"out_channels": len(planned.get("labels", [0, 0, 0])), "channels": [4, 8], "strides": [2]}
    Path("spec.json").write_text(json.dumps(spec))
    teachers = ["--teacher", "big=spec.json", "--teacher", "small=dynunet=T/model.pt"]
    assert main(["distill", *train, *teachers, "--method", "hinton", "--output-dir", "S"]) == 0

    assert main(["evaluate", *data, *RUN, "--weights", "S/model.pt", "--output-dir", "E"]) == 0
    expected = [(case, region) for case in sorted(story.masks) for region in story.regions]
    assert [(row["case_id"], row["region"]) for row in rows_of(Path("E/cases.csv"))] == expected
    measured = [row for row in rows_of(Path("E/measures.csv")) if row["lesion"] == "all"]
    assert [(row["case_id"], row["region"]) for row in measured] == expected
    summary = json.loads(Path("E/summary.json").read_text())
    assert list(summary["regions"]) == list(story.regions)

    images = [part for name, path in story.images.items() for part in (f"--{name}", str(path))]
    assert main(["segment", *RUN, "--weights", "S/model.pt", *images, "--output", "mask.nii.gz"]) == 0
    mask: Any = nib.load("mask.nii.gz")
    reference: Any = nib.load(story.masks[story.case])
    assert (voxels(Path("mask.nii.gz")) == voxels(Path("E/masks") / f"{story.case}.nii.gz")).all()
    own = [row for row in rows_of(Path("E/measures.csv")) if row["case_id"] == story.case]
    assert [{**row, "case_id": story.case} for row in rows_of(Path("mask.measures.csv"))] == own
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
    values = {0, *(value for members in story.regions.values() for value in members)}
    assert set(np.unique(voxels(Path("mask.nii.gz"))).tolist()) <= values


def test_masks_equal_to_the_label_have_dice_1_in_every_region(story: Story, tmp_path: Path) -> None:
    Path("masks").mkdir()
    for case, path in story.masks.items():
        shutil.copy(path, Path("masks") / f"{case}.nii.gz")
    data = ["--data", "planned.json", "--dataset-dir", str(story.data)]
    assert main(["plan", "--data", str(story.task), *data[2:], "--output", "planned.json"]) == 0
    assert main(["evaluate", *data, "--predictions", "masks", "--output-dir", "E"]) == 0
    rows = rows_of(Path("E/cases.csv"))
    assert len(rows) == len(story.masks) * len(story.regions)
    assert {(row["dice"], row["status"]) for row in rows} == {("1.0", "ok")}
    for row in rows:
        label: Any = nib.load(story.masks[row["case_id"]])
        inside = np.isin(np.asarray(label.dataobj), story.regions[row["region"]])
        volume = inside.sum() * abs(np.linalg.det(label.affine)) / 1000
        assert float(row["reference_volume_ml"]) == pytest.approx(volume, rel=1e-6)
    measured = {
        (row["case_id"], row["region"]): row for row in rows_of(Path("E/measures.csv")) if row["lesion"] == "all"
    }
    for row in rows:
        volume_ml = float(measured[row["case_id"], row["region"]]["volume_ml"])
        assert volume_ml == pytest.approx(float(row["reference_volume_ml"]), rel=1e-4)


@pytest.mark.parametrize("name", ["brats", "organs"])
def test_a_dicom_study_gets_one_segment_per_region(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    story = STORIES[name](tmp_path)
    study = write_dicom_study(story, tmp_path / "study")
    data = ["--data", "planned.json", "--dataset-dir", str(story.data)]
    assert main(["plan", "--data", str(story.task), *data[2:], "--output", "planned.json"]) == 0
    train = ["train", *data, *RUN, "--scale", "demo", *TINY, "--output-dir", "O"]
    assert main([*train, "--set", "learning_rate=0.02", "--epochs", "12", "--set", "val_interval=100"]) == 0
    command = [
        "dicom",
        *RUN,
        "--weights",
        "O/model.pt",
        "--study",
        str(study),
        "--output-dir",
        "out",
        "--rtstruct",
        "--sr",
    ]
    assert main(command) == 0
    mask = voxels(Path("out/mask.nii.gz"))
    present = {region for region, values in story.regions.items() if np.isin(mask, values).any()}
    assert present, "the student has learnt nothing, and the test shows nothing"
    segmentation = pydicom.dcmread("out/seg.dcm")
    segments = {segment.SegmentNumber: segment for segment in segmentation.SegmentSequence}
    lesions = [row for row in rows_of(Path("out/measures.csv")) if row["lesion"] != "all"]
    labels = [*story.regions, *(f"{row['region']} lesion {row['lesion']}" for row in lesions)]
    assert [segment.SegmentLabel for segment in segments.values()] == labels
    report = highdicom.sr.srread("out/sr.dcm").content.get_volumetric_roi_measurement_groups()
    assert sorted(group.tracking_identifier for group in report) == sorted(labels)
    frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    counts = dict.fromkeys(labels, 0)
    for frame, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        counts[segments[number].SegmentLabel] += int(frame.sum())
    assert {region: counts[region] for region in story.regions} == {
        region: int(np.isin(mask, values).sum()) for region, values in story.regions.items()
    }
    structures = pydicom.dcmread("out/rtstruct.dcm")
    assert {roi.ROIName for roi in structures.StructureSetROISequence} == present


@pytest.mark.parametrize(
    ("name", "grid"), [("hecktor21", ["--set", "spacing=[6,6,6]"]), ("picai22", ["--set", "spacing=[2,2,3]"])]
)
def test_data_sets_as_downloaded(
    name: str, grid: list[str], require_data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = require_data(name)
    data = ["--data", name, "--dataset-dir", str(folder)]
    assert main(["check", *data]) == 0
    settings = [*grid, "--set", "patch=[32,32,16]", "--set", "fold=null", "--set", "batch_size=1"]
    assert main(["train", *data, *RUN, "--scale", "demo", *settings, *TINY, "--output-dir", "O"]) == 0
    assert main(["evaluate", *RUN, "--dataset-dir", str(folder), "--weights", "O/model.pt", "--output-dir", "E"]) == 0
    rows = rows_of(Path("E/cases.csv"))
    assert rows
    task = json.loads(Path("O/model.task.json").read_text())
    assert {row["region"] for row in rows} == {task["classes"][1]}
    case = datalist(name, folder)[0]
    images = [part for key in task["modalities"] for part in (f"--{key}", case[key])]
    assert main(["segment", *RUN, "--weights", "O/model.pt", *images, "--output", "mask.nii.gz"]) == 0
    whole = voxels(Path("mask.nii.gz"))
    image = sitk.ReadImage(case["image"])
    assert whole.shape == image.GetSize()
