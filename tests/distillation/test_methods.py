# SPDX-License-Identifier: Apache-2.0
"""Every method of configs/methods: one short epoch on phantoms, and all of them in one distillation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from scripts.cli.main import main
from scripts.data.cohorts.phantom import write_phantoms
from scripts.report.curves import read_curves

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.json"))
PATCH = [32, 32, 16]
MODALITIES = ["ct", "pet", "mr"]
SMALL: dict[str, Any] = {
    "patch": PATCH,
    "spacing": [8.0, 8.0, 8.0],
    "student_features": [8, 8, 16, 16],
    "architectures": {"hdenseformer": {"features": 4, "depth": 4}, "dynunet": {"filters": [4, 8, 16, 16]}},
    "teacher_specs": {
        "transformer": {"architecture": "hdenseformer", "modalities": MODALITIES},
        "cnn": {"architecture": "dynunet", "modalities": MODALITIES},
    },
    "threads": 1,
}


def compose(*methods: str, **changes: Any) -> ConfigParser:
    parser = ConfigParser()
    names = ["train", "data/phantom", "scale/small", "distill", *(f"methods/{method}" for method in methods)]
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    untrained = {"headers_dir": None} if "gkd" in methods else {}
    parser.update({**SMALL, **untrained, **changes})
    return parser


def terms_of(method: str) -> list[str]:
    keys = json.loads((CONFIGS / "methods" / f"{method}.json").read_text())
    return [key.removeprefix("loss#terms#") for key in keys if key.startswith("loss#terms#")]


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(value, second[name]) for name, value in first.items()]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    write_phantoms(root, cases=5, seed=3, progress=False)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_one_epoch_changes_the_student_and_not_the_teachers(method: str, cohort: Path, tmp_path: Path) -> None:
    parser = compose(
        method, dataset_dir=str(cohort), output_dir=str(tmp_path), max_epochs=1, val_interval=2,
    )  # fmt: skip
    parser.get_parsed_content("initialize")
    distiller = parser.get_parsed_content("trained")
    student, teachers = state(distiller.student), state(distiller.teachers)
    adapters = state(distiller.adapters)
    parser.get_parsed_content("run")
    rows = read_curves(tmp_path / "curves.csv")
    terms = parser["loss"]["terms"]
    assert terms
    assert all(math.isfinite(rows[0][name]) for name in ("loss", *(f"loss/{term}" for term in terms)))
    assert not any(same(student, state(distiller.student)))
    assert not any(same(adapters, state(distiller.adapters)))
    assert all(same(teachers, state(distiller.teachers)))


def test_all_methods_together_add_up() -> None:
    patch = [32, 16, 16]
    image = torch.rand(2, 3, *patch, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, 1, *patch)
    label[:, :, 8:20, 4:10, 4:12] = 1
    parser = compose(*METHODS, patch=patch)
    distiller, loss = parser.get_parsed_content("trained"), parser.get_parsed_content("loss")
    torch.manual_seed(0)
    total = loss(distiller.train()(image), label)
    terms = {name for method in METHODS for name in terms_of(method)}
    assert set(loss.losses) == terms
    expected = loss.logged["segmentation"] + sum(loss.weights[name] * loss.logged[name] for name in terms)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(total.item())


# The weights of the authors' released code, by loss and tap. "soft" is the KL of the predictions at temperature 1.
RELEASED = {
    "cwd": {"ChannelWiseDivergence logits": 3, "ChannelWiseDivergence features": 50, "soft": 1},
    "skd": {"PixelRelationLoss features": 10, "soft": 1},
    "ifvd": {"IntraClassVariationLoss features": 20, "soft": 1},
    "hint": {"FeatureHintLoss features": 10, "soft": 1},
    "emkd": {
        "SoftPredictionLoss T4 logits": 0.1,
        "AttentionMapLoss p4 features": 0.9,
        "RegionAffinityLoss features": 0.9,
    },
    "cirkd": {
        "CrossImageRelationLoss features": 1,
        "MemoryRelationLoss pixel features": 0.1,
        "MemoryRelationLoss region features": 0.1,
        "soft": 1,
    },
    "dist": {"DISTLoss logits": 1},
}


@pytest.mark.parametrize("method", sorted(RELEASED))
def test_a_published_method_has_all_its_terms_at_the_weights_of_its_authors(method: str) -> None:
    loss = compose(method).get_parsed_content("loss")
    terms: dict[str, set[float]] = {}
    for name, module in loss.losses.items():
        kind = type(module).__name__
        option = {"SoftPredictionLoss": "T{temperature:g}", "AttentionMapLoss": "p{p}", "MemoryRelationLoss": "{kind}"}
        words = [kind, option.get(kind, "").format(**vars(module)), loss.taps[name]]
        words[2] = "logits" if words[2] == "logits" else "features"
        text = " ".join(word for word in words if word)
        terms.setdefault("soft" if text == "SoftPredictionLoss T1 logits" else text, set()).add(loss.weights[name])
    assert terms == {name: {weight} for name, weight in RELEASED[method].items()}


def test_emkd_compares_two_levels_and_cirkd_keeps_its_memory_in_the_checkpoint() -> None:
    taps = [tap for tap in compose("emkd").get_parsed_content("loss").taps.values() if tap != "logits"]
    assert sorted(taps) == ["deep", "deep", "fine", "fine"]
    assert set(compose("cirkd")["train"]["checkpoint_objects"]) >= {"model", "adapters", "memory"}


def test_no_two_methods_share_a_tap_adapter_or_term_name() -> None:
    owners: dict[str, str] = {}
    for method in METHODS:
        for key in json.loads((CONFIGS / "methods" / f"{method}.json").read_text()):
            if key.startswith(("taps#", "adapters#", "loss#terms#")):
                assert owners.setdefault(key, method) == method


def test_dual_distillation_without_a_cnn_is_refused_and_the_error_names_cnns() -> None:
    only = {"one": {"architecture": "hdenseformer", "modalities": MODALITIES}}
    with pytest.raises(RuntimeError) as caught:
        compose("dual", teacher_specs=only).get_parsed_content("trained")
    causes = []
    error: BaseException | None = caught.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    remedy = "layer for tap 'local'. Add a teacher of the kind cnn: dynunet, segresnet, student, uxnet."
    assert any(remedy in cause for cause in causes)


def test_the_list_of_methods_has_a_line_for_each_with_its_losses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert sorted(lines) == METHODS
    assert "TokenRankingLoss(deep)" in lines["rskd"]


def _arguments(cohort: Path, output: Path) -> list[str]:
    settings = {key: value for key, value in SMALL.items() if key not in ("teacher_specs", "threads")}
    pairs = [item for key, value in settings.items() for item in ("--set", f"{key}={json.dumps(value)}")]
    shared = ["--data", "phantom", "--dataset-dir", str(cohort), "--output-dir", str(output), "--threads", "1"]
    return [*shared, *pairs, "--epochs", "2"]


def test_gkd_trains_its_stages_first_and_keeps_them(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = compose("hinton", dataset_dir=str(cohort)).get_parsed_content("teachers")
    torch.save(teachers["cnn"].state_dict(), tmp_path / "teacher.pt")
    teacher = ["--teacher", f"dynunet={tmp_path / 'teacher.pt'}"]
    arguments = ["distill", "--method", "gkd", *teacher, *_arguments(cohort, tmp_path)]
    assert main(arguments) == 0
    stages = sorted(path.parent.name for path in (tmp_path / "stages").glob("*/model.pt"))
    assert stages == ["autoencoder", "header_dynunet", "header_student", "student"]
    assert len(read_curves(tmp_path / "curves.csv")) == 1  # the other epoch was the student's alone
    assert "stage: autoencoder" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*/model.pt")}
    (tmp_path / "stages" / "header_student" / "manifest.json").unlink()  # as if it had been interrupted
    for state in tmp_path.glob("checkpoint*.pt"):  # before the last training began
        state.unlink()
    assert main(arguments) == 0
    again = {path.parent.name for path, before in times.items() if path.stat().st_mtime_ns != before}
    assert again == {"header_student"}
    assert "stage: autoencoder" not in capsys.readouterr().out


def test_balanced_weights_are_logged_and_continue_when_a_training_is_resumed(cohort: Path, tmp_path: Path) -> None:
    arguments = ["distill", "--method", "dist", "--method", "hinton", "--teacher", "dynunet=random", "--balance", "0.5"]
    arguments += [*_arguments(cohort, tmp_path / "out"), "--set", "save_interval=1", "--set", "val_interval=9"]
    assert main(arguments) == 0
    first, last = read_curves(tmp_path / "out" / "curves.csv")
    assert {name for name in first if name.startswith("balance/")} == {"balance/dist", "balance/hinton"}
    assert first["balance/dist"] not in (1.0, 0.0)  # the config's weight
    state = torch.load(tmp_path / "out" / "checkpoint.previous.pt", weights_only=True)  # after the first epoch
    torch.save(state, tmp_path / "out" / "checkpoint.pt")
    assert main([*arguments, "--resume"]) == 0
    again = read_curves(tmp_path / "out" / "curves.csv")[1]
    assert {k: v for k, v in again.items() if k != "seconds_per_step"} == {
        k: v for k, v in last.items() if k != "seconds_per_step"
    }


def test_without_balance_the_weights_are_those_of_the_configs() -> None:
    assert compose("dist", "hinton").get_parsed_content("loss").weights == {"dist": 1.0, "hinton": 0.5}
