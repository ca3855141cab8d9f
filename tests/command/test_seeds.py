"""Several seeds in one process: each equals its run alone, whatever happens to the others."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from softmod import train
from softmod.agent.group import Group
from softmod.agent.mtsac import MTSAC
from softmod.checkpoint.files import all_in
from softmod.errors import WorkerError
from softmod.experiment import session
from softmod.system import signals
from softmod.tracking.metrics import Log
from tests.command.test_signals import results, send_at
from tests.command.test_train import SMALL, here, only, state, statuses

__all__ = ["here"]

SEEDS = "seeds=[0,1,2]"
ONE_BY_ONE = "fabric.compile=eager"  # saves the time of recording updates, where they do not matter


def run(*more: str) -> int:
    """Train in this process; return the exit code."""
    return train.run([*SMALL, "actor.norm=layer", *more])


def close(folder: Path, other: Path) -> bool:
    """Compare states array by array, since single numbers may differ by more than rounding."""
    ours, theirs = state(folder), state(other)
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
    return ours.keys() == theirs.keys() and all(
        (mine - their).norm() <= 5e-2 * their.norm() + 1e-3 for mine, their in pairs
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three seeds side by side; return their parent folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["softmod-train"])
        assert run(SEEDS) == 0
        return only(folder).parent.resolve()


def same(here: Path, undisturbed: Path) -> None:
    """Check that three seeds ended in the state of the undisturbed ones."""
    for seed in range(3):
        ours, theirs = only(here, seed), undisturbed / f"seed_{seed}"
        assert statuses(ours)[-1] == "FINISHED"
        assert results(ours).keys() == results(theirs).keys()
        assert close(ours, theirs)


def test_each_seed_equals_its_run_alone(here, undisturbed, capsys):
    assert run("seed=1") == 0
    assert close(only(here, 1), undisturbed / "seed_1")
    assert results(only(here, 1)).keys() == results(undisturbed / "seed_1").keys()
    assert only(here, 1).parent.name == undisturbed.name
    assert not close(undisturbed / "seed_0", undisturbed / "seed_1")


def test_updates_are_made_together(here, monkeypatch):
    sizes, learn = [], Group.learn

    def watched(group: Group, *arguments, **options):
        sizes.append([len(part.agents) for part in group.parts])
        return learn(group, *arguments, **options)

    monkeypatch.setattr(Group, "learn", watched)
    assert run(SEEDS, "fabric.threads=2") == 0
    assert set(map(tuple, sizes)) == {(1, 1, 1)}  # threads take turns with three single agents


def test_output_and_journal_of_each_seed(here, capsys):
    assert run("seeds=[3,5]", ONE_BY_ONE) == 0
    printed = capsys.readouterr()
    assert "seed 3: runs/" in printed.err
    assert "seed 5:" in printed.err
    assert "success by seed: 3: " in printed.out
    records = [
        json.loads(line) for line in (only(here, 5) / "journal.jsonl").read_text().splitlines()
    ]
    tags = {
        name: value for r in records if r["kind"] == "tags" for name, value in r["values"].items()
    }
    assert tags["softmod.command"].endswith("seed=5")
    assert "seeds=" not in tags["softmod.command"]
    params = {
        name: value for r in records if r["kind"] == "params" for name, value in r["values"].items()
    }
    assert str(params["seed"]) == "5"


@pytest.mark.bar(2)
def test_stopped_seeds_save_and_go_on_to_the_same_end(here, undisturbed):
    for at in (30, 7, 50):  # calls of any of the three
        with pytest.MonkeyPatch.context() as patch:
            send_at(patch, MTSAC, "prepare", at)
            assert run(SEEDS) == signals.STOPPED
        assert [statuses(only(here, seed))[-1] for seed in range(3)] == ["KILLED"] * 3
    assert run(SEEDS) == 0
    same(here, undisturbed)


def test_one_that_lost_its_newest_checkpoint_catches_up(here, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, MTSAC, "prepare", 90)
        assert run(SEEDS) == signals.STOPPED
    newest, *_ = sorted(all_in(only(here, 1)), reverse=True)
    shutil.rmtree(newest)
    assert run(SEEDS) == 0
    same(here, undisturbed)


def test_a_seed_goes_on_by_itself(here, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, MTSAC, "prepare", 60)
        assert run(SEEDS) == signals.STOPPED
    assert run("seed=2") == 0
    assert run(SEEDS) == 0
    same(here, undisturbed)


def test_seeds_may_be_added(here, undisturbed, capsys):
    assert run("seed=1", ONE_BY_ONE) == 0
    before = state(only(here, 1))
    assert run(SEEDS, ONE_BY_ONE) == 0
    assert "seed_1: finished already" in capsys.readouterr().out
    after = state(only(here, 1))
    assert all(torch.equal(after[name], before[name]) for name in before)
    same(here, undisturbed)


def test_a_seed_that_fails_ends_no_other(here, undisturbed, capsys, monkeypatch):
    written = Log.round

    def fails(log: Log, clock, *arguments):
        if log.progress.name == "seed 1" and clock.env_steps == 300:
            raise WorkerError("a fault of this test")
        written(log, clock, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "round", fails)
        assert run(SEEDS, ONE_BY_ONE) == WorkerError.exit_code
    assert "a fault of this test [seed=1]" in capsys.readouterr().err
    assert [statuses(only(here, seed))[-1] for seed in range(3)] == [
        "FINISHED",
        "FAILED",
        "FINISHED",
    ]
    assert run(SEEDS, ONE_BY_ONE) == 0
    same(here, undisturbed)


def test_an_update_that_fails_ends_all_of_them(here, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("an update of this test")

    monkeypatch.setattr(Group, "learn", fails)
    assert run(SEEDS, ONE_BY_ONE) == 1
    assert [statuses(only(here, seed))[-1] for seed in range(3)] == ["FAILED"] * 3


def test_ctrl_c_ends_all_of_them_at_once(here, monkeypatch):
    send_at(monkeypatch, MTSAC, "prepare", 40, signal.SIGINT)
    assert run(SEEDS, ONE_BY_ONE) == 130
    assert [statuses(only(here, seed))[-1] for seed in range(3)] == ["KILLED"] * 3


def test_seeds_end_when_they_are_solved_each_by_itself(here, monkeypatch):
    """Check that the group is rebuilt without finished seeds."""
    ended, seen = session.ended, []

    def solved(cfg, clock) -> bool:
        seen.append(clock)
        first = seen[0]
        return ended(cfg, clock) or (clock is first and clock.env_steps >= 150)

    monkeypatch.setattr(session, "ended", solved)
    assert run(SEEDS, ONE_BY_ONE) == 0
    ends = [
        json.loads((only(here, seed) / "result.json").read_text())["env_steps"] for seed in range(3)
    ]
    assert ends[0] < 600
    assert ends[1:] == [600, 600]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=[]"], "seeds=[]: must be distinct numbers of at least 0, as in seeds=[0,1,2]"),
        (["seeds=[1,1]"], "seeds=[1,1]: must be distinct"),
        (["seeds=[-1]"], "seeds=[-1]: must be distinct"),
        (["seeds=3"], "seeds=3: must be a list, as in [a,b]"),
        (["seeds=[a]"], "must be a whole number"),
        (["seed=1", "seeds=[0,1]"], "seed=1: cannot be combined with seeds="),
        (["-m", "seed=1,2", "seeds=[0,1]"], "seed=1,2: cannot be combined with seeds="),
    ],
)
def test_invalid_seeds(here, capsys, words, message):
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_sweep_over_groups_of_seeds(here):
    assert (
        run("-m", "seeds=[0,1]", "algorithm.discount=0.9,0.95", ONE_BY_ONE, "run.steps_per_task=80")
        == 0
    )
    assert len(list(here.glob("runs/*/seed_0/result.json"))) == 2
    assert len(list(here.glob("runs/*/seed_1/result.json"))) == 2
