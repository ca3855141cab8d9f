"""Meta-World's tasks with goals as arrays, pure resets, and detection of physics errors.

metaworld and mujoco are imported only when an environment is built.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softmod.envs.goals import benchmark_goals, draw, environment_classes, first_line
from softmod.envs.tasks import (
    GOALS,
    MT50,
    REWARDS,
    SETS,
    STEP_COSTS,
    check_choice,
    check_horizon,
    check_tasks,
)
from softmod.errors import PhysicsError, WorkerError
from softmod.spec import EnvSpec, Floats, Goal

FRAME = 18  # size of the state: hand, gripper, two objects
CAMERA = "corner4"  # the nearest corner camera; all of them are mounted upside down


class MetaWorld:
    """A set of Meta-World tasks, with observations `[39]` and actions `[4]`.

    Args:
        tasks: task names.
        goals: "benchmark", "fixed" or "random".
        goal_seed: the seed of the benchmark's goals.
        reward: "v1" or "v2".
        horizon: steps of an evaluation episode.
        name: the name of the set.
        fast: use our own code around the physics, which is bitwise equal to Meta-World's.
        train_horizon: steps of a training episode; None: `horizon`.

    Raises:
        ConfigError: a task or option is unknown, or a horizon is outside [1, 500].
    """

    def __init__(
        self,
        tasks: Sequence[str],
        goals: str = "benchmark",
        goal_seed: int = 0,
        reward: str = "v2",
        horizon: int = 500,
        name: str = "metaworld",
        fast: bool = True,
        train_horizon: int | None = None,
    ) -> None:
        shorter = None if train_horizon is None else check_horizon(train_horizon)
        self.spec = EnvSpec(check_tasks(tasks, MT50), 39, 4, check_horizon(horizon), shorter, FRAME)
        self.name = name
        self.goal_mode = check_choice("env.goals", goals, GOALS)
        self.goal_seed = int(goal_seed)
        self.reward = check_choice("env.reward", reward, REWARDS)
        self.fast = bool(fast)
        self._goals: dict[str, Goal] | None = None

    @property
    def benchmark(self) -> str:
        """Return the benchmark that provides the goals.

        It is `mt10` or `mt25` if the set has exactly its tasks, in any order, else `mt50`.
        """
        same = [name for name in ("mt10", "mt25") if set(SETS[name]) == set(self.spec.tasks)]
        return same[0] if same else "mt50"

    def goals(self, task: int) -> Goal:
        """Return a task's goals `[num_goals, 3 or 6]`: the benchmark's 50, or the first if `fixed`.

        With `random` goals, these are only for evaluation; training uses `draw_goal`.
        """
        if self._goals is None:
            everything = benchmark_goals(self.benchmark, self.goal_seed)
            self._goals = {name: everything[name] for name in self.spec.tasks}
        goals = self._goals[self.spec.tasks[task]]
        return goals[:1] if self.goal_mode == "fixed" else goals

    def step_cost(self, task: int) -> float:
        """Return the cost of a step of a task, relative to the cheapest task."""
        return STEP_COSTS.get(self.spec.tasks[task], 1.0)

    def make(self, task: int, render: bool = False) -> MetaWorldEnv:
        """Build a new environment of one task.

        Raises:
            WorkerError: `render` is set, but this machine cannot render.
        """
        return MetaWorldEnv(
            self.spec.tasks[task], self.reward, self.spec.horizon, render, self.fast
        )


class MetaWorldEnv:
    """One Meta-World task. Reset it before the first step and after `horizon` steps."""

    def __init__(
        self,
        task: str,
        reward: str = "v2",
        horizon: int = 500,
        render: bool = False,
        fast: bool = True,
    ) -> None:
        self._task = task
        self._horizon = horizon
        self._steps = horizon  # no episode is running
        self._render = render
        self._env = _build(task, reward, render, fast)
        self._faults = _fault_counts(self._env)
        if render:
            _check_rendering(self)

    def reset(self, goal: Goal) -> Floats:
        """Start an episode with a goal `[3 or 6]`; return the observation `[39]`.

        Raises:
            WorkerError: the goal has the wrong shape.
            PhysicsError: the simulation fails.
        """
        env = self._env
        self._steps = 0
        env._set_task_called = True
        env._freeze_rand_vec = True
        env._last_rand_vec = _own_goal(env, goal)
        return self._checked(env.reset()[0])

    def step(self, action: Floats) -> tuple[Floats, float, bool]:
        """Apply an action `[4]` in [-1, 1].

        Returns:
            The observation `[39]`, the reward, and whether this step is a success.

        Raises:
            WorkerError: no episode is running.
            PhysicsError: the simulation fails.
        """
        if self._steps >= self._horizon:
            raise WorkerError(
                f"{self._task}: no episode is running (the horizon is {self._horizon}), reset it"
                " first"
            )
        obs, reward, _, _, info = self._env.step(action)
        self._steps += 1
        if not isfinite(reward):
            self._fail("the reward is not finite")
        return self._checked(obs), float(reward), bool(info["success"])

    def draw_goal(self, rng: np.random.Generator) -> Goal:
        """Draw a goal `[3 or 6]` from the task's whole distribution, using `rng` only.

        This ends the running episode.
        """
        self._steps = self._horizon
        return draw(self._env, rng)

    def render(self) -> NDArray[np.uint8]:
        """Return an upright image `[480, 480, 3]` of the scene.

        Raises:
            WorkerError: the environment was made without `render=True`, or is closed.
        """
        if not self._render:
            raise WorkerError(
                f"{self._task}: made without render=True, or closed, so it cannot render"
            )
        viewer = self._env.mujoco_renderer.viewer
        if viewer is not None:  # the context of another environment may be current
            viewer.make_context_current()
        frame: NDArray[np.uint8] = self._env.render()
        return np.ascontiguousarray(frame[::-1, ::-1])  # half a turn, since the camera is inverted

    def close(self) -> None:
        """Free the rendering context, if any; repeated calls are harmless."""
        viewer = self._env.mujoco_renderer.viewer
        if viewer is not None:
            # Without this, the context of another environment could be freed.
            viewer.make_context_current()
            viewer.con.free()
            self._env.close()
            self._env.mujoco_renderer.viewer = None
        self._render = False

    def _checked(self, obs: NDArray[np.float64]) -> Floats:
        if any(self._faults.tolist()):
            self._fail(
                "MuJoCo found bad positions, velocities or accelerations and restarted the"
                " simulation"
            )
        # The dot product is five times as fast as the exact test.
        if not isfinite(obs.dot(obs)) and not np.isfinite(obs).all():
            self._fail("the observation is not finite")
        return obs.astype(np.float32)

    def _fail(self, reason: str) -> None:
        raise PhysicsError(
            f"{self._task}: the physics broke at step {self._steps} of an episode: {reason}"
        )


def _build(task: str, reward: str, render: bool, fast: bool) -> Any:
    """Build Meta-World's environment, with the goal in its observations."""
    view = {"render_mode": "rgb_array", "camera_name": CAMERA} if render else {}
    cls = environment_classes()[task]
    if fast:
        from softmod.envs.metaworld_fast import fast_class

        cls = fast_class(cls)
    env: Any = cls(reward_function_version=reward, **view)
    env._partially_observable = False
    vars(env).pop("sawyer_observation_space", None)  # cached with the goal's bounds at 0
    return env


