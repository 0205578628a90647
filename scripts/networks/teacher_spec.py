# SPDX-License-Identifier: Apache-2.0
"""The specification of a teacher: its keys, its files, and the errors for wrong ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from scripts.networks.architecture import did_you_mean, require_kind
from scripts.networks.zoo_bundle import bundle_weights
from scripts.utils.checksums import sha256
from scripts.utils.task_file import read_task, task_path
from scripts.utils.values import HEADS, TAPS, is_list, is_number, is_range, is_three, is_whole

# Exactly one of them says what answers.
ORIGINS = ("architecture", "network", "bundle", "label", "predictions", "nnunet")
CACHED_ONLY = ("predictions", "nnunet")  # origins that answer from a cache only
OWN_SETTINGS = ("intensity", "classes", "out_channels", "spacing", "patch")  # by default those of the task
IDENTITY = (*OWN_SETTINGS, "head")  # what a cache notes of a specification, as own_KEY
SPEC_KEYS = (*ORIGINS, "modalities", "weights", "sha256", "folds", "layers", "kind", "head", *OWN_SETTINGS)
Spec = Mapping[str, Any]


def weight_files(weights: str | Sequence[str] | None) -> list[str]:
    """The weights of a teacher as a list of files: none (random weights), one, or the members of an ensemble."""
    if not weights:
        return []
    return [weights] if isinstance(weights, str) else list(weights)


def spec_files(spec: Spec) -> list[str]:
    """The weights files of a teacher's specification; those of a bundle lie in its folder.

    Raises:
        ValueError: a bundle has no weights.
    """
    if spec.get("bundle") and not spec.get("weights"):
        return [bundle_weights(spec["bundle"])]
    return weight_files(spec.get("weights"))


def spec_channels(name: str, spec: Spec, all_modalities: Sequence[str]) -> list[int]:
    """The indices of a teacher's modalities among the image's channels.

    Raises:
        ValueError: the image has no such modality.
    """
    unknown = [each for each in spec["modalities"] if each not in all_modalities]
    if unknown:
        raise ValueError(
            f"The teacher {name} reads {unknown[0]}, which is no modality of the task. Its modalities must be one or "
            f"more of {', '.join(all_modalities)}."
        )
    return [list(all_modalities).index(each) for each in spec["modalities"]]


def spec_checksum(spec: Spec) -> str | None:
    """The checksum of a teacher's weights; None where it has none, or a file is missing."""
    files = spec_files(spec)
    if not all(Path(file).is_file() for file in files):
        return None  # a missing file is refused where it is loaded
    return join_checksums([sha256(file) for file in files])


def join_checksums(digests: Sequence[str]) -> str | None:
    """The checksum of a teacher: that of its file, or the sha256 of the checksums of an ensemble's files in order."""
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def own_settings(spec: Spec) -> dict[str, Any]:
    """What a teacher does otherwise than the task: the keys of ``OWN_SETTINGS`` that it has."""
    return {key: spec[key] for key in OWN_SETTINGS if spec.get(key) is not None}


def teacher_head(name: str, spec: Spec, task_head: str = HEADS[0]) -> str:
    """The head of a teacher's network: that of its specification, of the record of its weights, or of the task.

    Args:
        name: of the teacher, for errors.
        spec: its specification.
        task_head: of the task: a softmax over classes can teach regions, but regions cannot teach a softmax.

    Raises:
        ValueError: the networks of an ensemble have different heads, or the teacher cannot teach this task.
    """
    records = {file: read_task(file) for file in spec_files(spec)}
    heads = {record.get("head", HEADS[0]): file for file, record in records.items() if record is not None}
    if spec.get("head"):
        heads = {spec["head"]: ""}
    if len(heads) > 1:
        names = ", ".join(str(task_path(file)) for file in heads.values())
        raise ValueError(f"The networks of the teacher {name} have different heads ({names}). Use those of one head.")
    head = str(next(iter(heads), task_head))
    if head == "sigmoid" and task_head == "softmax":
        raise ValueError(
            f"The teacher {name} has a sigmoid head, whose regions do not tell the classes of this task apart. Use the "
            'head "sigmoid" for the task, or a teacher with a softmax.'
        )
    return head


def teacher_identity(spec: Spec) -> dict[str, Any]:
    """What a cache notes of a teacher beside its weights: the network's name, its modalities and its own settings."""
    bundle, own = spec.get("bundle"), {key: spec[key] for key in IDENTITY if spec.get(key) is not None}
    name = spec.get("architecture") or (Path(bundle).name if bundle else type(spec.get("network")).__name__)
    identity = {"architecture": name, "modalities": list(spec.get("modalities", ()))}
    return {**identity, **{f"own_{key}": value for key, value in own.items()}}


