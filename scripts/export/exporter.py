# SPDX-License-Identifier: Apache-2.0
"""Export a network's weights for other engines. A model is written only if it gives PyTorch's results.

For the weights ``X.pt`` the folder ``X_export`` next to them holds: ``model.onnx``; ``fp32.xml`` and ``.bin``
(OpenVINO, which also runs them in bf16); ``int8.xml`` and ``.bin``; ``model.ts`` (TorchScript); and ``export.json``:
the sha256 of the weights and of each file, the measurements and the cases they were made on, the refused models and
why, and the versions of packages.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from scripts.data.cohorts.phantom import MODALITIES, write_phantoms
from scripts.export import FORMATS, converters
from scripts.export.parity import REFERENCE_ENGINE, Figures, Inferer, compare_engines, gate_failures
from scripts.inference.engines import ExportedEngine
from scripts.networks.weights import load_weights
from scripts.runtime import EXPORT_PRECISIONS
from scripts.runtime.engines import ONNXRuntimeEngine, OpenVINOEngine, cpu_has_bf16, import_optional
from scripts.runtime.exported_files import PROBE, RECORD, export_folder, kept_logits, probe_image, small_probe
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.markdown import markdown_table
from scripts.utils.run_manifest import code_version, package_versions

logger = logging.getLogger(__name__)

Case = dict[str, Any]
PHANTOMS, PHANTOM_SEED = 4, 7
CALIBRATION_CASES = 40
FILES = {
    "onnxruntime fp32": ["model.onnx"],
    "openvino fp32": ["fp32.xml", "fp32.bin"],
    "openvino bf16": ["fp32.xml", "fp32.bin"],
    "openvino int8": ["int8.xml", "int8.bin"],
    "torchscript fp32": ["model.ts"],
}
REQUIRED_PACKAGES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["openvino"], "torchscript": []}
RECORDED_PACKAGES = ("torch", "monai", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")


def export(
    network: nn.Module,
    weights: str,
    split: Sequence[Sequence[Case]],
    preprocessing: Callable[[Case], Any],
    inferer: Inferer,
    modalities: Sequence[str],
    window: Sequence[int],
    formats: Sequence[str] = FORMATS,
    precisions: Sequence[str] = ("fp32", "bf16"),
    output_dir: str = "",
    threads: int = 0,
    regions: Sequence[Sequence[int]] | None = None,
    labels: Sequence[Sequence[float]] = ((0,), (1,)),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> dict[str, Any]:
    """Convert a network, compare each model with PyTorch on whole cases, and write those that pass.

    ``scripts.export.parity.GATES`` holds the limits. The folder is built under a temporary name and then renamed, so
    that it is always complete. If a float32 model fails, nothing is written: the conversion itself is then wrong, not
    the precision.

    Args:
        network: architecture of the weights; the weights are loaded into it.
        weights: file of the weights.
        split: training and validation cases. Without any, seeded phantoms are used for the comparison.
        preprocessing: of mode ``validate``: a case to ``image`` (M H W D) and ``label`` (1 H W D).
        inferer: sliding window, called with (image, network), whose ``roi_size`` is ``window``.
        modalities: the image's channels.
        window: size in voxels; the ONNX model runs on this size only.
        formats: some of ``FORMATS``.
        precisions: for OpenVINO, some of ``EXPORT_PRECISIONS``; fp32 is always exported, since the others are made from
            it.
        output_dir: parent of the folder; by default that of the weights, where engines look for it.
        threads: number of CPU threads; 0 takes PyTorch's setting.
        regions: the classes of each channel of a sigmoid head; None for a softmax over the classes.
        labels: per class the values of label files, which those of phantoms get.
        spacing: of the task in mm; phantoms of a fine one are made smaller.

    Returns:
        The contents of ``export.json``.

    Raises:
        ValueError: an unknown format or precision, int8 without training and validation cases, or a refused model; the
            models that passed have then been written, unless a float32 model was refused.
        UnavailableError: a package is not installed.
    """
    _check_options(formats, precisions, split)
    checksum = load_weights(network, weights)
    # Contiguous: in channels_last_3d PyTorch's own group normalisation is off by up to 1e-3, the limit of the logits.
    plain = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    target = export_folder(weights, output_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / "export"
        folder.mkdir()
        cases, source = comparison_cases(split, modalities, Path(temporary), labels, spacing)
        engines = _convert(plain, folder, len(modalities), window, formats, precisions, threads)
        if "int8" in precisions and "openvino" in formats:
            labelled = [case for case in split[0] if "label" in case]  # the preprocessing needs the label
            training = _volumes(labelled[:CALIBRATION_CASES], preprocessing, "calibrating")
            engines["openvino int8"] = _quantise(folder, training, window, threads)
        comparisons = compare_engines(plain, engines, _volumes(cases, preprocessing), inferer, len(cases), regions)
        figures = {name: comparison.figures() for name, comparison in comparisons.items()}
        refused = _refused(figures)
        print(_figures_table(figures, refused))
        record: dict[str, Any] = {
            "weights_sha256": checksum,
            "window": list(window),
            "modalities": list(modalities),
            "divisor": divisor_of(network),
            "compared_on": {"source": source, "cases": [case["case_id"] for case in cases]},
            "torch": figures[REFERENCE_ENGINE],
            "models": {name: _entry(folder, name, figures[name]) for name in engines if name not in refused},
            "refused": {name: {**figures[name], "because": reasons} for name, reasons in refused.items()},
            "bundle_version": code_version(),
            "versions": package_versions(RECORDED_PACKAGES),
        }
        if any(name.endswith("fp32") for name in refused):
            raise ValueError(f"Nothing was written: {_refusals(refused)}.")
        _remove_refused(folder, record["models"])
        record |= _write_probe(plain, len(modalities), window, folder / PROBE)
        write_json(record, folder / RECORD)
        _replace(folder, target)
    print(f"exported: {target}")
    if refused:
        raise ValueError(f"{_refusals(refused)}. The other models were written.")
    return record


def _check_options(formats: Sequence[str], precisions: Sequence[str], split: Sequence[Sequence[Case]]) -> None:
    """Refuse an impossible export before any work is done."""
    for names, known in ((formats, FORMATS), (precisions, EXPORT_PRECISIONS)):
        for name in names:
            if name not in known:
                raise ValueError(f"Unknown {name!r}. Choose from: {', '.join(known)}.")
    for package in [package for name in formats for package in REQUIRED_PACKAGES[name]]:
        import_optional(package)
    if "int8" in precisions and "openvino" in formats:
        import_optional("nncf")
        if not split[0] or not split[1]:
            raise ValueError(
                "int8 is calibrated on training cases and compared on validation cases: use --dataset-dir."
            )


def comparison_cases(
    split: Sequence[Sequence[Case]],
    modalities: Sequence[str],
    folder: Path,
    labels: Sequence[Sequence[float]],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[list[Case], str]:
    """The cases to compare on: validation cases, or phantoms where there is no data set.

    Args:
        split: training and validation cases.
        modalities: the image's channels.
        folder: phantoms are written here.
        labels: per class the values of label files; the phantoms' have those of the first two classes.
        spacing: of the task in mm. Below 1 mm the phantoms are made smaller, so that they have no more voxels.

    Returns:
        The cases, and what they are, for the record.

    Raises:
        ValueError: no validation case has a reference mask.
    """
    if split[0] or split[1]:
        cases = [case for case in split[1] if "label" in case]
        if not cases:
            raise ValueError("No validation case has a reference mask. Choose another --fold.")
        return cases, "validation cases"
    cases = []
    for item in write_phantoms(folder / "phantoms", cases=PHANTOMS, seed=PHANTOM_SEED, progress=False):
        for key in ("label", *MODALITIES):
            _scale(Path(item[key]), min(1.0, *spacing))
        # For modalities that the phantom does not have its images are used in turn: each channel needs some image.
        files: dict[str, str] = {}
        for i, key in enumerate(modalities):
            file = item.get(key) or item[MODALITIES[i % len(MODALITIES)]]
            if file in files.values():  # one file cannot be two modalities
                file = shutil.copyfile(file, Path(file).with_name(f"{key}.nii.gz"))
            files[key] = str(file)
        ids_and_label = {key: item[key] for key in ("case_id", "patient_id", "label")}
        _set_values(Path(item["label"]), labels)
        cases.append({**ids_and_label, **files, "image": files[modalities[0]]})
    return cases, f"phantoms of seed {PHANTOM_SEED}, no patients (--dataset-dir was not given)"


def _scale(path: Path, factor: float) -> None:
    """Make the grid of a file smaller in mm by a factor."""
    if factor < 1:
        image = nib.Nifti1Image.from_filename(path)
        affine = np.diag([factor, factor, factor, 1]) @ image.affine
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), path)  # type: ignore[attr-defined,no-untyped-call]


def _set_values(mask: Path, labels: Sequence[Sequence[float]]) -> None:
    """Give a phantom's mask, of the values 0 and 1, those of the first two classes."""
    image = nib.Nifti1Image.from_filename(mask)
    values = np.asarray([labels[0][0], labels[1][0]], dtype=np.float32)[np.asanyarray(image.dataobj).astype(int)]
    nib.save(nib.Nifti1Image(values, image.affine), mask)  # type: ignore[attr-defined,no-untyped-call]


