"""Whole runs on the toy tasks, in this process: counts, resumption, sweeps, evaluation, files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import softmod
from softmod import evaluate, replay_fault, train
from softmod.checkpoint import replay_files as archive
from softmod.checkpoint.files import arrays, newest, shared
from softmod.errors import CheckpointError, ConfigError, NumericalError, WorkerError
from softmod.experiment import session
from softmod.spec import TaskScore
from softmod.workers.pool import Workers

SMALL = [
    "experiment=toy", "workers=inline", "tracking=journal", "fabric.threads=1", "env.horizon=20",
    "run.steps_per_task=200", "run.warmup_per_task=40", "run.batch_per_task=8",
    "run.round_steps=10",
    "run.eval_every=150", "run.eval_goals=2", "run.final_eval_goals=4", "run.save_every=90",
    "run.log_every=60",
    "actor.module_width=8", "critic.module_width=8",
    "actor.embedding_width=8", "critic.embedding_width=8", "actor.gating_width=8",
    "critic.gating_width=8", "tracking.model=false",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["softmod-train"])
    monkeypatch.delenv("SOFTMOD_SWEEP", raising=False)
    return tmp_path


def run(*more: str) -> int:
    """Train in this process with eager updates, which saves seconds; return the exit code."""
    return train.run([*SMALL, "fabric.compile=eager", *more])


def only(here: Path, seed: int = 0) -> Path:
    """Return the folder of the only run with this seed."""
    (folder,) = here.glob(f"runs/*/seed_{seed}")
    return folder


def metrics(folder: Path) -> dict[tuple[str, int], float]:
    """Return every metric at its step; check that each pair occurs once."""
    values: dict[tuple[str, int], float] = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.get("values", {}).items() if record["kind"] == "metrics" else ():
            assert (name, record["step"]) not in values, f"{name} twice at {record['step']}"
            values[name, record["step"]] = value
    return values


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Return all arrays of a run's newest checkpoint."""
    found = newest(folder)
    assert found is not None
    groups = ("agent", "optimizers", "episodes")
    pieces = [load_file(folder / name)["rows"] for name in sorted(shared(found[0]))]
    held = {
        f"{group}.{name}": value
        for group in groups
        for name, value in arrays(found[0], group).items()
    }
    return held | {"replay": torch.cat(pieces, 1)}


def statuses(folder: Path) -> list[str]:
    """Return the statuses in a run's journal."""
    records = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [record["status"] for record in records if record["kind"] == "status"]


def test_a_run_from_nothing_to_its_result(here, capsys):
    assert run() == 0
    folder = only(here)
    result = json.loads((folder / "result.json").read_text())
    assert result["env_steps"] == 600
    assert [score["task"] for score in result["scores"]] == [
        "toy-reach",
        "toy-opposite",
        "toy-touch",
    ]
    assert {score["episodes"] for score in result["scores"]} == {4}
    values = metrics(folder)
    assert sorted({step for name, step in values if name == "eval/success_rate/mean"}) == [
        150,
        300,
        450,
        600,
    ]
    assert values["eval/success_rate/mean", 600] == pytest.approx(result["success_rate"])
    counts = Counter(name for name, _ in values)
    logged = [
        "train/critic_loss",
        "train/temperature/toy-touch",
        "train/task_weight/toy-reach",
        "train/episode_return/toy-opposite",
        "routing/entropy/layer_1",
        "time/updates_per_second",
    ]
    for name in logged:
        assert counts[name] >= 6, name
    found = newest(folder)
    assert found is not None
    assert found[1]["counters"]["updates"] == int(160 * 0.25)
    assert found[1]["counters"]["written"] == 200
    assert statuses(folder) == ["RUNNING", "FINISHED"]
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "success.png",
        "result.json",
        "checkpoints",
    }
    assert (folder / "success.png").stat().st_size > 5000
    (folder / "new").touch()
    usual = (folder / "new").stat().st_mode & stat.S_IROTH
    assert all(path.stat().st_mode & stat.S_IROTH == usual for path in folder.rglob("*"))
    out = capsys.readouterr().out
    assert "toy-opposite" in out
    assert sorted(path.name for path in here.iterdir()) == ["runs"]


