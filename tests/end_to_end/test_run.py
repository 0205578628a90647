# SPDX-License-Identifier: Apache-2.0
"""The main job end to end on phantoms, through the commands that a user types."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ckpt_export

from scripts.cli.main import main
from scripts.report.curves import read_curves

ROOT = Path(__file__).parents[2]
TINY = [
    "--data", "phantom", "--threads", "1", "--set", "patch=[64,32,32]", "--set", "spacing=[8,8,8]",
    "--set", 'architectures={"unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2}, '
    '"swinunetr": {"feature_size": 12, "window_size": 2, "depths": [1, 1, 1, 1]}, '
    '"hdenseformer": {"features": 4, "depth": 4}}',
    "--set", "student_features=[8,16,24,32]",
]  # fmt: skip


def _run(*arguments: str) -> None:
    assert main([str(a) for a in arguments]) == 0


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of each teacher, then one of the distilled student."""
    out = tmp_path_factory.mktemp("runs")
    for modality, architecture in (("ct", "unetr"), ("pet", "hdenseformer"), ("mr", "swinunetr")):
        _run(
            "teacher", *TINY, "--dataset-dir", cohort, "--output-dir", out / f"teacher_{modality}", "--epochs", 1,
            "--architecture", architecture, "--modalities", modality,
        )  # fmt: skip
    _run(
        "distill", *TINY, "--dataset-dir", cohort, "--output-dir", out / "distilled", "--epochs", 2,
        "--teachers-dir", out, "--modality-dropout", 0.3, "--set", "val_interval=1",
    )  # fmt: skip
    return out


