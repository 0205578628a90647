# SPDX-License-Identifier: Apache-2.0
"""Predictions that were made elsewhere, in a teacher's place: probabilities, logits or masks of every case in files."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks import one_hot
from monai.transforms import SpatialPad
from monai.utils import convert_to_tensor
from scipy.ndimage import gaussian_filter

from scripts.data.case_files import CaseFiles
from scripts.data.case_io import to_tensor
from scripts.data.resampling import resample
from scripts.distillation.teacher_cache import LOGITS
from scripts.distillation.teacher_origin import Case, PredictionFiles
from scripts.image_io.checks import Rules, report_findings
from scripts.image_io.header_reader import read_header
from scripts.image_io.headers import Affine, Header
from scripts.image_io.mask_checks import check_mask
from scripts.image_io.reader import read_volume
from scripts.networks.region_logits import region_logits
from scripts.runtime.label_values import class_indices

logger = logging.getLogger(__name__)

ARRAY = "probabilities"  # of nnU-Net's .npz
LEAST = 1e-6  # probability, so that every logarithm is finite in fp16
SUM_TOLERANCE = 0.02  # of probabilities in half precision
MIN_DICE = 0.5  # between nnU-Net's probabilities and the mask that it wrote beside them
Grid = tuple[Affine, tuple[int, ...]]


class ImportedAnswers:
    """The answers of a teacher whose predictions lie in a folder; see ``PredictionFiles`` for the files' names.

    ``CASE.npz`` is nnU-Net's: ``probabilities``, ``class z y x`` on the whole grid of the mask ``CASE.nii.gz`` beside
    it, or else of the case's reference image. ``CASE.nii.gz`` is 4D with the classes along its last axis
    (probabilities, or logits), or a mask with the values of the label files. For a task with a sigmoid head the
    channels may also be its regions, in its order.

    Args:
        origin: the files of predictions.
        files: the image files of the cases, which give the grids.
        labels: per class the values of a mask.
        smooth: standard deviation in mm of the Gaussian that softens the borders of masks; 0 leaves them hard.
        regions: the classes of each channel of a task with a sigmoid head.
        head: whether channels are classes (``"softmax"``) or regions (``"sigmoid"``); by default their number tells.

    Attributes:
        outputs: ``logits`` only.
        settings: what the manifest of a cache says about them.
    """

    def __init__(
        self,
        origin: PredictionFiles,
        files: CaseFiles,
        labels: Sequence[Sequence[float]],
        smooth: float = 0.0,
        regions: Sequence[Sequence[int]] | None = None,
        head: str | None = None,
    ) -> None:
        if smooth < 0:
            raise ValueError(f"--smooth is {smooth:g}. Give the width of a Gaussian in mm, at least 0.")
        self.origin, self.files, self.labels, self.smooth = origin, files, labels, float(smooth)
        self.regions, self.head = regions, head
        self.outputs = [LOGITS]
        self.settings: dict[str, Any] = {"smooth_mm": self.smooth} if smooth else {}

    def check(self, cases: Sequence[Case]) -> None:
        """Check the files of all cases by their headers.

        Raises:
            FileNotFoundError: cases without a file; all of them are named.
            ValueError: a file has another number of channels, or a grid that does not fit its case.
        """
        self.origin.require_answers(cases)
        for case in cases:
            path = self.origin.path(case)
            shape, header = self._shape_and_grid(path, case)
            if len(shape) == 4:
                self._has_regions(path, shape[0])
            if len(shape) == 4 and self.smooth:
                raise ValueError(f"{path} holds probabilities, and --smooth is for masks. Remove it.")
            if list(shape[-3:]) != list(header.shape[:3]):
                raise ValueError(
                    f"{path} holds {_sizes(shape[-3:])} voxels, but {header.path} {_sizes(header.shape)}. Export the "
                    "probabilities of the whole image, or put the mask on their grid beside them."
                )
            findings = check_mask(self.files.header(case), header._replace(shape=header.shape[:3]))
            report_findings(finding._replace(case_id=str(case["case_id"])) for finding in findings)
            affine, size = self.files.grid(case)
            if not _overlap(np.linalg.solve(header.affine, affine), size, header.shape):
                raise ValueError(f"{path} shares no space with the images of case {case['case_id']}. Check its affine.")
        logger.warning(
            "The predictions in %s: those of a model on its own training cases are over-confident. Use the files of a "
            "cross-validation, in which each case was left out.",
            self.origin.folder,
        )

    def predict(self, case: Case, image: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The logits of a case on the grid of its preprocessed volumes, ``C H W D``; see ``logits_on_grid``."""
        path = self.origin.path(case)
        shape, header = self._shape_and_grid(path, case)
        sigmoid = len(shape) == 4 and self._has_regions(path, shape[0])
        if path.suffix == ".npz":
            probabilities = _read_npz(path, sigmoid)
            beside = self.origin.mask_beside(path)
            if beside is not None:
                predicted = (probabilities > 0.5).any(0) if sigmoid else probabilities.argmax(0) > 0
                _require_agreement(path, predicted, beside, self.files.rules)
        else:
            volume = read_volume(header, self.files.rules)
            is_mask = len(shape) == 3
            probabilities = self._of_mask(volume, header) if is_mask else _of_channels(path, volume, sigmoid)
        return logits_on_grid(
            probabilities, header.affine, self.files.grid(case), self.files.patch, self.regions, sigmoid
        )

    def _has_regions(self, path: Path, channels: int) -> bool:
        """Whether the channels of a file are regions.

        Raises:
            ValueError: there are as many channels as neither classes nor regions, or their number fits both.
        """
        numbers = {"softmax": len(self.labels), "sigmoid": len(self.regions or ())}
        fitting = [head for head, number in numbers.items() if number == channels and self.head in (None, head)]
        if not fitting:
            regions = f" and {len(self.regions)} regions" if self.regions else ""
            raise ValueError(
                f"{path} has {channels} classes, this task has {len(self.labels)}{regions}. Use predictions of this "
                "task."
            )
        if len(fitting) > 1:
            raise ValueError(
                f"The {channels} channels of {path} may be classes or regions. Name the teacher by a specification, "
                'NAME=FILE.json, with "head": "softmax" or "sigmoid".'
            )
        return fitting[0] == "sigmoid"

    def _shape_and_grid(self, path: Path, case: Case) -> tuple[tuple[int, ...], Header]:
        """The file's shape, ``[classes] H W D``, and the header of the grid that it lies on."""
        rules = self.files.rules
        if path.suffix == ".npz":
            beside = self.origin.mask_beside(path)
            header = read_header(beside, rules.max_voxels, rules.voxel_size) if beside else self.files.header(case)
            shape = _npz_shape(path)
            return (shape[0], *shape[:0:-1]), header
        header = read_header(path, rules.max_voxels, rules.voxel_size)
        return (*header.shape[3:], *header.shape[:3]), header

    def _of_mask(self, mask: np.ndarray, header: Header) -> torch.Tensor:
        """The probabilities of a mask ``H W D``: its one-hot encoding, smoothed."""
        index = to_tensor(class_indices(mask, self.labels, header.path))
        hard = one_hot(index[None, None].float(), len(self.labels))[0]
        if not self.smooth:
            return hard
        sigmas = self.smooth / np.linalg.norm(header.affine[:3, :3], axis=0)
        return torch.stack([torch.from_numpy(gaussian_filter(channel.numpy(), sigmas)) for channel in hard])


