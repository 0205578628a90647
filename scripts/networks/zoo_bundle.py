# SPDX-License-Identifier: Apache-2.0
"""A bundle of the MONAI model zoo as a teacher: its network and its weights."""

from __future__ import annotations

from pathlib import Path

from monai.bundle import ConfigParser
from torch import nn

CONFIGS = ("inference", "train")  # where a bundle defines its network, in this order
SUFFIXES = (".json", ".yaml", ".yml")
NETWORK = "network_def"
WEIGHTS = Path("models", "model.pt")


def bundle_weights(folder: str) -> str:
    """The weights of a bundle.

    Raises:
        ValueError: there is no such bundle, or it has none.
    """
    _require_folder(folder)
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"The bundle {folder} has no weights at {WEIGHTS}. Download the whole bundle.")
    return str(path)


def bundle_network(folder: str) -> nn.Module:
    """Build the network of a bundle, with new weights.

    MONAI evaluates the expressions of the bundle's config, and its ``_target_`` names code: use only bundles that you
    trust. Classes of the bundle's own Python files cannot be used, because its package is named as the one here.

    Args:
        folder: of the bundle, with ``configs/inference.json`` or ``configs/train.json`` (or ``.yaml``).

    Raises:
        ValueError: there is no such config, it has no ``network_def``, or the network cannot be built.
    """
    _require_folder(folder)
    paths = [Path(folder) / "configs" / f"{name}{suffix}" for name in CONFIGS for suffix in SUFFIXES]
    for path in filter(Path.is_file, paths):
        parser = ConfigParser()
        try:
            parser.read_config(str(path))
        except Exception as error:  # of the JSON and YAML readers
            raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}). Restore the bundle.") from error
        if NETWORK in parser:
            return _build(parser, path, folder)
    raise ValueError(
        f"The bundle {folder} has no {NETWORK} in configs/inference or configs/train (.json, .yaml). Describe its "
        'network under "network" instead.'
    )


def _require_folder(folder: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError(f"There is no bundle at {folder}. Check the path.")


def _build(parser: ConfigParser, path: Path, folder: str) -> nn.Module:
    parser["bundle_root"] = folder
    try:
        parser.parse(True)
        network = parser.get_parsed_content(NETWORK)
    except Exception as error:  # a foreign config may raise anything
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"The {NETWORK} of {path} cannot be built: {cause}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"The {NETWORK} of {path} is a {type(network).__name__}, not a network.")
    return network
