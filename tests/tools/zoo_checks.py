# SPDX-License-Identifier: Apache-2.0
"""What the MONAI model zoo does with a bundle, for ``test_release.py``: run as a program, in the zoo's own folder.

``python -P zoo_checks.py NAME DATA`` expects ``models/NAME`` in the working directory, as in the zoo, and writes what
each step found, or the error that stopped it, into ``facts.json``. The bundle's code comes from its folder alone.
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
    """The schema lies where the zoo has put it before: nothing is downloaded."""
    monai.bundle.verify_metadata(meta_file=META, filepath=f"{BUNDLE}/eval/schema.json")


def properties() -> dict[str, list[str]]:
    """What the two workflows lack."""
    return {kind: _workflow(kind).check_properties() for kind in ("train", "inference")}


def shapes() -> None:
    """The network's input and output are those of metadata."""
    monai.bundle.verify_net_in_out(**NETWORK)


def torchscript() -> float:
    """Export the weights; the largest difference from the same network run by PyTorch."""
    monai.bundle.ckpt_export(filepath=EXPORTED, ckpt_file=WEIGHTS, **NETWORK)
    parser = monai.bundle.ConfigParser()
    parser.read_config(INFERENCE)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    image = torch.rand(1, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((torch.jit.load(EXPORTED).eval()(image) - network(image)).abs().max())


def loading() -> dict[str, list[str]]:
    """Per config: the tensors of ``monai.bundle.load``'s network that are not those of the file."""
    state, wrong = torch.load(WEIGHTS, weights_only=True), {}
    for kind in ("train", "inference"):
        network = monai.bundle.load(NAME, bundle_dir="models", workflow_type=kind, source="github", device="cpu")
        found = network.state_dict()
        wrong[kind] = [key for key in {**found, **state} if not torch.equal(found[key], state[key])]
    return wrong


def inference() -> None:
    """Segment ``DATA`` into ``masks``."""
    workflow = _workflow("inference", dataset_dir=DATA, output_dir="masks", threads=1, device=torch.device("cpu"))
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def code() -> list[str]:
    """Where the bundle's code came from; the last step."""
    return sorted(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "scripts")


def main() -> None:
    """Run every step, whatever the others do."""
    # An editable install of the bundle, such as that of `make env`, is found by a finder of its own.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
    sys.path.insert(0, BUNDLE)
    facts: dict[str, Any] = {}
    steps: list[Callable[[], Any]] = [metadata, properties, shapes, torchscript, loading, inference, code]
    for step in steps:
        try:
            facts[step.__name__] = step()
        except Exception:
            facts[step.__name__] = traceback.format_exc()
    with open("facts.json", "w", encoding="utf-8") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main()
