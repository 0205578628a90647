# SPDX-License-Identifier: Apache-2.0
"""The profile lists every stage once, its seconds add up, and it does not change the mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose, Lambda

from scripts.inference import stage_profile as profiling
from scripts.inference.stage_profile import INFERER, NETWORK, REST, START, Profile


class Clock:
    """A clock that advances only by ``spend``."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Any:
        def work(data: Any) -> Any:
            self.now += seconds
            return data

        return work


def evaluator(clock: Clock, before: Compose, after: Compose) -> Engine:
    """An engine with the attributes of MONAI's evaluator that the profile uses: network and inferer."""

    def step(engine: Any, batch: Any) -> Any:
        result = engine.inferer(before(batch), engine.network)
        clock.spend(16)(None)
        return after(result)

    engine: Any = Engine(step)
    engine.network = clock.spend(2)

    def infer(inputs: Any, network: Any) -> Any:
        clock.spend(4)(None)
        return network(network(inputs))

    engine.inferer = infer
    return engine


def test_seconds_are_assigned_to_their_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(profiling, "time", clock)
    before, after = Compose([Lambda(clock.spend(1))]), Compose([Lambda(clock.spend(8)), Lambda(clock.spend(8))])
    engine = evaluator(clock, before, after)
    Profile(before, after, str(tmp_path)).attach(engine)
    engine.run([torch.zeros(1)] * 3)
    profile = json.loads((tmp_path / "profile.json").read_text())
    seconds = {row["stage"]: row["seconds"] for row in profile["stages"]}
    assert seconds == {"Lambda": 3 * 17, NETWORK: 3 * 4, INFERER: 3 * 4, REST: 3 * 16}
    assert profile["cases"] == 3
    assert profile["seconds"] == 3 * (1 + 4 + 4 + 16 + 16)
    assert sum(row["share"] for row in profile["stages"]) == pytest.approx(1)
    assert "| network | 4.000 | 10% |" in capsys.readouterr().out


def test_starting_the_engine_has_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(profiling, "time", clock)
    nothing = Compose([])
    engine: Any = evaluator(clock, nothing, nothing)

    class Network:
        window, bytes_per_voxel = (1, 2, 3), 7

        def choose(self) -> None:
            clock.spend(32)(None)

        def __call__(self, image: Any) -> Any:
            return image

    engine.network = Network()
    Profile(nothing, nothing, str(tmp_path)).attach(engine)
    asked = []

    def infer(inputs: Any, network: Any) -> Any:
        asked.append((network.window, network.bytes_per_voxel))
        return network(inputs)

    engine.inferer = infer
    engine.add_event_handler(Events.COMPLETED, lambda: None)
    engine.run([torch.zeros(1)])
    assert json.loads((tmp_path / "profile.json").read_text())["start_seconds"] == 32
    assert asked == [((1, 2, 3), 7)]


def test_segment_with_profile_prints_the_stages_and_writes_the_same_mask(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.cli.main import main
    from scripts.networks import Student

    torch.manual_seed(0)
    torch.save({"model": Student(3, 2, (8, 8, 16, 16)).state_dict()}, tmp_path / "w.pt")
    case = sorted(path for path in cohort.iterdir() if path.is_dir())[0]
    files = {"ct": "CT_image.nii.gz", "pet": "PET_image.nii.gz", "mr": "MR_T1_image.nii.gz"}
    common = [
        "segment",
        "--data",
        "phantom",
        "--weights",
        str(tmp_path / "w.pt"),
        "--threads",
        "1",
        "--engine",
        "torch",
    ]
    common += [x for key, name in files.items() for x in (f"--{key}", str(case / name))]
    common += ["--set", "student_features=[8,8,16,16]", "--set", "patch=[32,32,32]", "--set", "spacing=[8,8,8]"]
    assert main([*common, "--output", str(tmp_path / "a" / "plain.nii.gz")]) == 0
    assert main([*common, "--output", str(tmp_path / "b" / "timed.nii.gz"), "--profile"]) == 0
    out = capsys.readouterr().out
    for stage in ("read, check, decompress", "resample", "normalise", NETWORK, "decide, bring back", "compress, write"):
        assert out.count(f"| {stage} |") == 1
    assert START in out
    masks = [nib.Nifti1Image.from_filename(tmp_path / name) for name in ("a/plain.nii.gz", "b/timed.nii.gz")]
    np.testing.assert_array_equal(*(np.asanyarray(mask.dataobj) for mask in masks))
