# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, MLflow and the overlays hold each epoch once, and only the first rank writes them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from matplotlib.image import imread
from monai.bundle import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.cli.main import main
from scripts.report import Overlay
from scripts.report.curves import read_curves
from scripts.training import tracking
from scripts.training.learning_curves import CurveWriter
from scripts.training.tracking import MLflowCurves, OverlayWriter, TensorBoard, TensorBoardCurves

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "patch": [64, 32, 32],
    "spacing": [8, 8, 8],
    "student_features": [8, 16, 24, 32],
    "architectures": {"hdenseformer": {"features": 4, "depth": 4}},
}
Curves = dict[str, dict[int, float]]


def _train(verb: str, cohort: Path, output: Path, *more: str, **changes: Any) -> Path:
    pairs = (f"--set={key}={json.dumps(value)}" for key, value in {**SETTINGS, **changes}.items())
    places = ["--dataset-dir", str(cohort), "--output-dir", str(output)]
    assert main([verb, "--data", "phantom", "--scale", "small", *places, *more, *pairs]) == 0
    return output


@pytest.fixture(scope="module")
def distilled(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs with two teachers, of which the second and the fourth validate."""
    teachers = ["--teacher", "hdenseformer:ct=random", "--teacher", "hdenseformer:pet=random"]
    output = tmp_path_factory.mktemp("runs") / "distilled"
    return _train("distill", cohort, output, *teachers, "--epochs", "4", val_interval=2)


def _table(folder: Path) -> Curves:
    """Column -> epoch -> value of the curves, empty cells left out."""
    found: Curves = {}
    for row in read_curves(folder / "curves.csv"):
        for name, value in row.items():
            if name != "epoch" and value is not None:
                found.setdefault(name, {})[int(row["epoch"] or 0)] = value
    return found


def _events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


def _scalars(folder: Path) -> Curves:
    events = _events(folder)
    found: Curves = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), f"{tag} has a step twice: {steps}"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def _assert_same(found: Curves, expected: Curves) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name


def test_tensorboard_has_every_column_of_the_curves(distilled: Path) -> None:
    expected = _table(distilled)
    terms = {f"loss/{term}" for term in ("segmentation", "soft", "coarse", "fine")}
    weights = {"weight/hdenseformer_ct", "weight/hdenseformer_pet"}
    assert {"loss", "learning_rate", "seconds_per_step", "val_dice", *terms, *weights} <= set(expected)
    assert set(expected["loss"]) == {1, 2, 3, 4}
    assert set(expected["val_dice"]) == {2, 4}
    _assert_same(_scalars(distilled), expected)


def test_every_validation_leaves_one_picture(distilled: Path) -> None:
    assert sorted(path.name for path in (distilled / "overlays").iterdir()) == ["epoch_0002.png", "epoch_0004.png"]
    assert [event.step for event in _events(distilled).Images("overlay")] == [2, 4]
    for path in (distilled / "overlays").iterdir():
        picture = imread(path)[..., :3]
        assert picture.shape[1] > 2 * picture.shape[0]  # three modalities side by side
        orange = np.abs(picture - np.array([0xE6, 0x9F, 0x00]) / 255).max(-1) < 0.1
        assert 50 < orange.sum() < 0.1 * orange.size
        assert picture[~orange].std() > 0.1


def test_other_ranks_train_and_write_no_tracking_files(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MONAI's handler writes if it has no writer
    output = _train("train", cohort, tmp_path / "out", "--epochs", "1", rank=1, world=2, val_interval=1)
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint.pt", "model.pt", "model.task.json", "splits.json",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [output]
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    assert state["trainer"]["iteration"] > 0


def _epochs(folder: Path, losses: list[float], *handlers: Any, done: int = 0) -> None:
    """An epoch of one step per loss, after the epochs that a checkpoint already holds."""

    def resume(engine: Engine) -> None:
        engine.state.epoch = engine.state.iteration = done

    engine = Engine(lambda engine, batch: {"loss": losses[engine.state.epoch - done - 1]})
    CurveWriter(str(folder / "curves.csv"), None, SimpleNamespace(param_groups=[{"lr": 0.5}])).attach(engine)
    engine.add_event_handler(Events.STARTED, resume)
    for handler in handlers:
        handler.attach(engine)
    engine.run([0], max_epochs=done + len(losses))


def _board(folder: Path) -> TensorBoardCurves:
    return TensorBoardCurves(TensorBoard(str(folder / "tensorboard")), iteration_log=False)


def test_tensorboard_shows_a_resumed_epoch_once(tmp_path: Path) -> None:
    _epochs(tmp_path, [4.0, 3.0, 9.0, 9.0, 9.0], _board(tmp_path))
    time.sleep(1.1)  # TensorBoard orders the files of a folder by the second
    _epochs(tmp_path, [2.0, 1.0], _board(tmp_path), done=2)
    assert _scalars(tmp_path)["loss"] == {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}


def test_tensorboard_hides_an_earlier_run_in_the_same_folder(tmp_path: Path) -> None:
    _epochs(tmp_path, [9.0, 9.0, 9.0], _board(tmp_path))
    time.sleep(1.1)
    _epochs(tmp_path, [4.0, 3.0], _board(tmp_path))
    assert _scalars(tmp_path)["loss"] == {1: 4.0, 2: 3.0}


def test_the_overlay_is_the_slice_with_the_most_label_and_shows_the_cases_dice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label, prediction = torch.zeros(1, 6, 5, 4), torch.zeros(1, 6, 5, 4)
    label[0, 1, 1, 1] = label[0, 1:4, 2, 2] = 1  # one voxel below three
    prediction[0, 2:5, 2, 2] = 1  # two of the three: Dice 2 * 2 / (4 + 3)
    image = torch.arange(2 * 120.0).reshape(2, 6, 5, 4)
    drawn: list[Overlay] = []
    real = tracking.slice_figure
    monkeypatch.setattr(tracking, "slice_figure", lambda overlay: drawn.append(overlay) or real(overlay))
    items = [{"image": image, "label": label, "pred": prediction}]
    engine = Engine(lambda engine, batch: items if engine.state.iteration == 1 else None)
    writer = SimpleNamespace(add_figure=lambda *_: None)
    OverlayWriter(str(tmp_path), ["ct", "pet"], [2.0, 2.0, 3.0], writer).attach(engine)
    engine.run([0, 1, 2])
    (overlay,) = drawn
    assert overlay.title == "epoch 1, Dice 0.571"
    np.testing.assert_array_equal(overlay.images["pet"], image[1, ..., 2:3])
    np.testing.assert_array_equal(overlay.reference, label[0, ..., 2:3] > 0)
    np.testing.assert_array_equal(overlay.prediction, prediction[0, ..., 2:3] > 0)
    assert [path.name for path in (tmp_path / "overlays").iterdir()] == ["epoch_0001.png"]


def test_ignored_voxels_are_in_no_outline_and_in_no_dice(tmp_path: Path) -> None:
    label, prediction = torch.zeros(1, 6, 5, 4), torch.zeros(1, 6, 5, 4)
    label[0, 1:3, 2, 2], label[0, 3:, 2, 2], prediction[0, 1:6, 2, 2] = 2, 254, 1
    writer = OverlayWriter(str(tmp_path), ["ct"], [2.0, 2.0, 3.0], SimpleNamespace())
    overlay = writer._overlay({"image": torch.zeros(1, 6, 5, 4), "label": label, "pred": prediction}, "epoch 1")
    assert overlay.title == "epoch 1, Dice 1.000"
    assert (overlay.reference.sum(), overlay.prediction.sum()) == (2, 2)


def test_without_any_mask_the_middle_slice_is_drawn_and_other_channels_are_numbered(tmp_path: Path) -> None:
    empty = torch.zeros(1, 6, 5, 4)
    image = torch.arange(2 * 120.0).reshape(2, 6, 5, 4)
    writer = OverlayWriter(str(tmp_path), ["ct", "pet", "mr"], [2.0, 2.0, 3.0], SimpleNamespace())
    overlay = writer._overlay({"image": image, "label": empty, "pred": empty}, "epoch 1")
    assert list(overlay.images) == ["channel 0", "channel 1"]
    np.testing.assert_array_equal(overlay.images["channel 0"], image[0, ..., 2:3])
    assert tracking.slice_figure(overlay).get_suptitle() == "epoch 1, Dice nan"


def test_tracking_without_mlflow_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    assert main(["train", "--tracking", "mlflow", "--output-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: MLflow is not installed: run pip install")


def test_every_stage_of_gkd_is_tracked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "gkd", "--teacher", "unetr=W.pt", "--tracking", "mlflow", "--dry-run"]
    assert main(["distill", *options, "--output-dir", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert len(lines) > 1
    assert all("--experiment_tracking mlflow" in line for line in lines)


def _mlflow_runs(folder: Path) -> list[tuple[Any, Curves]]:
    """Every MLflow run of the folder's data base, the oldest first, with its metrics, every step once."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns.db")
    found = []
    for experiment in client.search_experiments():
        for each in client.search_runs(experiment.experiment_id, order_by=["start_time"]):
            history = {name: client.get_metric_history(each.info.run_id, name) for name in each.data.metrics}
            for name, values in history.items():
                assert len({(v.step, v.value) for v in values}) == len({v.step for v in values}), name
            metrics = {name: {v.step: v.value for v in values} for name, values in history.items()}
            files = {item.path for item in client.list_artifacts(each.info.run_id)}
            facts = SimpleNamespace(
                experiment=experiment.name, name=each.info.run_name, status=each.info.status, files=files,
                params=each.data.params, tags=each.data.tags, client=client, run_id=each.info.run_id,
            )  # fmt: skip
            found.append((facts, metrics))
    return found


def test_mlflow_has_every_column_of_the_curves_and_the_pictures(cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    more = ["--epochs", "2", "--tracking", "mlflow"]
    output = _train("train", cohort, tmp_path / "alone", *more, val_interval=2)
    ((facts, metrics),) = _mlflow_runs(output)
    _assert_same(metrics, _table(output))
    assert set(metrics["loss"]) == {1, 2}
    assert (facts.experiment, facts.name, facts.status) == ("phantom", "alone", "FINISHED")
    assert facts.files == {"curves.csv", "manifest.json", "epoch_0002.png", "model.pt", "model.task.json"}
    assert (output / "mlruns").is_dir()


def test_an_mlflow_run_holds_the_settings_the_task_tags_and_the_weights(cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    teacher = ["--teacher", "hdenseformer:ct=random"]
    output = _train("distill", cohort, tmp_path / "out", *teacher, "--epochs", "1", "--tracking", "mlflow", seed=7)
    ((facts, _),) = _mlflow_runs(output)
    told = {key: json.loads(facts.params[key]) for key in ("spacing", "patch", "seed", "epochs", "modalities")}
    assert told == {
        "spacing": [8, 8, 8],
        "patch": [64, 32, 32],
        "seed": 7,
        "epochs": 1,
        "modalities": ["ct", "pet", "mr"],
    }
    assert json.loads(facts.params["network"])["features"] == SETTINGS["student_features"]
    split = json.loads((output / "splits.json").read_text())
    assert int(facts.params["training_cases"]) + int(facts.params["validation_cases"]) == sum(map(len, split["folds"]))
    expected = {"cohort": "phantom", "modalities": "ct, pet, mr", "regions": "tumour", "teachers": "hdenseformer_ct"}
    assert expected.items() <= facts.tags.items()
    assert facts.tags["network"] == "scripts.networks.Student"
    for name in ("model.pt", "model.task.json"):
        stored = Path(facts.client.download_artifacts(facts.run_id, name, str(tmp_path)))
        assert stored.read_bytes() == (output / name).read_bytes()


def test_a_resumed_training_is_an_mlflow_run_with_every_epoch_once(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")

    def handler() -> MLflowCurves:
        return MLflowCurves(str(tmp_path), run_name="run", close_on_complete=False)  # as one that is stopped

    _epochs(tmp_path, [4.0, 3.0, 9.0, 9.0, 9.0], handler())
    _epochs(tmp_path, [2.0, 1.0], handler(), done=2)
    stopped, resumed = (metrics for _, metrics in _mlflow_runs(tmp_path))
    assert stopped["loss"] == {1: 4.0, 2: 3.0, 3: 9.0, 4: 9.0, 5: 9.0}
    assert resumed["loss"] == {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}
    assert resumed["learning_rate"] == dict.fromkeys((1, 2, 3, 4), 0.5)


@pytest.mark.parametrize("rank", [0, 1])
def test_monais_own_tracking_records_the_same_columns_on_the_first_rank_only(
    rank: int, cohort: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mlflow")
    run(
        config_file=[str(ROOT / "configs" / f"{name}.json") for name in ("train", "data/phantom", "scale/small")],
        meta_file=str(ROOT / "configs/metadata.json"), logging_file=str(ROOT / "configs/logging.conf"),
        tracking="mlflow", dataset_dir=str(cohort), output_dir=str(tmp_path / "out"), max_epochs=1, val_interval=1,
        rank=rank, world=rank + 1, **SETTINGS,
    )  # fmt: skip
    if rank:
        assert not (tmp_path / "out" / "mlruns.db").exists()
        return
    ((facts, metrics),) = _mlflow_runs(tmp_path / "out")
    expected = _table(tmp_path / "out")
    _assert_same({name: metrics[name] for name in expected}, expected)
    assert len(metrics["train_loss"]) > 1  # MONAI's own: every step's
    assert (facts.experiment, facts.name, facts.status) == ("phantom", "out", "FINISHED")
