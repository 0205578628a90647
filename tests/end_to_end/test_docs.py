# SPDX-License-Identifier: Apache-2.0
"""The documents say what is there: links, commands, the reading order, the house rules that can be counted."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from scripts.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted((ROOT / "scripts").rglob("*.py"))


def _commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_is_one_that_the_program_takes(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in _commands(page):
        words = shlex.split(command)
        if words[0] == "torchrun":
            words = ["python", *words[words.index("-m") :]]
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), command
        elif words[:3] == ["python", "-m", "scripts"]:
            if words[3] not in ("phantom", "report"):
                assert main([*words[3:], "--dry-run"]) == 0, command
        elif words[:3] == ["python", "-m", "monai.bundle"] and "my_method" not in command:
            for name in re.findall(r"configs/[\w/]+\.json", command):
                assert (ROOT / name).is_file(), command
    capsys.readouterr()


def test_the_reading_order_is_at_most_six_files_and_700_lines() -> None:
    table = re.findall(
        r"^\| \d \| \[[^]]+\]\(([^)]+)\)", (ROOT / "docs/reading_order.md").read_text(), flags=re.MULTILINE
    )
    assert 1 <= len(table) <= 6
    assert sum(len((ROOT / "docs" / target).read_text().splitlines()) for target in table) <= 700


def test_the_readme_begins_with_the_two_commands() -> None:
    assert [line.split("#")[0].strip() for line in _commands(ROOT / "README.md")[:2]] == ["make demo", "make test"]


def test_public_losses_and_networks_keep_their_names() -> None:
    import scripts.losses
    import scripts.metrics
    import scripts.networks

    losses = (
        "SoftPredictionLoss AttentionMapLoss ChannelRelationLoss PixelRelationLoss TokenRankingLoss "
        "ContourletTextureLoss "
        "HierarchicalContextLoss MultiScalePriorLoss ContrastiveGraphLoss FeatureHintLoss ChannelWiseDivergence "
        "IntraClassVariationLoss CrossImageRelationLoss DISTLoss RegionAffinityLoss"
    )
    networks = "Student HDenseFormer UXNet SelectiveFusion SpaceChannelCascade AlignmentHeader SemanticAutoEncoder"
    for module, names in (
        (scripts.losses, losses),
        (scripts.networks, networks),
        (scripts.metrics, "surface_metrics FrechetSemanticDistance"),
    ):
        assert not [name for name in names.split() if not hasattr(module, name)]


def test_every_method_has_its_place_in_the_documents() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    for path in (ROOT / "configs" / "methods").glob("*.json"):
        assert f"(../configs/methods/{path.name})" in text


def test_nothing_loads_pickles() -> None:
    unsafe = re.compile(r"weights_only *= *False|pickle\.load|allow_pickle *= *True")
    for path in [*CODE, *(ROOT / "configs").rglob("*.json")]:
        assert not unsafe.search(path.read_text()), path


def test_no_tracked_file_is_over_20_mb() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        assert (ROOT / name).stat().st_size < 20e6, name


def test_data_configs_name_an_intensity_rule_for_every_modality() -> None:
    for path in (ROOT / "configs/data").glob("*.json"):
        spec = json.loads(path.read_text())
        assert set(spec["intensity"]) == set(spec["modalities"])
        assert all(set(layout) == set(spec["modalities"]) for layout in spec["naming"])


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)`", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []
