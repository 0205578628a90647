# SPDX-License-Identifier: Apache-2.0
"""The model zoo's test of this bundle: a training of one epoch, the evaluation of its weights, and an inference.

The model zoo's ``ci/unit_tests/runner.py`` runs this file. ``utils`` is a module of the model zoo.
"""

import os
import shutil
import sys
import tempfile
import unittest

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from utils import check_workflow

BUNDLE = "models/sarcoma_ct_pet_mr_segmentation"
sys.path.insert(0, BUNDLE)  # its configs name code in scripts/
SMALL = {
    "bundle_root": BUNDLE,
    "threads": 2,
    "spacing": [4.0, 4.0, 4.0],
    "patch": [32, 32, 32],
    "student_features": [8, 16, 24, 32],
}
TRAIN = {**SMALL, "max_epochs": 1, "val_interval": 1}
INFER = {"bundle_root": BUNDLE, "threads": 2, "engine": "torch"}  # by the shipped weights


def make_cohort(folder, patients=5, shape=(48, 48, 40)):
    """Write CT, PET, MR and a reference mask of patients as the soft-tissue sarcoma cohort names them."""
    rng = np.random.default_rng(0)
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    mask = np.zeros(shape)
    mask[16:30, 16:30, 12:24] = 1
    for number in range(1, patients + 1):
        volumes = {
            "CT_image": (rng.normal(0, 100, shape) + 40 * mask).astype(np.int16),
            "PET_image": (rng.uniform(0, 2, shape) + 6 * mask).astype(np.float32),
            "MR_T1_image": (rng.uniform(100, 400, shape) + 500 * mask).astype(np.float32),
            "CT_mask": mask.astype(np.uint8),
        }
        case = os.path.join(folder, f"STS_{number:03d}")
        os.makedirs(case)
        for name, voxels in volumes.items():
            nib.save(nib.Nifti1Image(voxels, affine), os.path.join(case, f"{name}.nii.gz"))


def test_order(test_name1, test_name2):
    def get_order(name):
        return 1 if "train" in name else 2 if "infer" in name else 3

    return get_order(test_name1) - get_order(test_name2)


class TestSarcomaSeg(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.dataset_dir = os.path.join(self.folder, "data")
        make_cohort(self.dataset_dir)

    def tearDown(self):
        shutil.rmtree(self.folder)

    def workflow(self, workflow_type, configs, override):
        return ConfigWorkflow(
            workflow_type=workflow_type,
            config_file=[os.path.join(BUNDLE, f"configs/{name}.json") for name in configs],
            logging_file=os.path.join(BUNDLE, "configs/logging.conf"),
            meta_file=os.path.join(BUNDLE, "configs/metadata.json"),
            dataset_dir=self.dataset_dir,
            **override,
        )

    def test_train_eval_config(self):
        output_dir = os.path.join(self.folder, "train")
        trainer = self.workflow("train", ["train"], {**TRAIN, "output_dir": output_dir})
        check_workflow(trainer, check_properties=True)
        weights = os.path.join(output_dir, "model.pt")
        assert os.path.isfile(weights)

        evaluation_dir = os.path.join(self.folder, "evaluation")
        override = {**TRAIN, "output_dir": evaluation_dir, "weights": weights}
        validator = self.workflow("train", ["train", "evaluate"], override)
        check_workflow(validator, check_properties=True)
        assert os.path.isfile(os.path.join(evaluation_dir, "summary.json"))

    def test_infer_config(self):
        output_dir = os.path.join(self.folder, "masks")
        inferrer = self.workflow("infer", ["inference"], {**INFER, "output_dir": output_dir})
        check_workflow(inferrer, check_properties=True)
        mask = nib.load(os.path.join(output_dir, "STS_001.nii.gz"))
        assert mask.shape == (48, 48, 40)


if __name__ == "__main__":
    loader = unittest.TestLoader()
    loader.sortTestMethodsUsing = test_order
    unittest.main(testLoader=loader)
