"""`python -m softmod.export`, and the policies that ship with softmod."""

from __future__ import annotations

import re
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

import softmod
from softmod import export
from softmod.agent.replay import Replay
from softmod.checkpoint.episodes import recorded
from softmod.checkpoint.load import find
from softmod.checkpoint.shipped import SHIPPED, shipped
from softmod.envs.episode import EvalEpisode
from softmod.errors import CheckpointError
from softmod.spec import Rollout
from tests.command.test_train import SMALL, here

__all__ = ["here"]

OBS, HORIZON = 9, 20  # of SMALL
CAPACITY = 150  # less than the 200 steps of each task
LINE = [
    *SMALL, "fabric.compile=eager", "workers.copies=2", f"run.replay_per_task={CAPACITY}",
    "algorithm=fast",
]  # fmt: skip


@pytest.fixture
def folder(here: Path) -> Path:
    """Return a run with two environments per task, whose replay lost its oldest steps."""
    return softmod.train(LINE).folder


def exported(folder: Path, *more: str) -> Path:
    assert export.run([f"checkpoint={folder}", *more]) == 0
    return folder / "export"


def test_weights_are_a_checkpoint_of_the_acting_policy(folder: Path):
    small = exported(folder, "formats=[weights]") / "weights"
    assert sum(file.stat().st_size for file in small.iterdir()) < 100_000
    policy, whole = softmod.load(small), softmod.load(folder)
    obs = np.random.default_rng(0).standard_normal((5, OBS)).astype(np.float32)
    for task in policy.tasks:
        assert np.array_equal(policy.act(obs, task), whole.act(obs, task))
    assert [score.success_rate for score in softmod.evaluate(small, goals=2)]


def test_onnx_and_torch(folder: Path, capsys):
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    written = exported(folder)
    assert {path.name for path in written.iterdir()} == {"policy.onnx", "policy.pt2"}
    line = re.search(
        r"actions on 1,000 observations differ by at most (\S+)\)", capsys.readouterr().out
    )
    assert line is not None
    assert float(line[1]) < 1e-5


