"""The tasks as data: names, order, meanings and sets.

This module imports no simulator, so names can be checked quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from softmod.errors import ConfigError

NEVER = "never reports success"


class Task(NamedTuple):
    """A task's name, its meaning, and the flaw in reward v1's success signal, if any."""

    name: str
    meaning: str
    v1_success: str = ""


METAWORLD = (
    Task("assembly-v3", "lift a ring by its handle and put it over a peg"),
    Task("basketball-v3", "carry the ball to the hoop and through it"),
    Task("bin-picking-v3", "move a cube from one bin into the other"),
    Task("box-close-v3", "pick up the lid and close the box with it"),
    Task("button-press-topdown-v3", "press a button from above"),
    Task("button-press-topdown-wall-v3", "reach over a wall and press a button from above"),
    Task("button-press-v3", "press a button on the side of a box"),
    Task("button-press-wall-v3", "get around a wall and press a button on the side of a box"),
    Task("coffee-button-v3", "push the button of the coffee machine"),
    Task("coffee-pull-v3", "pull the mug away from under the coffee machine"),
    Task("coffee-push-v3", "push the mug under the coffee machine"),
    Task("dial-turn-v3", "turn a dial half way round"),
    Task("disassemble-v3", "lift a ring off the peg that it hangs on"),
    Task("door-close-v3", "shut the door of a safe"),
    Task("door-lock-v3", "turn the door's lock until it is locked"),
    Task("door-open-v3", "open the door of a safe by its handle"),
    Task("door-unlock-v3", "turn the door's lock until it is open"),
    Task("hand-insert-v3", "lower the gripper with a block into a hole in the table", NEVER),
    Task("drawer-close-v3", "push a drawer shut"),
    Task("drawer-open-v3", "pull a drawer open by its handle"),
    Task("faucet-open-v3", "turn the tap's handle counter-clockwise"),
    Task("faucet-close-v3", "turn the tap's handle clockwise"),
    Task("hammer-v3", "take the hammer and drive in the nail"),
    Task("handle-press-side-v3", "press a lever down, standing beside it"),
    Task("handle-press-v3", "press a lever down"),
    Task("handle-pull-side-v3", "pull a lever up, standing beside it"),
    Task("handle-pull-v3", "pull a lever up"),
    Task("lever-pull-v3", "swing a hanging lever up by a quarter turn"),
    Task("pick-place-wall-v3", "lift a puck over a wall to the goal"),
    Task("pick-out-of-hole-v3", "lift a puck out of a hole to the goal"),
    Task("pick-place-v3", "lift a puck to the goal in the air"),
    Task("plate-slide-v3", "slide a plate into the net, straight ahead"),
    Task("plate-slide-side-v3", "slide a plate into the net, sideways"),
    Task("plate-slide-back-v3", "slide a plate out of the net, towards the robot"),
    Task("plate-slide-back-side-v3", "slide a plate out of the net, sideways"),
    Task(
        "peg-insert-side-v3",
        "push a peg sideways into the hole of a box",
        "seldom reports success: it measures from the peg's grip, not from its head",
    ),
    Task("peg-unplug-side-v3", "pull a peg sideways out of its socket"),
    Task("soccer-v3", "knock the ball into the goal"),
    Task("stick-push-v3", "take a stick and push a flask to the goal with it", NEVER),
    Task(
        "stick-pull-v3",
        "take a stick, hook it into a flask's handle and pull the flask to the goal",
    ),
    Task("push-v3", "push a puck across the table to the goal"),
    Task("push-wall-v3", "push a puck around a wall to the goal"),
    Task("push-back-v3", "bring a puck back across the table, towards the robot"),
    Task("reach-v3", "move the gripper to the goal"),
    Task("reach-wall-v3", "move the gripper around a wall to the goal"),
    Task("shelf-place-v3", "put a puck onto the shelf"),
    Task("sweep-into-v3", "sweep a puck into the hole in the table"),
    Task("sweep-v3", "sweep a puck to the edge of the table and over it"),
    Task("window-open-v3", "slide the window open by its handle"),
    Task("window-close-v3", "slide the window shut by its handle"),
)

TOY = (
    Task("toy-reach", "go to the goal"),
    Task("toy-opposite", "go to the goal's mirror image through the center"),
    Task("toy-touch", "go to the puck"),
    Task("toy-carry", "go to the puck, which then sticks, and bring it to the goal"),
)

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)

MT25 = (
    *MT10,
    "coffee-pull-v3",
    "pick-out-of-hole-v3",
    "disassemble-v3",
    "pick-place-wall-v3",
    "basketball-v3",
    "stick-pull-v3",
    "button-press-wall-v3",
    "faucet-open-v3",
    "door-lock-v3",
    "lever-pull-v3",
    "sweep-into-v3",
    "faucet-close-v3",
    "coffee-button-v3",
    "button-press-topdown-wall-v3",
    "dial-turn-v3",
)

MT50 = tuple(task.name for task in METAWORLD)
TOY_TASKS = tuple(task.name for task in TOY)
SETS: dict[str, tuple[str, ...]] = {"mt10": MT10, "mt25": MT25, "mt50": MT50, "toy": TOY_TASKS}
TASKS: dict[str, Task] = {task.name: task for task in (*METAWORLD, *TOY)}

GOALS = ("benchmark", "fixed", "random")
REWARDS = ("v1", "v2")


def check_tasks(tasks: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return the task names as a tuple.

    Raises:
        ConfigError: there is no name, or a name is not in `known` or occurs twice.
    """
    names = (tasks,) if isinstance(tasks, str) else tuple(str(task) for task in tasks)
    if not names:
        raise ConfigError("env.tasks is empty: name at least one task")
    for name in names:
        if name not in known:
            raise ConfigError(
                f"env.tasks: unknown task '{name}'{_nearest(name, known)}; `python -m softmod.envs`"
                " lists all"
            )
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ConfigError(f"env.tasks={names}: names {', '.join(duplicates)} more than once")
    return names


