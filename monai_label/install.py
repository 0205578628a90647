# SPDX-License-Identifier: Apache-2.0
"""Write the folder from which MONAI Label serves this bundle: the app with the bundle, and studies of phantoms.

Run it with the Python of MONAI Label's environment, in the bundle's folder: ``python -m monai_label.install FOLDER``.
It downloads nothing. Trained weights and labels that are in the folder are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.cli.bundle_run import protected
from scripts.cli.config import read_config, set_value
from scripts.cli.trained_task import SETTINGS
from scripts.training.trained_network import trained_network
from scripts.utils.task_file import read_task

ROOT = Path(__file__).resolve().parents[1]
MODEL = "distilled_segmentation"
COPIED = ("configs", "scripts", "LICENSE", "metadata.json")
LAYOUT = {"ct": "{case}", "pet": "pet/{case}", "mr": "mr/{case}"}
# MONAI Label reads one inference config and one training config. It sets data and epochs by fixed ids.
OVERRIDES: dict[str, dict[str, Any]] = {
    "inference": {
        # Options that viewers show. A case without some modality is refused, unless a request sets allow_missing.
        "displayable_configs": {"allow_missing": False},
        "allow_missing": "@displayable_configs#allow_missing",
        # As the bundle itself prepares it. In another memory format masks differ by rounding.
        "network_def": {"_target_": "scripts.networks.deep_supervision.segmentation_network", "network": "@student"},
    },
    "train": {
        "output_dir": "$os.path.join(@bundle_root, 'runs', 'label')",
        "final_weights": "$os.path.join(@bundle_root, 'models', 'model.pt')",  # the next inference uses them
        # The server runs one training at a time. A lock would be held until the server ends.
        "locked": "",
        "overwrite": True,  # every training starts anew, with the labels that the store has by then
        "batch_size": 1,  # so that one label is enough
        "naming": [LAYOUT],
        "cases": "@train#dataset#data",  # set by MONAI Label
        "split": "$[@cases, []]",
        "lr_scheduler#total_iters": "@train#trainer#max_epochs",
        "train#preprocessing#naming": "@naming",
        "validate#preprocessing#naming": "@naming",
        "required#naming": "@naming",
        "required#root": "the label store",
    },
}


def install_app(folder: Path) -> Path:
    """Copy MONAI Label's app for bundles from its package and put ``app.py`` around it.

    Returns:
        The folder of the app.
    """
    app = folder / "apps" / "monaibundle"
    if not (app / "monaibundle.py").is_file():
        shutil.rmtree(app, ignore_errors=True)
        arguments = ["apps", "--download", "--name", app.name, "--output", str(app.parent)]
        subprocess.run([sys.executable, "-m", "monailabel.main", *arguments], check=True)
        (app / "main.py").rename(app / "monaibundle.py")
    shutil.copy(Path(__file__).with_name("app.py"), app / "main.py")
    return app


def install_bundle(app: Path, weights: Path) -> Path:
    """Copy the bundle into the app. Existing weights are kept.

    Its configs get the ``OVERRIDES``, and the network and the settings that the weights were trained with.

    Returns:
        The folder of the bundle.
    """
    bundle = app / "model" / MODEL
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, bundle / name, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, bundle / name)
    target = bundle / "models" / "model.pt"
    target.parent.mkdir(exist_ok=True)
    if not target.exists():  # else they may have been trained here
        shutil.copy(weights, target)
        task = weights.with_name(f"{weights.stem}.task.json")
        if task.is_file():
            shutil.copy(task, target.with_name("model.task.json"))
    trained = trained_settings(target)
    for name, overrides in OVERRIDES.items():
        config = {**read_config(name), **protected(trained)}
        if "network_def" in overrides:
            config["student"] = config["network_def"]
        for key, value in overrides.items():
            set_value(config, key, value)
        (bundle / "configs" / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return bundle


def trained_settings(weights: Path) -> dict[str, Any]:
    """The settings and the definition of the network in the record beside weights; empty without a record.

    Raises:
        ValueError: the record is damaged, or its network cannot be used.
    """
    task = read_task(weights) or {}
    network = {"network_def": trained_network(task["network"], weights)} if "network" in task else {}
    return {**{key: task[key] for key in SETTINGS if key in task}, **network}


def install_studies(folder: Path, cases: int) -> Path:
    """Write phantoms in the layout of MONAI Label: CT files on top, PET and MR in sub folders with the same names.

    Returns:
        The folder of the studies.
    """
    phantoms, studies = folder / "phantoms", folder / "studies"
    arguments = ["phantom", "--cases", str(cases), "--output-dir", str(phantoms)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "scripts", *arguments], cwd=ROOT, check=True)
    for case in sorted(phantoms.glob("PHANTOM_*")):
        for key, name in (("ct", "CT_image"), ("pet", "PET_image"), ("mr", "MR_T1_image")):
            target = studies / LAYOUT[key].format(case=f"{case.name}.nii.gz")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(case / f"{name}.nii.gz", target)
    return studies


def main() -> None:
    """Install the app, the bundle and the studies."""
    parser = argparse.ArgumentParser(
        prog="python -m monai_label.install",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="folder for the app and the studies")
    parser.add_argument("--cases", type=int, default=3, help="number of phantoms (default %(default)s)")
    parser.add_argument(
        "--weights", type=Path, default=ROOT / "models" / "model.pt", help="weights to serve (default %(default)s)"
    )
    args = parser.parse_args()
    folder = args.folder.resolve()
    install_bundle(install_app(folder), args.weights)
    install_studies(folder, args.cases)


if __name__ == "__main__":
    main()
