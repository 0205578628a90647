# SPDX-License-Identifier: Apache-2.0
"""Enhanced (multi-frame) CT, PET and MR: one file, each frame with a position and a rescale of its own.

Read with the optional pydicom. Frames lie in the file in any order; here they are sorted by their positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from scripts.image_io.dicom_classes import ENHANCED, sop_class_of
from scripts.image_io.dicom_geometry import MAX_ROUNDING, geometry_numbers, slice_affine, spacing_warning, stack_affine
from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_values import PIXEL_KEYWORDS, Rescale, check_pixel_format, check_rescale
from scripts.image_io.headers import Affine, Header, check_affine, check_max_voxels

FRAMES = "PerFrameFunctionalGroupsSequence"
SHARED = "SharedFunctionalGroupsSequence"
RESCALE = "PixelValueTransformationSequence"
# What may differ between frames of one position, by the functional group that states it.
DIMENSIONS = (
    ("stacks", "FrameContentSequence", "StackID"),
    ("time points", "FrameContentSequence", "TemporalPositionIndex"),
    ("echoes", "MREchoSequence", "EffectiveEchoTime"),
    ("b-values", "MRDiffusionSequence", "DiffusionBValue"),
)
FRAME_TYPES = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")
# Elements of a single-frame PET that `scripts.image_io.dicom_suv` reads.
ATTENUATION, DECAY = ("AttenuationCorrected", "ATTN"), ("DecayCorrected", "DECY")
UCUM_UNITS = {"Bq/ml": "BQML", "g/ml{SUVbw}": "GML", "{SUVbw}g/ml": "GML"}


class EnhancedError(ValueError):
    """The file is refused. The message contains no patient data."""


class FrameGeometry(NamedTuple):
    """Geometry and rescale of a file's frames.

    Attributes:
        order: numbers of the frames (from 0) in the order of their positions.
        shape: columns, rows, frames.
        affine: voxel to world in mm, RAS.
        rescales: slope and intercept of each frame in the order of the file; None without a rescale.
        warnings: about unusual but usable headers.
    """

    order: list[int]
    shape: tuple[int, int, int]
    affine: Affine
    rescales: np.ndarray | None
    warnings: tuple[str, ...]


def read_enhanced_header(path: str, folder: str, modality: str, max_voxels: int | None = None) -> Header:
    """The header of a multi-frame file.

    Args:
        path: the file.
        folder: its folder, the header's path.
        modality: DICOM's ``CT``, ``PT`` or ``MR``.
        max_voxels: refuse a file whose header states more.

    Raises:
        ValueError: pydicom is not installed; the file is damaged, of another SOP class, or lacks positions; several
            stacks, orientations, time points, echoes or b-values; see also ``check_rescale`` and ``stack_affine``.
    """
    dataset = _read(path, stop_before_pixels=True)
    geometry = _geometry(dataset, path, modality, max_voxels)
    check_affine(geometry.affine, folder)
    return Header(folder, geometry.shape, geometry.affine, np.dtype(np.float32), warnings=geometry.warnings)


def frame_geometry(dataset: Any, path: str, modality: str) -> FrameGeometry:
    """Positions and rescale of a multi-frame data set; see ``read_enhanced_header`` for errors."""
    return _geometry(dataset, path, modality, None)


def read_enhanced_voxels(path: str) -> np.ndarray:
    """The voxels of a multi-frame file, ``columns rows frames``, frames in the order of their positions, rescaled.

    Raises:
        ValueError: see ``read_enhanced_header``; or pydicom cannot decode the file.
    """
    dataset = _read(path)
    geometry = frame_geometry(dataset, path, ENHANCED[str(dataset.SOPClassUID)])
    columns, rows, count = geometry.shape
    pixels = _decoded(dataset, path).reshape(-1, rows, columns)
    if len(pixels) != count:
        raise EnhancedError(f"{path} contains {len(pixels)} frames instead of {count}. Export it again.")
    voxels = np.empty((count, rows, columns), np.float32)
    for k, frame in enumerate(geometry.order):
        slope, intercept = (1.0, 0.0) if geometry.rescales is None else geometry.rescales[frame]
        voxels[k] = pixels[frame] * slope + intercept
    return voxels.T


def is_enhanced(file: str) -> bool:
    """Whether a file, which has been read as part of a series, is an enhanced multi-frame image."""
    return sop_class_of(file) in ENHANCED


def _read(path: str, stop_before_pixels: bool = False) -> Any:
    try:
        pydicom = dicom_package("pydicom")
    except ValueError as error:
        raise EnhancedError(f"{path} is multi-frame (enhanced) DICOM: {error}") from error
    try:
        return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
    except MemoryError:
        raise
    except Exception:  # pydicom raises many exception types on a damaged file, and quotes its content
        raise EnhancedError(f"{path} is a damaged DICOM file. Export it again.") from None


def _geometry(dataset: Any, path: str, modality: str, max_voxels: int | None) -> FrameGeometry:
    try:
        return _checked_geometry(dataset, path, modality, max_voxels)
    except (EnhancedError, MemoryError):
        raise
    except ValueError as error:
        if str(error).startswith(path):
            raise
        raise EnhancedError(f"{path} is a damaged DICOM file. Export it again.") from None
    except Exception:
        raise EnhancedError(f"{path} is a damaged DICOM file. Export it again.") from None


def _checked_geometry(dataset: Any, path: str, modality: str, max_voxels: int | None) -> FrameGeometry:
    if str(dataset.get("SOPClassUID", "")) not in ENHANCED:
        raise EnhancedError(
            f"{path} has several frames, but is no enhanced CT, PET or MR: the positions of its frames are unknown. "
            "Export it as single slices."
        )
    frames, shared = list(dataset.get(FRAMES) or []), list(dataset.get(SHARED) or [])
    count, rows, columns = (int(dataset.get(k) or 0) for k in ("NumberOfFrames", "Rows", "Columns"))
    if max_voxels is not None:
        check_max_voxels(path, (columns, rows, count), max_voxels)
    if not frames or len(frames) != count or min(rows, columns) < 1:
        raise EnhancedError(f"{path} states {count} frames, but describes {len(frames)}. Export it again.")
    check_pixel_format(lambda keyword: _text(dataset.get(keyword)), path)
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise EnhancedError(f"{path} contains RGB voxels. Give an image with one number per voxel.")
    groups = [[frame, *shared[:1]] for frame in frames]
    names = [f"{path} (frame {k + 1})" for k in range(count)]
    rescales = {
        name: Rescale(*(_text(_value(group, RESCALE, f"Rescale{part}")) for part in ("Slope", "Intercept", "Type")))
        for name, group in zip(names, groups, strict=True)
    }
    _refuse_dimensions(groups, path, DIMENSIONS[:1])
    positions, orientations, spacings = (
        np.array(
            [
                geometry_numbers(_text(_value(group, sequence, keyword)), keyword, name)
                for name, group in zip(names, groups, strict=True)
            ]
        )
        for sequence, keyword in (
            ("PlanePositionSequence", "ImagePositionPatient"),
            ("PlaneOrientationSequence", "ImageOrientationPatient"),
            ("PixelMeasuresSequence", "PixelSpacing"),
        )
    )
    for values, what in ((orientations, "orientations"), (spacings, "pixel sizes")):
        if np.ptp(values, axis=0).max() > MAX_ROUNDING:
            raise EnhancedError(f"{path} contains frames of several {what}. Export one of them as its own series.")
    _refuse_dimensions(groups, path, DIMENSIONS[1:])
    _refuse_repeated_positions(groups, positions, path)
    warnings = check_rescale(rescales, modality, path)
    thickness = _value(groups[0], "PixelMeasuresSequence", "SliceThickness")
    affine = slice_affine(positions[0], orientations[0], spacings[0], float(thickness or 1))
    normal = np.cross(orientations[0][:3], orientations[0][3:])
    order = np.argsort(positions @ normal, kind="stable").tolist()
    if count > 1:
        affine = stack_affine(affine, positions[order], path)
        stated = _text(_value(groups[0], "PixelMeasuresSequence", "SpacingBetweenSlices"))
        warnings += [text for text in [spacing_warning(stated, affine, path)] if text]
    has_rescale = any(rescale.slope for rescale in rescales.values())
    factors = np.array([[float(r.slope), float(r.intercept)] for r in rescales.values()]) if has_rescale else None
    return FrameGeometry(order, (columns, rows, count), affine, factors, tuple(warnings))


def _value(groups: Sequence[Any], sequence: str, keyword: str) -> Any:
    """A functional group's element: the frame's own, else the shared one; None if neither has it."""
    for group in groups:
        items = group.get(sequence)
        value = items[0].get(keyword) if items else None
        if value not in (None, ""):
            return value
    return None


def _text(value: Any) -> str:
    """A value as DICOM writes it; several values with backslashes between them."""
    if value is None:
        return ""
    return str(value).strip() if isinstance(value, str) or not hasattr(value, "__len__") else "\\".join(map(str, value))


def _refuse_dimensions(groups: Sequence[Sequence[Any]], path: str, dimensions: Sequence[tuple[str, str, str]]) -> None:
    for what, sequence, keyword in dimensions:
        values = {_text(_value(group, sequence, keyword)) for group in groups}
        if len(values) > 1:
            raise EnhancedError(
                f"{path} contains {len(values)} {what} ({keyword}). Export one of them as its own series."
            )


def _refuse_repeated_positions(groups: Sequence[Sequence[Any]], positions: np.ndarray, path: str) -> None:
    """Name what the frames of one position differ in, if a frame type does; ``stack_affine`` refuses the others."""
    if len(np.unique(np.round(positions, 3), axis=0)) == len(positions):
        return
    for sequence in FRAME_TYPES:
        for keyword in ("FrameType", "ComplexImageComponent"):
            types = {_text(_value(group, sequence, keyword)) for group in groups}
            if len(types) > 1:
                raise EnhancedError(f"{path} contains {len(types)} frame types ({keyword}). Export one of them alone.")
    raise EnhancedError(
        f"{path} contains several frames at one position, such as time points, echoes or b-values. Export one of them "
        "as its own series."
    )


def _decoded(dataset: Any, path: str) -> np.ndarray:
    """Stored values of all frames; bits above ``BitsStored`` do not count."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        pixels = np.asarray(dataset.pixel_array)
    except MemoryError:
        raise
    except Exception:  # pydicom and its decoders raise many exception types
        if syntax.is_compressed and not syntax.is_deflated:
            raise EnhancedError(
                f"{path} is damaged, or compressed so that pydicom cannot decode it here ({syntax.name}). Export it "
                "without compression, or install pylibjpeg."
            ) from None
        raise EnhancedError(f"{path} is truncated or damaged. Copy or export it again.") from None
    allocated, stored = (int(dataset.get(keyword)) for keyword in PIXEL_KEYWORDS[:2])
    if pixels.dtype.kind in "iu" and stored < allocated == 8 * pixels.dtype.itemsize:
        pixels = (pixels << (allocated - stored)) >> (allocated - stored)
    return pixels