def _volumes(cases: Sequence[Case], preprocessing: Callable[[Case], Any], name: str = "") -> Iterator[Any]:
    """The preprocessed cases, one at a time; with a name they have a progress bar."""
    for case in tqdm(cases, desc=name, unit="case", disable=not name):
        yield preprocessing(case)


def _convert(
    network: nn.Module,
    folder: Path,
    channels: int,
    window: Sequence[int],
    formats: Sequence[str],
    precisions: Sequence[str],
    threads: int,
) -> dict[str, nn.Module]:
    """Write every model but int8; name -> engine that runs its file."""
    threads = threads or torch.get_num_threads()
    engines: dict[str, nn.Module] = {}
    if "onnx" in formats:
        converters.to_onnx(network, channels, window, folder / "model.onnx")
        engines["onnxruntime fp32"] = ExportedEngine(ONNXRuntimeEngine(folder / "model.onnx", threads))
    if "openvino" in formats:
        converters.to_openvino(network, channels, window, folder / "fp32.xml")
        engines["openvino fp32"] = ExportedEngine(OpenVINOEngine(folder / "fp32.xml", "fp32", threads))
        if "bf16" in precisions and cpu_has_bf16():
            engines["openvino bf16"] = ExportedEngine(OpenVINOEngine(folder / "fp32.xml", "bf16", threads))
        elif "bf16" in precisions:
            logger.warning("bf16 is left out: this CPU has no bf16 instructions, so bf16 cannot be compared here")
    if "torchscript" in formats:
        converters.to_torchscript(network, channels, window, folder / "model.ts")
        engines["torchscript fp32"] = torch.jit.load(str(folder / "model.ts"), map_location="cpu").eval()
    return engines


