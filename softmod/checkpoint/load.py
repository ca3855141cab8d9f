"""A trained policy in two lines of Python: `softmod.load(path).act(obs, task)`."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.shipped import SHIPPED, shipped
from softmod.config import trust
from softmod.config.earlier import completed
from softmod.config.instantiate import build
from softmod.envs.episode import EvalEpisode
from softmod.errors import CheckpointError, ConfigError, near
from softmod.networks.build import build_actor
from softmod.networks.gaussian import Actor, Policy
from softmod.spec import EnvSpec, Floats, TaskSuite
from softmod.system.libraries import default_torch


class TrainedPolicy:
    """The deterministic policy of a checkpoint.

    Attributes:
        tasks: names of the tasks that it was trained on, by index.
        suite: task set that it was trained on, with environments and goals.
        actor: its networks.
    """

    def __init__(self, actor: Actor, suite: TaskSuite) -> None:
        self.tasks = suite.spec.tasks
        self.suite = suite
        self.actor = actor
        self._policy = Policy(actor)

    def act(self, obs: ArrayLike, task: str | int) -> NDArray[np.float32]:
        """Return the action `[action]` in [-1, 1] for an observation of a task.

        A one-hot task behind the observation, as Meta-World's vector environments append it, is
        left out.

        Args:
            obs: `[obs]`, or `[batch, obs]`; then the result is `[batch, action]`. A tensor, and
                the pair that an environment's `reset` returns, are converted.
            task: name or index.

        Raises:
            ConfigError: the policy was not trained on this task, or the observation has another
                size or is not finite.
        """
        rows = self._rows(obs)
        actions = self._policy.act(np.atleast_2d(rows)[None], self._index(task))[0]
        return actions[0] if rows.ndim == 1 else actions

    def routing(self, obs: ArrayLike, task: str | int) -> list[NDArray[Any]]:
        """Return routing probabilities `[target, source]` per layer.

        Args:
            obs: `[obs]`, or `[batch, obs]`; then the result is `[batch, target, source]` per layer.
            task: name or index.

        Raises:
            ConfigError: as for `act`.
        """
        rows = self._rows(obs)
        routes = self._policy.routing(np.atleast_2d(rows)[None], self._index(task))
        return [route[0, 0] if rows.ndim == 1 else route[0] for route in routes]

    def episode(self, task: str | int, goal: int = 0) -> tuple[Floats, bool]:
        """Play an episode; return its observations `[step, obs]` and its success.

        Args:
            task: name or index.
            goal: index of the goal among the task's goals.

        Raises:
            ConfigError: the policy was not trained on this task, or the task has no such goal.
        """
        index = int(self._index(task)[0])
        goals = self.suite.goals(index)
        chosen = goals[number(goal, len(goals), "goal")]
        env = self.suite.make(index)
        seen: list[Floats] = []
        try:
            episode = EvalEpisode(env, chosen, self.suite.spec.horizon)
            while not episode.over:
                seen.append(episode.obs)
                episode.step(self.act(episode.obs, index))
        finally:
            env.close()
        return np.stack(seen), episode.success

    def _rows(self, obs: ArrayLike) -> Floats:
        """Return observations `[obs]` or `[batch, obs]`, without a one-hot task behind them."""
        size = self.suite.spec.obs_dim
        if isinstance(obs, tuple) and len(obs) == 2 and isinstance(obs[1], dict):
            obs = obs[0]
        if isinstance(obs, Tensor):
            obs = obs.detach().float().cpu().numpy()
        try:
            rows = np.asarray(obs, np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"observation: must be an array of {size} numbers") from error
        if rows.ndim in (1, 2) and rows.shape[-1] > size and one_hot(rows[..., size:]):
            rows = rows[..., :size]
        if rows.ndim not in (1, 2) or rows.shape[-1] != size:
            raise ConfigError(
                f"observation of shape {list(rows.shape)}: must be [{size}], or [batch, {size}]"
            )
        if not np.isfinite(rows).all():
            raise ConfigError("observation: contains NaN or infinity")
        return rows

    def _index(self, task: str | int) -> NDArray[np.int64]:
        names = ", ".join(self.tasks)
        if isinstance(task, str):
            if task not in self.tasks:
                raise ConfigError(f"task {task}: must be one of {names}{near(task, self.tasks)}")
            return np.array([self.tasks.index(task)], np.int64)
        index = number(task, len(self.tasks), "task", "a name, or ", f" ({names})")
        return np.array([index], np.int64)


def number(value: Any, count: int, what: str, choice: str = "", names: str = "") -> int:
    """Return an index below `count`.

    Raises:
        ConfigError: it is not one.
    """
    with suppress(TypeError, ValueError):
        index = operator.index(value)
        if 0 <= index < count:
            return index
    shown = " ".join(str(value).split())[:60]
    raise ConfigError(f"{what} {shown}: must be {choice}a number up to {count - 1}{names}")


def one_hot(rows: Floats) -> bool:
    """Return whether every row `[..., task]` is 1 in one place and 0 elsewhere."""
    return bool(np.isin(rows, (0.0, 1.0)).all() and (rows.sum(-1) == 1.0).all())


@default_torch()
def load(path: str | Path, allow: Iterable[str] = ()) -> TrainedPolicy:
    """Load the policy of a checkpoint, or of the newest checkpoint in a run's folder.

    Args:
        path: folder of the checkpoint or run, or the name of a policy that ships with softmod:
            "mt10" or "quickstart".
        allow: your own packages whose classes may be built. An `allow` stored in the checkpoint is
            ignored.

    Raises:
        CheckpointError: there is no valid checkpoint.
        ConfigError: the policy is built of classes that are not allowed.
    """
    folder, metadata = find(Path(path))
    with checkpoint.reading(folder):
        return TrainedPolicy(actor_of(folder, metadata, allow), suite_of(metadata, allow))


def find(path: Path, whole: bool = False) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the metadata of a checkpoint, verified.

    Args:
        path: the folder, or the name of a policy that ships with softmod.
        whole: whether the replay is needed too, and checked.

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    path = SHIPPED / path if str(path) in shipped() else Path(os.path.expanduser(path))
    with checkpoint.reading(path):
        resolved = Path(os.path.realpath(path))
        if resolved.name == "checkpoints":
            path = resolved.parent
        is_checkpoint = (path / "manifest.json").exists()
    if is_checkpoint:
        return path, checkpoint.verify(path, whole)
    found = checkpoint.newest(path, whole)
    best = path / "checkpoints" / "best"
    if found is None and best.is_dir():
        raise CheckpointError(
            f"{path}: only the weights of its best evaluation are left; name them: {best}"
        )
    if found is None:
        names = shipped()
        raise CheckpointError(
            f"{path}: neither a checkpoint nor a run's folder with checkpoints in it, nor one of"
            f" the policies that ship with softmod ({', '.join(names)}){near(str(path), names)}"
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
