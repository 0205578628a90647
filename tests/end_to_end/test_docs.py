# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: links, commands, the reading order, and rules for files that a search can check."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks.__main__ import build_parser as benchmark_parser
from scripts.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "SECURITY.md",
            "CHANGELOG.md",
            "configs/methods/README.md",
            "configs/teachers/README.md",
        )
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CODE = sorted((ROOT / "scripts").rglob("*.py"))
NO_DRY_RUN = ("phantom", "report")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def bash_commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, without comments; a quoted text may span lines."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        command = ""
        for line in block.replace("\\\n", " ").splitlines():
            if not command and (not line.strip() or line.startswith("#")):
                continue
            command = f"{command}\n{line}" if command else line.split("  #")[0].strip()
            if command.count("'") % 2 == 0:
                commands.append(command)
                command = ""
        assert not command, f"{page_id(page)}: a quotation is not closed in {command}"
    return commands


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_to_a_file_and_to_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), f"{page_id(page)} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page_id(page)} links to {link}: no such heading"


def write_planned(folder: Path, name: str) -> None:
    """What ``plan`` and a training with its task would leave for the commands after them."""
    task = json.loads((folder / "task.json").read_text())
    task |= {"intensity": dict.fromkeys(task["modalities"], "zscore"), "spacing": [1, 1, 1], "patch": [64, 64, 64]}
    (folder / name).write_text(json.dumps(task))
    (folder / "RUNS" / "distilled").mkdir(parents=True, exist_ok=True)
    (folder / "RUNS" / "distilled" / "model.task.json").write_text(json.dumps(task))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_in_the_documents_is_one_that_the_program_takes(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:`(\w+\.json)`:\n\n)?```json\n(\{.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for name, block in blocks:
        (tmp_path / (name or "mine.json")).write_text(block, encoding="utf-8")  # the file that the page's commands name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for command in bash_commands(page):
        if command.startswith("("):  # a subshell that writes a table
            continue
        words = shlex.split(command)
        if words[0] == "torchrun":
            words = ["python", *words[words.index("-m") :]]
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), command
        elif words[:3] == ["python", "-m", "scripts"]:
            if words[3] == "plan" and "--output" in words:
                write_planned(tmp_path, words[words.index("--output") + 1])
            if words[3] not in NO_DRY_RUN:
                assert main([*words[3:], *([] if "--dry-run" in words else ["--dry-run"])]) == 0, command
        elif words[:3] == ["python", "-m", "benchmarks"]:
            assert benchmark_parser(words[3]).parse_args(words[3:]), command
        elif words[:3] == ["python", "-m", "monai.bundle"] and "my_method" not in command:
            for name in re.findall(r"configs/[\w/]+\.json", command):
                assert (ROOT / name).is_file(), command
    capsys.readouterr()


def test_the_reading_order_has_at_most_six_files() -> None:
    text = (ROOT / "docs/reading_order.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \d \| \[[^]]+\]\(([^)]+)\)", text, flags=re.MULTILINE)
    assert 1 <= len(table) <= 6
    assert all((ROOT / "docs" / target).is_file() for target in table)


def test_the_readme_begins_with_the_two_commands() -> None:
    assert bash_commands(ROOT / "README.md")[:2] == ["make demo", "make test"]


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


def test_every_method_is_in_the_table_of_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs" / "methods").glob("*.json"):
        assert f"(../configs/methods/{path.name})" in text


def test_every_package_is_described_in_the_architecture() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    described = re.findall(r"^## (\w+)$", text, flags=re.MULTILINE)
    assert sorted(described) == sorted(path.parent.name for path in (ROOT / "scripts").glob("*/__init__.py"))


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


def test_every_test_in_the_table_of_faults_exists() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)`", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []
