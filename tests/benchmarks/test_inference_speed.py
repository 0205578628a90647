# SPDX-License-Identifier: Apache-2.0
"""The benchmark of inference: real processes that take turns, each of its sides on tiny cases; never a time."""

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

from benchmarks import hardware_floor as floor
from benchmarks import inference_speed as inference_benchmark
from benchmarks.inference_candidates import (
    ENGINES,
    MAIN,
    NNUNET,
    PATIENT,
    SEGRESNET,
    SIZES,
    STOCK,
    TEACHERS,
    Plan,
    Volume,
    all_sides,
    choose,
    find_patient,
    make_volume,
    mask_path,
    shape_of,
)
from benchmarks.inference_speed import describe, fastest, network_floor, plot, table, time_sides
from benchmarks.synthetic_body import DRAWN, write_case
from benchmarks.synthetic_body import make_volume as make_voxels
from benchmarks.turn_taking import Side, compose, take_turns
from scripts.cli.main import main
from scripts.data.modalities import GatherModalitiesd

TINY = {
    "threads": 1, "patch": [32, 32, 32], "spacing": [1.0, 1.0, 1.0], "overlap": 0.25, "handlers": [],
    "whole_volume": False,
    "student_features": [4, 8, 8, 8], "student_norm": ["group", {"num_groups": 4}],
    "architectures": {
        "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
        "swinunetr": {"feature_size": 12, "window_size": 2, "depths": [1, 1, 1, 1]},
        "hdenseformer": {"features": 4, "depth": 4}, "segresnet": {"init_filters": 8},
    },
}  # fmt: skip
CONFIGURED = ("student, torch fp32", STOCK, TEACHERS, SEGRESNET)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan("sts", "small", tmp_path_factory.mktemp("benchmark"), threads=1)


@pytest.fixture(scope="module")
def volume(plan: Plan) -> Volume:
    case = write_case(plan.output / "case", (48, 40, 36), seed=1)
    return Volume("48x40x36", case, write_case(plan.output / "window", (32, 32, 32)), TINY, "small")


@pytest.fixture(scope="module")
def sides(plan: Plan, volume: Volume) -> dict[str, Side]:
    """All sides, with tiny networks."""
    found = all_sides(volume, plan)
    return {side.name: Side(side.name, side.configs, {**side.overrides, **TINY}) for side in found}


def segment(side: Side, seed: int = 0, **changes: Any) -> nib.Nifti1Image:
    """Run a side's evaluator on its case, here; the mask."""
    parser = compose(side)
    parser.update({"cases": "$[@case]", "seed": seed, **changes})
    parser.get_parsed_content("initialize")
    parser.get_parsed_content("evaluator").run()
    return nib.load(Path(parser["output_dir"]) / f"{parser['case']['case_id']}.nii.gz")


def test_two_sides_take_turns_of_one_case(sides: dict[str, Side], volume: Volume, plan: Plan) -> None:
    rows = time_sides([sides["student, torch fp32"], sides[STOCK]], volume.name, rounds=2, slow_rounds=1)
    assert [row["side"] for row in rows] == ["student, torch fp32", STOCK]
    for row in rows:
        assert list(row) == ["side", "what", "median_s", "ratio", "peak_mib", "n"]
        assert row["what"] == "48x40x36"
        assert row["median_s"] > 0
        assert row["peak_mib"] > 50
        assert row["n"] == 2  # the case to warm up on is in no row
        assert nib.load(mask_path(row["side"], volume, plan)).shape == (48, 40, 36)
    assert rows[0]["ratio"] == 1.0
    assert multiprocessing.active_children() == []


def test_a_side_that_fails_is_named_and_leaves_no_process_behind(sides: dict[str, Side]) -> None:
    good = sides["student, torch fp32"]
    broken = Side("the broken one", good.configs, {**good.overrides, "patch": [32, 32, 10]})
    with pytest.raises(RuntimeError, match="'the broken one' has ended"):
        time_sides([broken], "48x40x36", rounds=1, slow_rounds=1)
    assert multiprocessing.active_children() == []


