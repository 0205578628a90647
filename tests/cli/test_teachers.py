# SPDX-License-Identifier: Apache-2.0
"""The table of architectures against a network of MONAI that runs on real tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.networks.nets import SegResNet
from torch.utils.flop_counter import FlopCounterMode

from scripts.cli.main import main


def test_the_table_has_the_cost_and_the_layers_of_each_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.json"
    network = {"_target_": "SegResNet", "in_channels": "@in_channels", "out_channels": 5, "init_filters": 16}
    mine.write_text(json.dumps({"network": network, "layers": {"middle": "up_layers.0"}}))
    command = ["teachers", "--data", "hecktor21", "--set", "patch=[16,16,16]", "--architecture"]
    changes = ["--set", '+architectures#segresnet={"blocks_down": [1,1,1,1]}']
    assert main([*command, "segresnet", "hdenseformer", str(mine), *changes]) == 0
    lines = capsys.readouterr().out.splitlines()

    def row(name: str, kind: str, *options: int, **named: object) -> str:
        reference = SegResNet(3, *options, **named)  # type: ignore[arg-type]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            reference(torch.zeros(1, 2, 16, 16, 16))
        size = sum(parameter.numel() for parameter in reference.parameters()) / 1e6
        return f"| {name} | {kind} | {size:.2f} M | {counter.get_total_flops() / 1e9:.2f} |"

    assert lines[2] == row("segresnet", "cnn", 8, 2, 2, blocks_down=(1, 1, 1, 1)) + (
        " down_layers.3 | up_layers.0 | up_layers.2 |"
    )
    assert lines[3].startswith("| hdenseformer | transformer |  |  | encoder4 |")
    assert lines[4] == row(str(mine), "", 16, 2, 5) + "  | up_layers.0 |  |"
    assert lines[6] == "2 modalities, 2 classes, patch 16 x 16 x 16 voxels"
    assert lines[7].startswith(
        "hdenseformer: The architecture hdenseformer cannot be built: img_size must be divisible"
    )


def test_an_unknown_architecture_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["teachers", "--architecture", "vnet"])
    assert "vnet is none of dynunet, hdenseformer," in capsys.readouterr().err
