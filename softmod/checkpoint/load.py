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
        tasks: the names of the tasks it was trained on, in the order of their indices.
        suite: the task set that it was trained on; its environments and goals.
    """

    def __init__(self, actor: Actor, suite: TaskSuite) -> None:
        self.tasks, self.suite, self._policy = suite.spec.tasks, suite, Policy(actor)

    def act(self, obs: ArrayLike, task: str | int) -> NDArray[np.float32]:
        """The action `[action]` in [-1, 1] for an observation `[obs]` of a task, or `[batch,
        action]` for a batch.

        Raises:
            ConfigError: no such task.
        """
        rows = np.asarray(obs, np.float32)
        actions = self._policy.act(np.atleast_2d(rows)[None], self._index(task))[0]
        return actions[0] if rows.ndim == 1 else actions

    def routing(self, obs: ArrayLike, task: str | int) -> list[NDArray[Any]]:
        """Routing probabilities per layer, `[target, source]`, or `[batch, target, source]` for a
        batch.
        """
        rows = np.asarray(obs, np.float32)
        routes = self._policy.routing(np.atleast_2d(rows)[None], self._index(task))
        return [route[0, 0] if rows.ndim == 1 else route[0] for route in routes]

    def episode(self, task: str | int, goal: int = 0) -> tuple[Floats, bool]:
        """Play an episode; return its observations `[step, obs]`, and whether it was a success.

        Args:
            task: name or index.
            goal: which of the task's goals, by number.
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
            raise ConfigError(f"task {task}: the policy was trained on {', '.join(self.tasks)}")
        return np.array([self.tasks.index(task) if isinstance(task, str) else task], np.int64)


def load(path: str | Path, allow: Iterable[str] = ()) -> TrainedPolicy:
    """The policy of a checkpoint, or of a run's folder (its newest checkpoint).

    Args:
        path: the folder.
        allow: packages of your own whose classes it may be built of; what a checkpoint says of
            itself does not count.

    Raises:
        CheckpointError: nothing valid there.
        ConfigError: it is built of classes that are not allowed.
    """
    folder, facts = find(Path(path))
    with checkpoint.reading(folder):
        return TrainedPolicy(actor_of(folder, facts, allow), suite_of(facts, allow))


def find(path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder and its facts, checked; a run's folder stands for its newest
    checkpoint.

    Raises:
        CheckpointError: nothing valid there.
    """
    if (path / "manifest.json").exists():
        return path, checkpoint.verify(path)
    found = checkpoint.newest(path)
    if found is None:
        raise CheckpointError(
            f"{path}: neither a checkpoint nor a run's folder with checkpoints in it"
        )
    return found


def suite_of(facts: dict[str, Any], allow: Iterable[str] = ()) -> TaskSuite:
    """The task set that a checkpoint's policy was trained on."""
    trust.check({"env": facts["config"]["env"]}, allow)
    suite: TaskSuite = build(facts["config"]["env"], "env")
    return suite


def spec_of(facts: dict[str, Any]) -> EnvSpec:
    spec = facts["spec"]
    sizes = int(spec["obs_dim"]), int(spec["action_dim"]), int(spec["horizon"])
    shorter = spec["train_horizon"]
    frame = int(spec.get("frame", 0))  # policies of earlier versions do not say
    return EnvSpec(tuple(spec["tasks"]), *sizes, None if shorter is None else int(shorter), frame)


def actor_of(folder: Path, facts: dict[str, Any], allow: Iterable[str] = ()) -> Actor:
    """The policy of a checkpoint that acts and is evaluated, with its weights: the averaged one,
    where there is one.

    Raises:
        CheckpointError: the weights are of another form.
    """
    config = completed(facts["config"])
    policy = config["policy"]
    trust.check({"actor": config["actor"]}, allow)
    spec = spec_of(facts)
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
