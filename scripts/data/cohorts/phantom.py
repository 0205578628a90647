# SPDX-License-Identifier: Apache-2.0
"""A synthetic limb in CT, PET and MR, in the layout of `scripts.data.cohorts.sts`, for demonstrations and tests.

A case is an analytical scene: a function of world coordinates in mm, sampled at the voxel centres of three different
grids: CT about 64 x 64 x 48 voxels of 3 x 3 x 4 mm; PET coarser (4.7 x 4.7 x 4 mm); MR finer
(2.6 x 2.6 x 4 mm) with a smaller field of view, rotated by 3 to 6 degrees. CT and PET axes are LPS, as from DICOM.

Anatomy: an elliptic limb with a fat rim, muscle with fatty septa, one or two bones, an artery and a vein, air outside.
Each modality shows one part of the lesion (5 to 60 ml, off centre; values in `SIGNALS`), and none delineates it:
- PET: the *active* part is hot; it has the signal of muscle in MR and nearly that of muscle in CT;
- MR: the *core*, a necrotic lobe, is bright; it is cold in PET, and in CT 17 HU below muscle, less than the noise;
- CT: the *calcified* end of the core is dense; it is cold in PET and dark in MR.

Three structures are not lesion: bone, denser than the calcified part but as dense at its edge; *urine*, as hot as the
active part, but denser in CT (contrast medium); and a *cyst*, as bright in MR as the core, but of water density in CT
and isolated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from scripts.data.case_list import Item
from scripts.data.cohorts.sts import MODALITIES, image_name, mask_name, read_layout
from scripts.image_io.headers import LPS_TO_RAS
from scripts.image_io.nifti import write_nifti
from scripts.utils.atomic_files import write_text

Array = NDArray[Any]
Shape = Callable[[Array], Array]  # points (3 x N, mm) -> signed distance to the surface (mm, negative inside)

SIGNALS = {  # per tissue: CT in HU, PET in SUV (g/mL), MR in arbitrary units before gain and bias field
    "air": (-1000, 0.0, 0),
    "fat": (-100, 0.25, 700),
    "muscle": (55, 0.7, 400),
    "cortex": (1000, 0.5, 60),
    "marrow": (120, 0.9, 620),
    "vessel": (150, 1.6, 130),
    "urine": (130, 6.5, 400),
    "cyst": (8, 0.4, 1100),
    "core": (38, 0.45, 1100),
    "calcified": (240, 0.45, 130),
    "active": (48, 6.5, 410),
}
HOT_SUV = (4.5, 8.5)  # drawn per case for the active part and, independently, for urine
NOISE_CT = 18.0  # HU, standard deviation
NOISE_MR = 25.0  # a.u., of each of the two channels whose magnitude is taken (Rician)
PET_COUNTS = 40.0  # Poisson counts per SUV and voxel
PET_FWHM = 6.0  # mm, resolution of the scanner (full width at half maximum)
TEXTURE = {"ct": 7.0, "pet": 0.10, "mr": 0.05}  # HU; the others relative to the signal
BIAS_MR = 0.08  # standard deviation of the logarithm of the bias field
LESION_ML = (10.0, 42.0)  # drawn log-uniformly; the warp changes the volume to 5 to 60 ml
FAR_END = 0.4  # radii between the active part and the calcified end
EDGE = 0.6  # mm, softness of borders (partial volume)
GRIDS = {  # voxels, largest change of each number, spacing in mm
    "ct": ((64, 64, 48), 3, (3.0, 3.0, 4.0)),
    "pet": ((42, 42, 48), 2, (4.7, 4.7, 4.0)),
    "mr": ((58, 58, 40), 2, (2.6, 2.6, 4.0)),
}
FORMAT = 2  # increase it when the same seed gives different voxels


class Scene(NamedTuple):
    """One case, in mm relative to `origin` (world, LPS, mm). `layers` are painted in order, on air."""

    origin: Array
    layers: list[tuple[tuple[float, float, float], Shape]]  # signals as in SIGNALS; last: whole lesion, its parts
    centre: Array  # of the lesion


def _waves(rng: np.random.Generator, shortest: float, longest: float, count: int = 4) -> Shape:
    """A smooth random field of mean 0 and standard deviation 1, made of plane waves with lengths in mm."""
    vectors = rng.normal(size=(count, 3))
    vectors *= 2 * np.pi / rng.uniform(shortest, longest, (count, 1)) / np.linalg.norm(vectors, axis=1, keepdims=True)
    k, phase = vectors.astype(np.float32), rng.uniform(0, 2 * np.pi, (count, 1)).astype(np.float32)
    # einsum instead of BLAS, whose threads wait for each other on a busy machine
    return lambda p: np.cos(np.einsum("ij,jn->in", k, p) + phase).sum(axis=0) * float(np.sqrt(2 / count))


def _rotation(rng: np.random.Generator, degrees: float) -> Array:
    """Rotation by an angle about a random axis."""
    axis = rng.normal(size=3)
    return Rotation.from_rotvec(degrees * axis / np.linalg.norm(axis), degrees=True).as_matrix()


def _limb(rng: np.random.Generator, axes: Array, centre: Array, taper: float) -> Shape:
    """An elliptic cylinder along z with a wavy surface; `taper` is its relative growth per mm."""
    wobble = _waves(rng, 60, 150)
    (a, b), (x, y) = axes.tolist(), centre.tolist()
    return lambda p: (np.hypot((p[0] - x) / a, (p[1] - y) / b) / (1 + taper * p[2]) - 1) * b + 1.5 * wobble(p)


def _tube(x: float, y: float, radius: float) -> Shape:
    """A cylinder along z, slightly slanted."""
    return lambda p: np.hypot(p[0] - x - 0.04 * p[2], p[1] - y) - radius


def _septa(rng: np.random.Generator, bone: tuple[float, ...], muscle: Shape) -> Shape:
    """Fatty sheets, 2.4 mm thick, that run from the bone (x, y, radius) through the muscle."""
    x, y, _ = bone
    wobble, sector, turn = _waves(rng, 60, 150), np.pi / int(rng.integers(3, 6)), rng.uniform(0, 2 * np.pi)

    def distance(p: Array) -> Array:
        angle = (np.arctan2(p[1] - y, p[0] - x) + 0.1 * wobble(p) + turn) % (2 * sector) - sector
        return np.maximum(np.hypot(p[0] - x, p[1] - y) * np.abs(np.sin(angle)) - 1.2, muscle(p))

    return distance


def _blob(
    rng: np.random.Generator, ml: float, muscle: Array, obstacles: list[Any]
) -> tuple[Shape, Shape, Shape, Array]:
    """A warped ellipsoid of about `ml` millilitres in the muscle, clear of obstacles (x, y, z, radius; z NaN: a tube).

    Returns:
        Its surface, the part on one side of a wavy cut (about 45% of the volume), the far end of the other side (about
        30%), and its centre.
    """
    axes = rng.uniform(0.8, 1.25, 3)
    axes *= (ml * 1000 * 0.75 / np.pi / axes.prod()) ** (1 / 3)
    size = float(axes.mean())
    angle, radius = rng.uniform(0, 2 * np.pi, 400), np.sqrt(rng.uniform(0.1, 1, 400))  # never in the exact centre
    plane = radius * np.stack([np.cos(angle), np.sin(angle)])
    centres = np.column_stack([plane.T * np.maximum(muscle - 0.9 * size, 8), rng.uniform(-38, 38, 400)])
    gap = np.nan_to_num(centres[:, None] - np.array(obstacles)[None, :, :3])
    clear = (np.linalg.norm(gap, axis=-1) - np.array(obstacles)[:, 3]).min(axis=1) - size
    centre = centres[np.argmax(np.minimum(clear, 4))]  # the first with 4 mm clearance, or else the best
    obstacles.append([*centre, float(axes.max())])
    to_ball = (np.diag(1 / axes) @ _rotation(rng, rng.uniform(0, 180))).astype(np.float32)
    shift = (to_ball @ centre)[:, None].astype(np.float32)
    warp, wave = _waves(rng, 2 * size, 4 * size), _waves(rng, 20, 60)
    normal = (_rotation(rng, rng.uniform(0, 180))[0] / size).astype(np.float32)
    offset = rng.uniform(0.0, 0.2) + float(normal @ centre)

    def surface(p: Array) -> Array:
        return (np.linalg.norm(np.einsum("ij,jn->in", to_ball, p) - shift, axis=0) - 1 - 0.08 * warp(p)) * size

    def cut(p: Array) -> Array:
        return np.einsum("j,jn->n", normal, p) - offset - 0.1 * wave(p)  # in radii of the blob

    def near(p: Array) -> Array:
        return np.maximum(surface(p), -cut(p) * size)

    def far(p: Array) -> Array:
        return np.maximum(surface(p), (cut(p) + FAR_END) * size)

    return surface, near, far, centre


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw the anatomy, lesion and distractors of one case."""
    skin, taper = rng.uniform((70, 60), (80, 68)), rng.uniform(-6e-4, 6e-4)
    inner = skin - rng.uniform(8, 13)
    muscle = _limb(rng, inner, rng.uniform(-3, 3, 2), taper)
    around = rng.uniform(0, 2 * np.pi)
    vessel_angles = around + rng.uniform(1, 5) + np.array([0.0, 0.3])
    bones = [(*rng.uniform(-12, 12, 2).tolist(), rng.uniform(11, 14))]
    if rng.random() < 0.5:
        bones.append((*(0.6 * inner * (np.cos(around), np.sin(around))).tolist(), rng.uniform(6, 8)))
    vessels = [(*(0.5 * inner * (np.cos(a), np.sin(a))).tolist(), rng.uniform(3, 4)) for a in vessel_angles]
    obstacles = [[x, y, np.nan, radius] for x, y, radius in bones + vessels]
    shapes = [("fat", _limb(rng, skin, np.zeros(2), taper)), ("muscle", muscle), ("fat", _septa(rng, bones[0], muscle))]
    shapes += [("vessel", _tube(*vessel)) for vessel in vessels]
    for x, y, radius in bones:
        shapes += [("cortex", _tube(x, y, radius)), ("marrow", _tube(x, y, 0.6 * radius))]
    ml = float(np.exp(rng.uniform(*np.log(LESION_ML))))
    lesion, active, calcified, centre = _blob(rng, ml, inner, obstacles)
    shapes += [(other, _blob(rng, ml * rng.uniform(0.15, 0.3), inner, obstacles)[0]) for other in ("urine", "cyst")]
    shapes += [("core", lesion), ("calcified", calcified), ("active", active)]
    signals = SIGNALS | {hot: (SIGNALS[hot][0], rng.uniform(*HOT_SUV), SIGNALS[hot][2]) for hot in ("active", "urine")}
    origin = rng.uniform((-100, -100, -800), (100, 100, 800))
    return Scene(origin, [(signals[tissue], shape) for tissue, shape in shapes], centre)