def _note(side: Side, pipe: Connection) -> None:
    """Work that only says whose turn it is."""
    while count := pipe.recv():
        with open(side.overrides["log"], "a") as log:
            log.write(f"{side.name}{count}\n")
        pipe.send(([(1.0, 0.5)] * count, 100.0))


def test_sides_alternate_and_slow_ones_stop_earlier(tmp_path: Path) -> None:
    log = tmp_path / "log"
    named = [Side(name, (), {"log": str(log)}) for name in "abc"]
    measured = take_turns(named, _note, {"a": 3, "b": 1, "c": 2}, turn=2, warm_up=5)
    assert log.read_text().split() == ["a5", "b5", "c5", "a2", "b2", "c2", "a2", "c2", "a2"]
    assert {name: len(found.steps) for name, found in measured.items()} == {"a": 6, "b": 2, "c": 4}


def test_stock_transforms_give_the_mask_of_the_bundles_own(sides: dict[str, Side], phantoms: list[Any]) -> None:
    case = GatherModalitiesd(["ct", "pet", "mr"])(phantoms[0])
    changes = {"case": case, "spacing": [6.0, 6.0, 6.0], "patch": [16, 16, 16]}
    masks = [segment(sides[name], **changes) for name in ("student, torch fp32", STOCK)]
    assert masks[0].shape == masks[1].shape == nib.load(case["ct"]).shape
    np.testing.assert_array_equal(masks[0].affine, masks[1].affine)
    voxels = [np.asarray(mask.dataobj) for mask in masks]
    assert len(np.unique(voxels[0])) == 2  # random weights, and yet both classes
    assert (voxels[0] != voxels[1]).mean() < 1e-3  # where a range clips, stock clips first and interpolates then


@pytest.mark.parametrize("name", [TEACHERS, SEGRESNET])
def test_other_networks_segment_on_the_stock_path(sides: dict[str, Side], name: str) -> None:
    patch = [64, 32, 32]  # instance norm needs more than one cell on SwinUNETR's deepest grid
    assert segment(sides[name], patch=patch).shape == (48, 40, 36)


def test_the_ensemble_gives_the_mean_probabilities(sides: dict[str, Side]) -> None:
    parser = compose(sides[TEACHERS])
    parser["patch"] = [64, 32, 32]
    ensemble = parser.get_parsed_content("network_def").eval()
    image = torch.rand(1, 3, 64, 32, 32)
    with torch.inference_mode():
        mean = torch.stack([member(image).softmax(1) for member in ensemble.members.values()]).mean(0)
        torch.testing.assert_close(ensemble(image).softmax(1), mean)
    assert list(ensemble.members) == ["unetr", "swinunetr", "hdenseformer"]


