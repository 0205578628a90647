# SPDX-License-Identifier: Apache-2.0
"""The jobs of the study: who trains on whom, whose answers teach them, and in which order."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.study_taught as study_taught
from benchmarks.study_job import StudyJob, StudyRow
from benchmarks.study_plan import StudyPlan
from benchmarks.study_setting import FOLDS
from benchmarks.study_students import RECIPES
from benchmarks.study_teachers import STAGE_1, STAGE_2, TEACHERS
from scripts.data.folds import make_splits
from scripts.networks.architecture import read_architecture

FILES = {"ct": "CT.nii.gz", "pet": "PET.nii.gz", "mr": "MR.nii.gz", "label": "mask.nii.gz"}
ALL = set(range(FOLDS))
FOLDS_OF_PATIENTS = make_splits([f"P{number:02d}" for number in range(38)], FOLDS, seed=0)
EVERY_SUBSET = {"ct+pet+mr", "ct+pet", "ct+mr", "pet+mr", "ct", "pet", "mr"}


def new_plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> StudyPlan:
    """The study of 38 patients whose files do not exist."""
    cases = []
    for number in range(38):
        name = f"P{number:02d}"
        files = {key: str(root / "data" / name / file) for key, file in FILES.items()}
        cases.append({"case_id": name, "patient_id": name, "image": files["ct"], **files})
    monkeypatch.setattr("benchmarks.study_setting.datalist", lambda *_: cases)
    return StudyPlan("sts", str(root / "data"), root / "runs", root / "results")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyPlan:
    """A study of which nothing is known."""
    return new_plan(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[StudyJob]:
    """All jobs of a study whose gate is passed."""
    with pytest.MonkeyPatch.context() as patch:
        judged = new_plan(tmp_path_factory.mktemp("study"), patch)
        judge(judged, 0.9)
        return judged.jobs()


def options(command: Sequence[str], name: str = "--set") -> list[str]:
    """The values of an option in a command."""
    return [command[i + 1] for i, word in enumerate(command) if word == name]


def settings(command: Sequence[str]) -> dict[str, str]:
    """The overrides of a command."""
    return {key: value for key, _, value in (pair.partition("=") for pair in options(command))}


def write_record(plan: StudyPlan, row: StudyRow, dice: float) -> None:
    path = plan.record(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"patient_id": str(number), "dice": dice, "status": "ok"} for number in range(3)]
    path.write_text(json.dumps({"cases": rows}))


def choose(plan: StudyPlan, best: str) -> None:
    """Write results of all recipes, of which one is better."""
    for job in plan.recipe_jobs():
        write_record(plan, job.study_row, 0.7 if job.study_row.arm == best else 0.6)


def judge(plan: StudyPlan, ensemble: float) -> None:
    """Judge the gate with this Dice of the ensemble; the lone student has 0.7."""
    choose(plan, "batch_dice")
    for job in plan.teacher_jobs(STAGE_1[:1]):
        for row in job.rows if job.answers else ():
            write_record(plan, row, ensemble)
    plan.judge_gate()


def data_folds(job: StudyJob) -> tuple[set[int], set[int], set[int]]:
    """The folds on which a job trains with labels, without them, and is tested; from the files that it writes."""
    job.folder.mkdir(parents=True, exist_ok=True)
    job.preparations[0]()
    rows = json.loads((job.folder / "cases.json").read_text())
    tested, *training = json.loads((job.folder / "splits.json").read_text())["folds"]
    fold_of = {patient: k for k, part in enumerate(FOLDS_OF_PATIENTS) for patient in part}
    trained = {row["patient_id"]: "label" in row for row in rows if row["patient_id"] not in tested}
    assert sorted(trained) == sorted(training[0] if training else [])
    parts = [{fold_of[p] for p, label in trained.items() if label is wanted} for wanted in (True, False)]
    assert sum(len(FOLDS_OF_PATIENTS[k]) for part in parts for k in part) == len(trained)  # whole folds
    return parts[0], parts[1], {fold_of[patient] for patient in tested}


def expected_folds(row: StudyRow) -> tuple[set[int], set[int]]:
    """The folds on which a training must see the labels, and only the images."""
    i, j = row.fold, row.source_fold
    others = ALL - {i}
    if row.experiment in ("C", "D", "E", "F", "experts"):
        return others, set()
    if row.experiment == "recipe":
        return others - {0}, set()
    assert j is not None
    if row.experiment == "teachers" or row.arm in ("elsewhere", "teachers_t1", "teachers_t2", "teachers_dynunet"):
        return others - {j}, set()
    if row.experiment == "B2":
        return {j}, others - {j}
    if row.arm == "kd_unlabelled":
        return set(), {j}
    return {j}, set()


def seen_folds(path: Path) -> set[int]:
    """The folds that the network of an answer file has seen, by the name of the file."""
    words = path.stem.split("_")
    numbers = {int(word) for word in words if len(word) == 1}
    return numbers if "on" in words else ALL - numbers


def test_every_student_and_teacher_trains_on_its_folds_and_never_on_the_tested_one(jobs: list[StudyJob]) -> None:
    trained = [job for job in jobs if job.answers is None]
    for job in trained:
        labelled, unlabelled, tested = data_folds(job)
        assert (labelled, unlabelled) == expected_folds(job.study_row), job.study_row.name
        assert tested == {job.study_row.fold}
        assert job.study_row.fold not in labelled | unlabelled
        assert ("--unlabelled" in job.typed()[0]) == bool(unlabelled)
    counts: dict[str, int] = defaultdict(int)
    for job in trained:
        counts[job.study_row.experiment] += 1
    assert counts == {
        **{"recipe": 40, "teachers": 20 + 5, "few_labels_teachers": 10, "experts": 15, "weights": 10 + 5 * 3},
        **{"B1": 10 * 5 * 2, "B2": 5 * 2 * 2, "C": 3 * 4 * 10 + 10, "D": 7 * 10, "E": 4 * 5 * 2, "F": 11 * 5 * 2},
    }


def test_answers_are_those_of_teachers_that_have_or_have_not_seen_the_patient(
    jobs: list[StudyJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, list[Path]]] = []
    monkeypatch.setattr(study_taught, "write_predictions", lambda _, answers: written.append(answers))
    fold_of = {patient: k for k, part in enumerate(FOLDS_OF_PATIENTS) for patient in part}
    arms = set()
    for job in jobs:
        row = job.study_row
        if len(job.preparations) < 2:
            assert not any(path.suffix == ".npz" for path in job.needs) or job.answers or row.experiment == "weights"
            continue
        written.clear()
        for preparation in job.preparations:
            preparation()
        labelled, unlabelled, _ = data_folds(job)
        arms.add((row.experiment, row.arm))
        for answers in written:
            assert {fold_of[case] for case in answers} == labelled | unlabelled
            for case, paths in answers.items():
                assert set(paths) <= set(job.needs)
                for path in paths:
                    seen = seen_folds(path)
                    assert row.fold not in seen
                    if row.experiment == "B2":
                        assert seen == {row.source_fold}
                    elif row.experiment == "B1" or row.arm == "kd_out_of_fold":
                        assert fold_of[case] not in seen
                    else:
                        assert fold_of[case] in seen
        names = [
            sorted({path.stem.split("_")[0] for paths in answers.values() for path in paths}) for answers in written
        ]
        if row.arm == "self_training":
            assert names == [["lone"]]
            assert {path.stem for path in written[0][FOLDS_OF_PATIENTS[row.source_fold or 0][0]]} == {
                f"lone_on_{row.source_fold}_s{row.seed}"
            }
        elif row.arm == "kd_experts_dropout":
            assert names == [["expert"]] * 3
            modalities = [next(iter(answers.values()))[0].stem.split("_")[1] for answers in written]
            specs = [options(job.typed()[0], "--teacher")[i].partition("=")[0] for i in range(3)]
            assert modalities == specs == ["ct", "pet", "mr"]
        else:
            assert names == [["t1", "t2"]]
    assert arms == {
        *(("B1", arm) for arm in ("kd", "kd_unlabelled")),
        *(("B2", arm) for arm in ("kd", "self_training")),
        *(("C", arm) for arm in ("kd_in_sample", "kd_out_of_fold")),
        *(("D", arm) for arm in ("kd_dropout", "kd_mr", "kd_ct+pet", "kd_experts_dropout")),
        *(("E", arm) for arm in ("hinton_t1", "hinton_t4", "cwd", "dist")),
    }


def test_an_answer_file_is_named_after_what_its_network_has_seen(jobs: list[StudyJob]) -> None:
    weights = {job.folder / "model.pt": job for job in jobs if job.answers is None}
    answering = [job for job in jobs if job.answers and job.answers.teacher]
    assert len(answering) == 20 + 5 + 10 + 10 + 15
    for job in answering:
        assert job.answers is not None
        assert len(job.needs) == 1
        labelled, unlabelled, _ = data_folds(weights[job.needs[0]])
        assert not unlabelled
        assert seen_folds(job.answers.paths[0]) == labelled
        assert not {row.fold for row in job.rows} & labelled
    files = [job.answers.paths[0] for job in answering if job.answers]
    assert len(files) == len(set(files))
    needed = {path for job in jobs for path in job.needs if path.suffix == ".npz"}
    assert needed <= set(files)


def test_ensembles_are_scored_on_folds_that_none_of_them_has_seen(jobs: list[StudyJob]) -> None:
    ensembles = [job for job in jobs if job.answers and not job.answers.teacher]
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for job in ensembles:
        assert job.answers is not None
        assert job.needs == job.answers.paths
        for row in job.rows:
            counts[row.experiment, row.arm] += 1
            assert all(row.fold not in seen_folds(path) for path in job.needs)
        if job.study_row.experiment == "C":
            assert job.study_row.student == "ensemble"
            assert len(job.needs) == 4  # two teachers of both pairs of stage 1 with this fold
    assert counts == {("A", "ensemble"): 20, ("B2", "ensemble"): 5, ("C", "teachers"): 5}


def test_arms_of_an_experiment_have_the_same_steps_and_seeds(jobs: list[StudyJob]) -> None:
    steps: dict[tuple[Any, ...], set[int]] = defaultdict(set)
    seeds: dict[tuple[str, str, str], set[tuple[int, int | None, int]]] = defaultdict(set)
    for job in jobs:
        row = job.study_row
        if job.answers or row.experiment not in ("B1", "B2", "C", "D", "E", "F"):
            continue
        assert job.seed == row.seed
        assert abs(job.notes["steps"] - row.steps) <= 0.05 * row.steps
        seeds[row.experiment, row.arm, row.student].add((row.fold, row.source_fold, row.seed))
        if row.arm not in ("elsewhere", "alone_long"):
            steps[row.experiment, row.fold, row.source_fold].add(job.notes["steps"])
    assert all(len(lengths) == 1 for lengths in steps.values())
    next_folds = {(fold, (fold + 1) % FOLDS, seed) for fold in range(FOLDS) for seed in (0, 1)}
    later = {(fold, (fold + 2) % FOLDS, seed) for fold in range(FOLDS) for seed in (0, 1)}
    alone = {(fold, None, seed) for fold in range(FOLDS) for seed in (0, 1)}
    expected = {"B1": next_folds | later, "B2": next_folds}
    for (experiment, _, _), found in seeds.items():
        assert found == expected.get(experiment, alone)
    long = [job for job in jobs if job.study_row.arm == "alone_long"]
    assert {job.study_row.steps for job in long} == {2 * 4000 + 2000}


def test_the_order_of_the_jobs_is_that_of_their_value(jobs: list[StudyJob]) -> None:
    names = [job.study_row.name for job in jobs]
    assert len(names) == len(set(names))
    stage = {pair: 1 for pair in STAGE_1} | {pair: 2 for pair in STAGE_2}

    def group(row: StudyRow) -> str:
        if row.experiment in ("A", "teachers") and row.arm != "dynunet":
            assert row.source_fold is not None
            pair = (min(row.fold, row.source_fold), max(row.fold, row.source_fold))
            return f"A{stage[pair]}"
        if row.experiment == "C":
            late = {"alone_long": " long", "kd_out_of_fold": " out of fold"}.get(row.arm, "")
            return f"C {'3.5M' if row.student == '3.5M' else 'small' + late}"
        if row.experiment == "B1":
            return f"B1 {((row.source_fold or 0) - row.fold) % FOLDS}"
        return {"few_labels_teachers": "B2", "answers": "B2", "experts": "D"}.get(row.experiment, row.experiment)

    rows = [job.study_row for job in jobs if job.study_row.experiment != "weights" and job.study_row.arm != "dynunet"]
    assert list(dict.fromkeys(map(group, rows))) == [
        *("recipe", "A1", "B1 1", "C small", "B2", "D", "A2", "C small out of fold", "B1 2"),
        *("C small long", "C 3.5M", "E", "F"),
    ]


def test_students_with_dropout_are_scored_on_every_subset(jobs: list[StudyJob]) -> None:
    dropout = [job for job in jobs if job.study_row.experiment == "D" and job.study_row.arm.endswith("_dropout")]
    assert len(dropout) == 3 * 10
    for job in dropout:
        training, *evaluations = job.typed()
        assert settings(training)["modality_dropout"] == "0.25"
        assert {row.arm for row in job.rows} == {f"{job.study_row.arm}@{subset}" for subset in EVERY_SUBSET}
        for row, command, name in zip(job.rows, evaluations, job.evaluations, strict=True):
            start = command.index("--present") + 1
            present = row.arm.partition("@")[2].split("+")
            assert list(command[start : start + len(present)]) == present
            assert command[start + len(present)].startswith("--")
            assert options(command, "--output-dir") == [str(job.folder / name)]
        confidence = settings(training).get("loss#weighting") == '"confidence"'
        assert confidence == (job.study_row.arm == "kd_experts_dropout")
    assert "@" not in "".join(str(job.folder.name) for job in jobs)


def test_students_of_fixed_inputs_read_nothing_else(jobs: list[StudyJob]) -> None:
    for name, modalities in (("mr", ["mr"]), ("ct+pet", ["ct", "pet"])):
        fixed = [job for job in jobs if job.study_row.arm in (f"alone_{name}", f"kd_{name}")]
        assert len(fixed) == 20
        for job in fixed:
            commands = [*job.before, *job.typed()]
            assert len(commands) == (3 if job.study_row.arm.startswith("kd") else 2)
            assert all(json.loads(settings(command)["modalities"]) == modalities for command in commands)
            assert all(list(json.loads(settings(command)["intensity"])) == modalities for command in commands)
            assert job.rows == (job.study_row,)
            data_folds(job)
            rows = json.loads((job.folder / "cases.json").read_text())
            assert all(set(row) == {"case_id", "patient_id", "label", *modalities} for row in rows)


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
            assert restored.kept == Path(weights)
            assert restored.needs[-1] == training.kept  # after the answers, so never beside the first training
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


def test_self_training_waits_for_the_lone_student_and_trains_it_again_only_if_its_weights_are_gone(
    jobs: list[StudyJob],
) -> None:
    lone = {(job.study_row.fold, job.study_row.seed): job for job in jobs if job.study_row.experiment == "answers"}
    assert len(lone) == 10
    for (fold, seed), job in lone.items():
        name = f"B1.alone.0.9M.f{fold}.j{(fold + 1) % FOLDS}.s{seed}"
        alone = next(each for each in jobs if each.study_row.name == name)
        assert job.needs == (alone.folder / "model.pt",)
        (restored,) = (each for each in jobs if each.study_row.experiment == "weights" and each.folder == alone.folder)
        assert alone.record in restored.needs
        assert restored.typed() == alone.typed()[:1]
        assert restored.evaluations == ()
        assert not restored.done
        assert options(job.typed()[0], "--tta") == ["flips"]


@pytest.mark.benchmarks
@pytest.mark.parametrize(("name", "millions"), [("t1", 4.5), ("t2", 29.4), ("dynunet", 5.6)])
def test_teachers_have_their_sizes_and_fit_the_patch(plan: StudyPlan, name: str, millions: float) -> None:
    architecture = TEACHERS[name]["architecture"]
    changes = plan.sizes(name).get(f"+architectures#{architecture}", {})
    with torch.device("meta"):
        network = read_architecture(architecture).build(3, 2, [48, 48, 48], "full", changes)
        assert network(torch.zeros(1, 3, 48, 48, 48)).shape == (1, 2, 48, 48, 48)
    assert round(sum(weights.numel() for weights in network.parameters()) / 1e6, 1) == millions


# The recipe and the gate.


def test_the_recipe_with_the_best_mean_dice_is_frozen_for_all_arms(plan: StudyPlan) -> None:
    choose(plan, "batch_dice_fast_clipped")
    assert plan.chosen_recipe() == RECIPES["batch_dice_fast_clipped"]
    students = [job for job in plan.jobs() if job.study_row.experiment in ("B1", "C")]
    for job in students:
        given = settings(job.typed()[0])
        assert (given["learning_rate"], given["gradient_clip"]) == ("0.002", "1.0")
        assert given["segmentation_loss#batch"] == "true"
        assert given["ema"] == "0.99"
    choose(plan, "default")
    assert all("learning_rate" not in settings(job.typed()[0]) for job in students)  # decided when a job starts


def test_all_students_wait_for_the_recipe(plan: StudyPlan, jobs: list[StudyJob]) -> None:
    recipes = {path.name for path in plan.recipe_records}
    for job in jobs:
        if not job.answers and job.study_row.experiment in ("B1", "B2", "C", "D", "E", "F"):
            assert recipes <= {path.name for path in job.needs}


@pytest.mark.parametrize(
    ("scores", "steps", "teachers", "passed"),
    [
        ([0.731], 4000, ["t1", "t2"], True),
        ([0.729, 0.731], 8000, ["t1", "t2"], True),
        ([0.729, 0.729, 0.731], 8000, ["t1", "t2", "dynunet"], True),
        ([0.729, 0.729, 0.729], 8000, ["t1", "t2", "dynunet"], False),
    ],
)
def test_the_gate_lengthens_the_teachers_then_widens_the_ensemble_then_goes_on(
    plan: StudyPlan, scores: list[float], steps: int, teachers: list[str], passed: bool
) -> None:
    for score in scores:
        assert plan.gate is None
        assert not any(job.study_row.arm.startswith("kd") for job in plan.jobs())
        judge(plan, score)
    gate = plan.gate
    assert gate is not None
    assert (gate["passed"], gate["steps"], gate["teachers"]) == (passed, steps, teachers)
    assert gate["recipe"] == "batch_dice"
    assert gate["lone"] == pytest.approx(0.7)
    assert [each["ensemble"] for each in gate["tries"]] == pytest.approx(scores)
    planned = plan.jobs()
    trainings = [job for job in planned if job.study_row.experiment == "teachers" and job.study_row.arm != "dynunet"]
    assert len(trainings) == 20
    assert {options(job.typed()[0], "--epochs") == [] for job in trainings} == {True}
    assert {int(settings(job.typed()[0])["max_epochs"]) for job in trainings} <= {-(-steps // 11), -(-steps // 12)}
    taught = next(job for job in planned if job.study_row.arm == "kd")
    assert len([path for path in taught.needs if path.suffix == ".npz"]) == len(teachers)
    judge(plan, 0.1)
    assert plan.gate == gate
