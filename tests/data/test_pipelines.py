# SPDX-License-Identifier: Apache-2.0
"""From files to the network's input and back: grids, units, absent modalities, labels, masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import CacheDataset, DataLoader, Dataset, decollate_batch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from scripts.data import postprocessing, preprocessing

Array = NDArray[Any]
MODALITIES = ["ct", "pet", "mr"]
CENTRE = np.array([12.0, -25.0, 40.0])  # mm
LPS = np.diag([-1.0, -1.0, 1.0])
# Axes, spacing in mm, shape: an oblique LPS one, one with its axes permuted and flipped, a small one turned otherwise.
GRIDS = {
    "ct": (Rotation.from_rotvec([4, 10, 17], degrees=True).as_matrix() @ LPS, (2.0, 2.0, 4.0), (26, 24, 14)),
    "pet": (np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]]), (4.0, 4.5, 5.0), (16, 15, 14)),
    "mr": (Rotation.from_euler("z", -20, degrees=True).as_matrix(), (1.5, 3.0, 2.5), (20, 10, 12)),
}
# Values are linear in mm, so that linear interpolation is exact: 200 + w . (x - CENTRE), in the range [0, 400].
WEIGHTS = {"ct": [1.0, -0.5, 2.0], "pet": [-2.0, 1.5, 0.3], "mr": [0.4, 2.5, -1.0]}
INTENSITY = {key: [0, 400] for key in MODALITIES}


def plane(key: str, points: Array) -> Array:
    return 200 + (points - CENTRE) @ WEIGHTS[key]


@pytest.fixture
def oblique(tmp_path: Path, write_nifti: Any, make_affine: Any, world: Any) -> dict[str, str]:
    """One case, every modality on its own grid; the label is a ball of 12 mm on the PET's grid."""
    item = {"case_id": "A", "image": str(tmp_path / "ct.nii.gz")}
    for key, (axes, spacing, shape) in GRIDS.items():
        affine = make_affine(axes, spacing, shape, CENTRE)
        points = world(affine, shape)
        item[key] = str(write_nifti(tmp_path / f"{key}.nii.gz", plane(key, points).astype(np.float32), affine))
        if key == "pet":
            ball = np.linalg.norm(points - CENTRE, axis=-1) < 12
            item["label"] = str(write_nifti(tmp_path / "label.nii.gz", ball.astype(np.uint8), affine))
    return item


@pytest.fixture
def simple(tmp_path: Path, write_nifti: Any) -> Callable[..., dict[str, str]]:
    """Write a case of one or two modalities on one grid of 1 mm, RAS, so that nothing is resampled."""

    def make(label: Array | None = None, **volumes: Array) -> dict[str, str]:
        item = {"case_id": "B"}
        for key, voxels in {**volumes, **({} if label is None else {"label": label})}.items():
            item[key] = str(write_nifti(tmp_path / f"{key}.nii.gz", voxels))
        return {**item, "image": item["ct"]}

    return make


def whole(item: dict[str, str], mode: str = "infer", **options: Any) -> dict[str, Any]:
    """Preprocess with one modality per volume that the item names, 1 mm, range [0, 1] unless changed by options."""
    keys = [key for key in MODALITIES if key in item]
    settings = {"modalities": keys, "intensity": {key: [0, 1] for key in keys}, "spacing": (1, 1, 1), "mode": mode}
    return preprocessing(**{**settings, **options})(item)  # type: ignore[no-any-return]


def train(shape: int = 16, seed: int = 0, allow_missing: bool = False, **options: Any) -> Any:
    settings = {"intensity": {"ct": [0, 1], "pet": [0, 1]}, "modalities": ["ct", "pet"], "labels": [[0], [1], [2]]}
    settings |= {"spacing": (1, 1, 1), "patch": (shape,) * 3, "allow_missing": allow_missing, **options}
    return preprocessing(mode="train", **settings).set_random_state(seed)


