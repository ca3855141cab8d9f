"""Runs that a scheduler stops and restarts at any moment end in the same state, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from softmod import train
from softmod.agent.mtsac import MTSAC
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.files import all_in, newest
from softmod.envs.toy import ToyEnv
from softmod.experiment import run as experiment
from softmod.experiment import session
from softmod.experiment.resources import Resources
from softmod.state import COMPONENTS, state_hash
from softmod.system import signals, slurm
from softmod.tracking.names import WALL_CLOCK
from softmod.workers.pool import Workers
from tests.command.test_train import SMALL, here, metrics, only, run, state, statuses

__all__ = ["here"]

MOMENTS = {  # the method that is interrupted, and at which of its calls
    "warm-up": (Workers, "start", 2),
    "first update": (MTSAC, "training_step", 1),
    "within a round": (MTSAC, "training_step", 16),
    "the last update of a round": (MTSAC, "training_step", 17),
    "waiting for workers": (Workers, "finish", 7),
    "the beginning of an evaluation": (Workers, "evaluate", 2),
    "within an evaluation": (ToyEnv, "step", 150 + 30),
    "within the last evaluation": (ToyEnv, "step", -50),  # before the end
    "the last round": (Workers, "start", 20),
}
FULL = {
    "first update",
    "the last update of a round",
    "the beginning of an evaluation",
    "the last round",
}


def send_at(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int, number: int = signal.SIGTERM
) -> None:
    """Send this process a signal when something is called for the `at`-th time."""
    calls, original = [0], getattr(owner, name)

    def watched(self, *arguments, **options):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    monkeypatch.setattr(owner, name, watched)


def results(folder: Path) -> dict[tuple[str, int], float]:
    """Return the metrics of a run, except those that depend on the wall clock."""
    return {
        key: value for key, value in metrics(folder).items() if not key[0].startswith(WALL_CLOCK)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """Return metrics, state and environment steps of an undisturbed run."""
    steps, step = [0], ToyEnv.step
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        patch.setattr("sys.argv", ["softmod-train"])
        patch.setattr(
            ToyEnv,
            "step",
            lambda env, action: (steps.append(steps.pop() + 1), step(env, action))[1],
        )
        assert run() == 0
        folder = only(Path.cwd())
        return results(folder), state(folder), steps[0]


def test_a_run_beside_others_prints_how_to_resume_and_is_requeued(here, capsys, monkeypatch):
    assert run() == 0
    with monkeypatch.context() as patch:
        send_at(patch, MTSAC, "training_step", 16)
        assert run("run.resume=never") == signals.STOPPED
    printed = capsys.readouterr().err
    assert "rename" in printed
    assert "seed_0.1 to seed_0 to resume it" in printed
    assert "the same command" not in printed
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run("run.resume=never") == 0
    (ended,) = here.glob("runs/*/seed_0.1")
    assert statuses(ended)[-1] == "FINISHED"
    assert not list(here.glob("runs/*/seed_0.2"))


@pytest.mark.bar(2)
@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=[pytest.mark.reliability] * (m in FULL)) for m in MOMENTS]
)
def test_a_stopped_run_saves_and_goes_on_to_the_same_end(here, capsys, moment, undisturbed):
    expected, at_the_end, steps = undisturbed
    owner, name, at = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, owner, name, at if at > 0 else steps + at)
        assert run() == signals.STOPPED
    folder = only(here)
    assert "the same command resumes the run" in capsys.readouterr().err
    assert statuses(folder)[-1] == "KILLED"
    assert not (folder / "result.json").exists()
    found = newest(folder)
    assert found is not None
    saved = found[1]["clock"]["env_steps"]
    assert run() == 0
    assert statuses(folder)[-1] == "FINISHED"
    assert results(folder) == expected
    assert saved < 600 or moment == "within the last evaluation"
    ours = state(folder)
    assert ours.keys() == at_the_end.keys()
    assert all(torch.equal(ours[name], at_the_end[name]) for name in ours)


@pytest.mark.bar(2)
def test_stopped_again_and_again(here, undisturbed):
    codes = []
    for at in (3, 5, 2, 9, 1, 4):
        with pytest.MonkeyPatch.context() as patch:
            send_at(patch, MTSAC, "training_step", at, signal.SIGUSR1)
            codes.append(run())
    assert codes == [signals.STOPPED] * 6
    assert run() == 0
    assert results(only(here)) == undisturbed[0]


# every state that the recipe adds, and uniform actions before the first update
RECIPE = [
    "algorithm=fast", "model=soft_modular_residual", "critic.width=8", "actor.norm=layer",
    "env.train_horizon=10",
    "algorithm.policy_averaging=0.1", "run.warmup_policy=uniform", "critic_head.atoms=11",
]  # fmt: skip


def run_recipe(*more: str) -> int:
    small = [word for word in SMALL if not word.startswith("critic.")]
    return train.run([*small, "fabric.compile=eager", *RECIPE, *more])


@pytest.mark.bar(2)
def test_the_recipe_stopped_again_and_again_comes_to_the_same_end(tmp_path, monkeypatch, here):
    """Check that statistics, averaged policy, delayed updates and uniform actions are all saved."""
    line = f"run.folder={tmp_path / 'whole'}"
    assert run_recipe(line) == 0
    (whole,) = (tmp_path / "whole").glob("*/seed_0")
    update = (MTSAC, "training_step")
    stops = [
        (Workers, "start", 3),
        (*update, 4),
        (*update, 8),
        (*update, 9),
        (Workers, "evaluate", 1),
    ]
    stops += [(Workers, "finish", 2), (*update, 1)]
    for owner, name, at in stops:
        with pytest.MonkeyPatch.context() as patch:
            send_at(patch, owner, name, at)
            assert run_recipe() == signals.STOPPED
    assert run_recipe() == 0
    assert results(only(here)) == results(whole)
    ours, theirs = state(only(here)), state(whole)
    assert {
        "agent.moments.mean",
        "agent.return_scale.largest",
        "agent.actor.normalizer.scale",
    } <= ours.keys()
    assert "agent.averaged_actor.network.first.weight" in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert state_hash(newest(only(here))[0])["state"] == state_hash(newest(whole)[0])["state"]


@pytest.mark.bar(2)
@pytest.mark.parametrize("processes", [0, 1])
def test_collecting_before_learning_comes_to_the_same_end(tmp_path, monkeypatch, here, processes):
    """The signal ends the wait for a process; inline, the round is collected and then stopped."""
    assert run_recipe(f"run.folder={tmp_path / 'whole'}") == 0
    (whole,) = (tmp_path / "whole").glob("*/seed_0")
    order: list[str] = []
    for owner, name in ((Workers, "wait"), (MTSAC, "learn")):
        called = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=called, n=name: (order.append(n), f(*a))[1])
    monkeypatch.setattr(Resources, "in_turns", True)
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, Workers, "wait", 3)
        assert run_recipe(f"workers.processes={processes}") == signals.STOPPED
    assert order == ["wait", "learn", "wait", "learn", "wait", "learn"][: 6 - processes]
    assert run_recipe(f"workers.processes={processes}") == 0
    assert order[:4] == ["wait", "learn"] * 2
    assert state_hash(newest(only(here))[0])["state"] == state_hash(newest(whole)[0])["state"]


@pytest.mark.control(2)
@pytest.mark.parametrize("forgotten", ["moments", "return_scale", "averaged_actor"])
def test_seen_failing_each_state_of_the_recipe_is_needed(tmp_path, here, forgotten):
    """Check that resetting one of the saved states leads to a different end."""
    assert run_recipe(f"run.folder={tmp_path / 'whole'}") == 0
    (whole,) = (tmp_path / "whole").glob("*/seed_0")
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, MTSAC, "training_step", 30)
        assert run_recipe() == signals.STOPPED

    def without(live, saved, what):
        kept = {
            name: live[name].clone() if name.startswith(forgotten) else value
            for name, value in saved.items()
        }
        restore(live, kept, what)

    restore = checkpoint.restore_arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "restore_arrays", without)
        assert run_recipe() == 0
    assert any(
        not torch.equal(value, state(whole)[name]) for name, value in state(only(here)).items()
    )


def test_every_array_of_an_agent_belongs_to_a_component_of_the_hash(here):
    assert run_recipe() == 0
    known = tuple(begin for begins in COMPONENTS.values() for begin in begins)
    agent = [name for name in state(only(here)) if name.startswith("agent.")]
    assert agent
    assert all(name.removeprefix("agent.").startswith(known) for name in agent)


@pytest.mark.bar(9)
def test_a_second_signal_while_saving_is_safe(here, monkeypatch, undisturbed):
    send_at(monkeypatch, MTSAC, "training_step", 7)
    from softmod.checkpoint.saver import Saver

    save = Saver.save

    def impatient(self, *arguments, **options):
        if signals.stopping():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        return save(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", impatient)
        assert run() == signals.STOPPED
    assert len(all_in(only(here))) >= 1
    assert run() == 0
    assert results(only(here)) == undisturbed[0]


@pytest.mark.control(2)
def test_seen_failing_pending_work_is_needed(here, monkeypatch, undisturbed):
    """Check that dropping a round's pending policy and updates leads to a different end."""
    send_at(monkeypatch, MTSAC, "training_step", 16)
    assert run() == signals.STOPPED
    monkeypatch.setattr(
        session.Saver,
        "pending",
        property(lambda self: session.PendingWork(), lambda self, value: None),
        raising=False,
    )
    assert run() == 0
    assert any(
        not torch.equal(value, undisturbed[1][name]) for name, value in state(only(here)).items()
    )