def pet_elements(dataset: Any) -> Any:
    """An enhanced PET's data set, with the elements that SUV needs as a single-frame PET has them.

    - Units from the real world value mapping that agrees with the rescale, or from the rescale's type,
    - ``CorrectedImage`` from ``AttenuationCorrected`` and ``DecayCorrected``,
    - the time to which the images are decay-corrected (``DecayCorrectionDateTime``) as the start of the scan.

    Elements of a legacy converted image are in a sequence of their own.
    """
    flat = dicom_package("pydicom").Dataset()
    flat.update(dataset)
    for item in dataset.get("UnassignedSharedConvertedAttributesSequence") or []:
        for element in item:
            if element.tag not in flat:
                flat.add(element)
    groups = [*list(dataset.get(FRAMES) or [])[:1], *list(dataset.get(SHARED) or [])[:1]]
    if "Units" not in flat:
        flat.Units = _units(groups)
    corrections = {code: str(flat.get(keyword) or "") for keyword, code in (ATTENUATION, DECAY)}
    if "CorrectedImage" not in flat and any(corrections.values()):
        flat.CorrectedImage = [code for code, applied in corrections.items() if applied == "YES"] or ["NONE"]
    if "DecayCorrection" not in flat and corrections["DECY"] == "YES":
        corrected_to = str(flat.get("DecayCorrectionDateTime") or "")
        flat.DecayCorrection = "START"
        if corrected_to:
            for keyword in ("SeriesDate", "SeriesTime"):
                with suppress(KeyError):
                    del flat[keyword]
            _set_acquisition(flat, corrected_to)
    if "AcquisitionDate" not in flat and flat.get("AcquisitionDateTime"):
        _set_acquisition(flat, str(flat.AcquisitionDateTime))
    return flat


