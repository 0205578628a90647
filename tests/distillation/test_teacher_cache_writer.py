# SPDX-License-Identifier: Apache-2.0
"""Writing the cache: every teacher predicts each whole volume once, and no partial file gets a final name."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from benchmarks.job_queue import use_own_progress_lock
from scripts.cli.main import main
from scripts.data import preprocessing
from scripts.distillation.teacher_answers import NetworkAnswers, cached_map
from scripts.distillation.teacher_cache_writer import cache_teachers
from scripts.distillation.teacher_origin import Origin
from scripts.losses import AttentionMapLoss

MODALITIES, SPACING, PATCH = ["ct", "pet", "mr"], [9.0, 9.0, 9.0], [16, 12, 10]
INTENSITY = {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]}


class Fake(nn.Module):
    """A teacher of two convolutions that pad with zeros, so that every window's border shows in its prediction."""

    def __init__(self, channels: list[int], seed: int = 0, sha256: str = "a" * 64) -> None:
        super().__init__()
        self.channels, self.sha256, self.layers, self.kind = channels, sha256, {"deep": "0"}, None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Conv3d(len(channels), 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 2, 3, padding=1)
            )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image[:, self.channels])


SPECS = {
    "pair": {"architecture": "fake", "modalities": ["pet", "ct"]},
    "mr": {"architecture": "f", "modalities": ["mr"]},
}
TAPS = {"deep": {"layer": "deep"}}


def teachers(**changed: Any) -> dict[str, nn.Module]:
    return {"pair": Fake([1, 0], **changed), "mr": Fake([2], seed=1, sha256="b" * 64)}


def pipeline(**changed: Any) -> Any:
    settings = {"modalities": MODALITIES, "intensity": INTENSITY, "spacing": SPACING, "mode": "train", "patch": PATCH}
    return preprocessing(**{**settings, "labels": [[0], [1]], **changed})


def write(
    cases: Any, folder: Path, asked: Any = None, transform: Any = None, rebuild: bool = False, **options: Any
) -> None:
    inferer = SlidingWindowInferer(PATCH, overlap=0.5, mode="gaussian")
    settings = {"modalities": MODALITIES, "channels": 2, "spacing": SPACING, "overlap": 0.5}
    answers = {}
    for name, teacher in (asked or teachers()).items():
        origin = Origin(SPECS[name])
        origin.sha256 = teacher.sha256
        answers[name] = NetworkAnswers(name, [teacher], inferer, 2, origin=origin, **options)
    cache_teachers(cases, transform or pipeline(), answers, str(folder), settings, rebuild=rebuild)


def read(folder: Path, teacher: str, case: Any) -> dict[str, Any]:
    return torch.load(folder / teacher / f"{case['case_id']}.pt", weights_only=True)  # type: ignore[no-any-return]


