# SPDX-License-Identifier: Apache-2.0
"""The checks of the MONAI model zoo, as a program for ``test_release.py`` that runs in a folder with the zoo's layout.

``python -P zoo_checks.py NAME DATA`` expects ``models/NAME`` in the working directory, as in the zoo. It writes the
result of each check, or its traceback, to ``results.json``. The code of the bundle comes from ``models/NAME`` only.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import monai.bundle
import torch

NAME, DATA = sys.argv[1:]
BUNDLE = f"models/{NAME}"  # relative, as the zoo gives it
META, INFERENCE = f"{BUNDLE}/configs/metadata.json", f"{BUNDLE}/configs/inference.json"
WEIGHTS, EXPORTED = f"{BUNDLE}/models/model.pt", f"{BUNDLE}/models/verify_model.ts"
NETWORK = {"net_id": "network_def", "meta_file": META, "config_file": INFERENCE, "bundle_root": BUNDLE}


def _workflow(kind: str, **changes: Any) -> Any:
    return monai.bundle.create_workflow(
        workflow_type=kind, config_file=f"{BUNDLE}/configs/{kind}.json", meta_file=META,
        logging_file=f"{BUNDLE}/configs/logging.conf", bundle_root=BUNDLE, **changes,
    )  # fmt: skip


def metadata() -> None:
    """Verify the metadata. The schema exists already, as in the zoo, so that nothing is downloaded."""
    monai.bundle.verify_metadata(meta_file=META, filepath=f"{BUNDLE}/eval/schema.json")


def properties() -> dict[str, list[str]]:
    """The properties that the two workflows do not have."""
    return {kind: _workflow(kind).check_properties() for kind in ("train", "inference")}


def shapes() -> None:
    """Verify that the input and the output of the network are those of the metadata."""
    monai.bundle.verify_net_in_out(**NETWORK)


def torchscript() -> float:
    """Export the weights; returns the largest difference to PyTorch's output."""
    monai.bundle.ckpt_export(filepath=EXPORTED, ckpt_file=WEIGHTS, **NETWORK)
    parser = monai.bundle.ConfigParser()
    parser.read_config(INFERENCE)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    image = torch.rand(1, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((torch.jit.load(EXPORTED).eval()(image) - network(image)).abs().max())


def loading() -> dict[str, list[str]]:
    """By config, the tensors that ``monai.bundle.load`` does not load from the file of the weights."""
    state, different = torch.load(WEIGHTS, weights_only=True), {}
    for kind in ("train", "inference"):
        network = monai.bundle.load(NAME, bundle_dir="models", workflow_type=kind, source="github", device="cpu")
        loaded = network.state_dict()
        different[kind] = [key for key in {**loaded, **state} if not torch.equal(loaded[key], state[key])]
    return different


def inference() -> None:
    """Segment ``DATA`` into ``masks``."""
    workflow = _workflow("inference", dataset_dir=DATA, output_dir="masks", threads=1, device=torch.device("cpu"))
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def code() -> list[str]:
    """The files of all imported modules of the bundle; the last check."""
    return sorted(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "scripts")


def main() -> None:
    """Run every check, also after one that fails."""
    # `make env` installs the bundle in editable mode, which adds a finder for it.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
    sys.path.insert(0, BUNDLE)
    results: dict[str, Any] = {}
    checks: list[Callable[[], Any]] = [metadata, properties, shapes, torchscript, loading, inference, code]
    for check in checks:
        try:
            results[check.__name__] = check()
        except Exception:
            results[check.__name__] = traceback.format_exc()
    with open("results.json", "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
