# SPDX-License-Identifier: Apache-2.0
"""Measures of lesions against arithmetic on phantoms, closed forms, SimpleITK and pyradiomics."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.integrate import quad
from scipy.ndimage import gaussian_filter

from scripts.metrics import lesion_uptake
from scripts.metrics.lesion_measures import COLUMNS, Measures, measure_mask, measure_rows, read_measures, write_measures
from scripts.metrics.lesion_shape import Volume
from scripts.metrics.lesion_uptake import PEAK_RADIUS_MM, sphere_means, sphere_weights

REGION = {"tumour": [1]}


def scaled(*spacing: float, origin: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def rotated(affine: np.ndarray, degrees: tuple[float, float, float]) -> np.ndarray:
    turn = np.eye(4)
    transform = sitk.Euler3DTransform()
    transform.SetRotation(*np.deg2rad(degrees).tolist())
    turn[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    return turn @ affine


def box(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = 1
    return mask


def ball(shape: tuple[int, ...], affine: np.ndarray, centre_mm: tuple[float, ...], radius_mm: float) -> np.ndarray:
    points = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    return (((points - centre_mm) ** 2).sum(-1) <= radius_mm**2).astype(np.uint8)


def one(measured: list[Measures]) -> dict[str, float | None]:
    """The measures of the only lesion, which are those of the region."""
    assert [each.lesion for each in measured] == [None, 1]
    assert measured[0].values() == pytest.approx(measured[1].values())
    return measured[1].values()


def test_a_box_has_the_measures_of_arithmetic():
    mask = Volume(box((20, 16, 12), (3, 4, 5), (10, 4, 2)), scaled(2.0, 3.0, 5.0, origin=(-7.0, 11.0, 100.0)))
    found = one(measure_mask(mask, REGION))
    assert found["volume_ml"] == pytest.approx(10 * 4 * 2 * 30 / 1000)
    # From the middle of a voxel's face at one end of the longest side to the same at the opposite corner.
    assert found["axial_diameter_mm"] == pytest.approx(math.hypot(10 * 2, 3 * 3))
    assert found["diameter_mm"] == pytest.approx(math.hypot(10 * 2, 3 * 3, 1 * 5))
    assert found["centroid_x_mm"] == pytest.approx(-7 + 2 * (3 + 4.5))
    assert found["centroid_y_mm"] == pytest.approx(11 + 3 * (4 + 1.5))
    assert found["centroid_z_mm"] == pytest.approx(100 + 5 * (5 + 0.5))
    assert (found["suvmax"], found["suvpeak"], found["mtv_ml"], found["tlg_g"]) == (None,) * 4


def test_a_single_voxel_has_its_own_size():
    found = one(measure_mask(Volume(box((5, 5, 5), (0, 2, 4), (1, 1, 1)), scaled(1.5, 2.0, 4.0)), REGION))
    assert found["volume_ml"] == pytest.approx(0.012)
    assert (found["axial_diameter_mm"], found["diameter_mm"]) == (2.0, 4.0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.0)])
def test_a_sphere_has_its_volume_and_diameter_to_one_percent(spacing: tuple[float, ...]):
    affine, radius = scaled(*spacing), 50.3
    shape = tuple(int(110 / each) for each in spacing)
    found = one(measure_mask(Volume(ball(shape, affine, (54.7, 55.2, 55.4), radius), affine), REGION))
    assert found["volume_ml"] == pytest.approx(4 / 3 * math.pi * radius**3 / 1000, rel=0.01)
    assert found["axial_diameter_mm"] == pytest.approx(2 * radius, rel=0.01)
    assert 2 * radius - 0.5 < found["diameter_mm"] < 2 * radius + max(spacing)
    assert found["centroid_z_mm"] == pytest.approx(55.4, abs=0.05)


def test_measures_do_not_depend_on_how_the_grid_lies():
    rng = np.random.default_rng(3)
    voxels = (gaussian_filter(rng.normal(size=(22, 18, 14)), 2.5) > 0.03).astype(np.uint8)
    affine = scaled(1.1, 1.7, 2.9, origin=(5, -3, 8))
    straight = measure_mask(Volume(voxels, affine), REGION)
    for turned in (rotated(affine, (20, -15, 35)), affine @ np.diag([-1.0, -1, 1, 1])):
        for before, after in zip(straight, measure_mask(Volume(voxels, turned), REGION), strict=True):
            for name in ("volume_ml", "axial_diameter_mm", "diameter_mm"):
                assert after.values()[name] == pytest.approx(before.values()[name])
            back = np.linalg.inv(affine) @ np.array([*before.centroid, 1])
            np.testing.assert_allclose((turned @ back)[:3], after.centroid, atol=1e-9)


def test_axial_slices_lie_across_the_feet_to_head_axis_of_any_array():
    """A rod of 30 mm along the head-feet axis, 4 mm x 6 mm in axial slices, stored as a sagittal series."""
    voxels = box((12, 12, 40), (2, 3, 4), (4, 6, 30)).transpose(2, 1, 0)  # head-feet, front-back, left-right
    affine = np.eye(4)[[2, 1, 0, 3]]
    found = one(measure_mask(Volume(voxels, affine), REGION))
    assert found["axial_diameter_mm"] == pytest.approx(math.hypot(6, 3))
    assert found["diameter_mm"] == pytest.approx(math.hypot(30, 5, 3))


def test_corners_connect_and_lesions_are_numbered_by_size():
    mask = np.zeros((20, 20, 20), dtype=np.uint8)
    mask[1, 1, 1] = 1
    mask[10:13, 10:13, 10:13] = 1
    mask[13, 13, 13] = 1  # touches the cube by a corner
    mask[17:19, 17, 17] = 1
    measured = measure_mask(Volume(mask, scaled(1, 1, 1)), REGION)
    assert [each.lesion for each in measured] == [None, 1, 2, 3]
    np.testing.assert_allclose([each.volume_ml for each in measured], [0.031, 0.028, 0.002, 0.001])
    components = sitk.ConnectedComponent(sitk.GetImageFromArray(mask), True)  # fully connected
    assert sitk.GetArrayFromImage(components).max() == 3
    assert measured[0].diameter_mm == max(each.diameter_mm for each in measured[1:])
    np.testing.assert_allclose(measured[0].centroid, np.argwhere(mask).mean(axis=0))


def test_regions_may_overlap_and_an_empty_one_has_a_row():
    mask = np.zeros((10, 10, 10), dtype=np.int16)
    mask[1:7, 1:7, 1:7] = 2
    mask[3:5, 3:5, 3:5] = 4
    regions = {"whole": [2, 4], "core": [4], "cyst": [9]}
    measured = measure_mask(Volume(mask, scaled(1, 1, 1)), regions, Volume(np.ones((10, 10, 10)), scaled(1, 1, 1)))
    rows = measure_rows("P1", measured)
    assert [(row["region"], row["lesion"]) for row in rows] == [
        *(("whole", "all"), ("whole", "1"), ("core", "all"), ("core", "1"), ("cyst", "all"))
    ]
    assert [row["volume_ml"] for row in rows] == pytest.approx([0.216, 0.216, 0.008, 0.008, 0.0])
    assert [rows[-1][name] for name in ("diameter_mm", "centroid_x_mm", "suvmax")] == [None] * 3
    assert (rows[-1]["mtv_ml"], rows[-1]["tlg_g"]) == (0, 0)


def test_uptake_is_that_of_the_pet_voxels_whose_centres_lie_in_the_lesion():
    """A mask of 1 mm voxels on a PET of 4 mm voxels: 3 x 2 x 2 of them, with SUV 1 to 12."""
    pet = Volume(np.zeros((10, 10, 10), dtype=np.float32), scaled(4, 4, 4, origin=(1.5, 1.5, 1.5)))
    values = np.arange(1, 13, dtype=np.float32).reshape(3, 2, 2)
    pet.voxels[2:5, 3:5, 4:6] = values
    mask = Volume(box((40, 40, 40), (8, 12, 16), (12, 8, 8)), scaled(1, 1, 1))
    found = one(measure_mask(mask, REGION, pet))
    assert (found["suvmax"], found["suvmean"]) == pytest.approx((12, 6.5))
    assert found["mtv_ml"] == pytest.approx(12 * 0.064)
    assert found["volume_ml"] == pytest.approx(12 * 0.064)
    assert found["tlg_g"] == pytest.approx(6.5 * 12 * 0.064)
    on_grid = sitk.Resample(as_image(mask), as_image(pet), sitk.Transform(), sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(on_grid).T > 0, pet.voxels > 0)


def test_uptake_does_not_depend_on_how_both_grids_lie():
    rng = np.random.default_rng(8)
    pet = Volume(gaussian_filter(rng.random((30, 28, 26)), 1.5) * 10, scaled(3, 3, 3.3, origin=(-40, -42, -44)))
    mask = Volume(ball((90, 90, 50), scaled(1, 1, 2), (45, 44, 50), 21), scaled(1, 1, 2, origin=(-45, -45, -50)))
    straight = one(measure_mask(mask, REGION, pet))
    turned = (each._replace(affine=rotated(each.affine, (25, 10, -40))) for each in (mask, pet))
    after = one(measure_mask(next(turned), REGION, next(turned)))
    assert [after[name] for name in ("suvmax", "suvmean", "suvpeak", "mtv_ml", "tlg_g")] == pytest.approx(
        [straight[name] for name in ("suvmax", "suvmean", "suvpeak", "mtv_ml", "tlg_g")], rel=1e-3
    )
    image = sitk.Resample(as_image(mask), as_image(pet), sitk.Transform(), sitk.sitkNearestNeighbor)
    statistics = sitk.LabelIntensityStatisticsImageFilter()
    statistics.Execute(image, as_image(pet))
    assert straight["suvmean"] == pytest.approx(statistics.GetMean(1))
    assert straight["suvmax"] == pytest.approx(statistics.GetMaximum(1))
    assert straight["mtv_ml"] == pytest.approx(statistics.GetPhysicalSize(1) / 1000)


def test_a_lesion_between_the_centres_of_pet_voxels_gets_the_voxel_around_it():
    pet = Volume(np.arange(64, dtype=float).reshape(4, 4, 4), scaled(8, 8, 8))
    mask = np.zeros((24, 24, 24), dtype=np.uint8)
    mask[10, 10, 10] = mask[13, 13, 13] = 1  # both in the PET's voxel 1, 1, 1 or 2, 2, 2, whose centres are 8 and 16
    measured = measure_mask(Volume(mask, scaled(1, 1, 1)), REGION, pet)
    assert [each.uptake.suvmax for each in measured[1:]] == [21, 42]
    assert [each.uptake.mtv_ml for each in measured] == pytest.approx([1.024, 0.512, 0.512])
    assert measured[0].uptake.suvmean == 31.5


def test_a_lesion_outside_of_the_pet_has_no_uptake():
    mask = box((30, 10, 10), (2, 2, 2), (3, 3, 3)) + box((30, 10, 10), (20, 2, 2), (5, 5, 5))
    measured = measure_mask(Volume(mask, scaled(1, 1, 1)), REGION, Volume(np.full((9, 9, 9), 2.0), scaled(1, 1, 1)))
    assert [each.uptake is None for each in measured] == [False, True, False]
    assert measured[0].uptake == measured[2].uptake
    assert measured[0].volume_ml == pytest.approx(0.152)


@pytest.mark.parametrize(
    ("spacing", "sigma"),
    [((1.0, 1.0, 1.0), 6.0), ((2.0, 2.0, 2.0), 8.0), ((2.0, 2.0, 3.0), 10.0), ((4.0, 4.0, 4.0), 14.0)],
)
def test_suvpeak_of_a_gaussian_blob_is_that_of_the_integral(spacing: tuple[float, ...], sigma: float):
    """Its mean over a sphere around its centre, which is that of a voxel; each voxel holds the value at its centre."""
    shape = tuple(2 * int(40 / each) + 1 for each in spacing)
    affine = scaled(*spacing, origin=tuple(-(n // 2) * s for n, s in zip(shape, spacing, strict=True)))
    points = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    pet = Volume(8 * np.exp(-(points**2).sum(-1) / (2 * sigma**2)), affine)
    mask = Volume(ball(shape, affine, (0, 0, 0), 15), affine)
    shells = quad(lambda r: 8 * math.exp(-(r**2) / (2 * sigma**2)) * 4 * math.pi * r**2, 0, PEAK_RADIUS_MM)[0]
    assert one(measure_mask(mask, REGION, pet))["suvpeak"] == pytest.approx(shells / 1000, rel=0.01)


def test_suvpeak_looks_for_the_hottest_sphere_and_not_for_the_hottest_voxel():
    pet = Volume(np.ones((40, 40, 40)), scaled(2, 2, 2))
    pet.voxels[5, 5, 5] = 30  # one voxel: 0.008 ml of a sphere of 1 ml
    pet.voxels[22:35, 22:35, 22:35] = 10
    found = one(measure_mask(Volume(np.ones((40, 40, 40), dtype=np.uint8), scaled(2, 2, 2)), REGION, pet))
    assert (found["suvmax"], found["suvpeak"]) == pytest.approx((30, 10))


def test_suvpeak_at_the_edge_of_the_image_is_the_mean_of_what_lies_within():
    pet = Volume(np.full((12, 12, 3), 5.0), scaled(2, 2, 2))
    assert one(measure_mask(Volume(box((12, 12, 3), (0, 0, 0), (2, 2, 1)), scaled(2, 2, 2)), REGION, pet))[
        "suvpeak"
    ] == pytest.approx(5)


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 0.9), (2.0, 2.0, 3.0), (5.5, 5.5, 3.3), (20.0, 20.0, 20.0)])
def test_the_sphere_has_one_millilitre_and_border_voxels_count_in_part(spacing: tuple[float, ...]):
    affine = rotated(scaled(*spacing), (10, 20, 30))
    weights = sphere_weights(affine)
    assert weights.sum() * np.prod(spacing) == pytest.approx(1000, rel=0.01)
    np.testing.assert_allclose(weights, weights[::-1, ::-1, ::-1])
    assert ((weights > 0) & (weights < 1)).any()


def test_the_table_is_read_back_with_the_same_columns(tmp_path: Path):
    mask = np.zeros((10, 10, 10), dtype=np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    rows = measure_rows("P,1", measure_mask(Volume(mask, scaled(1.23456789, 1, 1)), {**REGION, "cyst": [2]}))
    write_measures(rows, tmp_path / "measures.csv")
    back = read_measures(tmp_path / "measures.csv")
    assert (tmp_path / "measures.csv").read_text().splitlines()[0] == (
        "case_id,region,lesion,volume_ml,axial_diameter_mm,diameter_mm,suvmax,suvmean,suvpeak,mtv_ml,tlg_g,"
        "centroid_x_mm,centroid_y_mm,centroid_z_mm,centroid_space"
    )
    assert [list(row) for row in back] == [list(COLUMNS)] * 3
    for row, expected in zip(back, rows, strict=True):
        assert {key: row[key] for key in ("case_id", "region", "lesion", "centroid_space")} == {
            key: expected[key] for key in ("case_id", "region", "lesion", "centroid_space")
        }
        assert row["volume_ml"] == pytest.approx(expected["volume_ml"], rel=1e-5)
        assert row["suvpeak"] is None
    assert [row["centroid_space"] for row in back] == ["RAS", "RAS", ""]
    (tmp_path / "measures.csv").write_text("case_id,region\nP1,tumour\n")
    with pytest.raises(ValueError, match=r"measures\.csv is no table of measures"):
        read_measures(tmp_path / "measures.csv")


def test_a_large_mask_is_measured_within_seconds():
    """Less than 0.2 s on an idle core; the limit only catches a measure of all pairs of voxels."""
    affine = scaled(1, 1, 1)
    mask = Volume(ball((256, 256, 192), affine, (128, 120, 96), 30), affine)
    pet = Volume(np.ones((128, 128, 96), dtype=np.float32), scaled(2, 2, 2))
    start = time.perf_counter()
    one(measure_mask(mask, REGION, pet))
    assert time.perf_counter() - start < 5


def as_image(volume: Volume) -> Any:
    """The volume in SimpleITK; its world is taken for LPS here, which does not matter to distances."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.voxels.T))
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection((volume.affine[:3, :3] / spacing).ravel().tolist())
    return image


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_measures_are_those_of_pyradiomics_to_one_percent(seed: int):
    """Shape on the mask's grid, first order statistics on the grid of the PET."""
    reason = "pyradiomics is not installed: pip install pyradiomics, into an environment with numpy 1"
    shape = pytest.importorskip("radiomics.shape", reason=reason)
    shape_2d = pytest.importorskip("radiomics.shape2D", reason=reason)
    first_order = pytest.importorskip("radiomics.firstorder", reason=reason)
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(36, 32, 20)), (4, 4, 2))
    largest = sitk.RelabelComponent(
        sitk.ConnectedComponent(sitk.GetImageFromArray((smooth > np.quantile(smooth, 0.85)).astype(np.uint8)), True)
    )
    mask = Volume((sitk.GetArrayFromImage(largest) == 1).astype(np.uint8), scaled(1.2, 1.2, 2.5, origin=(4, 5, 6)))
    pet = Volume(gaussian_filter(rng.random((40, 36, 50)), 1.0) * 12, scaled(1.2, 1.2, 1.2, origin=(2, 2, 4)))
    found = one(measure_mask(mask, REGION, pet))
    features = shape.RadiomicsShape(as_image(mask), as_image(mask))
    assert found["volume_ml"] == pytest.approx(features.getVoxelVolumeFeatureValue() / 1000, rel=0.01)
    assert found["diameter_mm"] == pytest.approx(features.getMaximum3DDiameterFeatureValue(), rel=0.01)
    slices = [
        as_image(mask)[:, :, index : index + 1] for index in np.flatnonzero(mask.voxels.any(axis=(0, 1))).tolist()
    ]
    axial = [
        shape_2d.RadiomicsShape2D(each, each, force2D=True, force2Ddimension=0).getMaximumDiameterFeatureValue()
        for each in slices
    ]
    assert found["axial_diameter_mm"] == pytest.approx(max(axial), rel=0.01)
    on_pet = sitk.Resample(as_image(mask), as_image(pet), sitk.Transform(), sitk.sitkNearestNeighbor)
    statistics = first_order.RadiomicsFirstOrder(as_image(pet), on_pet)
    statistics._initCalculation()
    assert found["suvmax"] == pytest.approx(statistics.getMaximumFeatureValue().item(), rel=0.01)
    assert found["suvmean"] == pytest.approx(statistics.getMeanFeatureValue().item(), rel=0.01)
    on_grid = shape.RadiomicsShape(on_pet, on_pet)
    assert found["mtv_ml"] == pytest.approx(on_grid.getVoxelVolumeFeatureValue() / 1000, rel=0.01)


def test_the_means_do_not_depend_on_how_many_are_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large lesions are taken in blocks, so that they need little memory."""
    rng = np.random.default_rng(4)
    pet = Volume(rng.random((23, 17, 19)), np.diag([2.0, 3.0, 2.5, 1.0]))
    voxels = np.flatnonzero(rng.random(pet.voxels.shape) < 0.3)
    sphere = sphere_weights(pet.affine)
    whole = sphere_means(pet, voxels, sphere)
    for block in (1, 700, 3000):
        monkeypatch.setattr(lesion_uptake, "BLOCK_VOXELS", block)
        np.testing.assert_allclose(sphere_means(pet, voxels, sphere), whole, rtol=1e-9)
