# SPDX-License-Identifier: Apache-2.0
"""The benchmark of inference: real processes, and each of its candidates on a tiny case. Times are not tested."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks import inference_speed, lower_bound
from benchmarks.__main__ import main
from benchmarks.inference_candidates import (
    ENGINES,
    MAIN,
    MONAI_BASELINE,
    NNUNET,
    PATIENT,
    PLOT_SIZES,
    SEGRESNET,
    THREE_TEACHERS,
    InferencePlan,
    Volume,
    all_candidates,
    find_patient,
    mask_path,
    prepare_volume,
    select_candidates,
    volume_shape,
)
from benchmarks.inference_speed import fastest, format_table, list_candidates, time_candidates, time_network, write_plot
from benchmarks.interleaved_timing import Candidate, compose, time_interleaved
from benchmarks.synthetic_body import MODALITIES, synthetic_volume, write_case
from scripts.data.modalities import GatherModalitiesd

pytestmark = pytest.mark.benchmarks
TORCH = "student, torch fp32"
TINY = {
    "threads": 1, "patch": [32, 32, 32], "spacing": [1.0, 1.0, 1.0], "overlap": 0.25, "handlers": [],
    "whole_volume": False,
    "ignore_task": True,  # the shipped weights are of another network; no test loads them
    "student_features": [4, 8, 8, 8], "student_norm": ["group", {"num_groups": 4}],
    "architectures": {
        "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
        "swinunetr": {"feature_size": 12, "window_size": 2, "depths": [1, 1, 1, 1]},
        "hdenseformer": {"features": 4, "depth": 4}, "segresnet": {"init_filters": 8},
    },
}  # fmt: skip
NEED_NO_PACKAGE = (TORCH, MONAI_BASELINE, THREE_TEACHERS, SEGRESNET)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> InferencePlan:
    return InferencePlan("sts", tmp_path_factory.mktemp("benchmark"), threads=1)


@pytest.fixture(scope="module")
def volume(plan: InferencePlan) -> Volume:
    case = write_case(plan.output / "case", (48, 40, 36), seed=1)
    return Volume("48x40x36", case, write_case(plan.output / "window", (32, 32, 32)), TINY, "small")


@pytest.fixture(scope="module")
def candidates(plan: InferencePlan, volume: Volume) -> dict[str, Candidate]:
    """All candidates, with tiny networks."""
    return {
        each.name: Candidate(each.name, each.configs, {**each.overrides, **TINY})
        for each in all_candidates(volume, plan)
    }


def segment(candidate: Candidate, seed: int = 0, **overrides: Any) -> nib.Nifti1Image:
    """Run a candidate's evaluator on its case in this process; returns the mask."""
    parser = compose(candidate)
    parser.update({"cases": "$[@case]", "seed": seed, **overrides})
    parser.get_parsed_content("initialize")
    parser.get_parsed_content("evaluator").run()
    return nib.load(Path(parser["output_dir"]) / f"{parser['case']['case_id']}.nii.gz")


def test_each_candidate_segments_one_case_per_round(
    candidates: dict[str, Candidate], volume: Volume, plan: InferencePlan
) -> None:
    rows = time_candidates([candidates[TORCH], candidates[MONAI_BASELINE]], volume.name, rounds=2, slow_rounds=1)
    assert [row["side"] for row in rows] == [TORCH, MONAI_BASELINE]
    for row in rows:
        assert list(row) == ["side", "what", "median_s", "ratio", "peak_mib", "n"]
        assert row["what"] == "48x40x36"
        assert row["median_s"] > 0
        assert row["peak_mib"] > 50
        assert row["n"] == 2  # the warm-up case is not counted
        assert nib.load(mask_path(row["side"], volume, plan)).shape == (48, 40, 36)
    assert rows[0]["ratio"] == 1.0
    assert multiprocessing.active_children() == []


def test_a_candidate_that_fails_is_named_and_leaves_no_process_behind(candidates: dict[str, Candidate]) -> None:
    good = candidates[TORCH]
    broken = Candidate("the broken one", good.configs, {**good.overrides, "patch": [32, 32, 10]})
    with pytest.raises(RuntimeError, match="The process of 'the broken one' has ended"):
        time_candidates([broken], "48x40x36", rounds=1, slow_rounds=1)
    assert multiprocessing.active_children() == []


