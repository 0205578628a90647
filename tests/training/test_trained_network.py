# SPDX-License-Identifier: Apache-2.0
"""The definition of a network beside weights is data: it names networks only, and none of its text is evaluated."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.training.trained_network import trained_network

UNET: dict[str, Any] = {
    "_target_": "monai.networks.nets.UNet", "channels": [4, 8], "strides": [2], "norm": ["group", {"num_groups": 2}]
}  # fmt: skip


def test_a_network_with_plain_values_and_parts_that_are_networks_is_taken() -> None:
    definition = {**UNET, "name": "50% @ home #1", "part": {"_target_": "torch.nn.PReLU", "init": 0.1}, "empty": None}
    assert trained_network(definition, "model.pt") == definition
    assert trained_network({"_target_": "SegResNet"}, "model.pt") == {"_target_": "monai.networks.nets.SegResNet"}


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ({"_target_": "os.system", "command": "touch RAN"}, "os.system is no network"),
        ({"_target_": "subprocess.Popen", "args": ["touch", "RAN"]}, "subprocess.Popen is no network"),
        ({"_target_": "builtins.eval", "source": "1"}, "builtins.eval is no network"),
        ({"_target_": "monai.networks.nets"}, "monai.networks.nets is no network"),
        ({"_target_": "torch.nn.init.xavier_normal_"}, "torch.nn.init.xavier_normal_ is no network"),
        ({"_target_": "monai.networks.nets.Missing"}, "monai.networks.nets.Missing is not installed here"),
        ({"_target_": "no_such_package.Net"}, "no_such_package.Net is not installed here"),
        ({**UNET, "part": [{"deep": {"_target_": "os.remove", "path": "x"}}]}, "os.remove is no network"),
        ({**UNET, "_mode_": "debug"}, "it has the key _mode_"),
        ({**UNET, "_requires_": {"_target_": "os.getcwd"}}, "it has the key _requires_"),
        ({**UNET, "channels": "$[4, __import__('os').system('touch RAN')]"}, "the value of channels is $[4,"),
        ({**UNET, "channels": ["@widths"]}, "is @widths, which depends on the training"),
    ],
)
def test_anything_else_is_refused_by_name_and_nothing_runs(
    definition: dict[str, Any], words: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^a/model\.task\.json: the network cannot be built: ") as refused:
        trained_network(definition, "a/model.pt")
    assert words in str(refused.value)
    assert str(refused.value).endswith("Name the network's definition with --network FILE.json.")
    assert not (tmp_path / "RAN").exists()