def boxes(size: int = 20) -> Array:
    """Classes 1 and 2 as two neighbouring cuboids."""
    label = np.zeros((size,) * 3, np.uint8)
    label[5:15, 5:15, 5:10], label[5:15, 5:15, 10:15] = 1, 2
    return label


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (2.0, 2.5, 3.5)])
def test_modalities_on_different_grids_are_resampled_by_their_full_affines(
    oblique: Any, world: Any, spacing: Any
) -> None:
    result = preprocessing(MODALITIES, INTENSITY, spacing, "infer")(oblique)
    image = result["image"]
    points = world(image.affine, image.shape[1:])
    tested = {}
    for channel, key in enumerate(MODALITIES):
        source, last = nib.Nifti1Image.from_filename(oblique[key]).affine, np.array(GRIDS[key][2]) - 1
        voxels = (points - source[:3, 3]) @ np.linalg.inv(source[:3, :3]).T
        inside = ((voxels >= 0) & (voxels <= last)).all(-1)
        outside = ((voxels <= -1) | (voxels >= last + 1)).any(-1)
        values = image[channel].numpy()
        np.testing.assert_allclose(values[inside], (plane(key, points) / 400)[inside], atol=1e-4)
        tested[key] = (inside.sum(), outside.sum())
        if key != "ct":
            assert (values[outside] == 0).all()
    assert min(tested[key][0] for key in MODALITIES) > 300
    assert tested["mr"][1] > 300


