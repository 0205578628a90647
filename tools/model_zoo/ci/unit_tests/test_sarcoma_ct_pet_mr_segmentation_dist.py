# SPDX-License-Identifier: Apache-2.0
"""The model zoo's test of this bundle in several processes: a training of one epoch, on two CPU processes without GPUs.

The model zoo's ``ci/unit_tests/runner.py --dist True`` runs this file. ``utils`` is a module of the model zoo.
"""

import os
import shutil
import tempfile
import unittest

import torch
from test_sarcoma_ct_pet_mr_segmentation import BUNDLE, TRAIN, make_cohort
from utils import export_config_and_run_mgpu_cmd


class TestSarcomaSegMGPU(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.dataset_dir = os.path.join(self.folder, "data")
        make_cohort(self.dataset_dir, patients=10)  # every process validates at least one case

    def tearDown(self):
        shutil.rmtree(self.folder)

    def test_train_mgpu_config(self):
        output_dir = os.path.join(self.folder, "train")
        export_config_and_run_mgpu_cmd(
            config_file=[os.path.join(BUNDLE, f"configs/{name}.json") for name in ("train", "multi_gpu_train")],
            logging_file=os.path.join(BUNDLE, "configs/logging.conf"),
            meta_file=os.path.join(BUNDLE, "configs/metadata.json"),
            override_dict={**TRAIN, "threads": 1, "dataset_dir": self.dataset_dir, "output_dir": output_dir},
            output_path=os.path.join(self.folder, "train_override.json"),
            ngpu=torch.cuda.device_count() or 2,
        )
        assert os.path.isfile(os.path.join(output_dir, "model.pt"))


if __name__ == "__main__":
    unittest.main()