def test_distillation_logs_every_term_by_name_and_its_warm_up(trained: Path) -> None:
    rows = read_curves(trained / "distilled" / "curves.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    for name in ("loss", "loss/segmentation", "loss/soft", "loss/coarse", "loss/fine", "val_dice", "learning_rate"):
        assert all(np.isfinite(row[name]) for row in rows), name
    assert [rows[0][f"weight/{k}"] for k in ("ct", "pet", "mr")] == pytest.approx([1 / 3] * 3)


def test_the_student_learns_and_its_weights_fit_the_plain_student(trained: Path) -> None:
    state = _weights(trained / "distilled")
    assert not any(name.startswith(("student.", "teachers.")) for name in state)
    checkpoint = torch.load(trained / "distilled" / "checkpoint.pt", weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "lr_scheduler", "adapters", "trainer", "seed", "record"}


def test_a_run_leaves_a_manifest_with_its_teachers_checksums(trained: Path) -> None:
    manifest = json.loads((trained / "distilled" / "manifest.json").read_text())
    assert set(manifest["teachers_sha256"]) == {"ct", "pet", "mr"}
    assert all(len(value) == 64 for value in manifest["teachers_sha256"].values())
    assert manifest["config"]["max_epochs"] == 2
    assert manifest["config"]["modality_dropout"] == 0.3
    assert len(manifest["data"][0]) + len(manifest["data"][1]) == 6


def test_evaluate_writes_table_summary_and_report(trained: Path, cohort: Path, tmp_path: Path) -> None:
    _run(
        "evaluate", *TINY, "--dataset-dir", cohort, "--weights", trained / "distilled" / "model.pt",
        "--output-dir", tmp_path, "--curves", trained / "distilled" / "curves.csv",
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["aggregate"]["n"] == 6
    assert summary["parameters"] == sum(v.numel() for k, v in _weights(trained / "distilled").items() if _trains(k))
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 6
    # Scoring the same masks as if they came from elsewhere gives the same numbers.
    _run(
        "evaluate",
        *TINY,
        "--dataset-dir",
        cohort,
        "--predictions",
        tmp_path / "masks",
        "--output-dir",
        tmp_path / "again",
    )
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["aggregate"] == summary["aggregate"]
    assert again["parameters"] is None


def _trains(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_a_teacher_is_evaluated_by_the_same_command(trained: Path, cohort: Path, tmp_path: Path) -> None:
    _run(
        "evaluate", *TINY, "--dataset-dir", cohort, "--weights", trained / "teacher_pet" / "model.pt", "--fold", 0,
        "--architecture", "hdenseformer", "--modalities", "pet", "--output-dir", tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text())["aggregate"]["n"] == 2


def test_segment_writes_the_mask_on_the_reference_grid_and_its_line_can_be_pasted(
    trained: Path, cohort: Path, tmp_path: Path, run_python: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    case = cohort / "PHANTOM_001"
    files = ["--ct", case / "CT_image.nii.gz", "--pet", case / "PET_image.nii.gz", "--mr", case / "MR_T1_image.nii.gz"]
    output = tmp_path / "mask.nii.gz"
    arguments = ["segment", *TINY, *files, "--output", output, "--weights", trained / "distilled" / "model.pt"]
    _run(*arguments)
    mask, reference = nib.load(output), nib.load(case / "CT_image.nii.gz")
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
    first = np.asarray(mask.dataobj).copy()
    assert set(np.unique(first)) <= {0, 1}
    _run(*arguments, "--dry-run")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m monai.bundle"))
    output.unlink()
    run_python(*shlex.split(line)[1:], cwd=Path.cwd()).check_returncode()
    np.testing.assert_array_equal(np.asarray(nib.load(output).dataobj), first)


def test_a_missing_modality_is_refused_in_one_sentence_unless_it_is_allowed(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = cohort / "PHANTOM_001"
    arguments = ["segment", *TINY, "--ct", str(case / "CT_image.nii.gz"), "--pet", str(case / "PET_image.nii.gz")]
    arguments += ["--output", str(tmp_path / "mask.nii.gz"), "--weights", str(trained / "distilled" / "model.pt")]
    assert main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "mr" in errors[0]
    assert not (tmp_path / "mask.nii.gz").exists()
    _run(*arguments, "--allow-missing")
    assert (tmp_path / "mask.nii.gz").is_file()


def test_a_case_without_ct_is_segmented_on_the_grid_of_its_pet(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pet = cohort / "PHANTOM_001" / "PET_image.nii.gz"
    output = tmp_path / "mask.nii.gz"
    _run(
        "segment", *TINY, "--pet", pet, "--mr", pet.with_name("MR_T1_image.nii.gz"), "--allow-missing",
        "--output", output, "--weights", trained / "distilled" / "model.pt",
    )  # fmt: skip
    assert "The mask is written on the grid of --pet, because --ct is missing." in capsys.readouterr().out
    mask, reference, ct = (nib.load(path) for path in (output, pet, pet.with_name("CT_image.nii.gz")))
    assert mask.shape == reference.shape != ct.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-4)
    assert not np.allclose(mask.affine, ct.affine, atol=1e-4)


def test_evaluate_reads_only_the_modalities_of_present_and_names_them(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for present, name in (["mr", "pet"], "student (pet, mr only)"), (["ct", "pet", "mr"], "student"):
        _run(
            "evaluate", *TINY, "--dataset-dir", cohort, "--weights", trained / "distilled" / "model.pt", "--fold", 0,
            "--output-dir", tmp_path, "--present", *present,
        )  # fmt: skip
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["present"] == [key for key in ("ct", "pet", "mr") if key in present]
        assert summary["name"] == name
    known = ["--weights", str(trained / "distilled" / "model.pt"), "--dataset-dir", str(cohort)]
    assert main(["evaluate", *known, "--present", "ct", "adc"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: present is ['ct', 'adc']. Name one or more of ct, pet, mr."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--dataset-dir", "/nowhere"], "/nowhere"),
        (["train"], "No data folder was given"),
        (["segment", "--pet", "p.nii.gz", "--output", "m.nii.gz"], "Missing images: --ct, --mr. Add them"),
        (["segment", "--output", "m.nii.gz", "--allow-missing"], "Name the images with --ct, --pet, --mr"),
        (["segment", "--ct", "nowhere.nii.gz", "--output", "m.nii.gz"], "nowhere.nii.gz"),
        (["segment", "--ct", "a.nii.gz", "--output", "m.mha"], ".nii.gz"),
        (["train", "--dataset-dir", ".", "--multi-gpu"], "torchrun"),
        (["distill", "--dataset-dir", ".", "--method", "gkd", "--cache-dir", "c"], "gkd needs the teachers' features"),
        (["report", "--evaluations", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]


def test_the_student_is_exported_to_torchscript_by_the_bundle_verb(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.ts"
    ckpt_export(
        net_id="network_def",
        filepath=str(target),
        ckpt_file=str(trained / "distilled" / "model.pt"),
        meta_file=str(ROOT / "configs/metadata.json"),
        config_file=str(ROOT / "configs/inference.json"),
        key_in_ckpt="model",
        student_features=[8, 16, 24, 32],
    )
    exported = torch.jit.load(str(target)).eval()
    from scripts.networks import Student

    student = Student(3, 2, (8, 16, 24, 32)).eval()
    student.load_state_dict(_weights(trained / "distilled"))
    image = torch.rand(1, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(image), student(image), atol=1e-5, rtol=1e-5)


METHOD = """
import torch
from torch import nn


class MeanDifferenceLoss(nn.Module):
    def forward(self, student, teacher):
        return (student.float().mean() - teacher.detach().float().mean()).abs()
"""


def test_a_method_is_one_loss_one_config_and_one_test_in_any_folder(
    trained: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_method.py").write_text(METHOD)
    term = {"tap": "logits", "weight": 1.0, "loss": {"_target_": "my_method.MeanDifferenceLoss"}}
    (tmp_path / "my_method.json").write_text(json.dumps({"loss#terms#mine": term}))
    monkeypatch.syspath_prepend(str(tmp_path))
    from monai.bundle import run

    names = ["train", "data/phantom", "scale/small", "distill"]
    settings = dict(_pairs(TINY))
    run(
        config_file=[*(str(ROOT / "configs" / f"{name}.json") for name in names), str(tmp_path / "my_method.json")],
        dataset_dir=str(cohort), output_dir=str(tmp_path / "out"), teachers_dir=str(trained), max_epochs=1,
        meta_file=str(ROOT / "configs/metadata.json"), logging_file=str(ROOT / "configs/logging.conf"), **settings,
    )  # fmt: skip
    assert np.isfinite(read_curves(tmp_path / "out" / "curves.csv")[0]["loss/mine"])


def _pairs(arguments: list[str]) -> list[tuple[str, object]]:
    pairs = [value.partition("=") for flag, value in itertools.pairwise(arguments) if flag == "--set"]
    return [(key, json.loads(value)) for key, _, value in pairs]