def test_the_result_is_ras_at_the_target_spacing_and_covers_the_reference(oblique: Any, world: Any) -> None:
    image = preprocessing(MODALITIES, INTENSITY, (3.0, 2.5, 3.5), "infer")(oblique)["image"]
    affine = np.asarray(image.affine)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (3.0, 2.5, 3.5), atol=1e-4)
    reference = nib.Nifti1Image.from_filename(oblique["ct"])
    voxels = (world(reference.affine, reference.shape) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert (voxels > -0.51).all()
    assert (voxels < np.array(image.shape[1:]) - 0.49).all()


def test_ranges_are_scaled_and_clipped(simple: Any) -> None:
    hu = np.tile(np.float32([-1000, -200, 0, 50, 300, 3000]), (6, 6, 1))
    image = whole(simple(ct=hu), intensity={"ct": [-200, 300]})["image"][0]
    np.testing.assert_allclose(image[2, 3], [0, 0, 0.4, 0.5, 1, 1], atol=1e-6)


def test_zscore_has_mean_0_and_deviation_1_over_the_non_zero_voxels(simple: Any) -> None:
    values = np.random.default_rng(0).normal(300, 40, (8, 8, 8)).astype(np.float32)
    values[:3] = 0
    image = whole(simple(ct=values), intensity={"ct": "zscore"})["image"][0].numpy()
    np.testing.assert_allclose(image[3:], (values[3:] - values[3:].mean()) / values[3:].std(), atol=1e-4)
    assert (image[:3] == 0).all()


def test_slope_and_intercept_are_applied_once(tmp_path: Path, write_nifti: Any) -> None:
    stored = np.full((6, 6, 6), 500, np.int16)
    stored[3:] = 525
    path = write_nifti(tmp_path / "x.nii.gz", stored, slope=2.0, intercept=-1000.0)
    image = whole({"ct": str(path)}, intensity={"ct": [-100, 100]})["image"]
    np.testing.assert_allclose(image[0, :3], 0.5, atol=1e-6)  # 2 * 500 - 1000 = 0
    np.testing.assert_allclose(image[0, 3:], 0.75, atol=1e-6)  # 2 * 525 - 1000 = 50


def test_an_absent_modality_is_zeros_and_only_accepted_if_allowed(oblique: Any) -> None:
    del oblique["pet"]
    result = preprocessing(MODALITIES, INTENSITY, (4, 4, 4), "infer", allow_missing=True)(oblique)
    assert torch.equal(result["presence"], torch.tensor([True, False, True]))
    assert (result["image"][1] == 0).all()
    assert (result["image"][[0, 2]] > 0).any()
    with pytest.raises(RuntimeError) as caught:  # MONAI's wrapping
        preprocessing(MODALITIES, INTENSITY, (4, 4, 4), "infer")(oblique)
    assert "Case A: no pet was given" in str(caught.value.__cause__)


def test_training_gives_plain_tensors_and_the_case(simple: Any) -> None:
    volume = np.random.default_rng(0).random((20, 20, 20), np.float32)
    items = [simple(ct=volume, pet=volume, label=boxes())] * 2
    data = CacheDataset(items, train(), progress=False)
    batch = next(iter(DataLoader(data, batch_size=2)))
    assert set(batch) == {"image", "label", "presence", "case_id"}
    assert all(type(batch[key]) is torch.Tensor for key in ("image", "label", "presence"))
    assert batch["image"].shape == (2, 2, 16, 16, 16)
    assert batch["label"].shape == (2, 1, 16, 16, 16)
    assert batch["presence"].tolist() == [[True, True]] * 2


def test_a_patch_larger_than_the_volume_is_padded(simple: Any) -> None:
    volume = np.ones((12, 20, 9), np.float32)
    volume[0, 0, 0] = 2
    (sample,) = train(16)(simple(ct=volume, pet=volume, label=np.ones((12, 20, 9), np.uint8)))
    assert sample["image"].shape == (2, 16, 16, 16)
    assert sample["label"].shape == (1, 16, 16, 16)


def test_the_same_seed_gives_the_same_patch_and_another_seed_another_patch(simple: Any) -> None:
    volume = np.random.default_rng(0).random((20, 20, 20), np.float32)
    item = simple(ct=volume, pet=1 - volume, label=boxes())
    first, again, other = (train(seed=seed)(item)[0] for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in ("image", "label", "presence"))
    assert not torch.equal(first["image"], other["image"])


def test_augmentation_moves_image_and_label_together_and_keeps_the_classes(simple: Any) -> None:
    label = boxes()
    item = simple(ct=(label > 0).astype(np.float32), pet=(label == 2).astype(np.float32), label=label)
    for seed in range(8):
        (sample,) = train(seed=seed)(item)
        assert set(sample["label"].unique().tolist()) <= {0.0, 1.0, 2.0}
        for channel, wanted in zip(sample["image"], (sample["label"][0] > 0, sample["label"][0] == 2), strict=True):
            found = channel > 0.5
            assert 2 * (found & wanted).sum() > 0.85 * (found.sum() + wanted.sum()) > 0


@pytest.mark.parametrize(
    ("flips", "rotation"), [([], [0, 0, 0]), ([0, 2], [0, 0, 0]), ([], [0, 0, 40]), ([], [40, 0, 0])]
)
def test_patches_are_flipped_and_rotated_as_the_task_allows(simple: Any, flips: list[int], rotation: list[int]) -> None:
    """A ramp along each axis in turn: its direction, and whether it stays a ramp along that axis only."""
    for axis in range(3):
        ramp = np.moveaxis(np.broadcast_to(np.linspace(0.1, 0.9, 24, dtype=np.float32), (24, 24, 24)), -1, axis)
        item = simple(ct=ramp.copy(), pet=ramp.copy(), label=boxes(24))
        reversed_, tilted = set(), set()
        for seed in range(12):
            (sample,) = train(seed=seed, flips=flips, rotation=rotation)(item)
            patch = gaussian_filter(sample["image"][0].numpy(), 1)[4:-4, 4:-4, 4:-4]
            change = np.array([np.diff(patch, axis=each).mean() for each in range(3)])
            reversed_.add(bool(change[axis] < 0))
            tilted |= {each for each in range(3) if each != axis and abs(change[each]) > 0.1 * abs(change[axis])}
        assert reversed_ == ({False, True} if axis in flips else {False})
        expected = {each for each in range(3) if each != axis} - {rotation.index(40)} if any(rotation) else set()
        assert tilted == (expected if any(rotation) and rotation[axis] == 0 else set())


def test_the_random_part_is_no_part_of_the_fingerprint() -> None:
    assert train(flips=[], rotation=[0, 0, 5]).fingerprint == train().fingerprint


def test_an_absent_modality_stays_exactly_zero_through_augmentation(simple: Any) -> None:
    item = simple(ct=np.random.default_rng(0).random((20, 20, 20), np.float32), label=boxes())
    for seed in range(8):
        (sample,) = train(seed=seed, allow_missing=True)(item)
        assert sample["presence"].tolist() == [True, False]
        assert (sample["image"][1] == 0).all()
        assert sample["image"].isfinite().all()


def test_an_empty_label_is_accepted_in_training(simple: Any) -> None:
    volume = np.random.default_rng(0).random((20, 20, 20), np.float32)
    (sample,) = train()(simple(ct=volume, pet=volume, label=np.zeros((20, 20, 20), np.uint8)))
    assert (sample["label"] == 0).all()


def test_validation_keeps_the_whole_volume_and_resamples_the_label_onto_it(oblique: Any, world: Any) -> None:
    result = preprocessing(MODALITIES, INTENSITY, (2, 2, 2), "validate", labels=[[0], [1]])(oblique)
    assert set(result) == {"image", "label", "presence", "case_id"}
    label = result["label"]
    assert label.shape[1:] == result["image"].shape[1:]
    np.testing.assert_allclose(label.affine, result["image"].affine)
    ball = np.linalg.norm(world(label.affine, label.shape[1:]) - CENTRE, axis=-1) < 12
    found = label[0].numpy() == 1
    assert 2 * (found & ball).sum() / (found.sum() + ball.sum()) > 0.85  # it was drawn in voxels of 4 to 5 mm


def test_a_slightly_shifted_label_is_resampled_to_its_image(
    tmp_path: Path, simple: Any, write_nifti: Any, make_affine: Any
) -> None:
    item = simple(ct=np.random.default_rng(0).random((20, 20, 20), np.float32))
    shifted = make_affine(np.eye(3), (1, 1, 1), (20, 20, 20), (9.5 + 0.385, 9.5, 9.5))
    item["label"] = str(write_nifti(tmp_path / "label.nii.gz", boxes(), shifted))
    result = whole(item, "validate", labels=[[0], [1], [2]])
    np.testing.assert_array_equal(result["label"][0], boxes())
    np.testing.assert_allclose(result["label"].affine, np.eye(4))


@pytest.fixture(params=["nii.gz", "mha"])
def reference(request: pytest.FixtureRequest, tmp_path: Path, write_nifti: Any, make_affine: Any) -> Path:
    """An oblique LPS image of 1.5 x 1.8 x 4 mm; the NIfTI one is int16 with slope and intercept."""
    axes, shape = GRIDS["ct"][0], (40, 36, 15)
    affine = make_affine(axes, (1.5, 1.8, 4.0), shape, CENTRE + np.array([5, -3, 2]))
    voxels = np.random.default_rng(0).integers(400, 600, shape).astype(np.int16)
    path = tmp_path / f"CT_image.{request.param}"
    if request.param == "nii.gz":
        return write_nifti(path, voxels, affine, slope=2.0, intercept=-1000.0)  # type: ignore[no-any-return]
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing((1.5, 1.8, 4.0))
    image.SetOrigin(LPS @ affine[:3, 3])
    image.SetDirection((LPS @ axes).ravel())
    sitk.WriteImage(image, str(path))
    return path


def in_ball(points: Array) -> Array:
    return np.linalg.norm(points - CENTRE, axis=-1) < 17


def segment_ball(reference: Path, output: Path, world: Any, plain: bool = False, save: bool = True) -> Any:
    """What inference does, with a network that knows the ball of `in_ball` and gives logits of 0 and 20."""
    before = preprocessing(["ct"], {"ct": [-200, 300]}, (2.5, 2.5, 2.5), "infer")
    data = Dataset([{"case_id": "P_7", "image": str(reference)}], before)
    (batch,) = DataLoader(data, batch_size=1)
    ball = torch.as_tensor(in_ball(world(batch["image"][0].affine, batch["image"].shape[2:])))
    logits = batch["image"] * 0 + 20.0 * torch.stack([~ball, ball])[None]
    batch["pred"] = logits.as_tensor() if plain else logits
    after = postprocessing(str(output), save)
    return [after(item) for item in decollate_batch(batch)]


@pytest.mark.parametrize("plain", [False, True])
def test_a_mask_returns_to_the_references_own_grid(reference: Path, tmp_path: Path, world: Any, plain: bool) -> None:
    segment_ball(reference, tmp_path / "masks", world, plain)
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["P_7.nii.gz"]
    written, image = sitk.ReadImage(str(tmp_path / "masks" / "P_7.nii.gz")), sitk.ReadImage(str(reference))
    assert written.GetSize() == image.GetSize()
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(written, get)(), getattr(image, get)(), atol=1e-4)
    mask = sitk.GetArrayFromImage(written).T
    assert mask.dtype == np.uint8
    assert np.unique(mask).tolist() == [0, 1]
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps = np.moveaxis(np.indices(mask.shape), 0, -1) @ axes.T + image.GetOrigin()
    wanted = in_ball(lps * [-1, -1, 1])
    assert 2 * (mask & wanted).sum() / (mask.sum() + wanted.sum()) > 0.95
    saved = nib.Nifti1Image.from_filename(tmp_path / "masks" / "P_7.nii.gz")
    assert (saved.dataobj.slope, saved.dataobj.inter) == (1, 0)
    if reference.suffix == ".gz":
        np.testing.assert_allclose(saved.affine, nib.Nifti1Image.from_filename(reference).affine, atol=1e-4)


