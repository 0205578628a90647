# SPDX-License-Identifier: Apache-2.0
"""Training with cached teachers: predictions are transformed like the image, and a wrong cache is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import DataLoader
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from torch import nn

from scripts.data import CaseSampler, Rules, preprocessing
from scripts.data.pipelines import Pipeline
from scripts.data.training_set import Volumes, training_set
from scripts.distillation.distiller import Distiller
from scripts.distillation.loss import DistillationLoss
from scripts.distillation.teacher_answers import NetworkAnswers
from scripts.distillation.teacher_cache import CachedTeacher, TeacherCache, cached_teachers
from scripts.distillation.teacher_cache_writer import cache_teachers
from scripts.distillation.teacher_origin import Origin
from scripts.losses import AttentionMapLoss, SoftPredictionLoss

MODALITIES, PATCH = ["ct", "pet"], [16, 16, 16]


@pytest.fixture
def make_case(tmp_path: Path, write_nifti: Any) -> Callable[..., dict[str, str]]:
    """A case of smooth CT and PET in [0, 1] on one grid of 1 mm; the label is a ball, off centre."""

    def make(size: int = 36, pet: bool = True) -> dict[str, str]:
        x, y, z = np.meshgrid(*[np.linspace(0, 1, size)] * 3, indexing="ij")
        ball = (x - 0.45) ** 2 + (y - 0.5) ** 2 + (z - 0.6) ** 2 < 0.33**2
        volumes = {"ct": 0.5 + 0.3 * np.sin(5 * x + 3 * y * z), "pet": 0.4 + 0.3 * np.cos(4 * z + 2 * x * y)}
        item = {"case_id": "A"}
        for key, voxels in volumes.items():
            if key == "ct" or pet:
                item[key] = str(write_nifti(tmp_path / f"{key}.nii.gz", voxels.astype(np.float32)))
        item["label"] = str(write_nifti(tmp_path / "label.nii.gz", ball.astype(np.uint8)))
        return {**item, "image": item["ct"]}

    return make


def pipeline(cached: Any = None, **changed: Any) -> Pipeline:
    settings = {"modalities": MODALITIES, "intensity": {"ct": [0, 1], "pet": [0, 1]}, "spacing": (1, 1, 1)}
    return preprocessing(
        **{**settings, "mode": "train", "labels": [[0], [1]], "patch": PATCH, "cached": cached, **changed}
    )


def write_cache(
    folder: Path, teacher: str, outputs: dict[str, torch.Tensor], transform: Pipeline, case: Any
) -> CachedTeacher:
    """A cache of one case that the test writes itself."""
    path = folder / teacher / "A.pt"
    path.parent.mkdir(parents=True)
    torch.save({**outputs, "made_of": ""}, path)
    files = {key: Path(case[key]).read_bytes() for key in ("ct", "image", "pet") if key in case}
    sources = {f"{key} bytes": len(content) for key, content in files.items()}
    sources |= {f"{key} sha256": hashlib.sha256(content).hexdigest() for key, content in files.items()}
    entry = {"bytes": path.stat().st_size, "sha256": "", "shape": list(outputs["logits"].shape), "sources": sources}
    head = {"format": 1, "channels": len(outputs["logits"]), "preprocessing": transform.settings}
    (path.parent / "manifest.json").write_text(json.dumps({**head, "cases": {"A": entry}}))
    return CachedTeacher([0], list(outputs), "a" * 64)


def dice(a: Any, b: Any) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_cached_predictions_get_the_same_patch_flips_and_affine_as_image_and_label(
    make_case: Any, tmp_path: Path
) -> None:
    case, plain = make_case(), pipeline()
    volumes = plain.prepare(case)
    ct, pet, label = (torch.as_tensor(volumes[key]).half() for key in ("ct", "pet", "label"))
    teachers = {
        "one": write_cache(tmp_path, "one", {"logits": torch.cat([ct, label])}, plain, case),
        "two": write_cache(tmp_path, "two", {"logits": torch.cat([1 - label, label]), "fine": pet}, plain, case),
    }
    cache = TeacherCache(str(tmp_path), teachers, verify="size")
    riding = pipeline(cache)
    data = Volumes([case], riding)
    before = next(i for i, step in enumerate(riding.transforms) if isinstance(step, mt.RandScaleIntensityd))
    (affine,) = (step for step in riding.transforms if isinstance(step, mt.RandAffined))
    overlaps, exact = [], 0
    for seed in range(40):
        riding.set_random_state(seed)
        (sample,) = riding(dict(data.prepared[0]), start=riding.fixed, end=before)
        moved, (image_ct, image_pet) = sample["cached"], (sample["ct"][0], sample["pet"][0])
        assert moved.shape == (5, *PATCH)
        assert moved.dtype == torch.float32
        inside = sample["label"][0] == 1
        torch.testing.assert_close(moved[[0, 4]], torch.stack([image_ct, image_pet]), atol=2**-11, rtol=0)
        if affine._do_transform:
            if 200 < inside.sum() < 3800:
                overlaps.append(min(dice(moved[1] > 0.5, inside), dice(moved[2:4].argmax(0) == 1, inside)))
        else:
            assert torch.equal(moved[1], inside.float())
            assert torch.equal(moved[2:4].argmax(0) == 1, inside)
            exact += 1
        # The whole random part: the very sample that a training without cache sees, and the same cached patch.
        riding.set_random_state(seed)
        plain.set_random_state(seed)
        (whole,), (alone,) = riding.draw(data.prepared[0]), plain.draw(data.prepared[0])
        assert torch.equal(whole["image"], alone["image"])
        assert torch.equal(whole["label"], alone["label"])
        assert torch.equal(whole["cached"], moved.as_tensor() if hasattr(moved, "as_tensor") else moved)
    assert min(overlaps) > 0.95
    assert min(len(overlaps), exact) >= 10


def test_a_batch_gives_the_cached_outputs_by_name(make_case: Any, tmp_path: Path) -> None:
    case, plain = make_case(), pipeline()
    grid = plain.prepare(case)["ct"].shape[1:]
    number = [torch.full((1, *grid), float(i)).half() for i in range(6)]
    teachers = {
        "one": write_cache(tmp_path, "one", {"logits": torch.cat(number[:3]), "deep": number[3]}, plain, case),
        "two": write_cache(tmp_path, "two", {"logits": torch.cat(number[4:])}, plain, case),
    }
    cache = TeacherCache(str(tmp_path), teachers, verify="size")
    data = training_set([case] * 2, pipeline(cache))
    batch = next(iter(DataLoader(data, batch_size=2, sampler=CaseSampler(2, 2))))
    image, label, _, named = cache.prepare_batch(batch, torch.device("cpu"))
    assert image.shape == (2, 2, *PATCH)
    assert label.shape == (2, 1, *PATCH)
    assert named["presence"].tolist() == [[True, True]] * 2
    values = {key: value.amax((0, 2, 3, 4)).tolist() for key, value in named["cached"].items()}
    assert values == {"one.logits": [0, 1, 2], "one.deep": [3], "two.logits": [4, 5]}
    with pytest.raises(ValueError, match="Unknown verify 'some': choose full or size"):
        TeacherCache(str(tmp_path), teachers, verify="some")


class Network(nn.Sequential):
    """Full grid, half grid, and back: ``0`` and ``2`` can be tapped."""

    def __init__(self, channels: list[int], seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(
                nn.Conv3d(len(channels), 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 6, 2, 2), nn.Tanh(),
                nn.Upsample(scale_factor=2), nn.Conv3d(6, 2, 3, padding=1),
            )  # fmt: skip


class Online(nn.Module):
    def __init__(self, channels: list[int], seed: int = 0) -> None:
        super().__init__()
        self.channels, self.sha256, self.network = channels, None, Network(channels, seed)
        self.layers, self.kind = {"fine": "0", "deep": "2"}, None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image[:, self.channels])


TAPS = {tap: {"layer": tap} for tap in ("fine", "deep")}


def cached(case: Any, folder: Path, teachers: dict[str, Online], **options: Any) -> tuple[TeacherCache, dict[str, Any]]:
    """The writer's cache of one case, its reader and its teachers."""
    specs = {
        name: {"architecture": "net", "modalities": [MODALITIES[c] for c in each.channels]}
        for name, each in teachers.items()
    }
    settings = {"modalities": MODALITIES, "channels": 2, "spacing": [1, 1, 1], "overlap": 0.5}
    inferer = SlidingWindowInferer(PATCH, overlap=0.5, mode="gaussian")
    transform = pipeline(**options)
    answers = {
        name: NetworkAnswers(name, [each], inferer, 2, TAPS, origin=Origin(specs[name]))
        for name, each in teachers.items()
    }
    cache_teachers([case], transform, answers, str(folder), settings)
    found = cached_teachers(specs, str(folder), MODALITIES, 2)
    reader = TeacherCache(str(folder), found)
    reader.check([case], transform.settings)
    return reader, found


