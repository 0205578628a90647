# SPDX-License-Identifier: Apache-2.0
"""Surface metrics against arithmetic, MONAI, brute force, SimpleITK, and real tumour outlines."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy.ndimage import gaussian_filter

from scripts.metrics import boundary, region_metrics, surface_metrics

STS = Path(os.environ.get("STS_ROOT", Path(__file__).parents[2].parent / "shared" / "data" / "sts"))
SPACING = (0.7, 1.3, 3.1)
DISTANCES = ("hd95_mm", "assd_mm")

needs_sts = pytest.mark.skipif(
    not STS.is_dir(), reason="no STS data: set STS_ROOT to the folder with STS_001, STS_002, ..."
)


def blobs(seed: int, shape: tuple[int, ...] = (18, 16, 14)) -> tuple[np.ndarray, np.ndarray]:
    """Two smooth random masks that overlap in part and touch the border of the volume."""
    rng = np.random.default_rng(seed)
    fields = [gaussian_filter(rng.normal(size=shape), 2.0) for _ in range(3)]
    a, b = fields[0] + 0.7 * fields[1], fields[0] + 0.7 * fields[2]
    return a > np.quantile(a, 0.8), b > np.quantile(b, 0.7)


def cube(shape: tuple[int, ...], start: tuple[int, ...], size: int) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def boundary_by_neighbour_loop(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Mask voxels with a face neighbour that is background or outside of the volume, one voxel at a time."""
    voxels = []
    for voxel in zip(*np.nonzero(mask), strict=True):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            other = [int(v) for v in voxel]
            other[axis] += step
            if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                voxels.append(tuple(int(v) for v in voxel))
                break
    return voxels