def test_without_saving_the_mask_is_only_returned(reference: Path, tmp_path: Path, world: Any) -> None:
    (item,) = segment_ball(reference, tmp_path / "masks", world, save=False)
    assert item["pred"].shape == (1, 40, 36, 15)
    assert not (tmp_path / "masks").exists()


def test_ignored_voxels_stay_so_in_training_and_validation(simple: Any) -> None:
    label = np.zeros((16,) * 3, np.uint8)
    label[4:12, 4:12, 4:12], label[:2] = 1, 7
    item = simple(label=label, ct=boxes(16))
    done = whole(item, "validate", labels=[[0], [1]], ignore=7)["label"]
    assert {int(value): int((done == value).sum()) for value in done.unique()} == {0: 3072, 1: 512, 254: 512}
    pipeline = preprocessing(["ct"], {"ct": [0, 1]}, (1, 1, 1), "train", labels=[[0], [1]], patch=(16,) * 3, ignore=7)
    assert int((pipeline.prepare(item)["label"] == 254).sum()) == 512
    assert float(pipeline(item)[0]["label"].max()) == 254


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "test"}, "Unknown mode 'test'. Choose train, validate or infer"),
        ({"mode": "train", "labels": [[0], [1]]}, "needs a patch size"),
        ({"mode": "train", "patch": (8, 8, 8)}, "needs the label values"),
        ({"mode": "validate"}, "needs the label values"),
        ({"intensity": {"ct": "percentile"}}, r'intensity\["ct"\] is "percentile"'),
        ({"intensity": {"ct": [0, 1, 2]}}, r'intensity\["ct"\] is \[0, 1, 2\]'),
        ({"intensity": {"pet": [0, 1]}}, r"no entry for \['ct'\]"),
    ],
)
def test_invalid_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    settings = {"modalities": ["ct"], "intensity": {"ct": [0, 1]}, "spacing": (1, 1, 1), "mode": "infer", **changed}
    with pytest.raises(ValueError, match=message):
        preprocessing(**settings)