def check_choice(key: str, value: str, allowed: Sequence[str]) -> str:
    """Return the value.

    Raises:
        ConfigError: it is not one of `allowed`.
    """
    if value not in allowed:
        raise ConfigError(f"{key} is '{value}', but must be one of {', '.join(allowed)}")
    return value


def check_horizon(horizon: int) -> int:
    """Return the horizon, in environment steps.

    Raises:
        ConfigError: it is outside [1, 500]; Meta-World ends episodes after 500 steps.
    """
    if not 1 <= horizon <= 500:
        raise ConfigError(f"env.horizon is {horizon}, but must be between 1 and 500")
    return horizon


def flawed_success(tasks: Iterable[str], reward: str) -> dict[str, str]:
    """Return the tasks whose success signal is flawed with this reward version: name to flaw."""
    if reward != "v1":
        return {}
    known = [name for name in tasks if name in TASKS]
    return {name: TASKS[name].v1_success for name in known if TASKS[name].v1_success}


def _nearest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""


# The time of a step relative to the cheapest tasks (65 microseconds), if at least a tenth more.
# Measured with random actions on one core.
STEP_COSTS = {
    "box-close-v3": 1.9, "stick-push-v3": 1.7, "stick-pull-v3": 1.7, "assembly-v3": 1.6,
    "disassemble-v3": 1.6,
    "hammer-v3": 1.5, "peg-unplug-side-v3": 1.5, "bin-picking-v3": 1.4, "coffee-pull-v3": 1.4,
    "coffee-push-v3": 1.4,
    "push-back-v3": 1.3, "shelf-place-v3": 1.3, "sweep-v3": 1.3, "sweep-into-v3": 1.3,
    "soccer-v3": 1.3,
    "pick-place-wall-v3": 1.3, "pick-place-v3": 1.3, "push-wall-v3": 1.3, "peg-insert-side-v3": 1.2,
    "coffee-button-v3": 1.2, "hand-insert-v3": 1.2, "push-v3": 1.2, "basketball-v3": 1.2,
    "pick-out-of-hole-v3": 1.2,
    "reach-wall-v3": 1.1, "reach-v3": 1.1,
}  # fmt: skip
