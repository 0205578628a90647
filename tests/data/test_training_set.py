# SPDX-License-Identifier: Apache-2.0
"""Preprocessed cases in memory or on disk: same samples, never changed, written again only if necessary."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from scripts.data import preprocessing
from scripts.data.cohorts.phantom import write_phantoms
from scripts.data.pipelines import Pipeline
from scripts.data.training_set import CentreCandidatesd, Volumes, training_set
from scripts.runtime.regions import IGNORED

ROOT = Path(__file__).parents[2]
SIZE, GIB = 20, 1 << 30


@pytest.fixture
def cases(tmp_path: Path, write_nifti: Any) -> list[dict[str, str]]:
    """Three cases of noise in CT and PET on one grid of 1 mm, with a cuboid as label; the last label is empty."""
    rng, found = np.random.default_rng(0), []
    for index in range(3):
        label = np.zeros((SIZE,) * 3, np.uint8)
        label[4:11, 5:12, 6:9] = index < 2
        item = {"case_id": f"C{index}"}
        for key, voxels in (("ct", None), ("pet", None), ("label", label)):
            voxels = rng.random((SIZE,) * 3, np.float32) if voxels is None else voxels
            item[key] = str(write_nifti(tmp_path / "images" / f"{index}_{key}.nii", voxels))
        found.append({**item, "image": item["ct"]})
    return found


def pipeline(**changed: Any) -> Pipeline:
    settings = {"modalities": ["ct", "pet"], "intensity": {"ct": [0, 1], "pet": [0, 1]}, "spacing": (1, 1, 1)}
    return preprocessing(**{**settings, "mode": "train", "labels": [[0], [1]], "patch": (16,) * 3, **changed})


def volume_file(cases: list[dict[str, str]], folder: Path, **changed: Any) -> str:
    """Name of the file of the first case."""
    return Volumes(cases[:1], pipeline(**changed), str(folder)).prepared[0].name


def test_memory_and_disk_give_the_same_bits(cases: Any, tmp_path: Path) -> None:
    memory = training_set(cases, pipeline(), seed=4)
    disk = training_set(cases, pipeline(), seed=4, folder=str(tmp_path / "volumes"))
    assert sorted(path.suffix for path in (tmp_path / "volumes").iterdir()) == [".pt"] * 3
    for draw in range(3, 18):
        (first,), (second,) = memory[draw], disk[draw]
        assert set(first) == set(second) == {"image", "label", "presence", "case_id"}
        for key in ("image", "label", "presence"):
            assert type(second[key]) is torch.Tensor
            assert torch.equal(first[key], second[key])
        assert first["case_id"] == second["case_id"] == f"C{draw % 3}"


def test_samples_never_change_the_stored_volumes(cases: Any, tmp_path: Path) -> None:
    memory, disk = Volumes(cases, pipeline()), Volumes(cases, pipeline(), str(tmp_path / "volumes"))
    before = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in prepared.items()}
        for prepared in memory.prepared
    ]
    files = [path.read_bytes() for path in disk.prepared]
    for seed in range(40):
        for data in (memory, disk):
            data.pipeline.set_random_state(seed)
            (sample,) = data[seed % 3]
            sample["image"] += 1  # changes by the training must not come back either
            sample["label"].zero_()
    for prepared, old in zip(memory.prepared, before, strict=True):
        assert set(prepared) == set(old)
        for key, value in old.items():
            assert torch.equal(prepared[key], value) if isinstance(value, torch.Tensor) else prepared[key] == value
    assert [path.read_bytes() for path in disk.prepared] == files


@pytest.mark.parametrize("damage", ["truncate", "delete", "empty"])
def test_only_a_damaged_file_is_written_again(cases: Any, tmp_path: Path, damage: str) -> None:
    paths = Volumes(cases, pipeline(), str(tmp_path / "volumes")).prepared
    first, times = torch.load(paths[0], weights_only=True), [path.stat().st_mtime_ns for path in paths]
    if damage == "delete":
        paths[0].unlink()
    else:
        os.truncate(paths[0], 0 if damage == "empty" else paths[0].stat().st_size // 2)
    again = Volumes(cases, pipeline(), str(tmp_path / "volumes"))
    assert again.prepared == paths
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times[1:]
    second = torch.load(paths[0], weights_only=True)
    assert all(torch.equal(second[key], first[key]) for key in ("ct", "pet", "label", "foreground", "background"))
    assert sorted((tmp_path / "volumes").iterdir()) == sorted(paths)  # no unfinished file is left


def test_a_full_disk_leaves_nothing_behind(cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(OSError, match="No space left"):
        Volumes(cases, pipeline(), str(tmp_path / "volumes"))
    assert list((tmp_path / "volumes").iterdir()) == []


def test_other_settings_and_other_input_files_lead_to_other_files(cases: Any, tmp_path: Path) -> None:
    names = [volume_file(cases, tmp_path)]
    assert volume_file(cases, tmp_path) == names[0]
    names.append(volume_file(cases, tmp_path, spacing=(2, 1, 1)))
    names.append(volume_file(cases, tmp_path, intensity={"ct": [0, 2], "pet": [0, 1]}))
    names.append(volume_file(cases, tmp_path, patch=(24,) * 3))
    names.append(volume_file(cases, tmp_path, labels=[[0], [1, 2]]))
    names.append(volume_file(cases, tmp_path, ignore=9))
    for key in ("pet", "label"):  # the same size at another time, as when voxels are corrected
        path = Path(cases[0][key])
        content = bytearray(path.read_bytes())
        content[-4] ^= 1 if key == "label" else 64
        path.write_bytes(bytes(content))
        later = time.time_ns() + 10**9
        os.utime(path, ns=(later, later))
        names.append(volume_file(cases, tmp_path))
    assert len(set(names)) == len(names) == 8


def test_a_task_that_ignores_nothing_keeps_its_files() -> None:
    assert pipeline(ignore=None).fingerprint == pipeline().fingerprint != pipeline(ignore=9).fingerprint


def test_volumes_are_reused_if_the_same_files_have_moved(cases: Any, tmp_path: Path) -> None:
    name = volume_file(cases, tmp_path)
    moved = dict(cases[0])
    for key, value in cases[0].items():
        if Path(value).is_file():
            moved[key] = str(shutil.copy2(value, tmp_path / Path(value).name))  # with its time
    assert volume_file([moved], tmp_path) == name
    assert volume_file([{**moved, "bbox_mm": [0, 0, 0, 9, 9, 9]}], tmp_path) != name


def test_all_voxels_of_a_small_volume_are_candidates() -> None:
    label = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    label[0, 1, 2, 3], label[0, 2, 3, 4], label[0, 0, 0, 0] = 1, 1, 1
    found = CentreCandidatesd("label")({"label": label, "other": 7})
    voxels = {(x, y, z) for x in range(3) for y in range(4) for z in range(5)}
    inside = {(1, 2, 3), (2, 3, 4), (0, 0, 0)}
    for key, wanted in (("foreground", inside), ("background", voxels - inside)):
        assert found[key].tolist() == sorted((x * 4 + y) * 5 + z for x, y, z in wanted)
    assert found["other"] == 7


def test_every_class_of_a_case_is_listed_equally_often_and_ignored_voxels_never() -> None:
    label = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    label[0, 0], label[0, 1, 0, :2], label[0, 2, 0, 0] = 1, 3, IGNORED  # 20, 2 and 1 of 60 voxels
    found = CentreCandidatesd("label")({"label": label})
    assert found["foreground"].tolist() == [*range(20), *[20, 21] * 10]
    assert found["background"].tolist() == [*range(22, 40), *range(41, 60)]
    few = CentreCandidatesd("label", count=8)({"label": label})["foreground"].tolist()
    assert few == [0, 6, 13, 19, 20, 21, 20, 21]  # evenly spread over the larger class
    nothing = CentreCandidatesd("label")({"label": torch.full_like(label, IGNORED)})
    assert (len(nothing["foreground"]), len(nothing["background"])) == (0, 60)  # such a case is drawn uniformly


def test_candidates_of_a_large_volume_are_of_their_class_and_evenly_spread() -> None:
    label = torch.as_tensor(np.random.default_rng(0).random((1, 60, 60, 60)) < 0.3).to(torch.uint8)
    found = CentreCandidatesd("label", count=1000)({"label": label})
    for key, value in (("foreground", 1), ("background", 0)):
        flat, members = label.flatten().numpy(), np.flatnonzero(label.numpy().ravel() == value)
        taken = found[key].numpy()
        assert len(taken) == len(set(taken.tolist())) == 1000
        assert (flat[taken] == value).all()
        assert (taken[0], taken[-1]) == (members[0], members[-1])
        gaps = np.diff(np.searchsorted(members, taken))  # counted in voxels of the class
        step = (len(members) - 1) / 999
        assert gaps.min() >= np.floor(step)
        assert gaps.max() <= np.ceil(step)


def test_candidates_of_more_voxels_than_float32_can_count_stay_in_the_volume() -> None:
    label = torch.zeros(1, 257, 256, 256, dtype=torch.uint8)  # 2^24 voxels and 65536 more
    label.view(-1)[: 65536 - 4] = 1  # 2^24 + 4 of background: the last is number 2^24 + 3, which float32 rounds up
    taken = CentreCandidatesd("label", count=5)({"label": label})["background"]
    assert taken[[0, -1]].tolist() == [65532, 257 * 256 * 256 - 1]


def test_an_empty_label_has_no_foreground_and_is_still_sampled(cases: Any) -> None:
    data = Volumes(cases, pipeline())
    assert data.prepared[2]["foreground"].shape == (0,)
    assert len(data.prepared[2]["background"]) == SIZE**3
    (sample,) = data[2]
    assert sample["image"].shape == (2, 16, 16, 16)
    assert (sample["label"] == 0).all()


def _resident(path: Path) -> int:
    """Bytes of this process's mappings of a file that are in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the kernel does not list mappings")
