# SPDX-License-Identifier: Apache-2.0
"""The cost of Dice, HD95 and ASSD: this bundle beside MONAI, MedPy, surface-distance and SimpleITK.

Each side is a process of its own that holds the same masks; the sides take turns, so that whatever else the machine
does falls on all of them. Packages are imported by the process that needs them.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.turn_taking import Measured, memory_mib, take_turns
from benchmarks.turn_taking import Side as Turning

Mask = NDArray[np.uint8]
Pair = tuple[Mask, Mask, tuple[float, ...]]  # prediction, reference, spacing in mm
Values = tuple[float, float, float]  # Dice, HD95 and ASSD in mm
Load = Callable[[], Sequence[Pair]]

OURS = "ours"
SHAPE, SPACING = (512, 512, 300), (0.8, 0.8, 1.0)
SLOW_TURNS = 2  # of the sides that measure distances all over the volume, most of a minute each


def ours(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """This bundle, one thread."""
    from scripts.metrics import surface_metrics

    values = surface_metrics(prediction, reference, spacing)
    return values["dice"], values["hd95_mm"], values["assd_mm"]


def monai(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """MONAI's three functions, as a validation calls them."""
    import torch
    from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance

    p, r = (torch.from_numpy(mask)[None, None] for mask in (prediction, reference))
    common: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    hd95 = compute_hausdorff_distance(p, r, percentile=95, **common)
    assd = compute_average_surface_distance(p, r, symmetric=True, **common)
    return float(compute_dice(p, r, include_background=True)), float(hd95), float(assd)