@pytest.mark.parametrize(("every", "expected"), [(150, [150, 180]), (30, [30, 60])])
def test_no_two_evaluations_at_one_step(here, monkeypatch, every, expected):
    """Check that the final evaluation comes a round later if time runs out in an evaluation."""
    evaluations, make = [], session.Session._evaluate

    def watched(self, *arguments):
        evaluations.append(arguments)
        return make(self, *arguments)

    monkeypatch.setattr(session.Session, "_evaluate", watched)
    monkeypatch.setattr(session, "ended", lambda *_: bool(evaluations))
    assert run(f"run.eval_every={every}") == 0
    values, result = metrics(only(here)), json.loads((only(here) / "result.json").read_text())
    assert sorted(step for name, step in values if name == "eval/success_rate/mean") == expected
    assert result["env_steps"] == expected[-1]
    assert {score["episodes"] for score in result["scores"]} == {4}
    assert values["eval/success_rate/mean", expected[-1]] == pytest.approx(result["success_rate"])


def test_a_missing_finished_status_is_written_the_next_time(here):
    assert run() == 0
    journal = only(here) / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"FINISHED"' not in line))
    assert statuses(only(here)) == ["RUNNING"]
    assert run() == 0
    assert statuses(only(here)) == ["RUNNING", "FINISHED"]

    def interrupted(_, clock) -> bool:
        if clock.env_steps >= 780:  # beyond the next evaluation
            raise KeyboardInterrupt
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "ended", interrupted)
        assert run("run.steps_per_task=400") == 130
    assert run() == 0  # this length is finished; the status of the longer run is kept
    assert statuses(only(here))[-1] == "KILLED"


def test_a_result_without_its_journal_is_shown_all_the_same(here, capsys):
    assert run() == 0
    (only(here) / "journal.jsonl").unlink()
    assert run() == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            ["env=mt50", "--cfg", "job"],
            ["name: mt50-soft_modular", "eval_every: 500000", "steps_per_task: 160000"],
        ),
        (
            ["--cfg", "job", "-p", "run", "env=mt10"],
            ["eval_every: 100000", "steps_per_task: 200000"],
        ),
        (
            ["env=mt10", "model=moore", "algorithm=mtsac", "run=smoke", "-c", "job"],
            ["num_experts: 4", "lr: 0.0003"],
        ),
        (["--cfg", "job", "--resolve"], ["name: quickstart-"]),
    ],
)
def test_a_configuration_is_shown_with_its_numbers(here, line, shown, capsys):
    assert train.run(line) == 0
    printed = capsys.readouterr().out
    assert "${" not in printed
    assert all(words in printed for words in shown)
    assert not list(here.iterdir())


def test_what_cannot_work_creates_nothing(here, capsys):
    faulty = {
        (
            "model=single_task",
            "algorithm.gradient_surgery=pcgrad",
        ): "gradient_surgery=pcgrad: tasks share no weights",
        (
            "fabric.compile=captured",
            "optimizer.actor.fused=false",
        ): "needs a fused optimizer; set optimizer.actor.fused=true",
    }
    for line, message in faulty.items():
        plain = [word for word in SMALL if not word.startswith(("actor.", "critic."))]
        assert train.run([*plain, *line]) == 2
        assert message in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_the_same_seed_gives_the_same_run_and_another_does_not(here):
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        assert run(f"run.folder={name}", f"seed={seed}") == 0
    first, second, third = (
        state(next(here.glob(f"{name}/*/seed_*"))) for name in ("first", "second", "third")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["agent.actor.network.first.weight"], third["agent.actor.network.first.weight"]
    )