def batch_of(case: Any, cache: TeacherCache, still: bool = False, **options: Any) -> Any:
    """Image, label and the network's keywords; with ``still`` nothing is augmented."""
    transform = pipeline(cache, **options)
    for step in transform.transforms if still else ():
        if hasattr(step, "prob"):
            step.prob = 0.0
    (sample,) = training_set([case], transform)[1]
    image, label, _, named = cache.prepare_batch(torch.utils.data.default_collate([sample]), torch.device("cpu"))
    return image, label, named


def student() -> nn.Module:
    return Network([0, 1], seed=3)


def total(distiller: Distiller, batch: Any, **terms: Any) -> tuple[float, dict[str, float]]:
    image, label, named = batch
    loss = DistillationLoss(DiceCELoss(to_onehot_y=True, softmax=True), distiller, terms)
    value = loss(distiller.train()(image, **named), label)
    return float(value.detach()), loss.logged


SOFT = {"tap": "logits", "weight": 2.0, "loss": SoftPredictionLoss()}


def test_the_first_loss_equals_that_of_online_teachers_if_the_volume_is_one_window(
    make_case: Any, tmp_path: Path
) -> None:
    case, online = make_case(size=16), {"both": Online([0, 1]), "pet": Online([1], seed=1)}
    cache, found = cached(case, tmp_path / "cache", online)
    batch = batch_of(case, cache, still=True)
    image, label, _ = batch
    prepared = pipeline().prepare(case)
    assert torch.equal(image[0], torch.cat([prepared["ct"], prepared["pet"]]))
    layers = {"student": "0", "both": "0", "pet": "0"}
    taps = {"fine": layers, "deep": {key: "2" for key in layers}}
    terms = {"soft": SOFT, "fine": {"tap": "fine", "weight": 1.0, "loss": AttentionMapLoss()}}
    ran, ran_logged = total(Distiller(student(), online, taps), (image, label, {}), **terms)
    read, read_logged = total(Distiller(student(), found, taps), batch, **terms)
    assert read == pytest.approx(ran, rel=1e-3)
    assert set(read_logged) == set(ran_logged)
    for name in ("segmentation", "soft", "fine"):  # the fine tap lies on the window's grid: no interpolation
        assert read_logged[name] == pytest.approx(ran_logged[name], rel=2e-3), name
        assert ran_logged[name] > 1e-4
    # A tap on half the grid comes back through an interpolation there and a pooling back.
    deep = {"deep": {"tap": "deep", "weight": 1.0, "loss": AttentionMapLoss()}}
    ran, ran_logged = total(Distiller(student(), online, taps), (image, label, {}), **deep)
    read, read_logged = total(Distiller(student(), found, taps), batch, **deep)
    assert read_logged["deep"] == pytest.approx(ran_logged["deep"], rel=0.05)
    assert ran_logged["deep"] > 0.05


