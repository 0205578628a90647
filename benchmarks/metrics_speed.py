# SPDX-License-Identifier: Apache-2.0
"""Time Dice, HD95 and ASSD of this bundle, MONAI, MedPy, surface-distance and SimpleITK.

Each package runs on the same masks, in its own process and in interleaved rounds. A package is imported only by its
own process; one that is not installed is left out.

Example: python -m benchmarks metrics --dataset-dir DATA --only MONAI MedPy
"""

from __future__ import annotations

import argparse
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

from benchmarks.interleaved_timing import Candidate, Timings, memory_mib, time_interleaved
from benchmarks.lower_bound import cpu_name
from benchmarks.options import add_json_option, add_output_options
from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table

Mask = NDArray[np.uint8]
Pair = tuple[Mask, Mask, tuple[float, ...]]  # prediction, reference, spacing in mm
Values = tuple[float, float, float]  # Dice, HD95 and ASSD in mm
Load = Callable[[], Sequence[Pair]]

OURS = "ours"
SHAPE, SPACING = (512, 512, 300), (0.8, 0.8, 1.0)
SLOW_ROUNDS = 2  # of packages that compute distances in the whole volume, which takes up to a minute


def ours(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """This bundle, on one thread."""
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
    """MedPy. Its HD95 is the percentile of the pooled distances of both directions."""
    from medpy.metric.binary import assd, dc, hd95

    pair = (prediction, reference)
    return float(dc(*pair)), float(hd95(*pair, voxelspacing=spacing)), float(assd(*pair, voxelspacing=spacing))


def surface_distance(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """DeepMind's package. Its surface elements lie between the voxels; ASSD weights both directions by their area."""
    import surface_distance as package

    p, r = prediction.astype(bool), reference.astype(bool)
    distances = package.compute_surface_distances(r, p, spacing)
    hd95 = package.compute_robust_hausdorff(distances, 95)
    means = package.compute_average_surface_distance(distances)
    areas = distances["surfel_areas_gt"].sum(), distances["surfel_areas_pred"].sum()
    return float(package.compute_dice_coefficient(r, p)), float(hd95), float(np.average(means, weights=areas))


def simpleitk(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> Values:
    """SimpleITK with our definitions: the Maurer distance map of each boundary, read at the other boundary."""
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
    from_p, from_r = (np.maximum(m[e], 0) for m, e in ((maps[1], edges[0]), (maps[0], edges[1])))  # negative inside
    hd95 = max(np.percentile(from_p, 95), np.percentile(from_r, 95))
    return overlap.GetDiceCoefficient(), float(hd95), float(np.concatenate([from_p, from_r]).mean())


@dataclass(frozen=True)
class Implementation:
    """One implementation of the metrics.

    Args:
        compute: prediction, reference and spacing in mm -> Dice, HD95 and ASSD.
        package: the package that must be installed.
        max_rounds: upper limit of the number of rounds.
    """

    compute: Callable[[Mask, Mask, Sequence[float]], Values]
    package: str
    max_rounds: int = 10**6


IMPLEMENTATIONS = {
    OURS: Implementation(ours, "scipy"),
    "MONAI": Implementation(monai, "monai"),
    "SimpleITK": Implementation(simpleitk, "SimpleITK", SLOW_ROUNDS),
    "surface-distance": Implementation(surface_distance, "surface_distance", SLOW_ROUNDS),
    "MedPy": Implementation(medpy, "medpy", SLOW_ROUNDS),
}


def select_implementations(only: Sequence[str]) -> tuple[list[str], list[str]]:
    """Select the implementations to time; ours is always among them.

    Args:
        only: names in ``IMPLEMENTATIONS``; empty for all.

    Returns:
        Their names, and one sentence for each package that is not installed.

    Raises:
        ValueError: an unknown name.
    """
    unknown = sorted(set(only) - set(IMPLEMENTATIONS))
    if unknown:
        raise ValueError(f"Unknown candidate {', '.join(unknown)}. Choose from {', '.join(IMPLEMENTATIONS)}.")
    wanted = [name for name in IMPLEMENTATIONS if not only or name == OURS or name in only]
    installed = [name for name in wanted if importlib.util.find_spec(IMPLEMENTATIONS[name].package)]
    notes = [
        f"{name} is left out: {IMPLEMENTATIONS[name].package} is not installed."
        for name in wanted
        if name not in installed
    ]
    if not importlib.util.find_spec("edt"):
        notes.append("edt is not installed: ours uses k-d trees for all distances.")
    return installed, notes


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


def _synthetic_pair(shape: Sequence[int], count: int, radii: tuple[float, float], seed: int) -> list[Pair]:
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
    """Seeded pairs of masks with voxels of 0.8 x 0.8 x 1 mm.

    Args:
        shape: of the masks.
        scale: factor of all radii, to shrink them with the shape.
    """

    def load(count: int, low: float, high: float, seed: int) -> Load:
        return partial(_synthetic_pair, shape, count, (low * scale, high * scale), seed)

    return {
        "one lesion of 3 cm": load(1, 14, 16, 0),
        "eight scattered lesions": load(8, 6, 15, 1),
        "an organ of 1.5 l": load(1, 68, 75, 2),
    }


def _read_pairs(paths: Iterable[tuple[Path, Path]]) -> list[Pair]:
    """Read pairs of masks drawn on CT and on PET, both on the grid of the CT."""
    import SimpleITK as sitk  # noqa: N813

    pairs = []
    for ct_path, pet_path in paths:
        ct = sitk.ReadImage(str(ct_path))
        pet = sitk.Resample(sitk.ReadImage(str(pet_path)), ct, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        p, r = ((sitk.GetArrayFromImage(image) > 0).astype(np.uint8) for image in (pet, ct))
        pairs.append((p, r, tuple(reversed(ct.GetSpacing()))))
    return pairs


def cohort_pairs(folder: Path) -> dict[str, Load]:
    """The tumours drawn on PET against those drawn on CT, on the grid of the CT, of all patients of the sts data set.

    Args:
        folder: of the data set.

    Raises:
        ValueError: it has no such masks.
    """
    paths = [(path, path.with_name("PET_mask.nii.gz")) for path in sorted(folder.glob("*/CT_mask.nii.gz"))]
    paths = [pair for pair in paths if pair[1].is_file()]
    if not paths:
        raise ValueError(f"No <patient>/CT_mask.nii.gz with a PET_mask.nii.gz found in {folder}. Check --dataset-dir.")
    return {f"masks of {len(paths)} patients": partial(_read_pairs, paths)}


def measure(pairs: Mapping[str, Load], names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Time implementations in interleaved rounds, one set of masks after the other.

    Args:
        pairs: name -> the masks of one round; a time is that of all of them, a metric is the mean over them.
        names: names in ``IMPLEMENTATIONS``, ours first.
        rounds: rounds of each implementation; slow ones have at most ``SLOW_ROUNDS``.

    Returns:
        Rows ``{"side", "what", "median_s", "ratio", "peak_mib", "n", "hd95_mm", "assd_mm", "dice"}``; ``ratio`` is to
        ours, ``peak_mib`` is the peak memory beyond the imported packages and the masks.

    Raises:
        RuntimeError: the process of an implementation has ended; it printed the reason.
    """
    rows = []
    counts = {name: min(rounds, IMPLEMENTATIONS[name].max_rounds) for name in names}
    for what, load in pairs.items():
        print(what, flush=True)
        with _masks_on_disk(load) as folder:
            candidates = [Candidate(name, (), {"folder": str(folder)}) for name in names]
            timings = time_interleaved(candidates, _compute_metrics, counts, 1, 1, start_method="spawn")
        base = statistics.median(seconds for seconds, _ in timings[names[0]].steps)
        rows += [_row(name, what, timings[name], base) for name in names]
    return rows


def _row(name: str, what: str, timings: Timings, base: float) -> dict[str, Any]:
    median = statistics.median(seconds for seconds, _ in timings.steps)
    dice, hd95, assd = timings.steps[0][1]
    return {
        "side": name,
        "what": what,
        "median_s": round(median, 5),
        "ratio": round(median / base, 2),
        "peak_mib": round(timings.peak_mib),
        "n": len(timings.steps),
        "hd95_mm": round(hd95, 6),
        "assd_mm": round(assd, 6),
        "dice": round(dice, 6),
    }


@contextmanager
def _masks_on_disk(load: Load) -> Iterator[Path]:
    """Write the masks to a temporary folder, from which every process reads its own copy.

    The processes then share no memory with this one, in which the masks were made.
    """
    with tempfile.TemporaryDirectory() as name:
        for i, (prediction, reference, spacing) in enumerate(load()):
            for kind, array in (("p", prediction), ("r", reference), ("spacing", np.array(spacing))):
                np.save(Path(name) / f"{i:04d}_{kind}.npy", array)
        yield Path(name)


def _compute_metrics(candidate: Candidate, pipe: Connection) -> None:
    """Worker process: import everything on a small pair, then compute all pairs once per round."""
    compute, folder = IMPLEMENTATIONS[candidate.name].compute, Path(candidate.overrides["folder"])
    small = np.pad(np.ones((3, 4, 5), dtype=np.uint8), 3)
    compute(small, np.roll(small, 1, axis=0), (1.0, 1.0, 1.0))
    files = [sorted(folder.glob(f"*_{kind}.npy")) for kind in ("p", "r", "spacing")]
    pairs = [(np.load(p), np.load(r), tuple(np.load(spacing).tolist())) for p, r, spacing in zip(*files, strict=True)]
    pipe.recv()  # the warm-up, which is done
    pipe.send(([], 0.0))
    before_mib = memory_mib("VmRSS")
    while pipe.recv():
        start = time.perf_counter()
        values = [compute(*pair) for pair in pairs]
        seconds = time.perf_counter() - start
        mean = tuple(np.mean(values, axis=0).tolist())
        pipe.send(([(seconds, mean)], max(0.0, memory_mib() - before_mib)))


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ("masks", "candidate", "median s", "ratio to ours", "peak MiB", "n", "Dice", "HD95 mm", "ASSD mm")
    cells = [
        (
            *(row["what"], row["side"], f"{row['median_s']:.3f}", f"{row['ratio']:.1f}", row["peak_mib"], row["n"]),
            *(f"{row['dice']:.4f}", f"{row['hd95_mm']:.3f}", f"{row['assd_mm']:.3f}"),
        )
        for row in rows
    ]
    return markdown_table(head, cells)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--dataset-dir", type=Path, help="also time the masks of the sts data set in this folder")
    add_output_options(parser, "runs/benchmark")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"time ours and these: {', '.join(IMPLEMENTATIONS)}"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> str:
    """Time all implementations and return the table."""
    names, notes = select_implementations(args.only)
    if args.dry_run:
        return "\n".join(names)
    pairs = synthetic_pairs()
    if args.dataset_dir:
        pairs |= cohort_pairs(args.dataset_dir)
    rows = measure(pairs, names, args.rounds)
    write_json(rows, args.json or args.output_dir / "metrics.json")
    return "\n".join([*notes, f"On {cpu_name()}.", "", format_table(rows)])