@pytest.mark.parametrize("stop", [90, pytest.param(270, marks=pytest.mark.reliability), 390])
def test_a_run_that_stopped_goes_on_to_the_same_end(here, stop):
    """Stop in the middle of episodes too: the horizon is 20, checkpoints are 30 steps apart."""
    assert run("run.folder=whole") == 0
    assert run(f"run.steps_per_task={stop // 3}") == 0
    folder = only(here)
    assert json.loads((folder / "result.json").read_text())["env_steps"] == stop
    assert run() == 0
    whole, resumed = state(next(here.glob("whole/*/seed_0"))), state(folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (
        metrics(folder)["eval/success_rate/mean", 600]
        == metrics(next(here.glob("whole/*/seed_0")))["eval/success_rate/mean", 600]
    )


def test_a_finished_run_is_not_run_again(here, capsys):
    assert run() == 0
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run() == 0
    assert "finished already, 600 env steps; nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}


def test_resume_must_and_never(here, capsys):
    assert run("run.resume=must") == CheckpointError.exit_code
    assert "run.resume=must: no checkpoint in" in capsys.readouterr().err
    assert run() == 0
    assert run("run.resume=never") == 0
    assert sorted(path.name for path in here.glob("runs/*/seed_0*")) == ["seed_0", "seed_0.1"]


def test_damaged_checkpoints_only(here, capsys, caplog):
    assert run("run.steps_per_task=100") == 0
    folder = only(here)
    for manifest in folder.glob("checkpoints/step_*/manifest.json"):
        manifest.write_text("{}")
    assert run() == CheckpointError.exit_code
    assert "none of 2 checkpoints is valid" in capsys.readouterr().err
    assert caplog.text.count("damaged checkpoint skipped") == 2


def test_a_finished_run_without_its_checkpoints_does_not_start_over(here, capsys):
    assert run("run.steps_per_task=100") == 0
    folder = only(here)
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "journal.jsonl").read_bytes()
    assert run() == CheckpointError.exit_code
    assert "finished before, and its checkpoints are gone" in capsys.readouterr().err
    assert (folder / "journal.jsonl").read_bytes() == before
    (folder / "result.json").unlink()  # as if it had been killed before its first save
    assert run("run.steps_per_task=60") == 0


def test_the_clock_ends_a_run(here):
    assert run("run.max_minutes=0.0001") == 0
    result = json.loads((only(here) / "result.json").read_text())
    assert 0 < result["env_steps"] < 600
    assert result["env_steps"] % 30 == 0  # whole rounds
    assert result["seconds"] >= 0.006
    assert run("run.max_minutes=0.0001") == 0  # finished: by the clock
    assert run("run.max_minutes=5") == 0  # resumes with more time
    assert json.loads((only(here) / "result.json").read_text())["env_steps"] == 600


def solve(monkeypatch: pytest.MonkeyPatch, rates: list[float]) -> list[int]:
    """Replace evaluations by ones with these mean success rates; the last one is repeated.

    Returns:
        A list to which each evaluation appends its number of goals.
    """
    made: list[int] = []

    def evaluate(self, policy, goals):
        made.append(goals)
        rate = rates[min(len(made), len(rates)) - 1]
        return [TaskScore(task, rate, 0.0, goals) for task in self.spec.tasks]

    monkeypatch.setattr(Workers, "evaluate", evaluate)
    return made


def test_two_evaluations_running_end_a_run(here, monkeypatch):
    made = solve(monkeypatch, [0.95, 0.5, 0.9, 1.0])
    often = ["run.eval_every=90", "run.stop_at=0.9"]
    assert run(*often) == 0
    result = json.loads((only(here) / "result.json").read_text())
    assert result["env_steps"] == 390  # four evaluations, and a round before the last one
    assert made == [2, 2, 2, 2, 4]
    assert result["stopped_at"] == 0.9
    assert run(*often) == 0  # finished
    assert len(made) == 5
    assert run("run.eval_every=90", "run.stop_at=0.8") == 0  # reached already
    assert len(made) == 5
    assert run("run.eval_every=90") == 0  # resumes without the limit
    assert json.loads((only(here) / "result.json").read_text())["env_steps"] == 600


def test_success_in_training_is_logged(here):
    assert run() == 0
    logged = [key for key in metrics(only(here)) if key[0].startswith("train/success_rate/")]
    assert {name for name, _ in logged} == {
        f"train/success_rate/{task}" for task in ("toy-reach", "toy-opposite", "toy-touch")
    }
    assert min(step for _, step in logged) < 150  # before the first evaluation
    assert all(0 <= metrics(only(here))[key] <= 1 for key in logged)


