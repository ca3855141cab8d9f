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
from softmod.errors import CheckpointError, ConfigError, near
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
        self.tasks = suite.spec.tasks
        self.suite = suite
        self._policy = Policy(actor)

    def act(self, obs: ArrayLike, task: str | int) -> NDArray[np.float32]:
        """Return the action `[action]` in [-1, 1] for an observation `[obs]` of a task, or
        `[batch, action]` for a batch `[batch, obs]`.

        A one-hot task behind the observation, as Meta-World's vector environments append it, is
        left out.

        Raises:
            ConfigError: there is no such task, or the observation has another size.
        """
        rows = self._rows(obs)
        actions = self._policy.act(np.atleast_2d(rows)[None], self._index(task))[0]
        return actions[0] if rows.ndim == 1 else actions

    def routing(self, obs: ArrayLike, task: str | int) -> list[NDArray[Any]]:
        """Return routing probabilities per layer, `[target, source]`, or `[batch, target, source]`
        for a batch.

        Raises:
            ConfigError: as for `act`.
        """
        rows = self._rows(obs)
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

    def _rows(self, obs: ArrayLike) -> Floats:
        """Return observations `[obs]` or `[batch, obs]`, without a one-hot task behind them."""
        size = self.suite.spec.obs_dim
        try:
            rows = np.asarray(obs, np.float32)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"observation: must be an array of {size} numbers") from error
        if rows.ndim in (1, 2) and rows.shape[-1] > size and one_hot(rows[..., size:]):
            rows = rows[..., :size]
        if rows.ndim not in (1, 2) or rows.shape[-1] != size:
            raise ConfigError(
                f"observation of shape {list(rows.shape)}: must be [{size}], or [batch, {size}]"
            )
        return rows

    def _index(self, task: str | int) -> NDArray[np.int64]:
        names = ", ".join(self.tasks)
        if isinstance(task, str):
            if task not in self.tasks:
                raise ConfigError(
                    f"task {task}: the policy was trained on {names}{near(task, self.tasks)}"
                )
            return np.array([self.tasks.index(task)], np.int64)
        if not 0 <= task < len(self.tasks):
            last = len(self.tasks) - 1
            raise ConfigError(f"task {task}: must be a name, or a number up to {last} ({names})")
        return np.array([task], np.int64)


def one_hot(rows: Floats) -> bool:
    """Return whether every row `[..., task]` is 1 in one place and 0 elsewhere."""
    return bool(np.isin(rows, (0.0, 1.0)).all() and (rows.sum(-1) == 1.0).all())


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


def find(path: Path, whole: bool = False) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder and its facts, checked; a run's folder stands for its newest
    checkpoint.

    Args:
        path: the folder.
        whole: whether the replay is needed too, and checked.

    Raises:
        CheckpointError: nothing valid there.
    """
    path = path.expanduser()
    if path.resolve().name == "checkpoints":
        path = path.resolve().parent
    if (path / "manifest.json").exists():
        return path, checkpoint.verify(path, whole)
    found = checkpoint.newest(path, whole)
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