def linear_percentile(values: np.ndarray, percent: float) -> float:
    ordered = sorted(values.tolist())
    position = percent / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def brute_force(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """MetricsReloaded's definition in O(n^2): all distances between all boundary voxels."""
    pa, pb = (np.array(boundary_by_neighbour_loop(m)) * np.array(spacing) for m in (a, b))
    table = np.sqrt(((pa[:, None] - pb[None]) ** 2).sum(-1))
    from_a, from_b = table.min(1), table.min(0)
    hd95 = max(linear_percentile(from_a, 95), linear_percentile(from_b, 95))
    return {"hd95_mm": hd95, "assd_mm": (from_a.sum() + from_b.sum()) / (len(pa) + len(pb))}


def monai_metrics(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    p, r = (torch.from_numpy(m)[None, None].float() for m in (a, b))
    hd95 = compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=list(spacing))
    assd = compute_average_surface_distance(p, r, include_background=True, symmetric=True, spacing=list(spacing))
    return {"hd95_mm": float(hd95), "assd_mm": float(assd)}


def sitk_metrics(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """Distance maps of the boundaries instead of point sets; SimpleITK counts axes backwards."""
    sitk = pytest.importorskip("SimpleITK")
    edges, maps = [], []
    for mask in (a, b):
        edge = np.zeros(mask.shape, dtype=np.uint8)
        edge[tuple(np.array(boundary_by_neighbour_loop(mask)).T)] = 1
        image = sitk.GetImageFromArray(edge)
        image.SetSpacing(tuple(reversed(spacing)))
        distance = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
        edges.append(edge > 0)
        maps.append(np.maximum(sitk.GetArrayFromImage(distance), 0))  # negative: deeper inside of a thick boundary
    from_a, from_b = maps[1][edges[0]], maps[0][edges[1]]
    hd95 = max(np.percentile(from_a, 95), np.percentile(from_b, 95))
    return {"hd95_mm": float(hd95), "assd_mm": float(np.concatenate([from_a, from_b]).mean())}


def distances(result: dict) -> dict[str, float]:
    assert result["status"] == "ok"
    return {key: result[key] for key in DISTANCES}


@pytest.mark.parametrize(("axis", "expected"), [(0, 2.8), (1, 5.2), (2, 12.4)])
def test_two_single_voxels_four_apart_are_four_spacings_apart(axis: int, expected: float) -> None:
    a, b = np.zeros((2, 6, 6, 6), dtype=bool)
    where = [1, 1, 1]
    a[tuple(where)] = True
    where[axis] += 4
    b[tuple(where)] = True
    assert surface_metrics(a, b, SPACING) == {
        "dice": 0.0,
        "hd95_mm": pytest.approx(expected),
        "assd_mm": pytest.approx(expected),
        "status": "ok",
    }


def test_two_cubes_shifted_by_one_voxel_follow_from_counting() -> None:
    """Cubes of 3: 26 of 27 voxels are boundary. After a shift by 1 along x, each cube has 9 voxels outside of the other
    at 1 spacing, 1 voxel in the other's centre at 1 face distance (0.7 along x), and 16 on the other's boundary."""
    a, b = cube((8, 8, 8), (2, 2, 2), 3), cube((8, 8, 8), (3, 2, 2), 3)
    result = surface_metrics(a, b, SPACING)
    assert result["dice"] == pytest.approx(2 * 18 / 54)
    assert result["hd95_mm"] == pytest.approx(0.7)
    assert result["assd_mm"] == pytest.approx(10 * 0.7 / 26)


def test_percentile_interpolates_linearly_between_two_distances() -> None:
    """21 prediction voxels in a row, the reference holds the first 20: distances 20 times 0, once 5 mm. Position
    0.95 * 20 = 19 is the last zero. With 11 and 10 voxels position 9.5 lies halfway between 0 and 5."""
    for length, expected in ((21, 0.0), (11, 2.5)):
        p, r = np.zeros((2, length, 1), dtype=bool)
        p[:] = True
        r[: length - 1] = True
        assert surface_metrics(p, r, (5.0, 1.0))["hd95_mm"] == pytest.approx(expected)


def test_assd_pools_both_boundaries_instead_of_averaging_two_means() -> None:
    """One voxel against two at 0 and 2 mm: pooled (0 + 0 + 2) / 3, the mean of the two directed means would be 1/2."""
    p, r = np.zeros((2, 4, 4), dtype=bool)
    p[0, 0] = r[0, 0] = r[2, 0] = True
    assert surface_metrics(p, r, (1.0, 1.0))["assd_mm"] == pytest.approx(2 / 3)


def test_identical_masks_have_dice_one_and_distance_zero() -> None:
    a, _ = blobs(0)
    assert surface_metrics(a, a.copy(), SPACING) == {"dice": 1.0, "hd95_mm": 0.0, "assd_mm": 0.0, "status": "ok"}


def test_swapped_arguments_give_the_same_values() -> None:
    a, b = blobs(1)
    assert surface_metrics(a, b, SPACING) == pytest.approx(surface_metrics(b, a, SPACING))


def test_values_do_not_depend_on_the_volume_around_the_masks() -> None:
    a, b = cube((9, 9, 9), (2, 3, 2), 4), cube((9, 9, 9), (3, 3, 4), 4)
    padded = [np.pad(m, ((5, 0), (1, 9), (3, 3))) for m in (a, b)]
    assert surface_metrics(*padded, SPACING) == pytest.approx(surface_metrics(a, b, SPACING))


def test_distances_scale_with_the_spacing() -> None:
    a, b = blobs(2)
    one, ten = (surface_metrics(a, b, tuple(f * s for s in SPACING)) for f in (1, 10))
    assert ten["hd95_mm"] == pytest.approx(10 * one["hd95_mm"])
    assert ten["assd_mm"] == pytest.approx(10 * one["assd_mm"])
    assert ten["dice"] == one["dice"]


def test_voxels_on_the_border_of_the_volume_are_boundary() -> None:
    """A full 3 x 3 x 3 volume has its centre as the only inner voxel: 26 distances to the centre voxel, 1 back."""
    full, centre = np.ones((3, 3, 3), dtype=bool), cube((3, 3, 3), (1, 1, 1), 1)
    expected = (6 * 1 + 12 * math.sqrt(2) + 8 * math.sqrt(3) + 1) / 27
    assert surface_metrics(full, centre, (1, 1, 1))["assd_mm"] == pytest.approx(expected)


@pytest.mark.parametrize("implementation", [monai_metrics, brute_force, sitk_metrics])
@pytest.mark.parametrize("seed", range(6))
def test_random_blobs_agree_with_a_second_implementation(implementation, seed: int) -> None:
    a, b = blobs(seed)
    assert distances(surface_metrics(a, b, SPACING)) == pytest.approx(implementation(a, b, SPACING), abs=1e-4)


@pytest.mark.parametrize("implementation", [monai_metrics, brute_force])
def test_two_dimensional_masks_agree_with_a_second_implementation(implementation) -> None:
    a, b = blobs(7, (30, 24))
    assert distances(surface_metrics(a, b, SPACING[:2])) == pytest.approx(implementation(a, b, SPACING[:2]), abs=1e-4)


@needs_sts
@pytest.mark.parametrize("case", ["STS_002", "STS_012"])
def test_real_tumour_outlines_of_ct_and_pet_agree_with_every_second_implementation(case: str) -> None:
    """The tumour drawn on CT against the one drawn on PET, resampled onto the CT grid by nearest neighbour."""
    sitk = pytest.importorskip("SimpleITK")
    ct, pet = (sitk.ReadImage(str(STS / case / f"{name}_mask.nii.gz")) for name in ("CT", "PET"))
    pet = sitk.Resample(pet, ct, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    a, b = (sitk.GetArrayFromImage(image) > 0 for image in (pet, ct))
    spacing = tuple(reversed(ct.GetSpacing()))
    result = surface_metrics(a, b, spacing)
    assert 0.8 < result["dice"] < 1
    for implementation in (monai_metrics, brute_force, sitk_metrics):
        assert distances(result) == pytest.approx(implementation(a, b, spacing), abs=1e-4)


@pytest.fixture(params=["tree", "map"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute the distances, one after the other."""
    if request.param == "map":
        pytest.importorskip("edt")
    monkeypatch.setattr(boundary, "map_is_faster", lambda *_: request.param == "map")
    return request.param


def scattered() -> tuple[np.ndarray, np.ndarray]:
    """Four small blobs in the corners of a volume, each with its own shift."""
    a, b = np.zeros((2, 30, 26, 22), dtype=bool)
    for i, corner in enumerate([(1, 1, 1), (22, 2, 3), (3, 19, 15), (24, 20, 16)]):
        a |= cube(a.shape, corner, 3 + i % 2)
        b |= cube(a.shape, tuple(c + (i == k) for k, c in enumerate(corner)), 4)
    return a, b


def far_apart() -> tuple[np.ndarray, np.ndarray]:
    return cube((40, 12, 12), (0, 2, 2), 8), cube((40, 12, 12), (31, 3, 1), 9)


def nested() -> tuple[np.ndarray, np.ndarray]:
    return cube((14, 14, 14), (0, 0, 0), 14), cube((14, 14, 14), (6, 5, 7), 3)


def shell() -> tuple[np.ndarray, np.ndarray]:
    """A hollow cube against a full one: inner surfaces count."""
    hollow = cube((12, 12, 12), (1, 1, 1), 10) & ~cube((12, 12, 12), (3, 3, 3), 5)
    return hollow, cube((12, 12, 12), (1, 1, 1), 10)


def single_voxels() -> tuple[np.ndarray, np.ndarray]:
    return cube((5, 6, 7), (0, 0, 0), 1), cube((5, 6, 7), (4, 5, 6), 1)


FIXTURES = {
    **{f"blobs {seed}": lambda seed=seed: blobs(seed) for seed in range(3)},
    "blobs in 2D": lambda: blobs(7, (30, 24)),
    "one slice": lambda: blobs(8, (1, 20, 18)),
    "a row": lambda: (np.arange(30)[None, :] % 7 < 3, np.arange(30)[None, :] % 5 < 3),
    "scattered": scattered,
    "far apart": far_apart,
    "nested": nested,
    "shell": shell,
    "single voxels": single_voxels,
    "the same": lambda: (blobs(4)[0], blobs(4)[0].copy()),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_tree_and_map_agree_with_brute_force_and_monai(name: str, method: str) -> None:
    a, b = FIXTURES[name]()
    spacing = SPACING[: a.ndim]
    result = surface_metrics(a, b, spacing)
    assert distances(result) == pytest.approx(brute_force(a, b, spacing), abs=1e-4)
    assert distances(result) == pytest.approx(monai_metrics(a, b, spacing), abs=1e-4)
    assert result["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("chunk", [1, 300, 700])
def test_values_do_not_depend_on_the_size_of_a_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = blobs(5)
    whole = surface_metrics(a, b, SPACING)
    monkeypatch.setattr(boundary, "CHUNK", chunk)
    assert surface_metrics(a, b, SPACING) == whole


@pytest.mark.parametrize("seed", range(3))
def test_boundary_and_box_are_those_of_a_loop_over_voxels(seed: int) -> None:
    mask = np.pad(blobs(seed)[0], ((3, 0), (0, 2), (1, 4)))
    box = boundary.bounding_box(mask)
    assert box is not None
    assert all(part.start == hits.min() for part, hits in zip(box, np.nonzero(mask), strict=True))
    assert all(part.stop == hits.max() + 1 for part, hits in zip(box, np.nonzero(mask), strict=True))
    indices, size = boundary.boundary_voxels(mask, box)
    corner = np.array([part.start for part in box]) - [0, 1, 1]  # all axes but the first have a margin
    voxels = np.stack(np.unravel_index(indices, boundary.padded_shape(box)), 1) + corner
    assert sorted(map(tuple, voxels.tolist())) == sorted(boundary_by_neighbour_loop(mask))
    assert size == mask.sum()


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "axes swapped": lambda m: np.ascontiguousarray(m.transpose(1, 2, 0)).transpose(2, 0, 1),
    "every second voxel of a larger array": lambda m: np.repeat(m, 2, axis=2)[:, :, ::2],
    "backwards": lambda m: np.ascontiguousarray(m[::-1, :, ::-1])[::-1, :, ::-1],
    "int64": lambda m: m.astype(np.int64) * 2**40,
    "negative zero": lambda m: np.where(m, 1.0, -0.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_do_not_depend_on_the_layout_in_memory(layout: str, method: str) -> None:
    a, b = blobs(6)
    expected = pytest.approx(distances(surface_metrics(a, b, SPACING)), abs=1e-6)
    for one, other in ((LAYOUTS[layout](a), LAYOUTS[layout](b)), (a, LAYOUTS[layout](b)), (LAYOUTS[layout](a), b)):
        assert distances(surface_metrics(one, other, SPACING)) == expected


def test_a_mask_of_negative_zeros_is_empty() -> None:
    empty, full = np.full((3, 3, 3), -0.0), np.ones((3, 3, 3))
    assert surface_metrics(empty, full, (1, 1, 1))["status"] == "missed"
    assert surface_metrics(full, empty, (1, 1, 1))["status"] == "false_positive"
    undefined = {"dice": None, "hd95_mm": None, "assd_mm": None, "status": "true_negative"}
    assert surface_metrics(empty, empty, (1, 1, 1)) == undefined
    assert surface_metrics(np.zeros((0, 3, 3)), np.zeros((0, 3, 3)), (1, 1, 1)) == undefined


def test_two_workers_give_the_values_of_one(method: str) -> None:
    a, b = blobs(9, (30, 30, 30))
    assert surface_metrics(a, b, SPACING, workers=2) == surface_metrics(a, b, SPACING)


def test_rugged_and_distant_boundaries_take_the_map_compact_and_scattered_ones_the_tree() -> None:
    """Measured numbers of voxels, of boundary voxels of both masks, and their distance in voxels."""
    rugged, distant = (4_251_528, 634_661, 653_942, 0.5), (15_175_336, 78_830, 106_674, 110)
    organ, scattered_lesions = (5_432_416, 78_830, 81_423, 3.2), (20_931_840, 13_771, 14_000, 1)
    small, from_afar_to_a_few = (1_000, 300, 300, 1), (5_056_778, 78_830, 488, 76)
    assert [boundary.map_is_faster(*sizes) for sizes in (rugged, distant)] == [True, True]
    assert [boundary.map_is_faster(*sizes) for sizes in (organ, scattered_lesions)] == [False, False]
    assert [boundary.map_is_faster(*sizes) for sizes in (small, from_afar_to_a_few)] == [False, False]


def test_without_edt_the_tree_computes_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "map_is_faster", lambda *_: True)
    monkeypatch.setattr(boundary, "import_edt", lambda: None)
    a, b = blobs(1)
    assert distances(surface_metrics(a, b, SPACING)) == pytest.approx(brute_force(a, b, SPACING), abs=1e-9)


@needs_sts
def test_tree_and_map_equal_monai_on_real_masks_against_shifted_copies(method: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    paths = sorted(STS.glob("*/*_mask.nii.gz"))[::19]
    assert paths
    for path in paths:
        image = nibabel.load(path)
        a = np.asanyarray(image.dataobj) > 0
        b = np.roll(a, (2, -1, 1), axis=(0, 1, 2))
        spacing = tuple(float(step) for step in image.header.get_zooms()[:3])
        assert distances(surface_metrics(a, b, spacing)) == pytest.approx(monai_metrics(a, b, spacing), abs=1e-4), path


BRATS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}


def nested_regions(seed: int) -> np.ndarray:
    """A mask with the values 0, 1, 2 and 4, which lie within each other and touch the border of the volume."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(18, 16, 14)), 2.0)
    inner = np.searchsorted(np.quantile(field, [0.6, 0.75, 0.9]), field)
    return np.array([0, 2, 1, 4], np.uint8)[inner]


@pytest.mark.parametrize("seed", range(4))
def test_regions_of_one_pass_equal_each_region_alone(seed: int) -> None:
    """Every number is the same to the last bit, whatever the layout and the type of the masks."""
    p, r = nested_regions(seed), nested_regions(seed + 10)
    assert any(p.any(axis=(1, 2))[[0, -1]])  # it touches the border
    expected = {name: surface_metrics(np.isin(p, v), np.isin(r, v), SPACING) for name, v in BRATS.items()}
    assert {each["status"] for each in expected.values()} == {"ok"}
    assert region_metrics(p, r, BRATS, SPACING) == expected
    assert region_metrics(torch.from_numpy(p), r.astype(np.float32), BRATS, SPACING) == expected
    fortran = [np.asfortranarray(mask) for mask in (p, r)]
    alone = {name: surface_metrics(*(m >= v for m in fortran), SPACING) for name, v in {"WT": 1, "ET": 4}.items()}
    assert {name: region_metrics(*fortran, BRATS, SPACING)[name] for name in alone} == alone


def test_regions_agree_with_monai() -> None:
    p, r = nested_regions(0), nested_regions(10)
    for name, result in region_metrics(p, r, BRATS, SPACING).items():
        monai = monai_metrics(*(np.isin(mask, BRATS[name]) for mask in (p, r)), SPACING)
        assert distances(result) == pytest.approx(monai, rel=1e-5), name


def test_each_region_has_its_own_status() -> None:
    p, r = np.zeros((2, 6, 6, 6), np.uint8)
    r[1:4, 1:4, 1:4] = 2  # only the whole tumour has voxels
    result = region_metrics(p, r, BRATS, SPACING)
    assert [result[name]["status"] for name in BRATS] == ["missed", "true_negative", "true_negative"]
    p[r > 0] = 4
    result = region_metrics(p, r, BRATS, SPACING)
    assert [result[name]["status"] for name in BRATS] == ["ok", "false_positive", "false_positive"]
    assert result["WT"]["dice"] == 1.0
    empty = np.zeros_like(p)
    assert {each["status"] for each in region_metrics(empty, empty, BRATS, SPACING).values()} == {"true_negative"}


def test_a_region_with_the_background_is_refused() -> None:
    mask = np.zeros((3, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="The region all has the value 0"):
        region_metrics(mask, mask, {"all": [0, 1]}, SPACING)