def _fault_counts(env: Any) -> NDArray[np.int32]:
    """Return a live view `[3]` of MuJoCo's fault counts since the reset.

    MuJoCo counts bad positions, velocities and accelerations.
    """
    from mujoco import mjtWarning

    counts: NDArray[np.int32] = env.data.warning.number
    return counts[int(mjtWarning.mjWARN_BADQPOS) : int(mjtWarning.mjWARN_BADQACC) + 1]


def _own_goal(env: Any, goal: Goal) -> Goal:
    """Copy a goal, since Meta-World keeps views of it, and check its shape.

    With a goal of the wrong size, Meta-World could search for a valid goal forever.
    """
    own = np.array(goal, dtype=np.float64)
    expected = env._random_reset_space.shape
    if own.shape != expected:
        raise WorkerError(f"{env.task_name}: expected a goal of shape {expected}, got {own.shape}")
    return own


def _check_rendering(env: MetaWorldEnv) -> None:
    """Render once, so that a machine that cannot render fails when the environment is made.

    Raises:
        WorkerError: rendering fails.
    """
    defaulted = _default_to_egl()
    backend = os.environ.get("MUJOCO_GL", "unset")
    try:
        if backend == "egl":
            _check_egl()
        env.render()
    except Exception as error:
        if defaulted:
            del os.environ["MUJOCO_GL"]  # otherwise child processes could not import mujoco
        raise WorkerError(
            f"cannot render with MUJOCO_GL={backend} ({first_line(error)}); set MUJOCO_GL=egl and"
            " install a driver, on Debian the packages libegl1 and libgl1-mesa-dri"
        ) from error


def _default_to_egl() -> bool:
    """Set MUJOCO_GL=egl on Linux if there is no display and no setting; return whether it was set.

    mujoco reads the variable when a renderer is built.
    """
    needed = (
        sys.platform == "linux"
        and not os.environ.get("DISPLAY")
        and not os.environ.get("MUJOCO_GL")
    )
    if needed:
        os.environ["MUJOCO_GL"] = "egl"
    return needed


def _check_egl() -> None:
    """Raise RuntimeError if there is no EGL display.

    Otherwise building a renderer would fail half way, and its clean-up would print further errors.
    """
    from mujoco import egl

    display = egl.create_initialized_egl_device_display()
    if display == egl.EGL.EGL_NO_DISPLAY:
        raise RuntimeError("no EGL display")