def _quantise(folder: Path, training: Iterator[Any], window: Sequence[int], threads: int) -> nn.Module:
    """Write the int8 model, calibrated on patches of training cases; return the engine that runs it."""
    converters.to_int8(folder / "fp32.xml", converters.draw_patches(training, window), folder / "int8.xml")
    return ExportedEngine(OpenVINOEngine(folder / "int8.xml", "int8", threads or torch.get_num_threads()))


def _refused(figures: Mapping[str, Figures]) -> dict[str, list[str]]:
    """Name of each refused model -> reasons."""
    reasons = {
        name: gate_failures(name.split()[-1], each, figures[REFERENCE_ENGINE])
        for name, each in figures.items()
        if name != REFERENCE_ENGINE
    }
    return {name: each for name, each in reasons.items() if each}


def _refusals(refused: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name} was refused, since {' and '.join(reasons)}" for name, reasons in refused.items())


def divisor_of(network: nn.Module) -> list[int]:
    """The numbers per axis that sizes of the network's images must be multiples of."""
    divisor = getattr(network, "divisor", 16)
    return [divisor] * 3 if isinstance(divisor, int) else list(divisor)


def _write_probe(network: nn.Module, channels: int, window: Sequence[int], path: Path) -> dict[str, Any]:
    """Write PyTorch's logits of the probes, which every engine is compared with on every machine.

    Returns:
        The entries of the record: the sha256, and the size of the small probe.
    """

    def answer(size: Sequence[int]) -> Any:
        with torch.no_grad():
            return kept_logits(network(torch.from_numpy(probe_image(channels, size))).numpy())

    small, answers = small_probe(window), {"window": answer(window)}
    try:
        answers["small"] = answer(small)
    except (RuntimeError, ValueError, AssertionError):  # a network that runs on larger images only, or on one size
        small, answers["small"] = tuple(window), answers["window"]
    np.savez_compressed(path, **answers)
    return {"probe": sha256(path), "probe_size": list(small)}


def _entry(folder: Path, name: str, figures: Figures) -> dict[str, Any]:
    """The entry of a model in the record."""
    return {"file": FILES[name][0], "files": {file: sha256(folder / file) for file in FILES[name]}, **figures}


def _remove_refused(folder: Path, models: Mapping[str, Any]) -> None:
    """Delete the files that belong to no accepted model."""
    accepted_files = {file for name in models for file in FILES[name]}
    for path in folder.iterdir():
        if path.name not in accepted_files:
            path.unlink()


def _replace(folder: Path, target: Path) -> None:
    """Rename the folder to its final name, replacing an earlier export."""
    earlier = folder.with_name("earlier")
    if target.exists():
        target.rename(earlier)
    folder.rename(target)
    shutil.rmtree(earlier, ignore_errors=True)


def _figures_table(figures: Mapping[str, Figures], refused: Mapping[str, Sequence[str]]) -> str:
    """The measurements as a Markdown table."""
    columns = {
        "logits_max_abs": ("logits max abs", ".2g"),
        "mask_dice": ("mask Dice", ".5f"),
        "validation_dice": ("validation Dice", ".4f"),
        "seconds_per_case": ("s per case", ".2f"),
    }
    rows = []
    for name, each in figures.items():
        verdict = "" if name == REFERENCE_ENGINE else "refused" if name in refused else "passed"
        cells = [_format(each[key], form) for key, (_, form) in columns.items()]
        rows.append([name, *cells, verdict])
    return markdown_table(["model", *(title for title, _ in columns.values()), ""], rows)


def _format(value: float | None, form: str) -> str:
    return "undefined" if value is None else format(value, form)