def manifest(folder: Path, teacher: str = "pair") -> dict[str, Any]:
    return json.loads((folder / teacher / "manifest.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def cases(phantoms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return phantoms[:2]


@pytest.fixture(scope="module")
def written(cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(cases, folder, taps=TAPS)
    return folder


def slid(image: np.ndarray, network: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Windows of PATCH at half steps, the last at the border, averaged by a Gaussian of an eighth of the window."""
    starts, bells = [], []
    for size, window in zip(image.shape[1:], PATCH, strict=True):
        steps = range(0, max(size - window, 0) + window // 2, window // 2)
        starts.append(sorted({min(start, size - window) for start in steps}))
        x = np.arange(window) - (window - 1) / 2
        bells.append(np.exp(-(x**2) / (2 * (window / 8) ** 2)))
    weight = np.maximum(np.einsum("i,j,k->ijk", *bells), 1e-3)
    total, norm = 0.0, np.zeros(image.shape[1:])
    for x in starts[0]:
        for y in starts[1]:
            for z in starts[2]:
                at = np.s_[:, x : x + PATCH[0], y : y + PATCH[1], z : z + PATCH[2]]
                with torch.no_grad():
                    prediction = network(torch.tensor(image[at])[None])[0].double().numpy()
                if isinstance(total, float):
                    total = np.zeros((len(prediction), *image.shape[1:]))
                total[at] += prediction * weight
                norm[at[1:]] += weight
    return total / norm  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def images(cases: Any) -> list[np.ndarray]:
    """The image after the fixed part of the training pipeline: at the spacing, padded to at least a patch."""
    prepared = [pipeline().prepare(case) for case in cases]
    return [np.concatenate([volumes[key].numpy() for key in MODALITIES]) for volumes in prepared]


def test_logits_and_maps_equal_an_independent_sliding_window_in_half_precision(
    written: Path, cases: Any, images: Any
) -> None:
    for name, teacher in teachers().items():
        first = teacher.network[0]  # type: ignore[index]

        def root(x: torch.Tensor, teacher: Any = teacher, first: nn.Module = first) -> torch.Tensor:
            return first(x[:, teacher.channels]).square().mean(1, keepdim=True).sqrt()  # type: ignore[no-any-return]

        for case, image in zip(cases, images, strict=True):
            kept = read(written, name, case)
            assert kept["logits"].dtype == kept["deep"].dtype == torch.float16
            for key, network in (("logits", teacher), ("deep", root)):
                expected = slid(image, network)
                assert kept[key].shape == expected.shape
                # Half precision has 11 bits: half a unit in the last place is 2^-11 of the value.
                np.testing.assert_allclose(kept[key].double().numpy(), expected, rtol=2**-11 * 1.02, atol=2e-6)
            assert kept["logits"].std() > 0.01


def test_shapes_are_those_of_the_padded_grid(cases: Any, tmp_path: Path) -> None:
    small = pipeline(spacing=[20.0, 20.0, 20.0])
    write(cases[:1], tmp_path, {"mr": teachers()["mr"]}, small)
    volume = small.prepare(cases[0])["ct"]
    assert all(size >= least for size, least in zip(volume.shape[1:], PATCH, strict=True))
    shape = list(read(tmp_path, "mr", cases[0])["logits"].shape)
    assert shape == manifest(tmp_path, "mr")["cases"]["PHANTOM_001"]["shape"] == [2, *volume.shape[1:]]
    assert PATCH[0] in shape  # 10 voxels of 20 mm cover the limb: this axis was padded


def test_one_file_per_case_and_teacher_and_a_complete_manifest(written: Path, cases: Any, images: Any) -> None:
    names = [f"{case['case_id']}.pt" for case in cases]
    for name in ("pair", "mr"):
        assert sorted(path.name for path in (written / name).iterdir()) == [*names, "manifest.json"]
        saved = manifest(written, name)
        assert saved["weights_sha256"] == ("a" if name == "pair" else "b") * 64
        assert (saved["architecture"], saved["modalities"]) == tuple(SPECS[name].values())
        assert saved["preprocessing_sha256"] == pipeline().fingerprint != pipeline(patch=[8, 8, 8]).fingerprint
        assert (saved["spacing"], saved["outputs"], saved["channels"]) == (SPACING, ["logits", "deep"], 2)
        assert saved["version"].startswith(json.loads(Path("configs/metadata.json").read_text())["version"])
        assert "flips" in saved["approximate"]
        for case, image in zip(cases, images, strict=True):
            entry, path = saved["cases"][case["case_id"]], written / name / f"{case['case_id']}.pt"
            assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert entry["bytes"] == path.stat().st_size
            assert entry["shape"] == [2, *image.shape[1:]]
            content = Path(case["pet"]).read_bytes()
            assert entry["sources"]["pet bytes"] == len(content)
            assert entry["sources"]["pet sha256"] == hashlib.sha256(content).hexdigest()


def test_a_stored_map_is_the_root_of_the_channels_mean_square_and_survives_its_interpolation() -> None:
    teacher = torch.randn(2, 5, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    same = cached_map(teacher, (8, 6, 4), 2)
    np.testing.assert_allclose(same[:, 0].numpy(), np.sqrt((teacher.numpy() ** 2).mean(1)), rtol=1e-6)
    # A smooth map on half the grid survives being interpolated to the window's grid, to the tolerance of interpolation.
    z, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (16, 16, 16)), indexing="ij")
    coarse = torch.stack([1 + x, 1 + y * z])[None]
    fine = torch.stack([2 - x, 1 + z])[None]
    loss = AttentionMapLoss()
    wanted = float(loss(fine, coarse))
    assert float(loss(fine, cached_map(coarse, (32, 32, 32), 2))) == pytest.approx(wanted, rel=0.02)
    assert wanted > 1e-3


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_loss_on_a_stored_map_is_that_on_the_features(power: float, norm: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 8, 6, 4, generator=generator), torch.randn(2, 5, 8, 6, 4, generator=generator)
    loss = AttentionMapLoss(power, norm)
    stored = cached_map(teacher, (8, 6, 4), power)
    torch.testing.assert_close(loss(student, stored), loss(student, teacher), rtol=1e-5, atol=1e-7)
    other = cached_map(teacher, (8, 6, 4), power + 1)
    assert abs(float(loss(student, other) - loss(student, teacher))) > 1e-3  # which is why another power is refused


def test_flips_store_the_log_of_the_mean_softmax_and_the_mean_of_the_maps(
    cases: Any, images: Any, tmp_path: Path
) -> None:
    one = teachers()["pair"]
    write(cases[:1], tmp_path, {"pair": one}, taps=TAPS, tta="flips")
    probabilities, maps = np.zeros((2, *images[0].shape[1:])), np.zeros((1, *images[0].shape[1:]))
    first = one.network[0]  # type: ignore[index]

    def root(x: torch.Tensor) -> torch.Tensor:
        return first(x[:, one.channels]).square().mean(1, keepdim=True).sqrt()  # type: ignore[no-any-return,index]

    for x in (1, -1):
        for y in (1, -1):
            for z in (1, -1):
                turned = np.ascontiguousarray(images[0][:, ::x, ::y, ::z])
                exponentials = np.exp(slid(turned, one))
                probabilities += (exponentials / exponentials.sum(0))[:, ::x, ::y, ::z] / 8
                maps += slid(turned, root)[:, ::x, ::y, ::z] / 8
    kept = read(tmp_path, "pair", cases[0])
    np.testing.assert_allclose(kept["logits"].double().numpy(), np.log(probabilities), rtol=2**-10, atol=2e-5)
    np.testing.assert_allclose(kept["deep"].double().numpy(), maps, rtol=2**-10, atol=2e-5)
    assert (manifest(tmp_path, "pair")["tta"], manifest(tmp_path, "pair")["attention_power"]) == ("flips", 2)
    with pytest.raises(ValueError, match=r"its tta is flips, this run's is None"):
        write(cases[:1], tmp_path, {"pair": one}, taps=TAPS)


def test_flips_of_a_2d_image_are_four() -> None:
    network = nn.Conv2d(1, 2, 3, padding=1)
    teacher = Fake([0])
    teacher.network = nn.Sequential(network)
    seen: list[torch.Tensor] = []

    def inferer(image: torch.Tensor, run: nn.Module) -> torch.Tensor:
        seen.append(image)
        return run(image)  # type: ignore[no-any-return]

    image = torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    answer = NetworkAnswers("a", [teacher], inferer, 2, tta="flips").predict({}, lambda: image)
    assert len(seen) == 4
    with torch.no_grad():
        turned = [network(image.flip(axes)).softmax(1).flip(axes) for axes in ((), (2,), (3,), (2, 3))]
    torch.testing.assert_close(answer, torch.stack(turned).mean(0)[0].log())


def test_flips_of_a_sigmoid_head_are_those_of_the_task_and_average_each_channel() -> None:
    network = nn.Conv3d(1, 2, 3, padding=1)
    teacher = Fake([0])
    teacher.network = nn.Sequential(network)
    image = torch.randn(1, 1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    answers = NetworkAnswers("a", [teacher], lambda image, run: run(image), 2, tta="flips", sigmoid=True, flips=[1, 2])
    assert answers.settings == {"tta": "flips", "tta_axes": [1, 2]}
    answer = answers.predict({}, lambda: image)
    with torch.no_grad():
        turned = [network(image.flip(axes)).sigmoid().flip(axes) for axes in ((), (3,), (4,), (3, 4))]
    torch.testing.assert_close(answer.sigmoid(), torch.stack(turned).mean(0)[0])


def test_the_size_is_stated_and_a_full_disk_is_refused_before_anything_is_written(
    cases: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    voxels = sum(image[0].size for image in images)
    size = 2 * voxels * 3  # fp16: two classes and a map
    free = 0

    def disk_usage(path: Path) -> Any:
        assert path.exists()
        return shutil._ntuple_diskusage(0, 0, free)  # type: ignore[attr-defined]

    asked = {"pair": teachers()["pair"]}
    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    with pytest.raises(OSError, match=f"needs {size / 1e6:.0f} MB, but only 0 MB are free in .*new"):
        write(cases, tmp_path / "new", asked, taps=TAPS)
    assert not (tmp_path / "new").exists()
    free = 10**9
    write(cases[:1], tmp_path / "new", asked, taps=TAPS)
    caplog.clear()
    free = 2 * images[1][0].size * 3  # the first case is there
    write(cases, tmp_path / "new", asked, taps=TAPS)
    expected = f"2 cases x 1 teachers are {size / 1e6:.0f} MB, {free / 1e6:.0f} MB of them to be written"
    assert any(expected in message for message in caplog.messages)
    written = sum(path.stat().st_size for path in (tmp_path / "new" / "pair").glob("*.pt"))
    assert written == pytest.approx(size, abs=2 * 8192)  # the zip's own bytes, and made_of


def test_undamaged_files_are_kept_and_damaged_ones_replaced(cases: Any, tmp_path: Path) -> None:
    write(cases, tmp_path)
    paths = [tmp_path / name / f"{case['case_id']}.pt" for name in SPECS for case in cases]
    content, times = [path.read_bytes() for path in paths], [path.stat().st_mtime_ns for path in paths]
    noted = [manifest(tmp_path, name) for name in SPECS]
    write(cases, tmp_path)
    assert [path.stat().st_mtime_ns for path in paths] == times
    os.truncate(paths[0], len(content[0]) - 7)
    flipped = bytearray(content[1])
    flipped[len(flipped) // 2] ^= 1
    paths[1].write_bytes(bytes(flipped))
    paths[2].unlink()
    write(cases, tmp_path)
    assert paths[3].stat().st_mtime_ns == times[3]
    for path, name, case in zip(paths, ["pair", "pair", "mr", "mr"], cases * 2, strict=True):
        old = torch.load(io.BytesIO(content[paths.index(path)]), weights_only=True)
        assert torch.equal(read(tmp_path, name, case)["logits"], old["logits"])
    assert [manifest(tmp_path, name)["cases"] for name in SPECS] == [entry["cases"] for entry in noted]


def test_a_later_call_for_more_cases_adds_them(cases: Any, tmp_path: Path) -> None:
    one = {"mr": teachers()["mr"]}
    write(cases[:1], tmp_path, one)
    time = (tmp_path / "mr" / "PHANTOM_001.pt").stat().st_mtime_ns
    write(cases[1:], tmp_path, one)
    assert sorted(manifest(tmp_path, "mr")["cases"]) == ["PHANTOM_001", "PHANTOM_002"]
    assert (tmp_path / "mr" / "PHANTOM_001.pt").stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"asked": {"pair": Fake([1, 0], sha256="c" * 64)}},
            "its weights sha256 is aaaaaaaaaaaa..., this run's is cccccc",
        ),
        (
            {"transform": pipeline(spacing=[8.0, 9.0, 9.0])},
            r"its spacing is \[9.0, 9.0, 9.0\], this run's is \[8.0, 9.0, 9.0\]",
        ),
        ({"taps": TAPS}, r"its outputs is \['logits'\], this run's is \['logits', 'deep'\]"),
    ],
)
def test_a_cache_with_other_settings_is_refused_without_rebuild(
    cases: Any, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    write(cases[:1], tmp_path, {"pair": teachers()["pair"]})
    before = {path.name: path.read_bytes() for path in (tmp_path / "pair").iterdir()}
    changed = {"asked": {"pair": teachers(seed=5)["pair"]}, **changed}
    with pytest.raises(ValueError, match=words):
        write(cases[:1], tmp_path, **changed)
    assert {path.name: path.read_bytes() for path in (tmp_path / "pair").iterdir()} == before
    write(cases[:1], tmp_path, **changed, rebuild=True)
    assert (tmp_path / "pair" / "PHANTOM_001.pt").read_bytes() != before["PHANTOM_001.pt"]
    write(cases[:1], tmp_path, **changed)  # and is now the cache of the other


def test_an_interrupted_rebuild_leaves_no_manifest_of_the_old_cache(cases: Any, tmp_path: Path) -> None:
    write(cases, tmp_path, {"pair": teachers()["pair"]})
    other = Fake([1, 0], seed=9, sha256="c" * 64)
    calls: list[Any] = []
    other.register_forward_pre_hook(lambda *_: calls.append(1) or (1 / 0 if len(calls) > 1 else None))
    with pytest.raises(ZeroDivisionError):
        write(cases, tmp_path, {"pair": other}, rebuild=True)
    assert not (tmp_path / "pair" / "manifest.json").exists()


def test_a_prediction_that_is_not_finite_in_half_precision_is_refused(cases: Any, tmp_path: Path) -> None:
    for value in (float("nan"), 1e5):  # the largest half is 65504
        teacher = Fake([2])
        nn.init.constant_(teacher.network[2].bias, value)
        with pytest.raises(ValueError, match=r"PHANTOM_001\.pt was not written: the prediction is not finite"):
            write(cases[:1], tmp_path, {"mr": teacher})
        assert list(tmp_path.rglob("*.pt")) == []
        assert list(tmp_path.rglob("manifest.json")) == []


def _killed_while_saving(cases: Any, folder: Path, die_in_save: Callable[[int], None]) -> None:
    use_own_progress_lock()
    die_in_save(2)
    write(cases, folder)


def test_a_kill_in_the_middle_leaves_no_half_file_under_a_final_name(
    cases: Any, written: Path, tmp_path: Path, die_in_save: Callable[[int], None]
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_saving, args=(cases, tmp_path, die_in_save)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.rglob("PHANTOM*")] == ["PHANTOM_001.pt"]
    assert list(tmp_path.rglob("manifest.json")) == []  # so that no training takes it for a cache
    time = (tmp_path / "pair" / "PHANTOM_001.pt").stat().st_mtime_ns
    write(cases, tmp_path)
    assert (tmp_path / "pair" / "PHANTOM_001.pt").stat().st_mtime_ns == time
    for name in SPECS:
        assert sorted(manifest(tmp_path, name)["cases"]) == ["PHANTOM_001", "PHANTOM_002"]
        for case in cases:
            assert torch.equal(read(tmp_path, name, case)["logits"], read(written, name, case)["logits"])


def test_the_command_writes_the_requested_outputs_and_refuses_in_one_sentence(
    tmp_path: Path, phantoms: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "cache-teachers", "--data", "phantom", "--dataset-dir", str(Path(phantoms[0]["image"]).parents[1]),
        "--output-dir", str(tmp_path / "cache"), "--teacher", "dynunet:pet=random", "--threads", "1",
        "--set", "patch=[32,32,32]", "--set", "spacing=[12,12,12]", "--set", f"splits_file={tmp_path / 'splits.json'}",
        "--set", 'architectures={"dynunet":{"filters":[2,4,4,4,4]}}',
    ]  # fmt: skip
    assert main(arguments) == 0
    folder = tmp_path / "cache"
    training = json.loads((tmp_path / "splits.json").read_text())["folds"][1:]
    assert sorted(manifest(folder, "dynunet_pet")["cases"]) == sorted(case for fold in training for case in fold)
    assert manifest(folder, "dynunet_pet")["outputs"] == ["logits"]
    assert main([*arguments, "--cases", "all", "--fold", "0"]) == 0
    assert (
        len(manifest(folder, "dynunet_pet")["cases"])
        == len(phantoms)
        > len([case for fold in training for case in fold])
    )
    names = sorted(manifest(folder, "dynunet_pet")["cases"])
    (tmp_path / "one.json").write_text(json.dumps({"seed": 0, "folds": [names]}))  # nobody trains
    one_fold = [*arguments[:-4], *arguments[-2:], "--set", f"splits_file={tmp_path / 'one.json'}"]
    one_fold += ["--output-dir", str(tmp_path / "other")]
    assert main([*one_fold, "--cases", "all", "--fold", "0"]) == 0
    assert sorted(manifest(tmp_path / "other", "dynunet_pet")["cases"]) == names
    assert main([*arguments, "--set", "spacing=[14,12,12]"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: The cache of the teacher dynunet_pet is outdated: its spacing is [12.0, 12.0, 12.0], "
    )
    assert main([*arguments, "--set", "spacing=[14,12,12]", "--rebuild", "--maps"]) == 0
    assert manifest(folder, "dynunet_pet")["outputs"] == ["logits", "coarse_map", "fine_map"]
    assert manifest(folder, "dynunet_pet")["spacing"] == [14, 12, 12]
