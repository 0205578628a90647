# SPDX-License-Identifier: Apache-2.0
"""What the bundle's tests for the MONAI model zoo import from the zoo's ``ci/unit_tests/utils.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow


def check_workflow(workflow: ConfigWorkflow, check_properties: bool = False) -> None:
    """Run a workflow; ValueError if it lacks a property."""
    workflow.initialize()
    missing = workflow.check_properties() if check_properties else []
    if missing:
        raise ValueError(f"The workflow lacks the properties {missing}.")
    workflow.run()
    workflow.finalize()


def export_config_and_run_mgpu_cmd(
    config_file: list[str],
    meta_file: str,
    logging_file: str,
    override_dict: dict[str, Any],
    output_path: str,
    ngpu: int,
) -> None:
    """Write the overridden config to a file and run it in several processes."""
    parser = ConfigParser()
    parser.read_config(config_file)
    parser.update(pairs=override_dict)
    ConfigParser.export_config_file(parser.config, output_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ngpu}"]
    command += ["-m", "monai.bundle", "run", "--config_file", output_path, "--meta_file", meta_file]
    environment = {**os.environ, "PYTHONPATH": override_dict["bundle_root"]}
    subprocess.run([*command, "--logging_file", logging_file], check=True, env=environment)