def log_steps(candidate: Candidate, pipe: Connection) -> None:
    """Worker that only logs its name and its number of steps."""
    while count := pipe.recv():
        with open(candidate.overrides["log"], "a") as log:
            log.write(f"{candidate.name}{count}\n")
        pipe.send(([(1.0, 0.5)] * count, 100.0))


def test_rounds_are_interleaved_and_candidates_with_fewer_rounds_end_earlier(tmp_path: Path) -> None:
    log = tmp_path / "log"
    named = [Candidate(name, (), {"log": str(log)}) for name in "abc"]
    timings = time_interleaved(named, log_steps, {"a": 3, "b": 1, "c": 2}, steps_per_round=2, warm_up_steps=5)
    assert log.read_text().split() == ["a5", "b5", "c5", "a2", "b2", "c2", "a2", "c2", "a2"]
    assert {name: len(each.steps) for name, each in timings.items()} == {"a": 6, "b": 2, "c": 4}


def test_monai_transforms_give_the_same_mask_as_those_of_the_bundle(
    candidates: dict[str, Candidate], phantoms: list[Any]
) -> None:
    case = GatherModalitiesd(["ct", "pet", "mr"])(phantoms[0])
    overrides = {"case": case, "spacing": [6.0, 6.0, 6.0], "patch": [16, 16, 16]}
    masks = [segment(candidates[name], **overrides) for name in (TORCH, MONAI_BASELINE)]
    assert masks[0].shape == masks[1].shape == nib.load(case["ct"]).shape
    np.testing.assert_array_equal(masks[0].affine, masks[1].affine)
    voxels = [np.asarray(mask.dataobj) for mask in masks]
    assert len(np.unique(voxels[0])) == 2  # both classes, although the weights are random
    assert (voxels[0] != voxels[1]).mean() < 1e-3  # MONAI's transforms clip intensities before they interpolate


@pytest.mark.parametrize("name", [THREE_TEACHERS, SEGRESNET])
def test_other_networks_segment_with_monai_transforms(candidates: dict[str, Candidate], name: str) -> None:
    patch = [64, 32, 32]  # instance norm needs more than one voxel on SwinUNETR's deepest grid
    assert segment(candidates[name], patch=patch).shape == (48, 40, 36)


def test_the_ensemble_returns_the_mean_probabilities(candidates: dict[str, Candidate]) -> None:
    parser = compose(candidates[THREE_TEACHERS])
    parser["patch"] = [64, 32, 32]
    ensemble = parser.get_parsed_content("network_def").eval()
    image = torch.rand(1, 3, 64, 32, 32)
    with torch.inference_mode():
        mean = torch.stack([member(image).softmax(1) for member in ensemble.members.values()]).mean(0)
        torch.testing.assert_close(ensemble(image).softmax(1), mean)
    assert list(ensemble.members) == ["unetr", "swinunetr", "hdenseformer"]