@pytest.mark.parametrize("kind", ["replay", "rollouts"])
def test_minari_reads_the_episodes_back(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    minari = pytest.importorskip("minari", reason="pip install minari")
    written = exported(folder, f"formats=[{kind}]", "goals=3")
    exported(folder, f"formats=[{kind}]", "goals=3")  # replaces them
    monkeypatch.setenv("MINARI_DATASETS_PATH", str((written / "minari").resolve()))
    names = [f"toy-{kind}/{task}-v0" for task in ("toy-reach", "toy-opposite", "toy-touch")]
    assert sorted(minari.list_local_datasets()) == sorted(names)
    wanted = episodes_of(folder, kind)
    for name, expected in zip(names, wanted, strict=True):
        dataset = minari.load_dataset(name)
        assert dataset.total_episodes == len(expected)
        assert dataset.observation_space.shape == (OBS,)
        for read, episode in zip(dataset.iterate_episodes(), expected, strict=True):
            assert read.observations == pytest.approx(episode[0])
            assert read.actions == pytest.approx(episode[1])
            assert read.rewards == pytest.approx(episode[2], abs=1e-5)
            ends = read.terminations | read.truncations
            assert list(np.nonzero(ends)[0]) == [len(ends) - 1]


def episodes_of(folder: Path, kind: str) -> list[list[tuple[np.ndarray, ...]]]:
    """Return observations, actions and rewards of each episode of each task."""
    if kind == "replay":
        return [
            [(one.obs, one.action, one.reward) for one in task] for task in recorded(*find(folder))
        ]
    policy = softmod.load(folder)
    return [[play(policy, index, goal) for goal in range(3)] for index in range(len(policy.tasks))]


def play(policy: softmod.TrainedPolicy, task: int, goal: int) -> tuple[np.ndarray, ...]:
    env = policy.suite.make(task)
    episode = EvalEpisode(env, policy.suite.goals(task)[goal], policy.suite.spec.horizon)
    obs, actions, rewards = [episode.obs], [], []
    while not episode.over:
        actions.append(policy.act(episode.obs, task))
        before = episode.episode_return
        episode.step(actions[-1])
        rewards.append(episode.episode_return - before)
        obs.append(episode.obs)
    return np.stack(obs), np.stack(actions), np.array(rewards)


def test_the_replay_is_read_back_as_it_was_collected(here: Path, monkeypatch: pytest.MonkeyPatch):
    rollouts: list[Rollout] = []
    extend = Replay.extend

    def watched(self: Replay, rollout: Rollout) -> None:
        rollouts.append(deepcopy(rollout))
        extend(self, rollout)

    monkeypatch.setattr(Replay, "extend", watched)
    folder = softmod.train(LINE).folder
    for task, episodes in enumerate(recorded(*find(folder))):
        assert sum(len(one.reward) for one in episodes) == CAPACITY
        whole = [one for one in episodes if len(one.reward) == HORIZON]
        assert len(whole) >= 6
        collected = [one for copy in range(2) for one in split(rollouts, task, copy)]
        for one in whole:
            matches = [theirs for theirs in collected if np.array_equal(theirs[0], one.obs)]
            assert len(matches) == 1
            assert np.array_equal(matches[0][1], one.action)
            assert np.array_equal(matches[0][2], one.reward)


def split(rollouts: list[Rollout], task: int, copy: int) -> list[tuple[np.ndarray, ...]]:
    """Return observations, actions and rewards of the episodes of one environment."""
    obs, action, reward, after, begins = (
        np.concatenate([getattr(rollout, name)[task, copy] for rollout in rollouts])
        for name in ("obs", "action", "reward", "next_obs", "begins")
    )
    ends = [*np.nonzero(begins)[0][1:], len(begins)]
    return [
        (
            np.concatenate([obs[first:end], after[end - 1 : end]]),
            action[first:end],
            reward[first:end],
        )
        for first, end in zip(np.nonzero(begins)[0], ends, strict=True)
    ]


def test_wrong_lines_write_nothing(folder: Path, capsys):
    best = folder / "checkpoints" / "best"
    before = sorted(folder.rglob("*"))
    for line, code, message in (
        (["formats=[onnx]"], 2, "checkpoint: no value given"),
        ([f"checkpoint={folder}", "formats=[onx]"], 2, "formats=onx: must be .*did you mean onnx"),
        ([f"checkpoint={folder}", "goal=3"], 2, "goal.*did you mean goals"),
        ([f"checkpoint={folder}", "--onnx"], 2, "--onnx: unknown flag"),
        (
            ["checkpoint=mt1O"],
            3,
            "that ship with softmod .mt10, quickstart.; did you mean",
        ),
    ):
        assert export.run(line) == code
        assert re.search(message, capsys.readouterr().err)
    assert sorted(folder.rglob("*")) == before
    pytest.importorskip("minari", reason="pip install minari")
    assert export.run([f"checkpoint={best}", "formats=[replay]"]) == 3
    assert "holds weights only" in capsys.readouterr().err


# --- policies that ship with softmod --------------------------------------------------------------


def test_they_are_small_and_have_a_card():
    assert shipped() == ["mt10", "quickstart"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 5_000_000
    for name in shipped():
        facts = find(Path(name))[1]
        card = (SHIPPED / name / "card.md").read_text()
        for task in facts["spec"]["tasks"]:
            assert f"| {task} | " in card
        assert f"{facts['clock']['env_steps']:,} environment steps" in card
        assert "license | MIT" in card


@pytest.mark.parametrize("name", ["mt10", "quickstart"])
def test_they_solve_their_tasks(name: str):
    """Both play goals of MT10, because those of MT50, the quickstart's, take longer to draw."""
    policy = softmod.load(name)
    suite = softmod.load("mt10").suite
    assert len(policy.tasks) == {"mt10": 10, "quickstart": 3}[name]
    for task in ("reach-v3", "drawer-close-v3", "window-close-v3"):
        index = suite.spec.tasks.index(task)
        env = suite.make(index)
        for goal in suite.goals(index)[:3]:
            episode = EvalEpisode(env, goal, suite.spec.horizon)
            while not episode.over:
                episode.step(policy.act(episode.obs, task))
            assert episode.success
        env.close()


def test_output_for_them_is_in_the_working_folder(here: Path):
    assert export.run(["checkpoint=quickstart", "formats=[weights]"]) == 0
    assert find(here / "runs" / "quickstart" / "export" / "weights")
    assert not (SHIPPED / "quickstart" / "export").exists()


def test_an_unknown_name_is_answered_with_the_known_ones(here: Path):
    with pytest.raises(CheckpointError, match=r"quickstrat: .*\(mt10, quickstart\); did you"):
        softmod.load("quickstrat")


def test_a_damaged_one_is_noticed(tmp_path: Path):
    copied = shutil.copytree(SHIPPED / "quickstart", tmp_path / "copy")
    (copied / "agent.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="does not match the hash"):
        softmod.load(copied)
