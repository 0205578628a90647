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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.cli.bundle_run import protected, trusted_classes
from scripts.cli.config import read_config, set_value
from scripts.cli.main import build_parser
from scripts.cli.trained_task import SETTINGS, task_of
from scripts.runtime.regions import class_mask_values
from scripts.training.trained_network import trained_network
from scripts.utils.checksums import sha256
from scripts.utils.task_file import read_task, task_path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "distilled_segmentation"
COPIED = ("configs", "scripts", "LICENSE")
AUGMENTATION = ("flips", "rotation")  # of the training, which a further one follows
PHANTOM_FILES = {"ct": "CT_image", "pet": "PET_image", "mr": "MR_T1_image"}
STRICT = {"_target_": "scripts.networks.weights.strict_network", "network": "@student"}  # MONAI Label is not strict
# MONAI Label reads one inference config and one training config. It sets data and epochs by fixed ids.
OVERRIDES: dict[str, dict[str, Any]] = {
    "inference": {
        # Options that viewers show. A case without some modality is refused, unless a request sets allow_missing.
        "displayable_configs": {"allow_missing": False},
        "allow_missing": "@displayable_configs#allow_missing",
        # As the bundle itself prepares it: in another memory format masks differ by rounding.
        "network_def": {"_target_": "scripts.networks.deep_supervision.segmentation_network", "network": STRICT},
        # MONAI Label writes masks itself. They get the values of the label files, so that a corrected mask is a label.
        "postprocessing": {"_target_": "Compose", "transforms": "$[*@masks.transforms, @label_values]"},
        "label_values": {
            "_target_": "MapLabelValued",
            "keys": "pred",
            "orig_labels": "$list(range(len(@labels)))",
            "target_labels": "$regions.mask_values(@labels)",
            "dtype": "$torch.uint8 if all(0 <= each < 256 for each in regions.mask_values(@labels)) else torch.int32",
        },
    },
    "train": {
        "network_def": STRICT,
        # The weights of the app are trained further. Their record says which cases they know.
        "record#pretrained": "$@final_weights if os.path.isfile(@final_weights) else ''",
        "output_dir": "$os.path.join(@bundle_root, 'runs', 'label')",
        "final_weights": "$os.path.join(@bundle_root, 'models', 'model.pt')",  # the next inference uses them
        # The server runs one training at a time. A lock would be held until the server ends.
        "locked": "",
        "overwrite": True,  # every training starts anew, with the labels that the store has by then
        "batch_size": 1,  # so that one label is enough
        "cases": "@train#dataset#data",  # set by MONAI Label
        "split": "$[@cases, []]",
        "lr_scheduler#total_iters": "@train#trainer#max_epochs",
        "train#preprocessing#naming": "@naming",
        "validate#preprocessing#naming": "@naming",
        "required#naming": "@naming",
        "required#root": "the label store",
    },
}