def logits_on_grid(
    probabilities: torch.Tensor,
    affine: Affine,
    grid: Grid,
    least: Sequence[int],
    regions: Sequence[Sequence[int]] | None = None,
    sigmoid: bool = False,
) -> torch.Tensor:
    """Resample probabilities by linear interpolation, and pad them; outside of their volume is background.

    Args:
        probabilities: ``C H W D``, of classes, the background first, or of regions.
        affine: of their voxels, RAS in mm.
        grid: affine and shape to resample to.
        least: voxels per axis that the result has at least, padded like the images.
        regions: the classes of each channel of a task with a sigmoid head.
        sigmoid: the probabilities are those of the regions.

    Returns:
        Logits of probabilities of at least ``LEAST``, ``C H W D`` of the task, float32.
    """
    matrix = np.linalg.solve(affine, grid[0])
    channels = []
    for index, channel in enumerate(probabilities.float()):
        outside = float(index == 0 and not sigmoid)
        resampled = resample(channel, matrix, grid[1], outside)
        padded = SpatialPad(least, value=outside)(resampled[None])
        channels.append(convert_to_tensor(padded, track_meta=False)[0])
    stacked = torch.stack(channels)
    if sigmoid:
        return stacked.clamp(LEAST, 1 - LEAST).logit()
    stacked = stacked.clamp_min(LEAST)
    logits = (stacked / stacked.sum(0)).log()
    return logits if regions is None else region_logits(logits[None], regions)[0]


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _overlap(matrix: Affine, grid: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a grid lies at least partly in a volume, both as boxes; ``matrix`` maps the grid's voxels to its own."""
    corners = np.stack(np.meshgrid(*((-0.5, n - 0.5) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    voxels = corners @ matrix[:3, :3].T + matrix[:3, 3]
    return bool((voxels.max(0) > -0.5).all() and (voxels.min(0) < np.asarray(shape[:3]) - 0.5).all())


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path} is damaged, or not nnU-Net's file of probabilities: it needs an array {ARRAY!r}, class z y x. Predict "
        "with --save_probabilities."
    )


def _npz_shape(path: Path) -> tuple[int, ...]:
    """The shape of the array in an .npz file, without reading its values."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(file)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path) from error
    if len(shape) != 4 or kind.kind != "f":
        raise _damaged(path)
    return shape


def _read_npz(path: Path, sigmoid: bool) -> torch.Tensor:
    """The probabilities in an .npz file, ``C x y z``; those of regions need not add up to 1."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values = file[ARRAY].astype(np.float32)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path) from error
    probabilities = torch.from_numpy(values).permute(0, 3, 2, 1)
    if not _are_probabilities(probabilities, sigmoid):
        rule = "" if sigmoid else " that add up to 1 in every voxel"
        raise ValueError(f"{path} does not hold probabilities{rule}. Export them again.")
    return probabilities


def _are_probabilities(values: torch.Tensor, sigmoid: bool) -> bool:
    in_range = bool((values >= -SUM_TOLERANCE).all() and (values <= 1 + SUM_TOLERANCE).all())
    return in_range and (sigmoid or bool(((values.sum(0) - 1).abs() <= SUM_TOLERANCE).all()))


def _of_channels(path: Path, volume: np.ndarray, sigmoid: bool) -> torch.Tensor:
    """The probabilities in a 4D volume ``H W D C`` of probabilities or logits."""
    values = to_tensor(volume).movedim(-1, 0).float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{path} holds NaN or infinite values. Export it again.")
    if _are_probabilities(values, sigmoid):
        return values
    if sigmoid:
        return values.sigmoid()
    if values.min() >= 0 and values.max() <= 1:
        raise ValueError(
            f"{path} holds values from 0 to 1 that do not add up to 1: neither probabilities of disjoint classes nor "
            "logits. Export one of them."
        )
    return values.softmax(0)


def _require_agreement(path: Path, predicted: torch.Tensor, mask: Path, rules: Rules) -> None:
    """Refuse probabilities, with this foreground, that lie in other axes than the mask beside them."""
    header = read_header(mask, rules.max_voxels, rules.voxel_size)
    inside = to_tensor(read_volume(header, rules)) > 0
    total = int(inside.sum() + predicted.sum())
    dice = 2 * int((inside & predicted).sum()) / total if total else 1.0
    if dice < MIN_DICE:
        raise ValueError(
            f"{path} and {mask} do not belong together: the Dice of their foregrounds is {dice:.2f}. Export both again "
            "by the same program."
        )
