# SPDX-License-Identifier: Apache-2.0
"""Every shipped config loads, in every combination that the commands compose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, create_workflow, verify_metadata, verify_net_in_out

from scripts.cli.main import main
from scripts.networks.architecture import architecture_names

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.json"))
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.json"))
SMALLEST = {
    "architectures": {
        "unetr": {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
        "swinunetr": {"feature_size": 12, "window_size": 2, "depths": [1, 1, 1, 1]},
        "hdenseformer": {"features": 4, "depth": 4},
        "dynunet": {"filters": [4, 8, 16, 16]},
    }
}


def _composed(*names: str, **changes: object) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    parser.update(changes)
    return parser


@pytest.mark.parametrize(("name", "kind"), [("train", "train"), ("inference", "infer")])
def test_the_two_self_contained_configs_have_every_property_from_any_folder(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workflow = create_workflow(config_file=str(CONFIGS / f"{name}.json"), workflow_type=kind)
    assert workflow.check_properties() == []
    assert Path(workflow.bundle_root) == ROOT


def test_a_config_finds_its_bundle_in_a_process_that_only_knows_its_path(tmp_path: Path) -> None:
    # Without the installed package: monai.bundle run itself has to put the bundle on sys.path.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(CONFIGS / "train.json"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert "No data folder was given" in done.stderr


def test_metadata_at_the_root_is_the_one_in_configs() -> None:
    assert (ROOT / "metadata.json").read_text() == (CONFIGS / "metadata.json").read_text()


def test_metadata_passes_verify_metadata_with_the_local_schema() -> None:
    # verify_metadata downloads the schema unless it already lies at filepath.
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(ROOT / "tests/meta_schema_20240725.json"))


def test_verify_metadata_refuses_metadata_without_a_version(tmp_path: Path) -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    del metadata["version"]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(
            meta_file=str(tmp_path / "metadata.json"), filepath=str(ROOT / "tests/meta_schema_20240725.json")
        )


def test_the_changelog_of_metadata_is_that_of_the_changelog_file() -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    text = " ".join((ROOT / "CHANGELOG.md").read_text().split())  # lines may be wrapped
    assert metadata["version"] == next(iter(metadata["changelog"]))
    for version, entry in metadata["changelog"].items():
        assert f"## {version}" in text
        assert entry in text


def test_the_network_has_the_inputs_and_outputs_of_metadata() -> None:
    verify_net_in_out(
        net_id="network_def", meta_file=str(CONFIGS / "metadata.json"), config_file=str(CONFIGS / "inference.json"),
        device="cpu", n=2,
    )  # fmt: skip


# A method depends on the data set only through the modalities, so each is composed once per method and per data set.
@pytest.mark.parametrize(
    ("data", "method"), [("sts", method) for method in METHODS] + [(data, METHODS[0]) for data in DATA if data != "sts"]
)
def test_every_method_and_every_data_set_compose(data: str, method: str) -> None:
    parser = _composed(
        "train", f"data/{data}", "scale/small", "distill", f"methods/{method}", patch=[64, 32, 32], **SMALLEST
    )
    reference = parser["modalities"][0]
    # One Transformer and one CNN, both with halves that can be called apart: whatever a method asks for.
    parser["teacher_specs"] = {
        name: {"architecture": name, "modalities": [reference]} for name in ("hdenseformer", "dynunet")
    }
    if "headers_dir" in parser:
        parser["headers_dir"] = None
    loss, distiller = parser.get_parsed_content("loss"), parser.get_parsed_content("trained")
    assert set(loss.losses) == set(parser["loss"]["terms"])
    assert set(loss.losses), "a method without a term"
    assert distiller.teacher_names == ("hdenseformer", "dynunet")


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("architecture", architecture_names())
def test_every_architecture_can_be_a_teacher_at_every_scale(architecture: str, scale: str) -> None:
    parser = _composed("train", "data/sts", f"scale/{scale}", "teacher", architecture=architecture)
    assert parser.get_parsed_content("network_def").channels == [0, 1, 2]  # by default all modalities


def test_no_two_configs_share_a_block_of_five_equal_lines() -> None:
    lines = {}
    for path in sorted(CONFIGS.rglob("*.json")):
        kept = [line.strip().rstrip(",") for line in path.read_text().splitlines() if line.strip(" {}[],\n")]
        for i in range(len(kept) - 4):
            block = tuple(kept[i : i + 5])
            assert lines.setdefault(block, path) == path, f"{path} repeats {lines[block]}: {block}"


def test_every_line_that_a_verb_prints_composes_existing_files(capsys: pytest.CaptureFixture[str]) -> None:
    segment = ["segment", "--ct", "a", "--output", "m.nii.gz"]
    for verb in (["train"], ["teacher"], ["distill"], ["evaluate"], segment, ["export"]):
        data = [] if verb == segment else ["--dataset-dir", "x"]
        assert main([*verb, "--dry-run", *data]) == 0
        line = capsys.readouterr().out
        assert line.startswith("python -m monai.bundle run --config_file")
        assert "configs/scale/small.json" in line  # the scale of the shipped weights
        for name in line.split("[", 1)[1].split("]", 1)[0].replace('"', "").split(", "):
            assert Path(name).is_file()


def _targets(value: object) -> set[str]:
    """Every ``_target_`` in a config."""
    if isinstance(value, dict):
        own = {value["_target_"]} if isinstance(value.get("_target_"), str) else set()
        return own.union(*map(_targets, value.values()))
    return set().union(*map(_targets, value)) if isinstance(value, list) else set()


def test_no_component_has_the_name_of_a_module() -> None:
    # pydoc.locate, which MONAI uses, finds the module with Python 3.12, and the component of that name with 3.11.
    targets = set().union(*(_targets(json.loads(path.read_text())) for path in CONFIGS.rglob("*.json")))
    own = {target for target in targets if target.startswith("scripts.")}
    assert len(own) > 40
    modules = {target for target in own if ROOT.joinpath(*target.split(".")).with_suffix(".py").exists()}
    assert modules == set()
