# SPDX-License-Identifier: Apache-2.0
"""Make a folder from which MONAI Label serves this bundle: the app, the bundle in it, and studies of phantoms.

Run by the Python of MONAI Label's own environment, without any download: ``python monai_label/install.py FOLDER``.
What a clinic has made there, trained weights and labels, stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "distilled_segmentation"
COPIED = ("configs", "scripts", "LICENSE", "metadata.json")
LAYOUT = {"ct": "{case}", "pet": "pet/{case}", "mr": "mr/{case}"}
# MONAI Label reads one config of each kind and gives it data and epochs by the ids of their places.
CHANGES: dict[str, dict[str, Any]] = {
    "inference.json": {
        # Options that viewers show; absent modalities are refused unless a request asks for zeros in their place.
        "displayable_configs": {"allow_missing": False},
        "allow_missing": "@displayable_configs#allow_missing",
        # In the format in which the bundle runs it; in the other one masks would differ by rounding.
        "network_def": "$@student.to(memory_format=torch.channels_last_3d)",
    },
    "train.json": {
        "output_dir": "$os.path.join(@bundle_root, 'runs', 'label')",
        "final_weights": "$os.path.join(@bundle_root, 'models', 'model.pt')",  # the next inference takes them
        "locked": "",  # it trains one at a time; asked to within the server, that would hold the folder until it ends
        "overwrite": True,  # every training starts anew, from what the store holds by then
        "batch_size": 1,  # from the first label on
        "naming": [LAYOUT],
        "cases": "@train#dataset#data",  # what the store gives
        "split": "$[@cases, []]",
        "lr_scheduler#total_iters": "@train#trainer#max_epochs",
        "train#preprocessing#naming": "@naming",
        "validate#preprocessing#naming": "@naming",
        "required#naming": "@naming",
        "required#root": "the label store",
    },
}


def place_app(folder: Path) -> Path:
    """Copy MONAI Label's app for bundles out of its package; ours wraps it."""
    app = folder / "apps" / "monaibundle"
    if not (app / "monaibundle.py").is_file():
        shutil.rmtree(app, ignore_errors=True)
        arguments = ["apps", "--download", "--name", app.name, "--output", str(app.parent)]
        subprocess.run([sys.executable, "-m", "monailabel.main", *arguments], check=True)
        (app / "main.py").rename(app / "monaibundle.py")
    shutil.copy(ROOT / "label" / "app.py", app / "main.py")
    return app


def place_bundle(app: Path, weights: Path) -> Path:
    """Copy the bundle to where the app looks for it; weights that lie there already may be the clinic's and stay."""
    bundle = app / "model" / MODEL
    for name in COPIED:
        target = bundle / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    for name, changes in CHANGES.items():
        config = json.loads((ROOT / "configs" / name).read_text(encoding="utf-8"))
        if "network_def" in changes:
            config["student"] = config["network_def"]
        for key, value in changes.items():
            *parents, last = key.split("#")
            place = config
            for parent in parents:
                place = place[parent]
            place[last] = value
        (bundle / "configs" / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept = bundle / "models" / "model.pt"
    kept.parent.mkdir(exist_ok=True)
    if not kept.exists():
        shutil.copy(weights, kept)
    return bundle


def place_studies(folder: Path, cases: int) -> Path:
    """Phantoms as MONAI Label wants its studies: CT files on top, PET and MR in sub folders by the same names."""
    made, studies = folder / "phantoms", folder / "studies"
    arguments = ["phantom", "--cases", str(cases), "--output-dir", str(made)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "scripts", *arguments], cwd=ROOT, check=True)
    for case in sorted(made.glob("PHANTOM_*")):
        for key, name in (("ct", "CT_image"), ("pet", "PET_image"), ("mr", "MR_T1_image")):
            target = studies / LAYOUT[key].format(case=f"{case.name}.nii.gz")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(case / f"{name}.nii.gz", target)
    return studies


def main() -> None:
    """Place everything and print the server's command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=3, help="phantoms")
    parser.add_argument("--weights", type=Path, default=ROOT / "models" / "model.pt")
    args = parser.parse_args()
    folder = args.folder.resolve()
    app = place_app(folder)
    place_bundle(app, args.weights)
    place_studies(folder, args.cases)


if __name__ == "__main__":
    main()