def test_train_log_has_what_was_printed_over_all_sessions(here, capsys):
    assert run("run.steps_per_task=100") == 0
    assert run() == 0
    printed = capsys.readouterr()
    lines = (only(here) / "train.log").read_text().splitlines()
    sessions = [line for line in lines if line.startswith("--- ")]
    assert len(sessions) == 2
    assert all("python -m softmod.train experiment=toy" in line for line in sessions)
    shown = [*printed.err.splitlines(), *printed.out.splitlines()]
    assert sorted(line for line in lines if line not in sessions) == sorted(shown)


def test_train_log_has_the_error_that_ended_a_run(here, capsys):
    assert run("env._target_=tests.faulty.Faulty", "env.name=raise-25") == 5
    *_, last = (only(here) / "train.log").read_text().splitlines()
    assert last == capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("softmod: RuntimeError: the simulation broke")


def test_evaluation_repeats_the_last_figures(here, capsys):
    assert run() == 0
    folder = only(here)
    result = json.loads((folder / "result.json").read_text())
    for processes in ("null", "0", "2"):
        assert evaluate.run([f"checkpoint={folder}", "goals=4", f"processes={processes}"]) == 0
        repeated = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        assert repeated["scores"] == result["scores"]
    assert "toy-reach" in capsys.readouterr().out
    best = folder / "checkpoints" / "best"
    assert evaluate.run([f"checkpoint={best}", "goals=3", f"output={here / 'out'}"]) == 0
    assert json.loads((here / "out" / "evaluation.json").read_text())["scores"][0]["episodes"] == 3