def check_spec(name: str, spec: Spec) -> None:
    """Check the name of a teacher, the keys of its specification, and the form of their values.

    Raises:
        ValueError: a name that no module or folder can have, an unknown key, a missing one, not exactly one of
            ``ORIGINS``, or a value of another form.
    """
    if name == "student":
        raise ValueError("No teacher can be named student. Name it: --teacher NAME=student=WEIGHTS.")
    if not name or set(name) & set("./\\") or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"No teacher can be named {name!r}: it has a dot or a slash, or PyTorch uses the name. Choose another: "
            "--teacher NAME=ARCHITECTURE=WEIGHTS."
        )
    for key in spec:
        if key not in SPEC_KEYS:
            hint = did_you_mean(key, SPEC_KEYS)
            raise ValueError(f"The teacher {name} has the unknown key {key!r}.{hint} Keys: {', '.join(SPEC_KEYS)}.")
    origins = [key for key in ORIGINS if spec.get(key)]
    if len(origins) != 1:
        given = " and ".join(origins) or "none"
        raise ValueError(f"The teacher {name} needs exactly one of {', '.join(ORIGINS)}; it has {given}.")
    if spec.get("label"):
        others = sorted(set(spec) - {"label"})
        if others:
            raise ValueError(f"The teacher {name} is the label, which takes no {', '.join(others)}. Remove them.")
        return
    for origin in CACHED_ONLY:
        others = [key for key in ("weights", "layers", *own_settings(spec)) if spec.get(key)]
        if spec.get(origin) and others:
            raise ValueError(
                f"The teacher {name} is described by {origin}, which takes no {', '.join(others)}. Remove them."
            )
    if spec.get("folds") and not spec.get("nnunet"):
        raise ValueError(f"The teacher {name} names folds, which only nnunet has. List its weights instead.")
    if not spec.get("modalities"):
        raise ValueError(f'The teacher {name} names no modalities. Add for example "modalities": ["ct", "pet"].')
    require_kind(f"The teacher {name}", spec.get("kind"))
    _check_own_settings(name, spec)


def _check_own_settings(name: str, spec: Spec) -> None:
    for key, is_right, form in (
        ("head", HEADS.__contains__, " or ".join(HEADS)),
        ("layers", _is_layers, f'an object such as {{"middle": "decoder.1"}}, with keys of {", ".join(TAPS)}'),
        ("classes", _is_classes, "its outputs for each class of the task, such as [0, 1] or [[0, 2], 1], each once"),
        ("out_channels", lambda value: is_whole(value) and value > 0, "a whole number of at least 1"),
        ("spacing", lambda value: is_three(value, is_number), "three sizes in mm, such as [1.5, 1.5, 2]"),
        ("patch", lambda value: is_three(value, is_whole), "three sizes in voxels, such as [96, 96, 96]"),
    ):
        if spec.get(key) is not None and not is_right(spec[key]):
            raise ValueError(f"The teacher {name} has the {key} {spec[key]!r}. Write {form}.")
    for modality, rule in _items(name, spec.get("intensity")):
        if modality not in spec["modalities"]:
            raise ValueError(
                f"The teacher {name} has an intensity for {modality}, which it does not read."
                f"{did_you_mean(modality, spec['modalities'])} It reads {', '.join(spec['modalities'])}."
            )
        if not is_range(rule):
            raise ValueError(
                f'The teacher {name} has the intensity {rule!r} of {modality}. Write [low, high] or "zscore".'
            )
    if spec.get("out_channels") and not (spec.get("architecture") and spec.get("classes")):
        raise ValueError(
            f"The teacher {name} has out_channels, the outputs of its architecture. Add architecture, and the classes "
            "among them."
        )


def _items(name: str, intensity: Any) -> list[tuple[str, Any]]:
    if intensity is not None and not isinstance(intensity, Mapping):
        raise ValueError(
            f'The teacher {name} has the intensity {intensity!r}. Write an object such as {{"ct": [-57, 164]}}.'
        )
    return list((intensity or {}).items())


def _is_layers(value: Any) -> bool:
    is_object = isinstance(value, Mapping) and set(value) <= set(TAPS)
    return is_object and all(isinstance(text, str) and text for text in value.values())


def _is_classes(value: Any) -> bool:
    if not is_list(value) or not value:
        return False
    groups = [each if is_list(each) else [each] for each in value]
    outputs = [output for group in groups for output in group]
    return (
        all(groups) and all(is_whole(output) and output >= 0 for output in outputs) and len({*outputs}) == len(outputs)
    )
