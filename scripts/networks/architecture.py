# SPDX-License-Identifier: Apache-2.0
"""Architectures: one file each in configs/teachers, with the network, its sizes and the layers to tap."""

from __future__ import annotations

import inspect
import json
import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

from scripts import bundle_root
from scripts.utils.json_files import read_json

FOLDER = Path(bundle_root()) / "configs" / "teachers"
KINDS = ("cnn", "transformer")
SUFFIX = ".json"
STUDENT = "student"  # the architecture of the bundle's own student
PASSED_ON = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}  # a class without parameters of its own


@dataclass(frozen=True)
class Architecture:
    """What a file of configs/teachers says.

    Attributes:
        name: of the file, without its suffix.
        network: ``_target_`` and its arguments, as a MONAI config. It may refer to ``@in_channels``, ``@out_channels``
            and ``@patch`` (voxels).
        scales: name of a scale (configs/scale) -> further arguments. A scale that is not here has the arguments of
            ``network`` alone.
        layers: ``deep``, ``middle`` and ``fine`` -> dotted path of a layer whose output is ``B C H W D``.
        kind: one of ``KINDS``; None where the method need not know.
    """

    name: str
    network: Mapping[str, Any]
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    kind: str | None = None

    @property
    def fixed_patch(self) -> bool:
        """Whether the network takes patches of one size only, such as one that learns a position per cell.

        An argument ``patch`` decides how deep a network is, which then takes other sizes, too.
        """
        return any("@patch" in json.dumps(value) for key, value in self.network.items() if key != "patch")

    def definition(self, scale: str | None = None, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The network as a MONAI config.

        Args:
            scale: name of a scale.
            changes: arguments that replace those of the file.
        """
        return {**self.network, **self.scales.get(scale or "", {}), **(changes or {})}

    def build(
        self,
        in_channels: int,
        out_channels: int,
        patch: Sequence[int],
        scale: str | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """The network with new weights: ``B in_channels H W D`` -> logits ``B out_channels H W D``.

        Args:
            in_channels: number of modalities that it reads.
            out_channels: number of classes, including the background.
            patch: patch size in voxels.
            scale: name of a scale.
            changes: arguments that replace those of the file; plain values, in which nothing is evaluated.

        Raises:
            ValueError: the class does not exist, does not know an argument, or refuses its value.
        """
        _require_plain(changes or {}, self.name)
        definition = self.definition(scale, changes)
        require_arguments(f"The network of the architecture {self.name}", definition)
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "patch": list(patch)}
        try:
            network = ConfigParser({**sizes, "network": definition}).get_parsed_content("network")
        except RuntimeError as error:
            raise ValueError(f"The architecture {self.name} cannot be built: {error.__cause__ or error}") from error
        assert isinstance(network, nn.Module)
        return network


def require_arguments(owner: str, definition: Mapping[str, Any], package: str = "monai.networks.nets") -> None:
    """Refuse arguments that the class of a definition does not take.

    Args:
        owner: what the definition defines, for the error.
        definition: ``_target_`` and arguments.
        package: see ``parameters``.

    Raises:
        ValueError: there is no such class, or it has no such argument.
    """
    known = parameters(str(definition["_target_"]), package)
    if known is None:
        raise ValueError(f"{owner} names {definition['_target_']}, which cannot be imported.")
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return
    for key in definition:
        if not key.startswith("_") and key not in known:
            raise ValueError(f"{owner} has no argument {key!r}.{did_you_mean(key, known)}")


def _require_plain(value: Any, name: str) -> None:
    """Refuse text that MONAI would evaluate: changes may come from the record beside weights, which is data."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(item if str(key)[:1] != "_" else f"${key}", name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _require_plain(item, name)
    elif isinstance(value, str) and value[:1] in ("$", "@", "%"):
        raise ValueError(f"The changes of the architecture {name} hold {value!r}. Give plain values.")


def parameters(target: str, package: str = "monai.networks.nets") -> dict[str, inspect.Parameter] | None:
    """The parameters of a class by its dotted name, or its name in ``package``; None if there is none.

    Those of a class that passes all its arguments on are the parameters of its base class.
    """
    component = pydoc.locate(target if "." in target else f"{package}.{target}")
    if not callable(component):
        return None
    found = dict(inspect.signature(component).parameters)
    if isinstance(component, type) and {each.kind for each in found.values()} == PASSED_ON:
        return dict(inspect.signature(component.__bases__[0]).parameters)
    return found


def did_you_mean(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """A question with the nearest known name, for the end of an error; empty if none is near."""
    nearest = get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def architecture_names(kind: str | None = None) -> list[str]:
    """The architectures of configs/teachers, of one kind or all."""
    names = sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))
    return [name for name in names if kind is None or read_architecture(name).kind == kind]


def read_architecture(name: str) -> Architecture:
    """Read an architecture.

    Args:
        name: of a file in configs/teachers, or the path of a file that ends with ``.json``. The file names code
            (``_target_``, expressions): use only files that you trust.

    Raises:
        ValueError: there is no such architecture, or the file describes none.
    """
    path = Path(name) if name.endswith(SUFFIX) else FOLDER / f"{name}{SUFFIX}"
    if not path.is_file():
        if name.endswith(SUFFIX):
            raise ValueError(f"There is no architecture at {name}. Check the path.")
        names = architecture_names()
        raise ValueError(
            f"Unknown architecture {name!r}.{did_you_mean(name, names)} Choose one of {', '.join(names)}, or a file "
            "that describes one (docs/how_to/own_teacher.md)."
        )
    content = read_json(path, "architecture")
    _require_architecture(path, content)
    return Architecture(path.stem, **content)


def _require_architecture(path: Path, content: Any) -> None:
    keys = ("network", "scales", "layers", "kind")
    network = content.get("network") if isinstance(content, dict) else None
    if not (isinstance(network, dict) and network.get("_target_")):
        raise ValueError(f"{path} describes no architecture. Write a network as in configs/teachers.")
    for key in content:
        if key not in keys:
            raise ValueError(f"{path} has the unknown key {key!r}.{did_you_mean(key, keys)} Keys: {', '.join(keys)}.")
    require_kind(str(path), content.get("kind"))


def require_kind(owner: str, kind: str | None) -> None:
    """Refuse a kind that is not one of ``KINDS``.

    Raises:
        ValueError: it is another.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"{owner} is of the kind {kind!r}. Choose {' or '.join(KINDS)}, or leave it out.")


def changes_of(name: str, changes: Mapping[str, Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """The changes of one architecture among those of all, the config id ``architectures``; a file by path has none.

    Raises:
        ValueError: the changes name an architecture that configs/teachers does not have.
    """
    known = architecture_names() if changes else []
    for other in changes or {}:
        if other not in known:
            raise ValueError(
                f"architectures names {other!r}, which is none.{did_you_mean(other, known)} Known: {', '.join(known)}."
            )
    return (changes or {}).get(name, {})