def test_cached_teachers_have_no_weights_and_cannot_predict(make_case: Any, tmp_path: Path) -> None:
    case = make_case(size=16)
    cache, found = cached(case, tmp_path / "cache", {"both": Online([0, 1])})
    distiller = Distiller(student(), found)
    assert list(found["both"].parameters()) == list(distiller.teachers.buffers()) == []
    assert list(distiller.teachers.parameters()) == []
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student"}
    image, _, named = batch_of(case, cache)
    outputs = distiller.train()(image, **named)
    assert torch.equal(outputs["both.logits"], named["cached"]["both.logits"])
    with pytest.raises(ValueError, match="A cached teacher cannot predict"):
        distiller(image)
    assert distiller.eval()(image).shape == (1, 2, *PATCH)  # the student alone needs no cache


def test_a_teacher_whose_modality_is_absent_has_no_weight(make_case: Any, tmp_path: Path) -> None:
    case, online = make_case(pet=False), {"ct": Online([0]), "both": Online([0, 1], seed=1)}
    cache, found = cached(case, tmp_path / "cache", online, allow_missing=True)
    image, label, named = batch_of(case, cache, allow_missing=True)
    assert named["presence"].tolist() == [[True, False]]
    distiller = Distiller(student(), found)
    value, logged = total(distiller, (image, label, named), soft=SOFT)
    assert (logged["weight/ct"], logged["weight/both"]) == (1.0, 0.0)
    named["cached"]["both.logits"] = torch.full_like(named["cached"]["both.logits"], math.nan)
    assert total(distiller, (image, label, named), soft=SOFT)[0] == value
    present = {**named, "presence": torch.tensor([[True, True]])}
    assert math.isnan(total(distiller, (image, label, present), soft=SOFT)[0])