class TestNNUNet:
    @pytest.fixture(autouse=True)
    def _require(self) -> None:
        pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: make bench-env")

    def test_it_writes_a_mask_on_the_grid_of_its_files(self, sides: dict[str, Side], tmp_path: Path) -> None:
        case = write_case(tmp_path / "case", (48, 48, 48))
        mask = segment(sides[NNUNET], case=case, patch=[16, 16, 16], overlap=0.0, output_dir=str(tmp_path))
        assert mask.shape == (48, 48, 48)
        np.testing.assert_allclose(mask.affine, nib.load(case["ct"]).affine)
        assert set(np.unique(mask.dataobj)) <= {0, 1}
        assert not (tmp_path / "one_grid").exists()

    def test_modalities_on_other_grids_are_brought_to_the_reference(self, phantoms: list[Any], tmp_path: Path) -> None:
        from benchmarks.nnunet_inference import on_one_grid

        files = {key: Path(phantoms[0][key]) for key in ("ct", "pet", "mr")}
        found = on_one_grid(files, "ct", tmp_path)
        assert [path.name for path in found] == ["case_0000.nii.gz", "case_0001.nii.gz", "case_0002.nii.gz"]
        assert {nib.load(path).shape for path in found} == {nib.load(files["ct"]).shape}
        np.testing.assert_array_equal(nib.load(found[0]).get_fdata(), nib.load(files["ct"]).get_fdata())

    def test_its_network_is_that_of_its_planner(self) -> None:
        from benchmarks.nnunet_inference import make_plans

        chosen = make_plans(["ct", "pet"], (1, 1, 1), (96, 96, 96))["configurations"]["3d_fullres"]
        assert chosen["architecture"]["arch_kwargs"]["features_per_stage"] == [32, 64, 128, 256, 320]
        assert chosen["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
        assert make_plans(["ct"], (1, 2, 3), (64, 32, 32))["configurations"]["3d_fullres"]["spacing"] == [3, 2, 1]


def test_synthetic_volumes_follow_from_their_seed(tmp_path: Path) -> None:
    shape = (40, 36, 33)
    for modality, kind in (("ct", np.int16), ("pet", np.float32), ("mr", np.int16)):
        voxels = make_voxels(shape, modality, 3)
        assert voxels.shape == shape
        assert voxels.dtype == kind
        np.testing.assert_array_equal(voxels, make_voxels(shape, modality, 3))
        assert (voxels != make_voxels(shape, modality, 4)).any()
    case, again = write_case(tmp_path / "a", shape), write_case(tmp_path / "b", shape)
    assert case["case_id"] == "40x36x33"
    assert all(Path(case[key]).read_bytes() == Path(again[key]).read_bytes() for key in DRAWN)
    before = Path(case["ct"]).stat().st_mtime_ns
    write_case(tmp_path / "a", shape)
    assert Path(case["ct"]).stat().st_mtime_ns == before  # what is there is kept
    write_case(tmp_path / "a", shape, seed=5)
    assert Path(case["ct"]).stat().st_mtime_ns != before


def test_the_body_is_surrounded_by_noisy_air() -> None:
    ct = make_voxels((48, 48, 48), "ct")
    assert ct[0, 0].mean() == pytest.approx(-1000, abs=10)
    assert ct[0, 0].std() > 5
    assert abs(ct[24, 24].mean()) < 300


def test_the_floor_is_the_sum_of_its_positive_parts(
    sides: dict[str, Side], volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "SIDE", 32)
    files = [Path(volume.case[key]) for key in DRAWN]
    parts = floor.floor(files, 0.5, files[0], repeats=1)
    assert all(each > 0 for each in parts.values())
    assert parts["sum"] == pytest.approx(parts["unpacking"] + parts["network"] + parts["packing"])
    assert not list(files[0].parent.glob(".floor*"))
    found = network_floor(sides["student, torch fp32"], volume)
    assert found["passes"] == 8  # 2 x 2 x 2 of 32 voxels, 24 apart, on 48 x 40 x 36
    assert found["seconds"] > 0
    assert found["gflops"] > 0
    assert all(rate > 0 for rate in found["rates"].values())
    side = sides["student, torch fp32"]
    whole = network_floor(Side(side.name, side.configs, {**side.overrides, "whole_volume": True}), volume)
    assert whole["passes"] == 1
    assert whole["gflops"] == pytest.approx(found["gflops"] * (48 * 48 * 48) / (8 * 32**3))


def test_the_numbers_of_the_floor_on_known_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = torch.nn.Conv3d(2, 4, 3, padding=1, bias=False)
    assert floor.network_flops(convolution, 2, (8, 8, 8)) == 2 * 27 * 2 * 4 * 512
    assert floor.shares(2.0, 100.0, {"float32": 100.0}) == {"float32": 0.5}
    monkeypatch.setattr(floor, "SIDE", 32)
    assert floor.matrix_rate(torch.float32, 1) > 0
    for native, names in ((True, ["float32", "bfloat16"]), (False, ["float32"])):
        monkeypatch.setattr(floor, "native_bf16", lambda found=native: found)
        assert list(floor.matrix_rates()) == names  # emulated bfloat16 would take minutes
    assert "3 threads" in floor.cpu_name(3)


def test_every_side_has_configs_and_the_volumes_their_sides(plan: Plan, volume: Volume) -> None:
    found = all_sides(volume, plan)
    assert [side.name for side in found] == [*(f"student, {x}" for x in ENGINES), STOCK, TEACHERS, SEGRESNET, NNUNET]
    for side in found:
        compose(side)

    def names(where: str, best: str = "", **changes: Any) -> list[str]:
        sides, words = choose(found, where, Plan("sts", "small", plan.output, **changes), best)
        return [side.name for side in sides if side.name in CONFIGURED] + [x for x in words if "stock" in x]

    first = "student, torch fp32"
    assert names(MAIN) == list(CONFIGURED)
    assert names(SIZES[0], best=first) == [first, STOCK]
    assert names(PATIENT) == [first, STOCK, TEACHERS]
    assert names(MAIN, only=("segresnet", "TORCH FP32")) == [first, SEGRESNET]
    assert [side.name for side in choose(found, MAIN, Plan("sts", "small", plan.output, only=("torch fp32",)))[0]] == [
        first
    ]
    with pytest.raises(ValueError, match="names no side"):
        names(MAIN, only=("nothing",))


def test_an_engine_that_cannot_run_is_left_out_with_a_sentence(
    plan: Plan, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.inference_candidates.find_spec", lambda name: None)
    sides, words = choose(all_sides(volume, plan), MAIN, plan)
    assert NNUNET not in [side.name for side in sides]
    assert f"{NNUNET} is left out: nnunetv2 is not installed (make bench-env)." in words


def test_volumes_are_named_by_their_voxels(plan: Plan, tmp_path: Path) -> None:
    assert shape_of("48x40x36") == (48, 40, 36)
    with pytest.raises(ValueError, match="--volume huge"):
        shape_of("huge")
    with pytest.raises(FileNotFoundError, match="no patient"):
        find_patient(tmp_path)
    for part in ("sts_dicom/STS_001/CT/image", "sts_dicom/STS_001/MR_T1/image", "sts/STS_001"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "sts/STS_001/PET_image.nii.gz").touch()
    own = Plan("sts", "small", tmp_path / "out", str(tmp_path))
    found = make_volume(PATIENT, own)
    assert found.case["case_id"] == "STS_001"
    assert found.overrides == {}
    assert found.teachers == "small"


def test_ratios_are_to_the_fastest_engine() -> None:
    assert fastest({"student, torch fp32": 2.0, "student, openvino int8": 1.0, STOCK: 0.5}) == "student, openvino int8"
    assert fastest({NNUNET: 3.0, TEACHERS: 2.0}) == TEACHERS


def test_the_verb_times_a_volume_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.inference_candidates.WINDOW", (32, 32, 32))
    monkeypatch.setattr(inference_benchmark, "floor_rows", lambda *_: ([], ["the floor."]))
    monkeypatch.setattr("benchmarks.__main__._exported", lambda *_: None)  # it would write beside the shipped weights
    command = ["benchmark", "inference", "--volume", "40x40x36", "--only", "torch fp32, windows", "--rounds", "1"]
    command += ["--threads", "1", "--output-dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert main([*command, "--plot", str(tmp_path / "plots" / "time.png")]) == 0
    told = json.loads((tmp_path / "rows.json").read_text())
    assert [row["side"] for row in told["rows"]] == ["student, torch fp32, windows"]
    assert "1 threads" in told["cpu"]
    assert (tmp_path / "plots" / "time.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| student, torch fp32, windows | 40x40x36 |" in printed
    assert "the floor." in printed


def test_table_plot_and_description(plan: Plan, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"side": "a", "what": "8x8x8", "median_s": 0.5, "ratio": 1.0, "peak_mib": 600, "n": 5},
        {"side": "floor: sum", "what": "8x8x8", "median_s": 0.25, "ratio": 0.5, "peak_mib": None, "n": 3},
        {"side": "a", "what": PATIENT, "median_s": 2.0, "ratio": 1.0, "peak_mib": 700, "n": 5},
    ]
    assert table(rows).splitlines()[2:4] == [
        "| a | 8x8x8 | 0.500 | 1.00 | 600 | 5 |",
        "| floor: sum | 8x8x8 | 0.250 | 0.50 |  | 3 |",
    ]
    plot(rows, tmp_path / "plot.svg")
    assert "voxels" in (tmp_path / "plot.svg").read_text()
    lines = describe([MAIN, PATIENT], plan)
    assert f"{MAIN}: {STOCK}: inference, data/sts, scale/small, benchmark/stock" in lines
