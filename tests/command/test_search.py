"""Search with Optuna: its space, its trials as runs under one parent, and its resumption."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from softmod import search
from softmod.errors import NumericalError
from softmod.experiment import run as experiment
from softmod.system import signals
from tests.command.test_train import SMALL, here

optuna = pytest.importorskip("optuna")
__all__ = ["here"]

SPACE = ["optimizer.actor.lr=tag(log,interval(1e-4,1e-2))", "actor.num_modules=2,3",
         "run.eval_goals=int(interval(1,3))", "algorithm.discount=interval(0.9,0.95)",
         "run.batch_per_task=range(4,13,4)"]  # fmt: skip
BRIEF = [*SMALL, "run.steps_per_task=60", "run.save_every=30"]


def trials(state: str = "COMPLETE") -> list:
    """Return the trials of the only study in a state."""
    (study,) = optuna.study.get_all_study_summaries("sqlite:///optuna.db")
    found = optuna.load_study(study_name=study.study_name, storage="sqlite:///optuna.db").trials
    return [trial for trial in found if trial.state.name == state]


def without(keys: list[str]) -> list[str]:
    """Return the overrides of a small run without those of these keys."""
    return [
        line
        for line in BRIEF
        if line.partition("=")[0] not in {key.partition("=")[0] for key in keys}
    ]


def test_trials_are_runs_and_the_same_command_runs_the_missing_ones(here: Path, capsys):
    line = [*without(SPACE), *SPACE]
    assert search.run(["trials=3", *line]) == 0
    printed = capsys.readouterr().out
    made = trials()
    assert len(made) == len(list(here.glob("runs/*/seed_0/result.json"))) == 3
    for trial in made:
        assert 1e-4 <= trial.params["optimizer.actor.lr"] <= 1e-2
        assert trial.params["actor.num_modules"] in ("2", "3")
        assert trial.params["run.eval_goals"] in (1, 2, 3)
        assert trial.params["run.batch_per_task"] in (4, 8, 12)
    results = [json.loads(path.read_text()) for path in here.glob("runs/*/seed_0/result.json")]
    assert sorted(trial.value for trial in made) == sorted(
        result["success_rate"] for result in results
    )
    best = max(made, key=lambda trial: trial.value)
    assert f"best of 3: success {best.value:.3f}" in printed
    assert re.search(r"python -m softmod.train experiment=toy .* optimizer.actor.lr=", printed)
    assert search.run(["trials=3", *line]) == 0
    assert search.run(["trials=4", *line]) == 0
    assert len(trials()) == 4


def test_a_stopped_trial_is_resumed_and_a_failed_one_ends_nothing(here: Path, monkeypatch, capsys):
    train, moments = experiment.run_experiment, iter(["fail", "stop", "go", "go"])

    def faulty(*given):
        match next(moments):
            case "fail":
                raise NumericalError("made up")
            case "stop":
                raise signals.StoppedError("a stop of this test")
        return train(*given)

    monkeypatch.setattr(experiment, "run_experiment", faulty)
    line = ["trials=2", *without(SPACE[:1]), SPACE[0]]
    assert search.run(line) == signals.STOPPED
    assert "softmod: made up [optimizer.actor.lr=" in capsys.readouterr().err
    failed, stopped = trials("FAIL")
    assert search.run(line) == 0
    assert trials()[0].params == stopped.params != failed.params
    assert len(trials()) == 2


def test_the_same_is_drawn_again_stopped_or_not(here: Path, monkeypatch):
    """Compare eleven trials: ten random ones, and one that depends on their results."""

    def searched(storage: str, stops: set[int]) -> list[dict]:
        moments = iter(range(99))

        def scored(cfg, *_):
            if next(moments) in stops:
                raise signals.StoppedError("a stop of this test")
            return SimpleNamespace(success_rate=float(cfg.values["algorithm.discount"]))

        def composed(_, values):  # saves a second per trial
            return SimpleNamespace(values=values, seeds=None), []

        monkeypatch.setattr(search.Search, "compose", composed)
        monkeypatch.setattr(experiment, "run_experiment", scored)
        line = [f"storage=sqlite:///{storage}", "trials=11", *without(SPACE), *SPACE]
        assert [search.run(line) for _ in stops] == [signals.STOPPED] * len(stops)
        assert search.run(line) == 0
        (study,) = optuna.study.get_all_study_summaries(f"sqlite:///{storage}")
        found = optuna.load_study(
            study_name=study.study_name, storage=f"sqlite:///{storage}"
        ).trials
        return [trial.params for trial in found if trial.state.name == "COMPLETE"]

    first = searched("first.db", set())
    assert searched("again.db", {3, 9}) == first
    assert len({json.dumps(params) for params in first}) == 11


def test_one_parent_in_mlflow(here: Path, monkeypatch):
    given = []

    def interrupted(*args):
        given.append(args[2])
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_experiment", interrupted)
    line = ["trials=2", *without(SPACE[:1]), SPACE[0]]
    assert [search.run(line), search.run(line)] == [130, 130]
    assert given[0] == given[1]
    assert given[0]["name"] == "toy: search optimizer.actor.lr"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "no search space given; add one"),
        (["trials=none", SPACE[0]], "trials=none: must be a whole number"),
        (["algorithm.discount=interval(0.9,1.5)"], "algorithm.discount=1.5: must be in"),
        (["algorithm.discont=interval(0.9,1)"], "algorithm.discount"),
        (["model=soft_modular,mt_sack"], "mt_sac"),
        (["algorithm.discount=tag(log,interval(0,1))"], "not a search space"),
        (["storage=sqlite:////nowhere/at/all.db", SPACE[0]],
         "storage=sqlite:////nowhere/at/all.db: cannot be used"),
        (["-m", SPACE[0]], "-m: unknown flag"),
        (["trials=²", SPACE[0]], "trials=²: must be a whole number"),
        (["storage=sqlite:///:memory:", SPACE[0]], "must be a file, to resume the search from"),
        (["sweep=seeds", SPACE[0]], "sweep=seeds: has no effect in a search"),
        (["hydra/launcher=joblib", SPACE[0]], "hydra/launcher=joblib: has no effect in a search"),
        (["hydra.mode=MULTIRUN", SPACE[0]], "hydra.mode=MULTIRUN: has no effect in a search"),
        (["actor.num_modules=4", SPACE[1]], "actor.num_modules is given twice"),
        (["seed=range(3,1)"], "seed=range(3,1): names no value"),
        (["seed=range(2),5"], "seed=range(2),5: name the values"),
    ],
)  # fmt: skip
def test_an_invalid_line_fails_with_one_line(here: Path, capsys, arguments: list[str], answer: str):
    assert search.run([*without(SPACE), *arguments]) == 2
    printed = capsys.readouterr().err
    assert answer in printed
    assert printed.count("\n") == 1
    assert list(here.iterdir()) == []


def test_another_space_with_the_same_keys_is_another_study(here: Path, capsys):
    """The best value that is reported lies in the space that was asked for."""
    line = [*without(["optimizer.actor.lr=", "actor.num_modules="]), "actor.num_modules=2"]
    assert search.run(["trials=1", *line, "optimizer.actor.lr=interval(1e-4,1e-3)"]) == 0
    capsys.readouterr()
    assert search.run(["trials=1", *line, "optimizer.actor.lr=interval(1e-2,2e-2)"]) == 0
    best = re.search(r"optimizer.actor.lr=([\d.e-]+)", capsys.readouterr().out.splitlines()[-1])
    assert best is not None
    assert 1e-2 <= float(best[1]) <= 2e-2
    assert len(optuna.study.get_all_study_summaries("sqlite:///optuna.db")) == 2


@pytest.mark.parametrize(
    "later", ["actor.num_modules=2,4,8", "actor.num_modules=range(2,5)", "actor.num_modules=4,2"]
)
def test_a_space_of_another_kind_is_another_study(later: str):
    first, second = (search.read([space]).sweep for space in ("actor.num_modules=2,4", later))
    assert first["id"] != second["id"]
    assert first["name"] == second["name"]


@pytest.mark.parametrize("fault", ["locked", "removed"])
def test_a_storage_that_fails_during_a_trial(here: Path, monkeypatch, capsys, fault: str):
    monkeypatch.setattr(search, "LOCKED", 0.1)
    database = sqlite3.connect("optuna.db", isolation_level=None)

    def trial(*_: object) -> SimpleNamespace:
        if fault == "locked":
            database.execute("begin exclusive")
        else:
            Path("optuna.db").unlink()
        return SimpleNamespace(success_rate=0.5)

    monkeypatch.setattr(experiment, "run_experiment", trial)
    assert search.run(["trials=1", *without(SPACE), SPACE[1]]) == 4
    database.close()
    assert "storage=sqlite:///optuna.db: cannot be used any more" in capsys.readouterr().err


def test_an_error_of_a_trial_is_none_of_the_storage(here: Path, monkeypatch):
    def trial(*_: object) -> None:
        raise KeyError("mine")

    monkeypatch.setattr(experiment, "run_experiment", trial)
    with pytest.raises(KeyError):
        search.run(["trials=1", *without(SPACE), SPACE[1]])


def test_the_home_folder_in_the_storage(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert search.with_home("sqlite:///~/x.db") == "sqlite:////home/someone/x.db"
    assert search.with_home("sqlite:///x.db") == "sqlite:///x.db"
