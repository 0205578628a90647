# SPDX-License-Identifier: Apache-2.0
"""Images and masks of one case on one grid, and how they are oriented for viewing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Volumes = dict[str, NDArray[Any]]

OUTLINES = {"reference": "#E69F00", "prediction": "#56B4E9"}  # colour per mask


class Plane(NamedTuple):
    """A viewing plane of volumes from `viewing_orientation`.

    Args:
        name: as the page writes it.
        axis: the axis that the plane cuts.
        letters: the patient's directions at the left, right, bottom and top edge of the picture.
    """

    name: str
    axis: int
    letters: str


PLANES = (Plane("axial", 2, "RLPA"), Plane("coronal", 1, "RLIS"), Plane("sagittal", 0, "PAIS"))


@dataclass(frozen=True)
class Overlay:
    """One case to draw: 3D images by modality and masks, all on one grid.

    Args:
        title: caption.
        images: volume per modality.
        reference: reference mask; non-zero is foreground. None where there is none.
        prediction: predicted mask.
        spacing: voxel size in mm, one value per array axis.
        axcodes: direction of each array axis, as from ``nibabel.aff2axcodes``. The letters in the pictures follow it.
        windows: per modality the values that are shown as black and as white; by default the 1st and 99th percentile.
        source: what made the prediction: the network and the modalities that it was given. Empty if it is not known.
        unused: modalities that the network was not given.
        regions: name -> values of the masks. Several regions get a colour and a switch each; without them, or with one,
            all of its voxels are outlined as one.
        case_id: the case; by default ``title``.
        affine: 4 x 4, from array indices to mm in the axes of DICOM (left, posterior, superior); by default the middle
            of the grid is the origin.
        dice: of the case, the mean over its regions; None where it is undefined or there is no reference.
        mask_path: file of the prediction, which a review names; None if it is not known.

    Raises:
        ValueError: the volumes are not 3D, have different shapes, ``spacing`` is not 3 finite positive values, or
            ``affine`` is not 4 x 4.
    """

    title: str
    images: Mapping[str, NDArray[Any]]
    reference: NDArray[Any] | None
    prediction: NDArray[Any]
    spacing: Sequence[float]
    axcodes: Sequence[str] = "RAS"
    windows: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    source: str = ""
    unused: Sequence[str] = ()
    regions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    case_id: str = ""
    affine: NDArray[Any] | None = None
    dice: float | None = None
    mask_path: Path | None = None

    def __post_init__(self) -> None:
        shapes = {name: np.shape(volume) for name, volume in {**self.images, **self.value_masks()}.items()}
        if len(set(shapes.values())) > 1 or len(shapes["prediction"]) != 3:
            raise ValueError(f"{self.title}: images and masks must be 3D and share one grid, got shapes {shapes}.")
        if len(self.spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"{self.title}: spacing must hold 3 finite positive values in mm, got {self.spacing}.")
        if self.affine is not None and np.shape(self.affine) != (4, 4):
            raise ValueError(f"{self.title}: affine must be 4 x 4, got shape {np.shape(self.affine)}.")

    @property
    def name(self) -> str:
        """The case id, or the caption of a case without one."""
        return self.case_id or self.title

    @property
    def has_regions(self) -> bool:
        """Whether there are several regions, which are drawn and listed one by one."""
        return len(self.regions) > 1

    def value_masks(self) -> Volumes:
        """The reference mask, if any, then the predicted mask, with their values."""
        masks = {name: getattr(self, name) for name in OUTLINES}
        return {name: np.asarray(mask) for name, mask in masks.items() if mask is not None}

    def masks(self) -> Volumes:
        """The reference mask, if any, then the predicted mask, as booleans: where any region is."""
        values = [value for members in self.regions.values() for value in members]
        return {name: np.isin(mask, values) if values else mask > 0 for name, mask in self.value_masks().items()}

    def region_values(self) -> Volumes:
        """The reference mask, if any, then the predicted mask, with their values; 0 where no region is."""
        inside = self.masks()
        return {name: np.where(inside[name], mask, 0) for name, mask in self.value_masks().items()}

    def volumes_ml(self) -> dict[str, float]:
        """Volume of each mask in millilitres; of several regions that of each, such as ``WT prediction``."""
        voxel_ml = float(np.prod(self.spacing)) / 1000
        if not self.has_regions:
            return {name: float(mask.sum() * voxel_ml) for name, mask in self.masks().items()}
        return {
            f"{region} {name}": float(np.isin(mask, list(values)).sum() * voxel_ml)
            for region, values in self.regions.items()
            for name, mask in self.value_masks().items()
        }

    def window(self, modality: str) -> tuple[float, float]:
        """The values of an image that are shown as black and as white."""
        image = np.asarray(self.images[modality], dtype=float)
        finite = image[np.isfinite(image)]
        low, high = self.windows.get(modality) or (np.percentile(finite, (1, 99)) if finite.size else (0, 0))
        return float(low), float(high)


def viewing_orientation(overlay: Overlay) -> tuple[Volumes, Volumes, NDArray[Any]]:
    """Masks, images and voxel size in mm with axes that run to the left, to anterior and to superior.

    A slice, drawn with its first axis to the right and its second axis up, is then in the radiological convention.
    """
    images = {name: np.asarray(image) for name, image in overlay.images.items()}
    step = np.asarray(overlay.spacing, dtype=float)[np.argsort(_orientation(overlay)[:, 0])]
    return to_view(overlay, overlay.masks()), to_view(overlay, images), step


def view_affine(overlay: Overlay) -> NDArray[Any]:
    """4 x 4, from indices of ``viewing_orientation`` to mm in the axes of DICOM (left, posterior, superior)."""
    from nibabel.orientations import inv_ornt_aff

    shape = np.shape(overlay.prediction)
    affine = _centred_affine(overlay) if overlay.affine is None else np.asarray(overlay.affine, dtype=float)
    return np.asarray(affine @ inv_ornt_aff(_orientation(overlay), shape))


def _centred_affine(overlay: Overlay) -> NDArray[Any]:
    """The affine of a grid whose middle is the origin."""
    directions = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([directions[code] for code in overlay.axcodes]) * np.asarray(overlay.spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(np.shape(overlay.prediction)) - 1) / 2)
    return affine


def to_view(overlay: Overlay, volumes: Mapping[str, NDArray[Any]]) -> Volumes:
    """Volumes on the grid of an overlay with the axes of ``viewing_orientation``."""
    from nibabel.orientations import apply_orientation

    return {name: apply_orientation(volume, _orientation(overlay)) for name, volume in volumes.items()}


def _orientation(overlay: Overlay) -> NDArray[Any]:
    from nibabel.orientations import axcodes2ornt

    return np.asarray(axcodes2ornt(tuple(overlay.axcodes), (("R", "L"), ("P", "A"), ("I", "S"))))


def largest_slice(masks: Mapping[str, NDArray[Any]], axis: int) -> int:
    """Index of the slice across ``axis`` with the largest reference area.

    Without a reference the prediction counts; without both it is the middle slice.
    """
    mask = next((mask for mask in masks.values() if mask.any()), masks["prediction"])
    area = mask.sum(axis=tuple(a for a in range(3) if a != axis))
    return int(area.argmax()) if area.any() else mask.shape[axis] // 2


def take_slice(volumes: Mapping[str, NDArray[Any]], index: int, axis: int) -> Volumes:
    """One slice of every volume; rows run up, columns to the right."""
    return {name: np.take(volume, index, axis).T for name, volume in volumes.items()}
