# SPDX-License-Identifier: Apache-2.0
"""The documents say what is there: links, commands, the reading order, the house rules that can be counted."""

from __future__ import annotations

import ast
import json
import re
import shlex
import statistics
import subprocess
from pathlib import Path

import pytest

from scripts.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted((ROOT / "scripts").rglob("*.py"))
# What each part of the house may import of the house: imports go down only.
ALLOWED = {
    "losses": {"losses"},
    "networks": {"networks"},
    "metrics": {"metrics"},
    "data": {"data"},
    "fusion": set(),
    "taps": set(),
    "distiller": {"fusion", "taps"},
    "gkd": {"checkpoint", "distiller", "networks"},
    "balance": {"checkpoint", "distiller"},
    "stages": set(),
    "checkpoint": set(),
    "teachers": {"checkpoint", "networks"},
    "tracking": {"handlers", "report"},
    "engines": {"checkpoint"},
    "conversion": {"engines", "manifest"},
    "parity": set(),
    "export": {"checkpoint", "conversion", "data", "engines", "manifest", "metrics", "parity"},
    "teacher_cache": {"checkpoint", "data"},
    "release": set(),
    "caching": {"checkpoint", "manifest", "metrics", "taps", "teacher_cache"},
}


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


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("scripts.")}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    part = path.relative_to(ROOT / "scripts").parts[0].removesuffix(".py")
    if part in ALLOWED:
        assert {name.split(".")[1] for name in _imports(path)} <= ALLOWED[part] | {"files"}


def test_files_and_functions_stay_small() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in CODE}
    assert max(lengths.values()) <= 400
    assert statistics.median(lengths.values()) <= 150
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 50, f"{path}: {node.name} has {lines} lines"


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
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)`", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []
