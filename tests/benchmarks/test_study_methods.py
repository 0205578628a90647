# SPDX-License-Identifier: Apache-2.0
"""The commands of the experiments E and F of the study."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from benchmarks.study_job import StudyJob
from tests.study_jobs import data_folds, options, settings


def test_methods_on_features_have_a_teacher_that_has_not_seen_the_tested_fold(jobs: list[StudyJob]) -> None:
    by_weights = {job.folder / "model.pt": job for job in jobs if job.study_row.experiment == "teachers"}
    methods = [job for job in jobs if job.study_row.experiment == "F"]
    kinds: dict[str, set[str]] = defaultdict(set)
    for job in methods:
        command = job.typed()[0]
        for teacher in options(command, "--teacher"):
            name, architecture, weights = teacher.split("=")
            training = by_weights[Path(weights)]
            assert Path(weights) in job.needs
            assert job.study_row.fold not in data_folds(training)[0]
            assert training.study_row.arm == name
            kinds[job.study_row.arm].add(architecture)
            restored = next(
                each for each in jobs if each.study_row.experiment == "weights" and each.folder == training.folder
            )
            assert restored.typed() == training.typed()
            assert restored.folder / "model.pt" == Path(weights)
            assert restored.needs[-1:] == training.serves  # after the answers, so never beside the first training
        assert options(command, "--method") == [job.study_row.arm]
        assert "--cache-dir" not in command
    assert kinds.pop("dual") == {"unetr", "dynunet"}
    assert kinds.pop("gkd") == {"hdenseformer"}
    assert set(kinds) == {"teachformer", "rskd", "cpkd", "emkd", "skd", "ifvd", "cirkd", "hint", "cwd"}
    assert all(each == {"unetr"} for each in kinds.values())
    for job in methods:
        training, evaluation = job.typed()
        assert ("selective_fusion" in settings(evaluation)) == (job.study_row.arm == "dual")
        epochs = options(training, "--epochs")  # a setting would hold for every stage of gkd
        assert bool(epochs) == (job.study_row.arm == "gkd")
        assert ("max_epochs" in settings(training)) != bool(epochs)


def test_methods_on_predictions_have_the_weights_of_their_papers(jobs: list[StudyJob]) -> None:
    found = {job.study_row.arm: settings(job.typed()[0]) for job in jobs if job.study_row.experiment == "E"}
    for temperature in (1, 4):
        given = found[f"hinton_t{temperature}"]
        assert float(given["+loss#terms#hinton#loss#temperature"]) == temperature
        assert "loss#terms#hinton#weight" not in given
    assert json.loads(found["cwd"]["+loss#terms#cwd_logits"])["weight"] == 3
    assert found["cwd"]["loss#terms#hinton#weight"] == "1.0"
    assert not any(key.startswith(("loss", "+loss")) for key in found["dist"])