@pytest.mark.parametrize("box", [None, [-40.0, -5.0, 20.0, 10.0, 45.0, 55.0]])
def test_the_grid_from_headers_is_that_of_the_training_volumes(oblique: Any, world: Any, box: Any) -> None:
    case = oblique if box is None else {**oblique, "bbox_mm": box}
    settings: dict[str, Any] = {"intensity": INTENSITY, "spacing": (3.0, 2.5, 3.5), "patch": [40, 8, 21]}
    pipeline = preprocessing(MODALITIES, mode="train", labels=[[0], [1]], **settings)
    affine, shape = pipeline.files.grid(case)
    volume = pipeline.prepare(case)["ct"][0].numpy()
    assert volume.shape == tuple(map(max, shape, settings["patch"])) == tuple(map(max, shape, pipeline.files.patch))
    assert volume.shape != shape  # an axis was padded, as MONAI pads: half before, the rest behind
    before = [(padded - size) // 2 for padded, size in zip(volume.shape, shape, strict=True)]
    volume = volume[tuple(slice(start, start + size) for start, size in zip(before, shape, strict=True))]
    points = world(affine, shape)
    own = nib.load(oblique["ct"]).affine
    voxels = (points - own[:3, 3]) @ np.linalg.inv(own[:3, :3]).T
    inside = ((voxels > 0) & (voxels < np.array(GRIDS["ct"][2]) - 1)).all(-1) & (volume > 0)
    if box is not None:
        lps = points * [-1, -1, 1]
        inside &= ((lps > box[:3]) & (lps < box[3:])).all(-1)
    assert inside.sum() > 500
    np.testing.assert_allclose(volume[inside], plane("ct", points)[inside] / 400, atol=1e-4)
