"""OmegaConf resolvers for values in `conf/`.

`${per_task:...}`, `${from_tasks:...}` and `${within_horizon:...}` depend on the task set;
`${expand_home:...}` is for paths that Hydra itself uses.
"""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from softmod.errors import ConfigError


def register() -> None:
    """Register the resolvers with OmegaConf for this process; repeated calls are safe."""
    OmegaConf.register_new_resolver("per_task", per_task, replace=True)
    OmegaConf.register_new_resolver("from_tasks", from_tasks, replace=True)
    OmegaConf.register_new_resolver("within_horizon", within_horizon, replace=True)
    OmegaConf.register_new_resolver("expand_home", expand_home, replace=True)


def per_task(*given: Any, _root_: DictConfig) -> int:
    """Resolve `${per_task:steps}`: steps per task times the number of tasks.

    Raises:
        ValueError: The argument is not a whole number.
        ConfigError: The task set is empty.
    """
    if len(given) != 1 or not _whole(given[0]):
        raise ValueError(
            f"${{per_task:{_shown(given)}}}: takes one whole number, the steps of one task"
        )
    return int(given[0]) * _count(_root_)


def from_tasks(*given: Any, _root_: DictConfig) -> Any:
    """Resolve `${from_tasks:number,many,few}`: `many` for at least `number` tasks, else `few`.

    Raises:
        ValueError: There are not three arguments, or the first is not a whole number.
        ConfigError: The task set is empty.
    """
    if len(given) != 3 or not _whole(given[0]):
        raise ValueError(
            f"${{from_tasks:{_shown(given)}}}: takes a number of tasks, the value for at least as"
            " many, and the value for fewer"
        )
    number, many, few = given
    return many if _count(_root_) >= number else few


def within_horizon(*given: Any, _root_: DictConfig) -> int:
    """Resolve `${within_horizon:steps}`: the smaller of `steps` and `env.horizon`.

    Raises:
        ValueError: The argument is not a whole number.
    """
    if len(given) != 1 or not _whole(given[0]):
        raise ValueError(f"${{within_horizon:{_shown(given)}}}: takes one whole number of steps")
    horizon = OmegaConf.select(_root_, "env.horizon")
    return min(int(given[0]), horizon) if _whole(horizon) else int(given[0])


def expand_home(path: str) -> str:
    """Resolve `${expand_home:path}`: the path with the user's home folder for `~`."""
    return os.path.expanduser(path)


def _whole(value: Any) -> bool:
    """Return whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(given: tuple[Any, ...]) -> str:
    """Write the arguments of a resolver as typed."""
    return ",".join(str(value) for value in given)


def _count(root: DictConfig) -> int:
    """Count the tasks of the configuration.

    Raises:
        ConfigError: The task set is empty.
    """
    tasks = OmegaConf.select(root, "env.tasks")
    if not isinstance(tasks, ListConfig) or not tasks:
        shown = "" if tasks is None else tasks
        raise ConfigError(
            f"env.tasks={shown}: name at least one task (python -m softmod.envs lists them)"
        )
    return len(tasks)