def _units(groups: Sequence[Any]) -> str:
    """The unit of the rescaled values: that of a mapping with the same slope and intercept, else the rescale's type."""
    ends = (("Slope", 1.0), ("Intercept", 0.0))
    rescale = [float(_value(groups, RESCALE, f"Rescale{end}") or default) for end, default in ends]
    for mapping in [each for group in groups for each in group.get("RealWorldValueMappingSequence") or []]:
        stated = [mapping.get(f"RealWorldValue{end}") for end, _ in ends]
        if "RealWorldValueLUTData" in mapping or not all(map(_same, stated, rescale)):
            continue
        codes = mapping.get("MeasurementUnitsCodeSequence")
        unit = UCUM_UNITS.get(str(codes[0].get("CodeValue", "")) if codes else "")
        if unit:
            return unit
    return _text(_value(groups, RESCALE, "RescaleType"))


def _same(stated: Any, number: float) -> bool:
    return stated in (None, "") or math.isclose(float(stated), number, rel_tol=1e-5, abs_tol=1e-9)


def _set_acquisition(flat: Any, text: str) -> None:
    """Set the date and time of the acquisition from DICOM's DT, in the time zone of the data set.

    If only the DT states its offset from UTC, it becomes that of the data set.
    """
    parts = re.fullmatch(r"(\d{8})(\d{2,6})(?:\.\d{1,6})?([+-]\d{4})?", text.strip())
    if parts is None:  # `scripts.image_io.dicom_suv` refuses it
        flat.AcquisitionDate, flat.AcquisitionTime = text[:8], text[8:]
        return
    date, clock, own = parts.groups()
    zone = str(flat.get("TimezoneOffsetFromUTC") or "").strip()
    if own and not zone:
        flat.TimezoneOffsetFromUTC = own
    elif own != zone and own and re.fullmatch(r"[+-]\d{4}", zone):
        moment = datetime.strptime(f"{date}{clock:0<6}{own}", "%Y%m%d%H%M%S%z")
        local = moment.astimezone(datetime.strptime(zone, "%z").tzinfo)
        date, clock = f"{local:%Y%m%d}", f"{local:%H%M%S}"
    flat.AcquisitionDate, flat.AcquisitionTime = date, clock