def medpy(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """MedPy; its HD95 is one percentile of both directions pooled."""
    from medpy.metric.binary import assd, dc, hd95

    pair = (prediction, reference)
    return float(dc(*pair)), float(hd95(*pair, voxelspacing=spacing)), float(assd(*pair, voxelspacing=spacing))


def surface_distance(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """DeepMind's package, whose surface elements lie between the voxels; its two directed means pooled by area."""
    import surface_distance as package

    p, r = prediction.astype(bool), reference.astype(bool)
    found = package.compute_surface_distances(r, p, spacing)
    hd95 = package.compute_robust_hausdorff(found, 95)
    means = package.compute_average_surface_distance(found)
    areas = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
    return float(package.compute_dice_coefficient(r, p)), float(hd95), float(np.average(means, weights=areas))


def simpleitk(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """SimpleITK: outlines and a Maurer distance map of each, read at the other's outline; our definitions."""
    import SimpleITK as sitk  # noqa: N813

    edges, maps = [], []
    images = [sitk.GetImageFromArray(mask) for mask in (prediction, reference)]
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    for image in images:
        image.SetSpacing(tuple(reversed(spacing)))
        inner = sitk.BinaryErode(image, [1] * image.GetDimension(), sitk.sitkCross, 0, 1, False)
        edge = image - inner
        distance = sitk.SignedMaurerDistanceMap(edge, squaredDistance=False, useImageSpacing=True)
        edges.append(sitk.GetArrayViewFromImage(edge) > 0)
        maps.append(sitk.GetArrayFromImage(distance))
    from_p, from_r = (np.maximum(m[e], 0) for m, e in ((maps[1], edges[0]), (maps[0], edges[1])))  # negative: inside
    hd95 = max(np.percentile(from_p, 95), np.percentile(from_r, 95))
    return overlap.GetDiceCoefficient(), float(hd95), float(np.concatenate([from_p, from_r]).mean())


@dataclass(frozen=True)
class Side:
    """One way to the three values, and the package without which it is left out."""

    run: Callable[[Mask, Mask, Sequence[float]], Values]
    package: str
    turns: int = 10**6


SIDES = {
    OURS: Side(ours, "scipy"),
    "MONAI": Side(monai, "monai"),
    "SimpleITK": Side(simpleitk, "SimpleITK", SLOW_TURNS),
    "surface-distance": Side(surface_distance, "surface_distance", SLOW_TURNS),
    "MedPy": Side(medpy, "medpy", SLOW_TURNS),
}


def chosen(only: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sides to run, ours always among them, and a sentence for each package that is not installed."""
    unknown = sorted(set(only) - set(SIDES))
    if unknown:
        raise ValueError(f"There is no side {', '.join(unknown)}: choose from {', '.join(SIDES)}.")
    wanted = [name for name in SIDES if not only or name == OURS or name in only]
    there = [name for name in wanted if importlib.util.find_spec(SIDES[name].package)]
    absent = [f"{name} is left out: {SIDES[name].package} is not installed." for name in wanted if name not in there]
    if not importlib.util.find_spec("edt"):
        absent.append("edt is not installed: ours does everything by k-d trees.")
    return there, absent


def _blob(shape: Sequence[int], centre: NDArray, radii: NDArray, phase: float) -> Mask:
    """An ellipsoid with a wavy surface; centre and radii in mm."""
    mask = np.zeros(shape, dtype=np.uint8)
    axes, box = [], []
    for size, step, middle, radius in zip(shape, SPACING, centre, radii, strict=True):
        low, high = int(max(0, (middle - 1.3 * radius) // step)), int(min(size, (middle + 1.3 * radius) // step + 2))
        box.append(slice(low, high))
        axes.append((np.arange(low, high) * step - middle) / radius)
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    wave = 1 + 0.1 * np.sin(5 * x + phase) * np.cos(4 * y + phase) * np.sin(3 * z + 1)
    mask[tuple(box)] = x**2 + y**2 + z**2 < wave**2
    return mask


def _pair(shape: Sequence[int], count: int, radii: tuple[float, float], seed: int) -> list[Pair]:
    """A prediction and a reference of ``count`` blobs, which differ by some mm in place, size and surface."""
    rng = np.random.default_rng(seed)
    extent = np.multiply(shape, SPACING)
    prediction, reference = np.zeros((2, *shape), dtype=np.uint8)
    for _ in range(count):
        size = rng.uniform(*radii, 3)
        centre = extent / 2 if count == 1 else rng.uniform(0.15, 0.85, 3) * extent
        prediction |= _blob(shape, centre, size, 0)
        reference |= _blob(shape, centre + rng.uniform(-1.5, 1.5, 3), size * rng.uniform(0.95, 1.05), 0.5)
    return [(prediction, reference, SPACING)]


def synthetic_pairs(shape: Sequence[int] = SHAPE, scale: float = 1.0) -> dict[str, Load]:
    """Seeded masks of 0.8 x 0.8 x 1 mm; ``scale`` shrinks radii along with a smaller ``shape``."""

    def load(count: int, low: float, high: float, seed: int) -> Load:
        return partial(_pair, shape, count, (low * scale, high * scale), seed)

    return {
        "one lesion of 3 cm": load(1, 14, 16, 0),
        "eight scattered lesions": load(8, 6, 15, 1),
        "an organ of 1.5 l": load(1, 68, 75, 2),
    }


def _cohort(paths: Iterable[tuple[Path, Path]]) -> list[Pair]:
    import SimpleITK as sitk  # noqa: N813

    pairs = []
    for ct_path, pet_path in paths:
        ct = sitk.ReadImage(str(ct_path))
        pet = sitk.Resample(sitk.ReadImage(str(pet_path)), ct, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        p, r = ((sitk.GetArrayFromImage(image) > 0).astype(np.uint8) for image in (pet, ct))
        pairs.append((p, r, tuple(reversed(ct.GetSpacing()))))
    return pairs


def cohort_pairs(folder: Path) -> dict[str, Load]:
    """The tumours drawn on CT against those drawn on PET, on the grid of the CT, of every patient of the sts cohort."""
    paths = [(path, path.with_name("PET_mask.nii.gz")) for path in sorted(folder.glob("*/CT_mask.nii.gz"))]
    paths = [both for both in paths if both[1].is_file()]
    if not paths:
        raise ValueError(f"{folder} holds no <patient>/CT_mask.nii.gz with a PET_mask.nii.gz beside it.")
    return {f"masks of {len(paths)} patients": partial(_cohort, paths)}


def measure(pairs: Mapping[str, Load], sides: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Time the sides in turns, one set of masks after the other.

    Args:
        pairs: name -> the masks of one turn; times are of all of them, values are means over them.
        sides: names in ``SIDES``, ours first.
        rounds: turns of each side; slow sides have at most ``SLOW_TURNS``.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "peak_mib", "n", "hd95_mm", "assd_mm", "dice"}``; ``ratio`` is to
        ours, ``peak_mib`` what a side needed at most beyond its packages and the masks.

    Raises:
        RuntimeError: a side's process has ended; its own message is above.
    """
    rows = []
    for what, load in pairs.items():
        print(what, flush=True)
        with _masks_on_disk(load) as folder:
            named = [Turning(name, (), {"folder": str(folder)}) for name in sides]
            counts = {name: min(rounds, SIDES[name].turns) for name in sides}
            measured = take_turns(named, _work, counts, turn=1, warm_up=1, start="spawn")
        base = statistics.median(seconds for seconds, _ in measured[sides[0]].steps)
        rows += [_row(side, what, measured[side], base) for side in sides]
    return rows


def _row(side: str, what: str, measured: Measured, base: float) -> dict[str, Any]:
    median = statistics.median(seconds for seconds, _ in measured.steps)
    dice, hd95, assd = measured.steps[0][1]
    return {
        "side": side,
        "what": what,
        "median_s": round(median, 5),
        "ratio": round(median / base, 2),
        "peak_mib": round(measured.peak_mib),
        "n": len(measured.steps),
        "hd95_mm": round(hd95, 6),
        "assd_mm": round(assd, 6),
        "dice": round(dice, 6),
    }


@contextmanager
def _masks_on_disk(load: Load) -> Iterator[Path]:
    """The masks as files, so that every process holds its own and nothing of how they were made."""
    with tempfile.TemporaryDirectory() as name:
        for i, (prediction, reference, spacing) in enumerate(load()):
            for kind, array in (("p", prediction), ("r", reference), ("spacing", np.array(spacing))):
                np.save(Path(name) / f"{i:04d}_{kind}.npy", array)
        yield Path(name)


def _work(side: Turning, pipe: Connection) -> None:
    """A side's process: a small pair to import everything, then all pairs, each time it is asked."""
    run, folder = SIDES[side.name].run, Path(side.overrides["folder"])
    small = np.pad(np.ones((3, 4, 5), dtype=np.uint8), 3)
    run(small, np.roll(small, 1, axis=0), (1.0, 1.0, 1.0))
    kinds = [sorted(folder.glob(f"*_{kind}.npy")) for kind in ("p", "r", "spacing")]
    pairs = [(np.load(p), np.load(r), tuple(np.load(step).tolist())) for p, r, step in zip(*kinds, strict=True)]
    pipe.recv()
    pipe.send(([], 0.0))
    held = memory_mib("VmRSS")
    while pipe.recv():
        began = time.perf_counter()
        values = [run(*pair) for pair in pairs]
        seconds = time.perf_counter() - began
        mean = tuple(np.mean(values, axis=0).tolist())
        pipe.send(([(seconds, mean)], max(0.0, memory_mib() - held)))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| masks | side | median s | ratio to ours | peak MiB | n | Dice | HD95 mm | ASSD mm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["what"], row["side"], f"{row['median_s']:.3f}", f"{row['ratio']:.1f}", str(row["peak_mib"])]
        values = [str(row["n"]), f"{row['dice']:.4f}", f"{row['hd95_mm']:.3f}", f"{row['assd_mm']:.3f}"]
        lines.append("| " + " | ".join([*cells, *values]) + " |")
    return "\n".join(lines)
