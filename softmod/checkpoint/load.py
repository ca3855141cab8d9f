"""A trained policy in two lines of Python: `softmod.load(path).act(obs, task)`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from softmod.checkpoint import files as checkpoint
from softmod.config import trust
from softmod.config.earlier import completed
from softmod.config.instantiate import build
from softmod.envs.episode import EvalEpisode
from softmod.errors import CheckpointError, ConfigError
from softmod.networks.build import build_actor
from softmod.networks.gaussian import Actor, Policy
from softmod.spec import EnvSpec, Floats, TaskSuite


class TrainedPolicy:
    """The deterministic policy of a checkpoint.

    Attributes:
        tasks: names of the tasks that it was trained on, by index.
        suite: task set that it was trained on, with environments and goals.
    """

    def __init__(self, actor: Actor, suite: TaskSuite) -> None:
        self.tasks, self.suite, self._policy = suite.spec.tasks, suite, Policy(actor)

    def act(self, obs: ArrayLike, task: str | int) -> NDArray[np.float32]:
        """Return the action `[action]` in [-1, 1] for an observation of a task.

        Args:
            obs: `[obs]`, or `[batch, obs]`; then the result is `[batch, action]`.
            task: name or index.

        Raises:
            ConfigError: the policy was not trained on this task.
        """
        rows = np.asarray(obs, np.float32)
        actions = self._policy.act(np.atleast_2d(rows)[None], self._index(task))[0]
        return actions[0] if rows.ndim == 1 else actions

    def routing(self, obs: ArrayLike, task: str | int) -> list[NDArray[Any]]:
        """Return routing probabilities `[target, source]` per layer.

        Args:
            obs: `[obs]`, or `[batch, obs]`; then the result is `[batch, target, source]` per layer.
            task: name or index.

        Raises:
            ConfigError: the policy was not trained on this task.
        """
        rows = np.asarray(obs, np.float32)
        routes = self._policy.routing(np.atleast_2d(rows)[None], self._index(task))
        return [route[0, 0] if rows.ndim == 1 else route[0] for route in routes]

    def episode(self, task: str | int, goal: int = 0) -> tuple[Floats, bool]:
        """Play an episode; return its observations `[step, obs]` and its success.

        Args:
            task: name or index.
            goal: index of the goal among the task's goals.

        Raises:
            ConfigError: the policy was not trained on this task.
        """
        index = int(self._index(task)[0])
        env = self.suite.make(index)
        seen: list[Floats] = []
        try:
            episode = EvalEpisode(env, self.suite.goals(index)[goal], self.suite.spec.horizon)
            while not episode.over:
                seen.append(episode.obs)
                episode.step(self.act(episode.obs, index))
        finally:
            env.close()
        return np.stack(seen), episode.success

    def _index(self, task: str | int) -> NDArray[np.int64]:
        if isinstance(task, str) and task not in self.tasks:
            raise ConfigError(f"task {task}: must be one of {', '.join(self.tasks)}")
        return np.array([self.tasks.index(task) if isinstance(task, str) else task], np.int64)


def load(path: str | Path, allow: Iterable[str] = ()) -> TrainedPolicy:
    """Load the policy of a checkpoint, or of the newest checkpoint in a run's folder.

    Args:
        path: folder of the checkpoint or run.
        allow: your own packages whose classes may be built. An `allow` stored in the checkpoint is
            ignored.

    Raises:
        CheckpointError: there is no valid checkpoint.
        ConfigError: the policy is built of classes that are not allowed.
    """
    folder, metadata = find(Path(path))
    with checkpoint.reading(folder):
        return TrainedPolicy(actor_of(folder, metadata, allow), suite_of(metadata, allow))


def find(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the metadata of a checkpoint, verified.

    Args:
        path: folder of a checkpoint, or of a run (its newest checkpoint).

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    if (path / "manifest.json").exists():
        return path, checkpoint.verify(path)
    found = checkpoint.newest(path)
    if found is None:
        raise CheckpointError(
            f"{path}: neither a checkpoint nor a run's folder with checkpoints in it"
        )
    return found


def suite_of(metadata: dict[str, Any], allow: Iterable[str] = ()) -> TaskSuite:
    """Build the task set that a checkpoint's policy was trained on.

    Raises:
        ConfigError: its class is not allowed.
    """
    trust.check({"env": metadata["config"]["env"]}, allow)
    suite: TaskSuite = build(metadata["config"]["env"], "env")
    return suite


def spec_of(metadata: dict[str, Any]) -> EnvSpec:
    """Return the shapes of the task set that a checkpoint's policy was trained on."""
    spec = metadata["spec"]
    sizes = int(spec["obs_dim"]), int(spec["action_dim"]), int(spec["horizon"])
    shorter = spec["train_horizon"]
    frame = int(spec.get("frame", 0))  # missing in checkpoints of earlier versions
    return EnvSpec(tuple(spec["tasks"]), *sizes, None if shorter is None else int(shorter), frame)


def actor_of(folder: Path, metadata: dict[str, Any], allow: Iterable[str] = ()) -> Actor:
    """Build the acting policy of a checkpoint with its weights, averaged ones if it has them.

    Raises:
        CheckpointError: the weights do not match the policy.
        ConfigError: its classes are not allowed.
    """
    config = completed(metadata["config"])
    policy = config["policy"]
    trust.check({"actor": config["actor"]}, allow)
    spec = spec_of(metadata)
    actor = build_actor(config["actor"], policy["log_std"], policy["normalize_obs"], spec)
    arrays = checkpoint.arrays(folder, "agent")
    prefix = (
        "averaged_actor."
        if any(name.startswith("averaged_actor.") for name in arrays)
        else "actor."
    )
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in arrays.items()
        if name.startswith(prefix)
    }
    checkpoint.restore_arrays(dict(actor.state_dict()), weights, "actor")
    return actor
