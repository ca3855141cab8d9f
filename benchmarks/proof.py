"""`python -m benchmarks.proof`: compare the fast environments with Meta-World, bit for bit.

Both are stepped side by side with the same actions: random ones, and those of Meta-World's
scripted policies. Compared are observations (float64, before the conversion to float32), rewards,
`info`, flags, exceptions, and the physics at the end of an episode.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softmod.envs.goals import draw, environment_classes
from softmod.envs.tasks import MT50, REWARDS, SETS, check_tasks
from softmod.errors import SoftmodError
from softmod.spec import Goal

Policy = Callable[[NDArray[np.float64]], NDArray[Any]]
POLICIES = ("random", "scripted")
STEPS = 500


class DifferenceError(SoftmodError):
    """Raised when the two environments differ."""


class Tally(NamedTuple):
    """Counts of compared steps, of steps with success, and of steps that raised in both."""

    steps: int = 0
    successes: int = 0
    raised: int = 0

    def plus(self, other: Tally) -> Tally:
        """Add two tallies."""
        return Tally(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Pair:
    """Meta-World's environment and the fast one, of the same task."""

    def __init__(self, task: str) -> None:
        from softmod.envs.metaworld_fast import fast_class

        self.task = task
        cls = environment_classes()[task]
        self.plain, self.fast = (_seeing(made) for made in (cls(), fast_class(cls)()))

    def goal(self, number: int) -> Goal:
        """Draw a goal from the task's distribution, seeded by `number`."""
        return draw(self.plain, np.random.default_rng(number))

    @staticmethod
    def reset(env: Any, goal: Goal, reward: str) -> NDArray[np.float64]:
        """Start an episode of one of the two; return the observation `[39]`."""
        env._set_task_called, env._freeze_rand_vec, env._last_rand_vec = True, True, goal.copy()
        env.reward_function_version = reward
        return env.reset()[0].copy()

    def compare(self, goal: Goal, reward: str, policy: Policy, steps: int = STEPS) -> Tally:
        """Play an episode in both and compare every field of every step.

        Raises:
            DifferenceError: A field differs, by as little as a bit.
        """
        where = f"{self.task}, reward {reward}"
        obs, ours = (self.reset(env, goal, reward) for env in (self.plain, self.fast))
        _check("observation", obs, ours, f"{where}, reset")
        tally = Tally()
        for step in range(1, steps + 1):
            action = policy(obs)
            theirs, mine = (_outcome(env, action.copy()) for env in (self.plain, self.fast))
            for field in {**theirs, **mine}:
                _check(field, theirs.get(field), mine.get(field), f"{where}, step {step}")
            if "exception" in theirs:
                return tally.plus(Tally(steps=1, raised=1))
            obs = theirs["observation"]
            tally = tally.plus(Tally(steps=1, successes=int(theirs["info['success']"])))
        _check("physics", _physics(self.plain), _physics(self.fast), f"{where}, end")
        return tally


def policy(kind: str, task: str, number: int) -> Policy:
    """Return a policy with random or scripted actions `[4]`; scripted ones can exceed [-1, 1].

    Actions are float32 for even numbers and float64 for odd ones.
    """
    dtype = (np.float32, np.float64)[number % 2]
    if kind == "random":
        rng = np.random.default_rng(number)
        return lambda obs: rng.uniform(-1, 1, 4).astype(dtype)
    from metaworld.policies import ENV_POLICY_MAP

    policies: dict[str, Any] = ENV_POLICY_MAP
    scripted = policies[task]()
    return lambda obs: np.asarray(scripted.get_action(obs), dtype=dtype)


def prove(task: str, rewards: Sequence[str], goals: int, episodes: int, steps: int) -> Tally:
    """Compare one task under these rewards, both policies and `goals` goals.

    Each combination is played for `episodes` episodes of at most `steps` steps.

    Raises:
        DifferenceError: A field differs.
    """
    pair, tally = Pair(task), Tally()
    for reward, kind, number in itertools.product(rewards, POLICIES, range(goals)):
        goal = pair.goal(number)
        for episode in range(episodes):
            tally = tally.plus(
                pair.compare(goal, reward, policy(kind, task, number + goals * episode), steps)
            )
    return tally


def _seeing(env: Any) -> Any:
    """Add the goal to an environment's observation; return the environment."""
    env._partially_observable = False
    vars(env).pop("sawyer_observation_space", None)  # cached with the goal's bounds at 0
    return env


def _outcome(env: Any, action: NDArray[Any]) -> dict[str, Any]:
    """Step an environment; return everything that it returns or raises, by field."""
    try:
        obs, reward, terminated, truncated, info = env.step(action)
    except Exception as error:
        return {"exception": f"{type(error).__name__}: {error}"}
    details = {f"info['{key}']": value for key, value in info.items()}
    return {
        "observation": obs,
        "reward": reward,
        "terminated": terminated,
        "truncated": truncated,
        **details,
    }


def _physics(env: Any) -> NDArray[np.float64]:
    """Return the physics state that the next step starts from."""
    data = env.data
    parts = (
        data.qpos,
        data.qvel,
        data.qacc_warmstart,
        data.ctrl,
        data.mocap_pos.ravel(),
        data.mocap_quat.ravel(),
    )
    return np.concatenate(parts)


def _check(field: str, theirs: Any, ours: Any, where: str) -> None:
    """Compare two values bit by bit; a flag may be NumPy's or Python's.

    Raises:
        DifferenceError: They differ.
    """
    if _bits(theirs) != _bits(ours):
        indices = ""
        if isinstance(theirs, np.ndarray):
            indices = f" at {np.flatnonzero(theirs != ours).tolist()}"
        raise DifferenceError(
            f"{where}: {field} differs{indices}: {theirs!r} in Meta-World, {ours!r} in ours"
        )


def _bits(value: Any) -> Any:
    """Convert a value to its shape and bytes."""
    if isinstance(value, (str, type(None))):
        return value
    return np.shape(value), np.asarray(value, dtype=np.float64).tobytes()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per task; return 0 if all are equal, 1 if not, 2 for an unknown task."""
    chosen = _parser().parse_args(arguments)
    print(f"{'task':<30}{'steps':>8}{'success':>9}{'raised':>8}{'seconds':>9}")
    try:
        names = [name for word in chosen.tasks for name in SETS.get(word, (word,))]
        for task, tally, seconds in _proofs(check_tasks(names, MT50), chosen):
            print(
                f"{task:<30}{tally.steps:>8}{tally.successes:>9}{tally.raised:>8}{seconds:>9.1f}",
                flush=True,
            )
    except SoftmodError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("equal to the bit")
    return 0


def _proofs(tasks: Sequence[str], chosen: argparse.Namespace) -> Iterator[tuple[str, Tally, float]]:
    """Yield each task with its tally and the seconds that it took."""
    rewards = [chosen.reward] if chosen.reward else list(REWARDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Meta-World warns of actions outside [-1, 1]
        for task in tasks:
            start = time.monotonic()
            tally = prove(task, rewards, chosen.goals, chosen.episodes, chosen.steps)
            yield task, tally, time.monotonic() - start


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["mt50"], help="tasks or sets of tasks (default: all)"
    )
    parser.add_argument("--reward", choices=REWARDS, help="one reward version (default: both)")
    parser.add_argument(
        "--goals", type=int, default=3, help="goals per task, reward and policy (default: 3)"
    )
    parser.add_argument("--episodes", type=int, default=1, help="episodes per goal (default: 1)")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps per episode (default: 500)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