class TestNNUNet:
    @pytest.fixture(autouse=True)
    def _skip_without_nnunet(self) -> None:
        pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: make bench-env")

    def test_it_writes_a_mask_on_the_grid_of_its_files(self, candidates: dict[str, Candidate], tmp_path: Path) -> None:
        case = write_case(tmp_path / "case", (48, 48, 48))
        mask = segment(candidates[NNUNET], case=case, patch=[16, 16, 16], overlap=0.0, output_dir=str(tmp_path))
        assert mask.shape == (48, 48, 48)
        np.testing.assert_allclose(mask.affine, nib.load(case["ct"]).affine)
        assert set(np.unique(mask.dataobj)) <= {0, 1}
        assert not (tmp_path / "one_grid").exists()

    def test_modalities_on_other_grids_are_resampled_to_the_reference(
        self, phantoms: list[Any], tmp_path: Path
    ) -> None:
        from benchmarks.nnunet_inference import resample_to_one_grid

        files = {key: Path(phantoms[0][key]) for key in ("ct", "pet", "mr")}
        paths = resample_to_one_grid(files, "ct", tmp_path)
        assert [path.name for path in paths] == ["case_0000.nii.gz", "case_0001.nii.gz", "case_0002.nii.gz"]
        assert {nib.load(path).shape for path in paths} == {nib.load(files["ct"]).shape}
        np.testing.assert_array_equal(nib.load(paths[0]).get_fdata(), nib.load(files["ct"]).get_fdata())

    def test_the_network_is_the_one_of_its_planner(self) -> None:
        from benchmarks.nnunet_inference import make_plans

        plans = make_plans(["ct", "pet"], (1, 1, 1), (96, 96, 96))
        configuration = plans["configurations"]["3d_fullres"]
        assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [32, 64, 128, 256, 320]
        assert configuration["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
        assert make_plans(["ct"], (1, 2, 3), (64, 32, 32))["configurations"]["3d_fullres"]["spacing"] == [3, 2, 1]


def test_synthetic_volumes_depend_on_their_seed_only(tmp_path: Path) -> None:
    shape = (40, 36, 33)
    for modality, kind in (("ct", np.int16), ("pet", np.float32), ("mr", np.int16)):
        voxels = synthetic_volume(shape, modality, 3)
        assert voxels.shape == shape
        assert voxels.dtype == kind
        np.testing.assert_array_equal(voxels, synthetic_volume(shape, modality, 3))
        assert (voxels != synthetic_volume(shape, modality, 4)).any()
    case, again = write_case(tmp_path / "a", shape), write_case(tmp_path / "b", shape)
    assert case["case_id"] == "40x36x33"
    assert all(Path(case[key]).read_bytes() == Path(again[key]).read_bytes() for key in MODALITIES)
    before = Path(case["ct"]).stat().st_mtime_ns
    write_case(tmp_path / "a", shape)
    assert Path(case["ct"]).stat().st_mtime_ns == before  # existing files are kept
    write_case(tmp_path / "a", shape, seed=5)
    assert Path(case["ct"]).stat().st_mtime_ns != before


def test_the_body_is_surrounded_by_noisy_air() -> None:
    ct = synthetic_volume((48, 48, 48), "ct")
    assert ct[0, 0].mean() == pytest.approx(-1000, abs=10)
    assert ct[0, 0].std() > 5
    assert abs(ct[24, 24].mean()) < 300


def test_the_lower_bound_is_the_sum_of_its_positive_parts(
    candidates: dict[str, Candidate], volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_bound, "MATRIX_SIZE", 32)
    files = [Path(volume.case[key]) for key in MODALITIES]
    parts = lower_bound.lower_bound(files, 0.5, files[0], repeats=1)
    assert all(each > 0 for each in parts.values())
    assert parts["sum"] == pytest.approx(parts["unpacking"] + parts["network"] + parts["packing"])
    assert not list(files[0].parent.glob(".timing*"))
    network = time_network(candidates[TORCH], volume)
    assert network["passes"] == 8  # 2 x 2 x 2 windows of 32 voxels, 24 apart, on 48 x 40 x 36
    assert network["seconds"] > 0
    assert network["gflops"] > 0
    assert all(rate > 0 for rate in network["rates"].values())
    windowed = candidates[TORCH]
    one_pass = Candidate(windowed.name, windowed.configs, {**windowed.overrides, "whole_volume": True})
    whole = time_network(one_pass, volume)
    assert whole["passes"] == 1
    assert whole["gflops"] == pytest.approx(network["gflops"] * (48 * 48 * 48) / (8 * 32**3))


def test_the_numbers_of_the_lower_bound_on_known_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = torch.nn.Conv3d(2, 4, 3, padding=1, bias=False)
    assert lower_bound.network_flops(convolution, 2, (8, 8, 8)) == 2 * 27 * 2 * 4 * 512
    assert lower_bound.rate_shares(2.0, 100.0, {"float32": 100.0}) == {"float32": 0.5}
    monkeypatch.setattr(lower_bound, "MATRIX_SIZE", 32)
    assert lower_bound.matrix_rate(torch.float32, 1) > 0
    for native, names in ((True, ["float32", "bfloat16"]), (False, ["float32"])):
        monkeypatch.setattr(lower_bound, "native_bf16", lambda supported=native: supported)
        assert list(lower_bound.matrix_rates()) == names  # emulated bfloat16 takes minutes
    assert "3 threads" in lower_bound.cpu_name(3)


def test_every_candidate_has_existing_configs(plan: InferencePlan, volume: Volume) -> None:
    candidates = all_candidates(volume, plan)
    assert [each.name for each in candidates] == [
        *(f"student, {engine}" for engine in ENGINES), MONAI_BASELINE, THREE_TEACHERS, SEGRESNET, NNUNET
    ]  # fmt: skip
    for candidate in candidates:
        compose(candidate)


def test_candidates_are_selected_by_volume_and_by_name(plan: InferencePlan, volume: Volume) -> None:
    candidates = all_candidates(volume, plan)

    def selected(where: str, only: tuple[str, ...] = (), fastest_engine: str = "") -> list[str]:
        chosen, _ = select_candidates(candidates, where, InferencePlan("sts", plan.output, only=only), fastest_engine)
        return [each.name for each in chosen if each.name in NEED_NO_PACKAGE]

    assert selected(MAIN) == list(NEED_NO_PACKAGE)
    assert selected(PLOT_SIZES[0], fastest_engine=TORCH) == [TORCH, MONAI_BASELINE]
    assert selected(PATIENT) == [TORCH, MONAI_BASELINE, THREE_TEACHERS]
    assert selected(MAIN, only=("segresnet", "TORCH FP32")) == [TORCH, SEGRESNET]
    only_torch = InferencePlan("sts", plan.output, only=("torch fp32",))
    assert [each.name for each in select_candidates(candidates, MAIN, only_torch)[0]] == [TORCH]  # without ", windows"
    with pytest.raises(ValueError, match="--only nothing matches no candidate"):
        selected(MAIN, only=("nothing",))


def test_a_candidate_that_cannot_run_is_left_out_with_a_note(
    plan: InferencePlan, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.inference_candidates.find_spec", lambda name: None)
    candidates, notes = select_candidates(all_candidates(volume, plan), MAIN, plan)
    assert NNUNET not in [each.name for each in candidates]
    assert f"{NNUNET} is left out: nnunetv2 is not installed (make bench-env)." in notes


def test_volumes_are_named_by_their_shape() -> None:
    assert volume_shape("48x40x36") == (48, 40, 36)
    with pytest.raises(ValueError, match="--volume huge"):
        volume_shape("huge")


def test_the_patient_has_ct_and_mr_as_dicom_and_pet_as_nifti(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No patient found"):
        find_patient(tmp_path)
    for part in ("sts_dicom/STS_001/CT/image", "sts_dicom/STS_001/MR_T1/image", "sts/STS_001"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "sts/STS_001/PET_image.nii.gz").touch()
    volume = prepare_volume(PATIENT, InferencePlan("sts", tmp_path / "out", str(tmp_path)))
    assert volume.case["case_id"] == "STS_001"
    assert volume.overrides == {}
    assert volume.teacher_scale == "small"


def test_ratios_are_to_the_fastest_engine() -> None:
    assert fastest({TORCH: 2.0, "student, openvino int8": 1.0, MONAI_BASELINE: 0.5}) == "student, openvino int8"
    assert fastest({NNUNET: 3.0, THREE_TEACHERS: 2.0}) == THREE_TEACHERS


def test_the_command_times_a_volume_and_draws_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.inference_candidates.WINDOW", (32, 32, 32))
    monkeypatch.setattr(inference_speed, "lower_bound_rows", lambda *_: ([], ["the lower bound."]))
    monkeypatch.setattr(inference_speed, "export_if_missing", lambda *_: None)  # it writes beside the shipped weights
    command = ["inference", "--volume", "40x40x36", "--only", "torch fp32, windows", "--rounds", "1"]
    command += ["--threads", "1", "--output-dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert main([*command, "--plot", str(tmp_path / "plots" / "time.png")]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["side"] for row in written["rows"]] == ["student, torch fp32, windows"]
    assert "1 threads" in written["cpu"]
    assert (tmp_path / "plots" / "time.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| student, torch fp32, windows | 40x40x36 |" in printed
    assert "the lower bound." in printed


def test_the_table_the_plot_and_the_list_of_candidates(plan: InferencePlan, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"side": "a", "what": "8x8x8", "median_s": 0.5, "ratio": 1.0, "peak_mib": 600, "n": 5},
        {"side": "floor: sum", "what": "8x8x8", "median_s": 0.25, "ratio": 0.5, "peak_mib": None, "n": 3},
        {"side": "a", "what": PATIENT, "median_s": 2.0, "ratio": 1.0, "peak_mib": 700, "n": 5},
    ]
    assert format_table(rows).splitlines()[2:4] == [
        "| a | 8x8x8 | 0.500 | 1.00 | 600 | 5 |",
        "| floor: sum | 8x8x8 | 0.250 | 0.50 |  | 3 |",
    ]
    write_plot(rows, tmp_path / "plot.svg")
    assert "voxels" in (tmp_path / "plot.svg").read_text()
    lines = list_candidates([MAIN, PATIENT], plan)
    assert f"{MAIN}: {MONAI_BASELINE}: inference, data/sts, scale/small, benchmark/stock" in lines
