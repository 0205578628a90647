# SPDX-License-Identifier: Apache-2.0
"""Export a network's weights for other engines; only what answers as PyTorch does is written.

Of ``X.pt`` come, in the folder ``X_export`` beside it: ``model.onnx``, ``fp32.xml`` and ``.bin`` (OpenVINO, run in bf16
by a hint), ``int8.xml`` and ``.bin``, ``model.ts`` (TorchScript) and ``export.json``: the weights' sha256, the files'
own, what was measured and on which cases, what was refused and why, versions.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from scripts.data.cohorts.phantom import MODALITIES, write_phantoms
from scripts.export import converters as conversion
from scripts.export.parity import Inferer, compare, failures
from scripts.inference.engine_choice import RECORD, export_folder
from scripts.inference.engines import ONNXRuntimeEngine, OpenVINOEngine, cpu_has_bf16, optional
from scripts.networks.weights import load_weights
from scripts.utils.atomic_files import write_json
from scripts.utils.checksums import sha256
from scripts.utils.run_manifest import code_version, package_versions

logger = logging.getLogger(__name__)

Case = dict[str, Any]
FORMATS = ("onnx", "openvino", "torchscript")
PRECISIONS = ("fp32", "bf16", "int8")
PHANTOMS, PHANTOM_SEED = 4, 7
CALIBRATION_CASES = 40
FILES = {
    "onnxruntime fp32": ["model.onnx"],
    "openvino fp32": ["fp32.xml", "fp32.bin"],
    "openvino bf16": ["fp32.xml", "fp32.bin"],
    "openvino int8": ["int8.xml", "int8.bin"],
    "torchscript fp32": ["model.ts"],
}
PACKAGES = ("torch", "monai", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")


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
) -> dict[str, Any]:
    """Convert, compare with PyTorch on whole cases, and write what passes ``scripts.export.parity.GATES``.

    The folder is made beside its final name and then renamed, so that it never holds half of an export. If a float32
    model fails nothing is written: then something is wrong with the conversion, not with the number of bits.

    Args:
        network: of the weights' kind; gets the weights.
        weights: file of the weights.
        split: training and validation cases. Without validation cases seeded phantoms are compared on.
        preprocessing: of mode ``validate``: a case to ``image`` (M H W D) and ``label`` (1 H W D).
        inferer: sliding window of (image, network), whose ``roi_size`` is ``window``.
        modalities: the image's channels.
        window: size in voxels, the only one that the ONNX model takes.
        formats: some of ``FORMATS``.
        precisions: of OpenVINO, some of ``PRECISIONS``; fp32 is always made, since the others come from it.
        output_dir: where the folder is made, by default beside the weights, where engines look for it.
        threads: of the CPU; 0 is as many as PyTorch has.

    Returns:
        What ``export.json`` holds.

    Raises:
        ValueError: an unknown format or precision, int8 without training cases, a package that is not installed, or a
            model that failed (after those that passed have been written).
    """
    _check(formats, precisions, split)
    checksum = load_weights(network, weights)
    # Contiguous: in channels_last_3d PyTorch's own group normalisation is off by up to 1e-3, the gate of the logits.
    plain = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    target = export_folder(weights, output_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        made, (cases, source) = Path(temporary) / "made", _cases(split, modalities, Path(temporary))
        made.mkdir()
        engines = _convert(plain, made, len(modalities), window, formats, precisions, threads)
        if "int8" in precisions and "openvino" in formats:
            training = _volumes(split[0][:CALIBRATION_CASES], preprocessing, "calibrating")
            engines["openvino int8"] = _quantise(made, training, window, threads)
        measured = compare(plain, engines, _volumes(cases, preprocessing), inferer, len(cases))
        figures = {name: each.summary() for name, each in measured.items()}
        refused = _refused(figures)
        print(_table(figures, refused))
        record: dict[str, Any] = {
            "weights_sha256": checksum,
            "window": list(window),
            "modalities": list(modalities),
            "compared_on": {"source": source, "cases": [case["case_id"] for case in cases]},
            "torch": figures["torch fp32"],
            "models": {name: _entry(made, name, figures[name]) for name in engines if name not in refused},
            "refused": {name: {**figures[name], "because": reasons} for name, reasons in refused.items()},
            "bundle_version": code_version(),
            "versions": package_versions(PACKAGES),
        }
        if any(name.endswith("fp32") for name in refused):
            raise ValueError(f"Nothing was written: {_sentences(refused)}.")
        _remove_refused(made, record["models"])
        write_json(record, made / RECORD)
        _put(made, target)
    print(f"exported: {target}")
    if refused:
        raise ValueError(f"The others were written, but {_sentences(refused)}.")
    return record


def _check(formats: Sequence[str], precisions: Sequence[str], split: Sequence[Sequence[Case]]) -> None:
    """Refuse what cannot be done before anything has been done."""
    for name, known in [*((each, FORMATS) for each in formats), *((each, PRECISIONS) for each in precisions)]:
        if name not in known:
            raise ValueError(f"Unknown {name!r}: choose some of {', '.join(known)}.")
    needed = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["openvino"], "torchscript": []}
    for package in [package for each in formats for package in needed[each]]:
        optional(package)
    if "int8" in precisions and "openvino" in formats:
        optional("nncf")
        if not split[0] or not split[1]:
            raise ValueError("int8 is calibrated on training cases and judged on validation cases: give --dataset-dir.")


def _cases(split: Sequence[Sequence[Case]], modalities: Sequence[str], folder: Path) -> tuple[list[Case], str]:
    """What to compare on, and what to call it."""
    if split[0] or split[1]:
        cases = [case for case in split[1] if "label" in case]
        if not cases:
            raise ValueError("No validation case has a reference mask: choose another --fold.")
        return cases, "validation cases"
    cases = []
    for item in write_phantoms(folder / "phantoms", cases=PHANTOMS, seed=PHANTOM_SEED, progress=False):
        # Other data sets' modalities get the phantom's images in turn: all that counts is that every channel has one.
        files = {key: item.get(key, item[MODALITIES[i % len(MODALITIES)]]) for i, key in enumerate(modalities)}
        kept = {key: item[key] for key in ("case_id", "patient_id", "label")}
        cases.append({**kept, **files, "image": files[modalities[0]]})
    return cases, f"phantoms of seed {PHANTOM_SEED}, no patients (--dataset-dir was not given)"


def _volumes(cases: Sequence[Case], preprocessing: Callable[[Case], Any], name: str = "") -> Iterator[Any]:
    """The cases' volumes, one at a time."""
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
    """Every model but int8: its name -> an engine that runs its file."""
    threads = threads or torch.get_num_threads()
    engines: dict[str, nn.Module] = {}
    if "onnx" in formats:
        conversion.to_onnx(network, channels, window, folder / "model.onnx")
        engines["onnxruntime fp32"] = ONNXRuntimeEngine(folder / "model.onnx", threads)
    if "openvino" in formats:
        conversion.to_openvino(network, channels, window, folder / "fp32.xml")
        engines["openvino fp32"] = OpenVINOEngine(folder / "fp32.xml", "fp32", threads)
        if "bf16" in precisions and cpu_has_bf16():
            engines["openvino bf16"] = OpenVINOEngine(folder / "fp32.xml", "bf16", threads)
        elif "bf16" in precisions:
            logger.warning("bf16 is left out: this CPU has none, so that it cannot be judged here")
    if "torchscript" in formats:
        conversion.to_torchscript(network, folder / "model.ts")
        engines["torchscript fp32"] = torch.jit.load(str(folder / "model.ts"), map_location="cpu").eval()
    return engines