def acquire(scene: Scene, modality: str, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Sample one modality: voxels (int16 HU, float32 SUV or int16 a.u.), lesion mask (uint8), affine (RAS, mm)."""
    shape, change, spacing = GRIDS[modality]
    shape = tuple((shape + rng.integers(-change, change + 1, 3)).tolist())
    axes, centre = np.diag(spacing * rng.uniform(0.96, 1.04, 2)[[0, 0, 1]]), rng.uniform(-3, 3, 3)
    if modality == "mr":  # a small field of view is centred on the lesion
        axes, centre = _rotation(rng, rng.uniform(3, 6)) @ axes, centre + 0.35 * scene.centre
    corner = centre - axes @ (np.array(shape) - 1) / 2
    points = (axes @ np.indices(shape).reshape(3, -1) + corner[:, None]).astype(np.float32)
    column = MODALITIES.index(modality)
    signal = np.full(points.shape[1], SIGNALS["air"][column], np.float32)
    for signals, distance in scene.layers:  # the weight of a tissue falls from 1 to 0 across its border
        signal += (signals[column] - signal) / (1 + np.exp(np.clip(distance(points) / EDGE, -30, 30)))
    texture = TEXTURE[modality] * _waves(rng, 8, 40, 8)(points)
    if modality == "ct":
        hounsfield = signal + texture * (signal > -500) + rng.normal(0, NOISE_CT, signal.size)
        voxels = np.clip(np.rint(hounsfield), -1024, 3071).astype(np.int16)
    elif modality == "pet":
        sigma = PET_FWHM / 2.355 / np.linalg.norm(axes, axis=0)
        blurred = gaussian_filter((signal * (1 + texture)).reshape(shape), sigma, mode="nearest")
        voxels = (rng.poisson(np.maximum(blurred, 0) * PET_COUNTS) / PET_COUNTS).astype(np.float32)
    else:
        bias = rng.uniform(0.85, 1.15) * np.exp(BIAS_MR * _waves(rng, 200, 400)(points))
        noise = rng.normal(0, NOISE_MR, (2, signal.size))
        voxels = np.rint(np.hypot(signal * (1 + texture) * bias + noise[0], noise[1])).astype(np.int16)
    lps = np.vstack([np.column_stack([axes, corner + scene.origin]), [0, 0, 0, 1]])
    mask = (scene.layers[-3][1](points) < 0).astype(np.uint8)
    return voxels.reshape(shape), mask.reshape(shape), LPS_TO_RAS @ lps


def make_case(seed: int, index: int) -> dict[str, tuple[Array, Array, Array]]:
    """Make case `index`, independent of the number of cases: per modality voxels, mask and affine (RAS, mm)."""
    scene = draw_scene(np.random.default_rng([seed, index]))
    return {m: acquire(scene, m, np.random.default_rng([seed, index, k])) for k, m in enumerate(MODALITIES, 1)}


def write_phantoms(
    root: str | Path, cases: int = 24, seed: int = 0, progress: bool = True, first: int = 1
) -> list[Item]:
    """Write PHANTOM_001... to `root` and return their data list. Existing phantoms of the same parameters are kept.

    Args:
        root: folder of the phantoms.
        cases: number of phantoms.
        seed: seed of their shapes and noise.
        progress: show a progress bar.
        first: number of the first phantom. Cases of one id count as the same case, so give phantoms for a test other
            numbers than those for the training.

    Raises:
        ValueError: the numbers are not in 1 to 999, or `seed` is negative.
        FileExistsError: the folder contains other phantoms.
    """
    last = first + cases - 1
    if not 1 <= first <= last <= 999 or seed < 0:
        raise ValueError(
            f"Phantoms need numbers from 1 to 999 and a seed of 0 or more, got cases={cases}, first={first} and "
            f"seed={seed}."
        )
    (root := Path(root)).mkdir(parents=True, exist_ok=True)
    parameters = {"format": FORMAT, "cases": cases, "seed": seed, **({"first": first} if first > 1 else {})}
    _check_parameters(root, json.dumps(parameters))
    for index in tqdm(range(first, last + 1), desc="phantoms", unit="case", disable=not progress):
        folder = root / f"PHANTOM_{index:03d}"
        if all((folder / name(modality)).is_file() for modality in MODALITIES for name in (image_name, mask_name)):
            continue
        folder.mkdir(exist_ok=True)
        for modality, (voxels, mask, affine) in make_case(seed, index).items():
            write_nifti(voxels, affine, folder / image_name(modality))
            write_nifti(mask, affine, folder / mask_name(modality))
    return datalist(root)


def _check_parameters(root: Path, parameters: str) -> None:
    """Write the parameters to phantom.json, or compare them with those of the phantoms in the folder."""
    record = root / "phantom.json"
    existing = record.read_text(encoding="utf-8").strip() if record.is_file() else "unknown parameters"
    if not record.is_file() and not any(root.glob("PHANTOM_*")):
        write_text(parameters + "\n", record)
    elif existing != parameters:
        raise FileExistsError(
            f"{root} contains phantoms of {existing}, not {parameters}. Choose another folder or delete it."
        )


def datalist(root: Path, *_: object) -> list[Item]:
    """List the phantoms, with the keys and errors of `scripts.data.cohorts.sts.datalist`."""
    return read_layout(root, "phantom", "PHANTOM_")
