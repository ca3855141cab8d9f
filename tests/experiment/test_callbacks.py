"""Callbacks: what they see, what they may do, and that they change nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import softmod
from softmod.errors import ConfigError
from softmod.experiment.session import Session
from tests.command.test_train import SMALL, here, metrics, only, run, state, statuses

__all__ = ["here"]

OVERRIDES = [*SMALL, "fabric.compile=eager"]
HERE = "tests.experiment.test_callbacks"


class Counting(softmod.Callback):
    """Counts what it sees, and logs a metric at each round."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.steps: list[int] = []
        self.checkpoints: list[Path] = []

    def on_round_end(self, session: Session, metrics: Any, rollout: Any) -> None:
        self.seen["round"] += 1
        self.seen["env steps"] += rollout.env_steps
        self.seen["with updates"] += bool(metrics)
        session.log_metrics({"mine/rounds": self.seen["round"]})

    def on_evaluation(self, session: Session, scores: list[Any]) -> None:
        self.seen["evaluation"] += 1
        self.steps.append(session.env_steps)

    def on_save(self, session: Session, checkpoint: Path) -> None:
        assert checkpoint.is_relative_to(session.folder)
        self.checkpoints.append(checkpoint)


class Stopping(softmod.Callback):
    """Stops the training at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_round_end(self, session: Session, metrics: Any, rollout: Any) -> None:
        if session.env_steps >= self.at:
            session.stop()


class Failing(softmod.Callback):
    """Fails at its third round."""

    rounds = 0

    def on_round_end(self, session: Session, metrics: Any, rollout: Any) -> None:
        self.rounds += 1
        if self.rounds == 3:
            raise LookupError("mine is broken")


def named(name: str, **options: Any) -> str:
    more = "".join(f",{key}:{value}" for key, value in options.items())
    return f"callbacks=[{{_target_:{HERE}.{name}{more}}}]"


def test_a_callback_sees_rounds_evaluations_and_checkpoints(here):
    counting = Counting()
    result = softmod.train(OVERRIDES, callbacks=[counting])
    assert counting.seen == {
        "round": 20, "env steps": 600, "with updates": 16, "evaluation": 4,
    }  # fmt: skip
    assert counting.steps == [150, 300, 450, 600]
    assert [path.name for path in counting.checkpoints[-2:]] == ["step_000000000600"] * 2
    logged = metrics(result.folder)
    assert logged["mine/rounds", 30] == 1
    assert logged["mine/rounds", 600] == 20


def test_callbacks_change_nothing(here):
    watched = softmod.train(OVERRIDES, callbacks=[Counting()])
    plain = softmod.train([*OVERRIDES, "run.folder=plain"])
    assert watched.folder.parent.name == plain.folder.parent.name  # the same identity
    ours, theirs = state(watched.folder), state(plain.folder)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_callback_stops_the_training_and_the_run_is_finished(here, capsys):
    result = softmod.train(OVERRIDES, callbacks=[Stopping(at=200)])
    assert result.env_steps == 210
    assert statuses(result.folder)[-1] == "FINISHED"
    assert json.loads((result.folder / "result.json").read_text())["stopped_by_callback"] is True
    assert softmod.train(OVERRIDES) == result
    assert "nothing to do" in capsys.readouterr().out


def test_a_callback_named_in_a_configuration(here):
    assert run(named("Stopping", at=100)) == 0
    assert json.loads((only(here) / "result.json").read_text())["env_steps"] == 120


def test_each_seed_has_callbacks_of_its_own(here):
    assert run("seeds=[0,1]", named("Stopping", at=100)) == 0
    for seed in (0, 1):
        assert json.loads((only(here, seed) / "result.json").read_text())["env_steps"] == 120


def test_a_callback_that_fails_ends_the_run_which_can_be_resumed(here, capsys):
    assert run(named("Failing")) == 1
    assert "mine is broken" in capsys.readouterr().err
    assert statuses(only(here)) == ["RUNNING", "FAILED"]
    assert run() == 0
    assert statuses(only(here))[-1] == "FINISHED"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (named("Countin"), "callbacks.0._target_=.*Countin: not found .*did you mean Counting"),
        ("callbacks=[{_target_:pathlib.Path}]", "must be a softmod.*Callback"),
        (named("Stopping", step=3), "callbacks.0.step: Stopping takes no such option"),
        (named("Stopping"), "callbacks.0._target_=.*missing a required argument: 'at'"),
        ("callbacks=[mine]", "callbacks.0._target_: no value given"),
        ("callbacks=3", "callbacks=3: must be a list"),
    ],
)
def test_a_wrong_callback_is_refused_before_anything_is_written(override, message, here):
    with pytest.raises(ConfigError, match=message):
        softmod.train([*OVERRIDES, override])
    assert not list(here.iterdir())


def test_an_object_that_is_no_callback_is_refused(here):
    with pytest.raises(ConfigError, match="int must be an instance of softmod.Callback"):
        softmod.train(OVERRIDES, callbacks=[3])  # type: ignore[list-item]
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eval/success_rate/mean", 1.0, "names that begin with eval/, .* are softmod's own"),
        ("mine/text", "three", "metric mine/text='three': must be a number"),
    ],
)
def test_metrics_of_a_callback_are_checked(name, value, message, here):
    class Logging(softmod.Callback):
        def on_round_end(self, session, metrics, rollout):
            session.log_metrics({name: value})

    with pytest.raises(ConfigError, match=message):
        softmod.train(OVERRIDES, callbacks=[Logging()])


def test_stopping_in_the_last_evaluation_leaves_the_run_extensible(here):
    class Late(softmod.Callback):
        def on_evaluation(self, session, scores):
            if session.env_steps >= 600:
                session.stop()

    result = softmod.train(OVERRIDES, callbacks=[Late()])
    assert json.loads((result.folder / "result.json").read_text())["stopped_by_callback"] is False
    assert softmod.train([*OVERRIDES, "run.steps_per_task=220"]).env_steps == 660
