# SPDX-License-Identifier: Apache-2.0
"""The phantom is reproducible and plausible, and no single modality delineates its lesion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

from scripts.data.case_list import datalist
from scripts.data.cohorts.phantom import make_case, write_phantoms

Array = NDArray[Any]
Case = dict[str, tuple[Array, Array, Array]]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [make_case(seed=0, index=index) for index in (1, 2, 3)]


def on_ct_grid(case: Case, modality: str) -> Array:
    voxels, _, affine = case[modality]
    shape = case["ct"][0].shape
    matrix = np.linalg.inv(affine) @ case["ct"][2]
    index = matrix[:3, :3] @ np.indices(shape).reshape(3, -1) + matrix[:3, 3:]
    return map_coordinates(voxels.astype(float), index, order=1, cval=0.0).reshape(shape)


def best_interval(values: Array, lesion: Array, taken: Array | None = None) -> float:
    """Dice of the best rule "taken, or low <= value < high", the interval chosen with the lesion known: an oracle."""
    taken = np.zeros_like(lesion) if taken is None else taken
    rest, wanted = values[~taken], lesion[~taken]
    levels = np.linspace(0, 1, 60)
    edges = np.unique([rest.min(), *np.quantile(rest[wanted], levels), rest.max()]) if wanted.any() else [0.0, 1.0]
    hits = np.append(0, np.cumsum(np.histogram(rest[wanted], edges)[0]))
    all_ = np.append(0, np.cumsum(np.histogram(rest, edges)[0]))
    true = (lesion & taken).sum() + np.maximum(hits - hits[:, None], 0)
    size = taken.sum() + np.maximum(all_ - all_[:, None], 0)
    return float((2 * true / (lesion.sum() + size)).max())


def best_union(pet: Array, mr: Array, lesion: Array) -> float:
    """Dice of the best rule "PET above a threshold, or MR inside an interval"."""
    return max(best_interval(mr, lesion, taken=pet > threshold) for threshold in np.linspace(1.5, 5, 8))


def test_a_case_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    for folder, number, seed in (("two", 2, 0), ("one", 1, 0), ("other", 1, 1)):
        write_phantoms(tmp_path / folder, cases=number, seed=seed, progress=False)
    names = sorted(path.name for path in (tmp_path / "one" / "PHANTOM_001").iterdir())
    assert names == [f"{m}_{kind}.nii.gz" for m in ("CT", "MR_T1", "PET") for kind in ("image", "mask")]
    for name in names:
        two, one, other = (
            nib.Nifti1Image.from_filename(tmp_path / f / "PHANTOM_001" / name) for f in ("two", "one", "other")
        )
        assert np.asarray(two.dataobj).tobytes() == np.asarray(one.dataobj).tobytes()
        assert np.array_equal(two.affine, one.affine)
        assert not np.array_equal(one.affine, other.affine)


def test_the_files_are_read_in_the_layout_and_types_of_the_real_data(tmp_path: Path) -> None:
    (item,) = write_phantoms(tmp_path, cases=1, progress=False)
    assert [item] == datalist("phantom", tmp_path)
    assert item["image"] == item["ct"]
    assert item["label"].endswith("CT_mask.nii.gz")
    types = {key: nib.Nifti1Image.from_filename(item[key]).get_data_dtype() for key in ("ct", "pet", "mr", "label")}
    assert types == {"ct": np.int16, "pet": np.float32, "mr": np.int16, "label": np.uint8}
    for key in ("ct", "pet", "mr"):
        image = nib.Nifti1Image.from_filename(item[key])
        assert np.allclose(image.get_sform(), image.get_qform(), atol=1e-3)
        assert min(image.header["sform_code"], image.header["qform_code"]) > 0


def test_an_interrupted_folder_is_completed_and_a_complete_one_is_kept(tmp_path: Path) -> None:
    write_phantoms(tmp_path, cases=2, progress=False)
    kept, lost = (tmp_path / "PHANTOM_001" / "CT_image.nii.gz", tmp_path / "PHANTOM_002" / "PET_image.nii.gz")
    before, content = kept.stat().st_mtime_ns, np.asarray(nib.Nifti1Image.from_filename(lost).dataobj)
    lost.unlink()
    assert len(write_phantoms(tmp_path, cases=2, progress=False)) == 2
    assert kept.stat().st_mtime_ns == before
    assert np.array_equal(np.asarray(nib.Nifti1Image.from_filename(lost).dataobj), content)
    assert not list(tmp_path.rglob(".*"))


def test_other_phantoms_in_the_folder_are_refused(tmp_path: Path) -> None:
    write_phantoms(tmp_path, cases=1, progress=False)
    with pytest.raises(FileExistsError, match=r'"seed": 0.*"seed": 5.*Choose another folder'):
        write_phantoms(tmp_path, cases=1, seed=5, progress=False)
    (tmp_path / "phantom.json").unlink()
    with pytest.raises(FileExistsError, match="unknown parameters"):
        write_phantoms(tmp_path, cases=1, progress=False)


@pytest.mark.parametrize(("number", "seed"), [(0, 0), (1000, 0), (1, -1)])
def test_impossible_parameters_are_refused(number: int, seed: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="numbers from 1 to 999"):
        write_phantoms(tmp_path / "new", cases=number, seed=seed)
    assert not (tmp_path / "new").exists()


def test_the_modalities_lie_on_different_grids(cases: list[Case]) -> None:
    for case in cases:
        spacing = {m: np.linalg.norm(affine[:3, :3], axis=0) for m, (_, _, affine) in case.items()}
        extent = {m: spacing[m] * case[m][0].shape for m in case}
        assert spacing["mr"][0] < spacing["ct"][0] < spacing["pet"][0]
        assert np.all(extent["mr"] < extent["ct"])
        for modality in ("ct", "pet"):  # LPS axes are negative in NIfTI's RAS frame
            assert np.array_equal(np.sign(case[modality][2][:3, :3]), np.diag([-1, -1, 1]))
        axes = case["mr"][2][:3, :3] / spacing["mr"] * [[-1], [-1], [1]]
        tilt = np.degrees(np.arccos((np.trace(axes) - 1) / 2))
        assert 3 <= tilt <= 6


def test_grids_differ_between_cases(cases: list[Case]) -> None:
    for modality in ("ct", "pet", "mr"):
        assert len({(case[modality][0].shape, case[modality][2].tobytes()) for case in cases}) == 3


def test_values_are_plausible(cases: list[Case]) -> None:
    for case in cases:
        ct, pet, mr = (case[modality][0] for modality in ("ct", "pet", "mr"))
        assert abs(np.median(ct[:2, :2]) + 1000) < 10
        assert 700 < ct.max() < 2000
        assert pet.min() >= 0
        assert 3 < pet.max() < 20
        assert mr.min() >= 0
        assert 800 < mr.max() < 3000


def test_the_lesion_has_5_to_60_ml_on_every_grid(cases: list[Case]) -> None:
    for case in cases:
        ml = [mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000 for _, mask, affine in case.values()]
        assert 5 < min(ml) < max(ml) < 60
        assert max(ml) / min(ml) < 1.1


def test_each_modality_shows_a_part_of_the_lesion_that_the_others_do_not(cases: list[Case]) -> None:
    for case in cases:
        lesion, ct = case["ct"][1] > 0, gaussian_filter(case["ct"][0].astype(float), 0.5)
        pet, mr = on_ct_grid(case, "pet"), on_ct_grid(case, "mr")
        peak = np.quantile(pet[lesion], 0.95)
        assert peak > 3
        hot, dense = lesion & (pet > peak / 2), lesion & (ct > 150)  # HU, between 240 and the 50 of its surroundings
        bright = lesion & ~hot & ~dense & (mr > 700)
        parts = {"hot": hot, "dense": dense, "bright": bright}
        share = {name: part.sum() / lesion.sum() for name, part in parts.items()}
        assert share["hot"] > 0.3
        assert share["dense"] > 0.1
        assert share["bright"] > 0.2
        assert (hot & dense).sum() < 0.05 * lesion.sum()
        assert (hot | dense | bright).sum() > 0.8 * lesion.sum()
        assert np.median(pet[dense]) < peak / 4
        assert np.median(pet[bright]) < peak / 3
        assert np.median(mr[bright]) > 1.6 * max(np.median(mr[hot]), np.median(mr[dense]))
        assert abs(np.median(ct[bright]) - np.median(ct[hot])) < 20  # HU, about the noise


def test_no_single_modality_delineates_the_lesion(cases: list[Case]) -> None:
    for case in cases:
        smooth = gaussian_filter(case["ct"][0].astype(float), 1)
        lesion = case["ct"][1] > 0
        body = (smooth > -300) | lesion
        pet, mr = on_ct_grid(case, "pet")[body], on_ct_grid(case, "mr")[body]
        alone = {"ct": best_interval(smooth[body], lesion[body]), "pet": best_interval(pet, lesion[body])}
        alone["mr"] = best_interval(mr, lesion[body])
        assert alone["ct"] < 0.3
        assert alone["pet"] < 0.67
        assert alone["mr"] < 0.4
        assert best_union(pet, mr, lesion[body]) > max(alone.values()) + 0.04


def test_phantoms_for_a_test_may_have_numbers_of_their_own(tmp_path: Path) -> None:
    cases = write_phantoms(tmp_path, cases=2, seed=1, progress=False, first=101)
    assert [case["case_id"] for case in cases] == ["PHANTOM_101", "PHANTOM_102"]
    with pytest.raises(FileExistsError):
        write_phantoms(tmp_path, cases=2, seed=1, progress=False)
    with pytest.raises(ValueError, match="numbers from 1 to 999"):
        write_phantoms(tmp_path, cases=2, first=999)