# --- SLURM (a real one: tests/cluster) ------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a command on the path that records its arguments and answers a question about a job;
    return the record's path.
    """
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    (folder / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$1" in show) echo "JobId=7 $ABOUT";; esac\n'
    )
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


IN_ARRAY = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
IN_GRACE = "JobState=RUNNING Restarts=0 PreemptTime=2026-01-01T00:00:00"
QUEUED = "JobState=COMPLETING Restarts=1"
CANCELLED = "JobState=COMPLETING Restarts=0 PreemptTime=None"


@pytest.mark.bar(9)
@pytest.mark.parametrize(
    ("number", "environment", "about", "asked", "said"),
    [
        (signal.SIGUSR1, {"SLURM_JOB_ID": "7"}, "", "requeue 7", "job 7 is queued again"),
        (signal.SIGUSR1, IN_ARRAY, "", "requeue 7_3", "job 7_3 is queued again"),
        (signal.SIGUSR1, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}, "", None, None),
        (signal.SIGUSR2, {"SLURM_JOB_ID": "7"}, "", "requeue 7", "job 7 is queued again"),
        (signal.SIGTERM, {"SLURM_JOB_ID": "7"}, IN_GRACE, "requeue 7", "job 7 is queued again"),
        (signal.SIGTERM, {"SLURM_JOB_ID": "7"}, QUEUED, None, "SLURM has queued job 7 again"),
        (signal.SIGTERM, {"SLURM_JOB_ID": "7"}, CANCELLED, None, None),
        (signal.SIGHUP, {"SLURM_JOB_ID": "7"}, CANCELLED, None, None),
        (signal.SIGUSR1, {}, "", None, None),
    ],
)
def test_a_stopped_job_is_queued_again_if_it_is_to_run_again(
    here, capsys, monkeypatch, scontrol, number, environment, about, asked, said
):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"ABOUT": about}).items():
        monkeypatch.setenv(name, value)
    send_at(monkeypatch, MTSAC, "training_step", 4, number)
    assert run() == signals.STOPPED
    calls = scontrol.read_text().splitlines() if scontrol.exists() else []
    assert [call for call in calls if call.startswith("requeue")] == ([asked] if asked else [])
    printed = capsys.readouterr().err
    assert said in printed if said else "queue" not in printed


def test_a_refused_request_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # without scontrol
    again, said = slurm.ensure_rerun([signal.SIGUSR1], {"SLURM_JOB_ID": "7"})
    assert not again
    assert said.startswith("SLURM does not queue job 7 again (")


def swallow(*_):
    """Raise the error that follows an interrupt during torch's optional import of NumPy."""
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    raise ImportError("cannot load module more than once per process")


@pytest.mark.bar(10)
def test_an_interrupt_that_comes_out_as_another_error(here, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "run_experiment", swallow)
    assert run() == 130
    assert (
        capsys.readouterr().err
        == "softmod: interrupted; run the same command again to resume from the last checkpoint\n"
    )


@pytest.mark.control(10)
def test_seen_failing_an_interrupt_that_is_not_recorded(here, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "run_experiment", swallow)
    monkeypatch.setattr(signals, "check", lambda: None)
    assert run() == 1
    assert "Traceback" in capsys.readouterr().err