def _quantise(folder: Path, training: Iterator[Any], window: Sequence[int], threads: int) -> nn.Module:
    """The int8 model, calibrated on patches of training cases."""
    conversion.to_int8(folder / "fp32.xml", conversion.draw_patches(training, window), folder / "int8.xml")
    return OpenVINOEngine(folder / "int8.xml", "int8", threads or torch.get_num_threads())


def _refused(figures: Mapping[str, Mapping[str, float | None]]) -> dict[str, list[str]]:
    """The models that failed, and why."""
    found = {name: failures(name.split()[-1], each, figures["torch fp32"]) for name, each in figures.items()}
    return {name: reasons for name, reasons in found.items() if reasons and name != "torch fp32"}


def _sentences(refused: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name} was refused, since {' and '.join(reasons)}" for name, reasons in refused.items())


def _entry(folder: Path, name: str, figures: Mapping[str, float | None]) -> dict[str, Any]:
    """A model's line in the record."""
    return {"file": FILES[name][0], "files": {each: sha256(folder / each) for each in FILES[name]}, **figures}


def _remove_refused(folder: Path, models: Mapping[str, Any]) -> None:
    """Keep only the files of models that passed."""
    kept = {file for name in models for file in FILES[name]}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def _put(made: Path, target: Path) -> None:
    """Give the folder its final name, in place of an earlier one."""
    earlier = made.with_name("earlier")
    if target.exists():
        target.rename(earlier)
    made.rename(target)
    shutil.rmtree(earlier, ignore_errors=True)


def _table(figures: Mapping[str, Mapping[str, float | None]], refused: Mapping[str, Sequence[str]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| model | logits max abs | mask Dice | validation Dice | s per case | |", "|" + "---|" * 6]
    for name, each in figures.items():
        verdict = "" if name == "torch fp32" else "refused" if name in refused else "passed"
        keys = (
            ("logits_max_abs", ".2g"),
            ("mask_dice", ".5f"),
            ("validation_dice", ".4f"),
            ("seconds_per_case", ".2f"),
        )
        cells = ["undefined" if each[key] is None else format(each[key], form) for key, form in keys]
        lines.append(f"| {' | '.join([name, *cells, verdict])} |")
    return "\n".join(lines)