def test_another_bounding_box_in_the_same_files_is_refused(make_case: Any, tmp_path: Path) -> None:
    case = {**make_case(), "bbox_mm": [-30.0, -30.0, 2.0, -2.0, -2.0, 30.0]}
    cache, _ = cached(case, tmp_path / "cache", {"both": Online([0, 1])})
    settings = pipeline().settings
    cache.check([case], settings)
    with pytest.raises(ValueError, match="image files of case A have changed"):
        cache.check([{**case, "bbox_mm": [-31.0, -30.0, 2.0, -3.0, -2.0, 30.0]}], settings)


@pytest.mark.parametrize("made", ["with", "without"])
@pytest.mark.parametrize("rules", [Rules(replace_nonfinite=0.0), Rules(series_uids=["1.2.3"])])
def test_a_setting_that_only_the_cache_or_only_the_run_has_is_refused(
    rules: Rules, made: str, make_case: Any, tmp_path: Path
) -> None:
    case, transforms = make_case(), {"with": pipeline(checks=rules), "without": pipeline()}
    cached = {"a": write_cache(tmp_path, "a", {"logits": torch.zeros(2, 1, 1, 1)}, transforms[made], case)}
    other = transforms["without" if made == "with" else "with"]
    with pytest.raises(ValueError, match=r"cache of the teacher a is outdated: its (replace nonfinite|series uids) is"):
        TeacherCache(str(tmp_path), cached, verify="size").check([case], other.settings)
    TeacherCache(str(tmp_path), cached, verify="size").check([case], transforms[made].settings)


def test_a_cache_that_is_replaced_during_a_training_ends_it(make_case: Any, tmp_path: Path) -> None:
    case, transform = make_case(), pipeline()
    teacher = write_cache(tmp_path, "a", {"logits": torch.zeros(2, 1, 1, 1).half()}, transform, case)
    cache = TeacherCache(str(tmp_path), {"a": teacher}, verify="size")
    cache.check([case], transform.settings)
    assert set(cache(case)) > {"a.logits"}
    torch.save({"logits": torch.ones(2, 1, 1, 1).half(), "made_of": "other weights"}, tmp_path / "a" / "A.pt")
    with pytest.raises(ValueError, match=r"A\.pt was replaced during this training, by cache-teachers with other sett"):
        cache(case)
