# SPDX-License-Identifier: Apache-2.0
"""Train a small nnU-Net for a few steps, and predict by its own loader: run in a process with its environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

FEATURES, PATCH, STEPS = 4, 32, 12
PREDICTED = 2  # cases


def train(base: Path, folds: list[str]) -> Path:
    """Plan, preprocess and train dataset 1; returns the folder of the training."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.run.run_training import get_trainer_from_args

    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    path = base / "preprocessed" / "Dataset001_Phantom" / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    full = plans["configurations"]["3d_fullres"]
    full["patch_size"] = [PATCH] * 3
    arguments = full["architecture"]["arch_kwargs"]
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[key] = arguments[key][:4]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][:3]
    arguments.update(n_stages=4, features_per_stage=[FEATURES * 2**i for i in range(4)])
    path.write_text(json.dumps(plans))
    preprocess([1], configurations=("3d_fullres",), num_processes=(1,))
    os.environ.update({"nnUNet_n_proc_DA": "0"})  # augment in this process; planning refuses 0
    for fold in folds:
        trainer = get_trainer_from_args("1", "3d_fullres", int(fold), device=torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 3, STEPS, 1
        trainer.run_training()
    return Path(trainer.output_folder_base)


def predict(folder: Path, folds: list[str], images: Path, output: Path) -> None:
    """Predict with nnU-Net's own loader and files, with probabilities."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), tuple(folds))
    output.mkdir()
    cases = sorted({path.name[: -len("_0000.nii.gz")] for path in images.iterdir()})[:PREDICTED]
    inputs = [[str(images / f"{case}_000{channel}.nii.gz") for channel in range(3)] for case in cases]
    predictor.predict_from_files_sequential(inputs, [str(output / case) for case in cases], save_probabilities=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    base_folder, use_folds = Path(sys.argv[1]), sys.argv[2:]
    trained = train(base_folder, use_folds)
    predict(trained, use_folds, base_folder / "raw" / "Dataset001_Phantom" / "imagesTr", base_folder / "predicted")
    print(trained)