def test_messages_of_evaluate_for_invalid_lines(here, capsys):
    assert evaluate.run([]) == 2
    assert evaluate.run(["checkpoint=nowhere"]) == 3
    assert evaluate.run(["checkpoint=nowhere", "goals=0"]) == 2
    assert evaluate.run(["checkpoint=nowhere", "gaols=3"]) == 2
    assert evaluate.run(["--video", "checkpoint=nowhere"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 5
    assert printed[1].startswith(
        "softmod: nowhere: neither a checkpoint nor a run's folder with checkpoints in it"
    )
    assert "did you mean goals" in printed[3]


def test_a_policy_in_two_lines(here):
    assert run() == 0
    policy = softmod.load(only(here))
    action = policy.act(np.zeros(9), "toy-opposite")
    assert action.shape == (2,)
    assert np.array_equal(policy.act(np.zeros((3, 9)), 1)[2], action)
    assert [route.shape for route in policy.routing(np.zeros(9), "toy-opposite")] == [
        (2, 2),
        (1, 2),
    ]
    assert policy.tasks == ("toy-reach", "toy-opposite", "toy-touch")
    with pytest.raises(ConfigError, match="must be one of toy-reach"):
        policy.act(np.zeros(9), "push-v3")
    with pytest.raises(CheckpointError):
        softmod.load(here)


@pytest.mark.bar(20)
def test_a_sweep_goes_on_after_a_failed_job(here, capsys):
    faulty = "env._target_=tests.faulty.Faulty,softmod.envs.toy.Toy"
    assert run("-m", faulty, "env.name=raise-25") == 5
    printed = capsys.readouterr()
    assert "softmod: RuntimeError: the simulation broke [" in printed.err
    ended = sorted(tuple(statuses(folder)) for folder in here.glob("runs/*/seed_0"))
    assert ended == [("RUNNING", "FAILED"), ("RUNNING", "FINISHED")]


def test_a_sweep_does_only_what_is_missing(here, capsys):
    assert run("-m", "seed=0,1") == 0
    assert capsys.readouterr().out.count("resumes at") == 0
    times = {path: path.stat().st_mtime_ns for path in here.glob("runs/*/*/result.json")}
    assert len(times) == 2
    assert run("-m", "seed=0,1,2") == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list(here.glob("runs/*/*/result.json"))) == 3


def test_an_invalid_class_fails_before_anything_is_created(here, capsys):
    assert run("optimizer.actor._target_=torch.optim.adam.Adamm") == 2
    assert run("optimizer.actor._target_=torch.optim.SGD") == 2
    assert run("env._target_=softmod.envs.toy.ToyEnv") == 2
    assert run("env._target_=fractions.Fraction") == 2
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert os.listdir(here) == []


@pytest.mark.parametrize("threads", ["fabric.threads=3", "fabric.threads=null"])
def test_threads_are_configured_or_measured(here, threads):
    assert run(threads, "workers=auto") == 0
    found = newest(only(here))
    assert found is not None
    assert found[1]["threads"] == 3 or threads.endswith("null")
    assert found[1]["processes"] >= 1
    torch.set_num_threads(1)


def test_one_goal_only(here):
    assert run("env.goals=fixed") == 0
    result = json.loads((only(here) / "result.json").read_text())
    assert {score["episodes"] for score in result["scores"]} == {1}


@pytest.mark.bar(15)
def test_updates_that_stay_non_finite_end_the_run(here, capsys):
    """Check that each batch with a NaN reward is skipped, and that too many of them end the run."""
    line = ["env._target_=tests.faulty.Faulty", "env.name=nan-1"]
    assert run(*line) == NumericalError.exit_code
    printed = capsys.readouterr().err
    assert "updates were not finite and changed nothing" in printed
    assert statuses(only(here)) == ["RUNNING", "FAILED"]
    (bundle,) = (only(here) / "faults").iterdir()
    assert f"python -m softmod.replay_fault {bundle.relative_to(here)} --allow tests" in printed
    assert replay_fault.main([str(bundle), "--allow", "tests"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not finite, as it was" in lines[0]
    batch = [line for line in lines if line.startswith("batch")]
    assert batch
    for line in batch:
        assert line.startswith("batch, reward:")
        assert line.endswith("of toy-opposite")
    assert any(line.startswith("result, critic_loss") for line in lines)
    assert not [line for line in lines if line.startswith("parameters")]
    assert replay_fault.main([str(only(here) / "checkpoints" / "best")]) == 3
    assert "not the bundle of a fault" in capsys.readouterr().err


def test_an_environment_that_fails_while_it_is_measured(here, capsys):
    line = ["env._target_=tests.faulty.Faulty", "workers=auto"]
    for fault in ("raise-3", "die-3", "build"):
        assert run(*line, f"env.name={fault}") == WorkerError.exit_code
    assert "Traceback" not in capsys.readouterr().err


def test_insisting_on_a_checkpoint_creates_nothing(here):
    assert run("run.resume=must") == CheckpointError.exit_code
    assert os.listdir(here) == []


@pytest.mark.parametrize(("refused", "code"), [(range(1, 3), 0), (range(2, 5), 4), ((1, 3, 5), 0)])
def test_a_full_disk_is_reported_and_ends_the_run_at_the_third_time(
    here, caplog, monkeypatch, refused, code
):
    """Let some writes of the replay fail; check that everything on disk is complete."""
    attempts, write = [0], archive.write_arrays

    def full(path, arrays):
        attempts[0] += 1
        if attempts[0] in refused:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, arrays)

    monkeypatch.setattr(archive, "write_arrays", full)
    assert run("run.save_every=60", "run.eval_every=600") == code
    assert caplog.text.count("No space left on device") == (2 if code else len(refused))
    found = newest(only(here))
    assert found is not None
    monkeypatch.setattr(archive, "write_arrays", write)
    assert run("run.save_every=60", "run.eval_every=600") == 0
    assert json.loads((only(here) / "result.json").read_text())["env_steps"] == 600


@pytest.mark.bar(14)
def test_physics_that_break_too_often_end_the_run(here, capsys, monkeypatch):
    monkeypatch.setattr("softmod.tracking.metrics.TOLERATED_FAULTS", 3)
    broken = ["env._target_=tests.faulty.AlwaysBroken", "env.name=physics-9"]
    assert run(*broken) == 6
    assert "the physics broke in more than 3 episodes (toy-opposite 4)" in capsys.readouterr().err
    values = metrics(only(here))
    assert values["train/physics_faults/toy-opposite", 60] >= 1
