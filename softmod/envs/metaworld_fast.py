"""Meta-World's environments with faster hot paths and bitwise equal results.

`FastSawyer` reimplements what all tasks share: the step, the observation, look-ups by name, the
contact test and the caging reward. The code of single tasks (object positions, rewards) is
Meta-World's, but calls the stand-ins of `softmod.envs.metaworld_scalars`. Meta-World itself is not
patched. This module imports metaworld and mujoco.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from math import sqrt
from types import FunctionType
from typing import Any

import numpy as np
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils.reward_utils import hamacher_product
from mujoco import mj_forward, mj_getState, mj_setState, mj_stateSize, mj_step, mjtState
from numpy.typing import NDArray

from softmod.envs.metaworld_scalars import STAND_INS, Pairs, tolerance

Doubles = NDArray[np.float64]

HOT = ("_get_pos_objects", "_get_quat_objects", "evaluate_state", "compute_reward",
       "_gripper_caging_reward",
       "_reward_pos", "_reward_quat", "_reward_grab_effort", "_stick_is_inserted")  # fmt: skip
SINGLE = np.dtype(np.float32)
HALF = np.full(3, 0.5)  # array times array is faster than array times number
EVERYTHING = int(mjtState.mjSTATE_INTEGRATION)  # the full state, apart from the model
MOST_HOMES = 64  # cached scenes; more than a task's 50 goals
HAND_DOWN = np.array([1.0, 0.0, 1.0, 0.0])  # the mocap body's orientation as a quaternion


@cache
def fast_class(cls: type) -> type:
    """Return the fast version of an environment class: a subclass of the same name."""
    # The order of overrides: the task's, ours, the base class's.
    fast = type(cls.__name__, (cls, FastSawyer), {})
    pairs = (*STAND_INS, (cls, fast))
    for name in HOT:
        if name in vars(cls):
            setattr(fast, name, _with_stand_ins(vars(cls)[name], pairs))
    return fast


def _with_stand_ins(method: Any, pairs: Pairs) -> Any:
    """Return a copy of a method whose global names refer to the stand-ins.

    The decorator `assert_task_is_set` is kept.
    """
    if isinstance(method, staticmethod):
        return staticmethod(_with_stand_ins(method.__func__, pairs))
    if method.__name__ == "inner":
        (wrapped,) = (cell.cell_contents for cell in method.__closure__)
        return SawyerXYZEnv._Decorators.assert_task_is_set(_with_stand_ins(wrapped, pairs))
    names = {name: _stand_in(value, pairs) for name, value in method.__globals__.items()}
    copy = FunctionType(
        method.__code__, names, method.__name__, method.__defaults__, method.__closure__
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


def _stand_in(value: Any, pairs: Pairs) -> Any:
    for original, replacement in pairs:
        if value is original:
            return replacement
    return value


class Positions(dict[str, Doubles]):
    """Live views `[3]` of positions by name; each name is looked up once."""

    def __init__(self, look_up: Callable[[str], Any]) -> None:
        self._look_up = look_up

    def __missing__(self, name: str) -> Doubles:
        view: Doubles = self._look_up(name).xpos
        self[name] = view
        return view


class FastSawyer(SawyerXYZEnv):
    """The code that all tasks share.

    Views of the simulation's arrays stay valid, since `data` is never replaced.
    """

    obj_init_pos: Any  # [3], set by the task's reset
    init_tcp: Any  # [3], set by _reset_hand
    _tcp: Doubles | None = None  # the center between the fingers while a step is evaluated
    _discarded = False  # True while a reset builds a scene that it discards

    def _initialize_simulation(self) -> tuple[Any, Any]:
        model, data = super()._initialize_simulation()
        if model.nsensor or model.nmocap != 1:
            raise NotImplementedError(
                f"{self.model_name}: only models with one mocap body and no sensors are supported"
            )
        self._body = Positions(data.body)
        self._site = Positions(data.site)
        self._control = data.ctrl
        self._mocap_pos = data.mocap_pos[0]
        self._mocap_quat = data.mocap_quat[0]
        self._pads = data.geom("leftpad_geom").id, data.geom("rightpad_geom").id
        self._pair = np.empty(2)
        self._scale = np.full(3, self.action_scale, np.float32)
        self._state = np.empty(mj_stateSize(model, EVERYTHING))
        self._homes: dict[Any, Doubles] = {}
        return model, data

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset as Meta-World does: build the scene, reset the simulation, build the scene again.

        The arguments are ignored.
        """
        self.curr_path_length = 0
        self._discarded = True
        self.reset_model()
        self._discarded = False
        obs, info = super(SawyerXYZEnv, self).reset()  # resets the simulation and calls reset_model
        self._prev_obs = obs[:18].copy()
        obs[18:36] = self._prev_obs
        return obs, info

    def _reset_hand(self, steps: int = 50) -> None:
        """Move the hand home, which takes 250 deterministic steps of physics.

        They are skipped in a scene that is discarded. Otherwise their result is cached by the
        scene. The last step always runs, since it sets more than the state.
        """
        if not self._discarded:
            scene = (steps, *(array.tobytes() for array in self._scene()))
            if scene in self._homes:
                mj_setState(self.model, self.data, self._homes[scene], EVERYTHING)
            else:
                self._go_home(steps)
                self._remember_home(scene)
            mj_step(self.model, self.data)
        self.init_tcp = self.tcp_center

    def _scene(self) -> tuple[Doubles, ...]:
        """Return what the way home depends on: the state, the bodies' poses, and the home position.

        These are views.
        """
        mj_getState(self.model, self.data, self._state, EVERYTHING)
        return (
            self._state,
            self.model.body_pos,
            self.model.body_quat,
            np.asarray(self.hand_init_pos),
        )

    def _go_home(self, steps: int) -> None:
        """Simulate the way home except its last step."""
        for left in reversed(range(steps)):
            self._mocap_pos[:] = self.hand_init_pos
            self._mocap_quat[:] = HAND_DOWN
            self.do_simulation((-1, 1), self.frame_skip - (left == 0))

    def _remember_home(self, scene: Any) -> None:
        if len(self._homes) == MOST_HOMES:
            self._homes.clear()
        mj_getState(self.model, self.data, self._state, EVERYTHING)
        self._homes[scene] = self._state.copy()

    def step(self, action: Any) -> tuple[Doubles, Any, bool, bool, dict[str, Any]]:
        """Step as Meta-World does, with the same results.

        It leaves out the move of target sites, which `mj_forward` undoes, and an unused flag.
        """
        if not self._set_task_called:
            raise RuntimeError("You must call env.set_task before using env.step")
        assert len(action) == 4, f"Actions should be size 4, got {len(action)}"
        self.set_xyz_action(action[:3])
        if self.curr_path_length >= self.max_path_length:
            raise ValueError("You must reset the env manually once truncate==True")
        grip = action[-1]
        self.do_simulation((grip, -grip), self.frame_skip)
        self.curr_path_length += 1
        mj_forward(self.model, self.data)
        space = self.sawyer_observation_space
        obs = self._last_stable_obs = np.minimum(np.maximum(self._get_obs(), space.low), space.high)
        self._tcp = self.tcp_center
        try:
            reward, info = self.evaluate_state(obs, action)
        finally:
            self._tcp = None
        return obs, reward, False, self.curr_path_length == self.max_path_length, info

    def set_xyz_action(self, action: Any) -> None:
        """Move the mocap body by an action `[3]` in [-1, 1], within its bounds.

        The product is rounded in the action's dtype.
        """
        action = np.asarray(action)
        x, y, z = action.tolist()
        if not (-1 <= x <= 1 and -1 <= y <= 1 and -1 <= z <= 1):
            action = np.clip(action, -1, 1)
        delta = action * (self._scale if action.dtype is SINGLE else self.action_scale)
        position = self._mocap_pos
        moves = delta.tolist()
        current = position.tolist()
        lows = self.mocap_low.tolist()
        highs = self.mocap_high.tolist()
        for axis in (0, 1, 2):
            moved = current[axis] + moves[axis]
            if moved < lows[axis]:
                moved = lows[axis]
            elif moved > highs[axis]:
                moved = highs[axis]
            position[axis] = moved
        self._mocap_quat[:] = HAND_DOWN

    def do_simulation(self, ctrl: Any, n_frames: int) -> None:
        """Simulate without `mj_rnePostConstraint`, whose results are not used here.

        It computes cacc, cfrc_int and cfrc_ext. Only sensors read them, and these models have none.
        The contact test and the renderer use efc_force.
        """
        control = self._control
        control[0], control[1] = ctrl
        mj_step(self.model, self.data, n_frames)

    def _get_obs(self) -> Doubles:
        """Return `[39]`: the state (18), the state one step earlier (18), the goal (3)."""
        obs = np.zeros(39)
        self._observe(obs)
        obs[18:36] = self._prev_obs
        self._prev_obs = obs[:18].copy()
        if not self._partially_observable:
            obs[36:] = self._get_pos_goal()
        return obs

    def _get_curr_obs_combined_no_goal(self) -> Doubles:
        obs = np.zeros(18)
        self._observe(obs)
        return obs

    def _observe(self, obs: Doubles) -> None:
        """Write the state: hand (3), opening (1), and position (3) and quaternion (4) per object.

        There are one or two objects.
        """
        body = self._body
        apart = body["rightclaw"] - body["leftclaw"]
        obs[:3] = body["hand"]
        obs[3] = min(max(sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
        position = self._get_pos_objects()
        quaternion = self._get_quat_objects()
        if len(position) == 3:
            obs[4:7], obs[7:11] = position, quaternion
        else:
            obs[4:7], obs[7:11] = position[:3], quaternion[:4]
            obs[11:14], obs[14:18] = position[3:], quaternion[4:]

    def get_endeff_pos(self) -> Doubles:
        return self._body["hand"]

    def get_body_com(self, body_name: str) -> Doubles:
        return self._body[body_name]

    def _get_site_pos(self, site_name: str) -> Doubles:
        return self._site[site_name].copy()

    @property
    def tcp_center(self) -> Doubles:
        """Return the center `[3]` between the fingers."""
        if self._tcp is not None:
            return self._tcp
        return (self._site["rightEndEffector"] + self._site["leftEndEffector"]) * HALF

    @cached_property
    def _main_object(self) -> int:
        return self._get_id_main_object()

    @property
    def touching_main_object(self) -> bool:
        return self.touching_object(self._main_object)

    def touching_object(self, object_geom_id: int) -> bool:
        """Return whether both pads press on an object."""
        contact = self.data.contact
        force = [0.0, 0.0]
        for index, pair in enumerate(contact.geom.tolist()):
            if object_geom_id in pair:
                for side, pad in enumerate(self._pads):
                    if pad in pair:  # as in Meta-World, address -1 reads the last force
                        force[side] += self.data.efc_force[contact.efc_address[index]]
        return bool(force[0] > 0 and force[1] > 0)

    def _gripper_caging_reward(
        self,
        action: Any,
        obj_pos: Doubles,
        obj_radius: float,
        pad_success_thresh: float,
        object_reach_radius: float,
        xz_thresh: float,
        desired_gripper_effort: float = 1.0,
        high_density: bool = False,
        medium_density: bool = False,
    ) -> Any:
        """Return a reward in [0, 1] for caging an object in y, x and z and closing the gripper."""
        if high_density and medium_density:
            raise ValueError("Can only be either high_density or medium_density")
        caging = hamacher_product(
            self._caging_y(obj_pos, obj_radius, pad_success_thresh),
            self._caging_xz(obj_pos, xz_thresh),
        )
        # The result has the dtype of the action.
        closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
        caged = hamacher_product(caging, closed if caging > 0.97 else 0.0)
        if high_density:
            return (caged + caging) / 2
        if medium_density:
            return (caged + self._reach(obj_pos, object_reach_radius)) / 2
        return caged

    def _caging_y(self, obj_pos: Doubles, near: float, far: float) -> float:
        """Return the reward for pads on both sides of the object along y.

        Margins are the distances from the object's initial position.
        """
        y = obj_pos.item(1)
        first = self.obj_init_pos.item(1)
        left = self._body["leftpad"].item(1)
        right = self._body["rightpad"].item(1)
        return hamacher_product(
            tolerance(abs(left - y), (near, far), abs(abs(left - first) - far), "long_tail"),
            tolerance(abs(right - y), (near, far), abs(abs(right - first) - far), "long_tail"),
        )

    def _caging_xz(self, obj_pos: Doubles, near: float) -> float:
        """Return the reward for a gripper near the object in x and z.

        The margin is the initial distance.
        """
        margin = self._distance_xz(self.obj_init_pos, self.init_tcp) - near
        return tolerance(
            self._distance_xz(self.tcp_center, obj_pos), (0, near), margin, "long_tail"
        )

    def _distance_xz(self, a: Doubles, b: Doubles) -> float:
        pair = self._pair
        pair[0], pair[1] = a.item(0) - b.item(0), a.item(2) - b.item(2)
        return sqrt(pair.dot(pair))

    def _reach(self, obj_pos: Doubles, near: float) -> float:
        """Return the reward for a gripper near the object; the margin is the initial distance."""
        away = obj_pos - self.tcp_center
        first = self.obj_init_pos - self.init_tcp
        return tolerance(
            sqrt(away.dot(away)), (0, near), abs(sqrt(first.dot(first)) - near), "long_tail"
        )