def test_a_sample_from_disk_touches_only_its_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline()
    label = torch.zeros(1, 200, 200, 200, dtype=torch.uint8)
    label[0, 90:110, 90:110, 90:110] = 1
    candidates = CentreCandidatesd("label")({"label": label})

    def make(case: Any) -> Any:
        volumes = {"ct": torch.ones(label.shape), "pet": torch.ones(label.shape), **candidates}
        return {**volumes, "presence": torch.tensor([True, True]), "case_id": "A"}

    data = Volumes([{"case_id": "A"}], Pipeline([make], real.transforms[real.fixed :], {}), str(tmp_path))
    (path,) = data.prepared
    assert path.stat().st_size > 70e6
    mapped, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **more: mapped.append(load(*args, **more)) or mapped[-1])
    for seed in range(3):
        data.pipeline.set_random_state(seed)
        data[0]
    assert len(mapped) == 3
    del mapped[1:]  # each sample has mapped the file anew
    assert 0 < _resident(path) < 0.3 * path.stat().st_size
    mapped[0]["ct"].sum(), mapped[0]["pet"].sum()
    assert _resident(path) > 0.8 * path.stat().st_size


@pytest.mark.parametrize(("folder", "kept"), [("", 2), ("volumes", 0)])
def test_with_volumes_on_disk_validation_keeps_none_in_memory(
    phantoms: list[dict[str, Any]], tmp_path: Path, folder: str, kept: int
) -> None:
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{name}.json") for name in ("train", "data/phantom")])
    parser.update({"dataset_dir": str(Path(phantoms[0]["image"]).parents[1]), "spacing": [12, 12, 12]})
    parser.update({"splits_file": str(tmp_path / "splits.json"), "volumes_dir": folder})
    dataset = parser.get_parsed_content("validate#dataset")
    assert (len(dataset), len(dataset._cache)) == (2, kept)
    assert dataset[1]["image"].shape[0] == 3