WRAPPED = {
    "student": "network_def",
    "masks": "postprocessing",
}  # new id -> what an override of inference puts around it


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
    """Copy the bundle into the app. Existing weights are kept, and a line says so if they are others than ``weights``.

    Its configs get the ``OVERRIDES``, and the network and the settings that the weights were trained with; its metadata
    the labels and modalities of their task.

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
        record = task_path(weights)
        task_path(target).unlink(missing_ok=True)
        if record.is_file():
            shutil.copy(record, task_path(target))
    elif sha256(target) != sha256(weights):
        print(f"The app keeps its weights {target}. Remove them to serve {weights}.")
    task, network = trained_task(target), trained_definition(target)
    naming, record = [study_layout(task["modalities"])], read_task(target) or {}
    for name, overrides in OVERRIDES.items():
        known = read_config(name)
        augmentation = {key: record[key] for key in AUGMENTATION if key in record and key in known}
        config = {**known, **protected({**task, **network, **augmentation, "naming": naming})}
        config |= {key: config[wrapped] for key, wrapped in WRAPPED.items() if wrapped in overrides}
        for key, value in overrides.items():
            set_value(config, key, value)
        _write_json(config, bundle / "configs" / f"{name}.json")
    _write_json(app_metadata(read_config("metadata"), task), bundle / "configs" / "metadata.json")
    return bundle


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def trained_task(weights: Path) -> dict[str, Any]:
    """The settings of the task that weights were trained on, from the record beside them.

    Raises:
        ValueError: the record is damaged.
    """
    task = task_of(build_parser().parse_args(["segment", "--weights", str(weights)]))
    return {key: task[key] for key in SETTINGS}


def trained_definition(weights: Path) -> dict[str, Any]:
    """The definition of the network in the record beside weights, by its config id; empty without a record.

    Raises:
        ValueError: the record is damaged, or its network cannot be used.
    """
    task = read_task(weights) or {}
    return {"network_def": trusted_classes(trained_network(task["network"], weights))} if "network" in task else {}


def study_layout(modalities: Sequence[str]) -> dict[str, str]:
    """The layout of MONAI Label's studies: files of the first modality on top, of the others in folders below it."""
    return {key: f"{key}/{{case}}" if number else "{case}" for number, key in enumerate(modalities)}


def app_metadata(metadata: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's metadata for one task: MONAI Label takes the names and values of its labels from it.

    Args:
        metadata: of the bundle, for its own task.
        task: settings of another.

    Raises:
        ValueError: a value of the label files is no whole number, which MONAI Label requires.
    """
    values = class_mask_values(task["labels"], task["classes"], task["regions"])
    for name, value in values.items():
        if value != int(value):
            raise ValueError(f"MONAI Label requires whole numbers as labels, but {name} is {value:g} in labels.")
    names = {"0": "background", **{str(int(value)): name for name, value in values.items()}}
    inputs = dict(enumerate(task["modalities"]))
    title = f"Segmentation of {', '.join(values)} in {', '.join(task['modalities'])}"
    described = ", ".join(f"{value} {name}" for value, name in names.items())
    texts = {"task": title, "description": f"{title}, for research only", "label_classes": described}
    texts |= {"image_classes": f"channels: {', '.join(task['modalities'])}", "pred_classes": described}
    images, masks = (metadata["network_data_format"][key] for key in ("inputs", "outputs"))
    image = {**images["image"], "num_channels": len(inputs), "channel_def": {str(k): key for k, key in inputs.items()}}
    pred = {**masks["pred"], "num_channels": len(names), "channel_def": names}
    others = {key: value for key, value in metadata.items() if not key.endswith("_data_format")}  # of the teachers
    formats = {"inputs": {"image": image}, "outputs": {"pred": pred}}
    return {**others, **texts, "network_data_format": formats}


def install_studies(folder: Path, cases: int, modalities: Sequence[str]) -> Path:
    """Make the folder of the studies: files of the first modality on top, of others in sub folders with the same names.

    Phantoms are written into it if they have all of the modalities.

    Returns:
        The folder of the studies.
    """
    phantoms, studies = folder / "phantoms", folder / "studies"
    layout = study_layout(modalities)
    for pattern in layout.values():
        (studies / pattern).parent.mkdir(parents=True, exist_ok=True)
    if not set(modalities) <= set(PHANTOM_FILES):
        print(f"No phantoms have {', '.join(modalities)}. Put your studies into {studies}.")
        return studies
    arguments = ["phantom", "--cases", str(cases), "--output-dir", str(phantoms)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "scripts", *arguments], cwd=ROOT, check=True)
    for case in sorted(phantoms.glob("PHANTOM_*")):
        for key, pattern in layout.items():
            target = studies / pattern.format(case=f"{case.name}.nii.gz")
            if not target.exists():
                shutil.copy(case / f"{PHANTOM_FILES[key]}.nii.gz", target)
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
    bundle = install_bundle(install_app(folder), args.weights)
    install_studies(folder, args.cases, trained_task(bundle / "models" / "model.pt")["modalities"])


if __name__ == "__main__":
    main()
