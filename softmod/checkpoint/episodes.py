"""Episodes for offline learning: played by a policy or read from a replay, as Minari datasets."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softmod.agent.replay import Replay
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.load import spec_of
from softmod.checkpoint.replay_files import Archive
from softmod.envs.episode import EvalEpisode
from softmod.errors import CheckpointError
from softmod.networks.gaussian import Actor, Policy
from softmod.spec import EnvSpec, Floats, TaskSuite


@dataclass(frozen=True)
class Episode:
    """An episode of one task.

    Args:
        obs: `[step + 1, obs]`; the last one follows the last action.
        action: `[step, action]`.
        reward: `[step]`.
        success: whether the last step ended the episode by success; a replay does not hold it.
    """

    obs: Floats
    action: Floats
    reward: Floats
    success: bool = False


def played(suite: TaskSuite, actor: Actor, task: int, goals: int) -> list[Episode]:
    """Play the deterministic policy on the first goals of a task, as an evaluation does."""
    policy = Policy(actor)
    env = suite.make(task)
    try:
        return [play(env, policy, suite, task, goal) for goal in suite.goals(task)[:goals]]
    finally:
        env.close()


def play(env: Any, policy: Policy, suite: TaskSuite, task: int, goal: Any) -> Episode:
    """Play one episode, to success or to the horizon."""
    episode = EvalEpisode(env, goal, suite.spec.horizon)
    obs = [episode.obs]
    actions: list[Floats] = []
    returns = [0.0]
    while not episode.over:
        actions.append(policy.act(episode.obs[None, None], np.array([task]))[0, 0])
        episode.step(actions[-1])
        obs.append(episode.obs)
        returns.append(episode.episode_return)
    reward = np.diff(returns).astype(np.float32)
    return Episode(np.stack(obs), np.stack(actions), reward, episode.success)


def recorded(folder: Path, metadata: dict[str, Any]) -> Iterator[list[Episode]]:
    """Yield the episodes in a checkpoint's replay, task by task, oldest first.

    The first ones may lack their beginning, which later transitions replaced. The running ones
    lack their end.

    Raises:
        CheckpointError: there is no replay, or it cannot be read.
    """
    with checkpoint.reading(folder):
        if metadata["kind"] != "whole":
            raise CheckpointError(
                f"{folder}: holds weights only; a step_... checkpoint has a replay"
            )
        config = metadata["config"]
        spec = spec_of(metadata)
        capacity = int(config["run"]["replay_per_task"])
        replay = Replay(spec, capacity, copies=int(config["workers"]["copies"]))
        pieces = {Path(name).name: hashed for name, hashed in checkpoint.shared(folder).items()}
        archive = Archive(folder.resolve().parent.parent, replay)
        archive.restore(pieces, int(metadata["counters"]["written"]))
    for task in range(spec.num_tasks):
        yield of_task(replay, task)


def of_task(replay: Replay, task: int) -> list[Episode]:
    """Return the episodes of one task in a replay, oldest first."""
    batch, numbers = replay.all_of(task)
    obs, action, reward, next_obs = (part[0].cpu().numpy() for part in batch[:4])
    found = []
    for number in numbers.unique():
        rows = (numbers == number).nonzero()[:, 0].cpu().numpy()
        whole = np.concatenate([obs[rows], next_obs[rows[-1:]]])
        found.append(Episode(whole, action[rows], reward[rows]))
    return found


def save_dataset(name: str, episodes: list[Episode], spec: EnvSpec, root: Path) -> Path:
    """Write episodes as a Minari dataset; one with this name is replaced.

    Args:
        name: of the dataset, as in "mt10-replay/reach-v3-v0".
        episodes: all of one task.
        spec: sizes of observations and actions.
        root: folder of datasets, as `MINARI_DATASETS_PATH` names it.

    Returns:
        The dataset's folder.
    """
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector.episode_buffer import EpisodeBuffer

    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    buffers = [
        EpisodeBuffer(
            id=index,
            observations=list(episode.obs),
            actions=list(episode.action),
            rewards=episode.reward.tolist(),
            terminations=last_only(len(episode.reward), episode.success),
            truncations=last_only(len(episode.reward), not episode.success),
        )
        for index, episode in enumerate(episodes)
    ]
    with datasets_in(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing links, authors and environments
        minari.create_dataset_from_buffers(
            name,
            buffers,
            observation_space=Box(-np.inf, np.inf, (spec.obs_dim,), np.float32),
            action_space=Box(-1.0, 1.0, (spec.action_dim,), np.float32),
            algorithm_name="softmod",
            data_format="arrow",
        )
    return folder


@contextmanager
def datasets_in(root: Path) -> Iterator[None]:
    """Let Minari write to a folder; it reads the place from the environment only."""
    root.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root.resolve())
    try:
        yield
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


def last_only(steps: int, value: bool) -> list[bool]:
    """Return False for every step but the last, which has the value."""
    return [False] * (steps - 1) + [value]