CAPPED = """
import resource, sys
import monai.bundle, scripts.data.training_set, scripts.distillation.distiller, scripts.networks
import scripts.training.handlers, scripts.training.tracking
from scripts.cli.main import main

resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
code = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"peak resident memory {peak / 2**20:.2f} GiB", flush=True)
sys.exit(code)
"""


def _train_capped(cohort: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """An epoch in a process that may have 2 GiB of data.

    ``RLIMIT_DATA`` counts the heap and every private writable mapping, touched or not. So it is stricter than resident
    memory: the interpreter with its libraries has 0.4 GiB of it, and a volume's file counts in full while it is mapped.
    What it does not count are pages that the kernel can drop, the cache of files.
    """
    output.mkdir()
    patients = sorted(path.name for path in cohort.glob("PHANTOM_*"))
    (output / "splits.json").write_text(json.dumps({"seed": 0, "folds": [patients[:1], patients[1:]]}))
    settings = {
        "spacing": [1, 1, 1], "patch": [32, 32, 32], "student_features": [4, 8, 8, 8], "val_interval": 100,
        "student_norm": ["group", {"num_groups": 4}],
    }  # fmt: skip
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    arguments = ["train", "--data", "phantom", "--dataset-dir", str(cohort), "--output-dir", str(output)]
    arguments += ["--epochs", "1", "--threads", "1", *overrides, *more]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CAPPED, *arguments],
        cwd=ROOT, text=True, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_cohort_larger_than_memory_trains_from_disk(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "cohort", cases=28, seed=3, progress=False)
    volumes = tmp_path / "volumes"
    try:
        began = time.monotonic()
        disk = _train_capped(tmp_path / "cohort", tmp_path / "disk", "--volumes-dir", str(volumes))
        print(f"{time.monotonic() - began:.0f} s from disk, {disk.stdout[-40:]}")
        assert disk.returncode == 0, (disk.stdout + disk.stderr)[-3000:]
        assert (tmp_path / "disk" / "model.pt").is_file()
        files = list(volumes.iterdir())
        assert len(files) == 27
        assert 2 * GIB < sum(path.stat().st_size for path in files) < 3 * GIB
    finally:
        shutil.rmtree(volumes, ignore_errors=True)
    memory = _train_capped(tmp_path / "cohort", tmp_path / "memory")  # the control
    print(f"{time.monotonic() - began:.0f} s with the control")
    assert memory.returncode != 0
    assert re.search("allocate|MemoryError", memory.stdout + memory.stderr), memory.stderr[-3000:]
    assert not (tmp_path / "memory" / "model.pt").exists()
