"""Workers: equal rollouts for any number of processes, resumed episodes, reported failures."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from math import erf
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from softmod.config.compose import compose, typed
from softmod.envs.metaworld import MetaWorld, MetaWorldEnv
from softmod.envs.tasks import MT50, STEP_COSTS
from softmod.envs.toy import Toy
from softmod.errors import PhysicsError, WorkerError
from softmod.experiment.build import make_plan
from softmod.experiment.resources import wanted_processes
from softmod.networks.gaussian import Actor, Policy
from softmod.networks.mlp import MLP
from softmod.networks.weights import flatten
from softmod.seeding import Purpose, generator, pink
from softmod.workers import pool, process
from softmod.workers.pool import Workers, partition
from softmod.workers.process import ProcessWorker, limit, shared_weights, start_worker
from softmod.workers.worker import Plan, serve
from tests.faulty import AlwaysBroken, Faulty
from tests.settings import network, published

TASKS = ["toy-reach", "toy-opposite", "toy-touch"]


def actor() -> Actor:
    torch.manual_seed(0)
    return published(MLP(9, 4, 3, 1, **network("mlp", num_layers=1, width=8, init="torch")))


def plan(suite=None, seed=0, draw_goals=False) -> Plan:
    return Plan(suite or Toy(TASKS, horizon=20), actor(), seed, draw_goals)


def weights() -> torch.Tensor:
    return flatten(actor())


def rounds(workers: Workers, count: int, steps: int = 10):
    rollouts = []
    for _ in range(count):
        workers.start(weights(), steps)
        rollouts.append(workers.finish())
    return rollouts


def same(first, second, exact=True) -> None:
    for name in ("obs", "action", "reward", "next_obs", "begins"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.shape == b.shape
        (
            np.testing.assert_array_equal(a, b)
            if exact
            else np.testing.assert_allclose(a, b, atol=1e-4)
        )
    assert [e[:3] for e in first.episodes] == [e[:3] for e in second.episodes]


@pytest.fixture(scope="module")
def inline():
    with Workers(plan(), 0, copies=2) as workers:
        return rounds(workers, 5)


def test_shapes_and_the_order_of_steps(inline):
    first, second = inline[:2]
    assert first.obs.shape == first.next_obs.shape == (3, 2, 10, 9)
    assert first.action.shape == (3, 2, 10, 2)
    assert first.reward.shape == (3, 2, 10)
    assert first.env_steps == 60
    np.testing.assert_array_equal(first.obs[:, :, 1:], first.next_obs[:, :, :-1])
    # Episodes continue in the next round.
    np.testing.assert_array_equal(second.obs[:, :, 0], first.next_obs[:, :, -1])
    assert first.episodes == []
    assert [e[:3] for e in second.episodes] == [(t, c, 0) for t in range(3) for c in range(2)]
    returns = first.reward.sum(-1) + second.reward.sum(-1)
    np.testing.assert_allclose(
        [e.episode_return for e in second.episodes], returns.reshape(-1), rtol=1e-5
    )


def test_where_episodes_begin_and_what_they_bring(inline):
    begins = np.concatenate([rollout.begins for rollout in inline[:4]], -1)
    assert (np.flatnonzero(begins[1, 0]) == [0, 20]).all()
    assert (begins == begins[:1, :1]).all()
    reward = np.concatenate([rollout.reward for rollout in inline[:2]], -1)
    for episode in inline[1].episodes:
        np.testing.assert_allclose(episode.rewards, reward[episode.task, episode.copy], rtol=1e-6)


@pytest.mark.parametrize("processes", [0, 2])
def test_training_episodes_may_be_shorter_than_evaluations(processes):
    shorter = Plan(Toy(TASKS, horizon=20, train_horizon=5), actor(), 0)
    with Workers(shorter, processes) as workers:
        first, second = rounds(workers, 2)
        state = workers.under_way
        scores = workers.evaluate(weights(), 2)
    assert np.flatnonzero(first.begins[0, 0]).tolist() == [0, 5]
    assert [e[:3] for e in first.episodes if e.task == 0] == [(0, 0, 0), (0, 0, 1)]
    with Workers(shorter, processes) as workers:
        workers.restore(state)
        resumed = rounds(workers, 1)[0]
    assert resumed.begins[0, 0, 0]
    assert [len(episode.rewards) for episode in second.episodes] == [5] * 6
    longer = Toy(TASKS, horizon=20).make(1)
    obs, returned = longer.reset(Toy(TASKS, horizon=20).goals(1)[0]), 0.0
    policy = Policy(actor())
    for _ in range(20):
        obs, reward, success = longer.step(policy.act(obs[None, None], np.array([1]))[0, 0])
        returned += reward
        assert not success  # an untrained policy, for the whole horizon
    one = Workers(shorter, 0, training=False)
    assert one.evaluate(weights(), 1)[1].episode_return == pytest.approx(returned, rel=1e-4)
    assert scores[1].episodes == 2


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_uniform_actions_are_uniform_and_the_same_for_any_number_of_processes(processes):
    with Workers(plan(), processes) as workers:
        rollouts = []
        for _ in range(30):
            workers.start(weights(), 10, uniform=True)
            rollouts.append(workers.finish())
    action = np.concatenate([rollout.action for rollout in rollouts], 2)
    assert np.abs(action).max() <= 1.0
    counts = np.histogram(action, bins=10, range=(-1, 1))[0] / action.size
    np.testing.assert_allclose(counts, 0.1, atol=0.03)  # 1,800 numbers: four standard deviations
    noise = generator(0, Purpose.EXPLORATION, 0, 0, 0).standard_normal((20, 2), np.float32)
    np.testing.assert_allclose(
        action[0, 0, :20], [[erf(x / 2**0.5) for x in row] for row in noise], atol=1e-6
    )


def test_a_plan_with_pink_noise_explores_by_it():
    with Workers(replace(plan(), pink_noise=True), 0) as workers:
        workers.start(weights(), 20, uniform=True)
        action = workers.finish().action
    noise = pink(generator(0, Purpose.EXPLORATION, 0, 0, 0).standard_normal((20, 2), np.float32))
    np.testing.assert_allclose(
        action[0, 0], [[erf(x / 2**0.5) for x in row] for row in noise], atol=1e-6
    )


@pytest.mark.parametrize(
    ("line", "pink_noise", "draw_goals"),
    [("env=toy", True, False), ("env=toy policy.exploration_noise=white", False, False),
     ("env=toy algorithm=mtsac env.goals=random", False, True)],
)  # fmt: skip
def test_the_plan_of_a_configuration(line, pink_noise, draw_goals):
    made = make_plan(typed(compose(line.split())), Toy(TASKS), actor())
    assert (made.pink_noise, made.draw_goals) == (pink_noise, draw_goals)


@pytest.mark.bar(17)
def test_copies_and_tasks_explore_on_their_own(inline):
    action = inline[0].action.reshape(6, -1)
    for i in range(6):
        for j in range(i):
            assert np.abs(action[i] - action[j]).max() > 0.1


@pytest.mark.bar(1)
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_any_number_of_processes_collects_the_same(inline, processes):
    with Workers(plan(), processes, copies=2) as workers:
        for mine, theirs in zip(rounds(workers, 3), inline, strict=False):
            same(mine, theirs, exact=False)  # a product's last bits depend on its shape


@pytest.mark.control(1)
def test_seeds_differ(inline):
    with Workers(plan(seed=1), 0, copies=2) as workers:
        assert np.abs(rounds(workers, 1)[0].action - inline[0].action).max() > 0.1


def test_tasks_are_shared_out_evenly_and_once():
    for tasks, copies, processes in [
        (10, 1, 3),
        (3, 4, 5),
        (1, 8, 3),
        (2, 1, 7),
        (50, 1, 15),
        (4, 2, 4),
    ]:
        shares = partition([1.0] * tasks, copies, processes)
        held = [
            (task, copy)
            for share_tasks, share_copies in shares
            for task in share_tasks
            for copy in share_copies
        ]
        assert sorted(held) == [(t, c) for t in range(tasks) for c in range(copies)]
        assert len(shares) <= processes


def test_heavy_tasks_do_not_meet_in_one_process():
    costs = [STEP_COSTS.get(task, 1.0) for task in MT50]
    for processes in (2, 4, 16):
        shares = partition(costs, 1, processes)
        loads = [sum(costs[task] for task in tasks) for tasks, _ in shares]
        assert max(loads) < 1.12 * min(loads) or processes == 16
        assert {len(tasks) for tasks, _ in shares} <= {50 // processes, 50 // processes + 1}
        interleaved = [sum(costs[hand::processes]) for hand in range(processes)]
        assert max(loads) < max(interleaved)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("draw_goals", [False, True])
def test_episodes_under_way_resume_exactly(processes, draw_goals):
    one = plan(draw_goals=draw_goals)
    with Workers(one, processes) as workers:
        rounds(workers, 3, steps=5)
        state = workers.under_way
        expected = rounds(workers, 4, steps=5)
    with Workers(one, processes) as workers:
        workers.restore(state)
        for mine, theirs in zip(rounds(workers, 4, steps=5), expected, strict=True):
            same(mine, theirs)


def test_a_state_that_does_not_repeat_is_refused():
    with Workers(plan(), 0) as workers:
        rounds(workers, 1)
        state = workers.under_way
    state.obs[1, 0, 0] += 1e-6
    with (
        Workers(plan(), 0) as workers,
        pytest.raises(WorkerError, match="toy-opposite: re-executing episode 0"),
    ):
        workers.restore(state)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_does_not_depend_on_who_does_it(processes):
    with Workers(plan(), 0, training=False) as workers:
        expected = workers.evaluate(weights(), 7)
    with Workers(plan(), processes) as workers:
        before = rounds(workers, 1)
        assert workers.evaluate(weights(), 7) == expected
        after = rounds(workers, 1)
    assert [score.task for score in expected] == TASKS
    # Evaluation does not change the training episodes.
    np.testing.assert_array_equal(before[0].next_obs[:, :, -1], after[0].obs[:, :, 0])


def test_evaluation_ends_an_episode_at_success():
    class Always(MLP):
        """A policy that moves towards the goal.

        The observation holds the point at (0, 1) and the goal at (6, 7).
        """

        def forward(self, x, tasks=None):
            towards = 5 * (x[..., 6:8] - x[..., :2])
            return torch.cat([towards, torch.zeros_like(towards)], -1)[None]

    suite = Toy(["toy-reach"], horizon=40)
    policy = published(Always(9, 4, 1, 1, **network("mlp")))
    with Workers(Plan(suite, policy, 0), 0, training=False) as workers:
        (score,) = workers.evaluate(flatten(policy), 50)
    assert score.success_rate == 1.0
    assert score.episodes == 50
    assert score.episode_return < 40 * 10 * 0.8  # not collected up to the horizon


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.bar(11)
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            "build",
            (
                r"worker of toy-opposite \(seed 0\) could not start: RuntimeError: this environment"
                r" cannot be built"
            ),
        ),
        ("raise-7", r"worker of toy-opposite \(seed 0\): RuntimeError: the simulation broke"),
        ("die-7", r"worker of toy-opposite \(seed 0\) \(pid \d+\) died: exit code 9"),
        (
            "hang-7",
            r"worker of toy-opposite \(seed 0\) did not answer within 8 s \(workers.timeout\)",
        ),
    ],
)
def test_failures_are_named_and_leave_no_process(fault, told):
    suite = Faulty(TASKS, horizon=20, name=fault)
    with Workers(plan(), 1):  # starts the fork server, which takes seconds
        pass
    workers = Workers(plan(suite), 3, timeout=8.0 if "hang" in fault else 60.0, restarts=0)
    began = time.monotonic()
    with workers, pytest.raises(WorkerError, match=told):
        rounds(workers, 2)
    assert time.monotonic() - began < 30
    assert not [child for child in multiprocessing.active_children() if child.name != "forkserver"]


def test_inline_failures_are_worker_errors_too():
    with pytest.raises(WorkerError, match="cannot be built"):
        Workers(plan(Faulty(TASKS, name="build")), 0)
    with (
        Workers(plan(Faulty(TASKS, name="raise-3")), 0) as workers,
        pytest.raises(WorkerError, match="broke"),
    ):
        rounds(workers, 1)


@pytest.mark.bar(11)
def test_a_killed_worker_is_told_with_its_signal():
    with Workers(plan(), 2, restarts=0) as workers:
        rounds(workers, 1)
        os.kill(workers.workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="died: signal 9"):
            rounds(workers, 1)


@pytest.mark.bar(11)
@pytest.mark.parametrize("fault", ["build", "raise-7", "die-27", "hang-7"])
def test_what_replaces_a_failed_worker_goes_on_with_the_same_run(fault, tmp_path, caplog):
    """In the first round or within the second episode, without effect on other processes."""
    with Workers(plan(), 0) as workers:
        expected = rounds(workers, 5)
        score = workers.evaluate(weights(), 3)
    suite = Faulty(TASKS, horizon=20, name=fault)
    suite.marker = tmp_path / "marker"
    with Workers(plan(suite), 3, timeout=8.0 if "hang" in fault else 60.0) as workers:
        before = {worker.process.pid for worker in workers.workers}
        for mine, theirs in zip(rounds(workers, 5), expected, strict=True):
            same(mine, theirs)
        assert workers.evaluate(weights(), 3) == score
        assert len({worker.process.pid for worker in workers.workers} - before) == 1
    assert "a new one takes over (1 of 3)" in caplog.text


@pytest.mark.bar(11)
def test_workers_killed_between_and_within_rounds_are_replaced():
    with Workers(plan(), 0, copies=2) as workers:
        expected = rounds(workers, 6)
    with Workers(plan(), 2, copies=2) as workers:
        for number, theirs in enumerate(expected):
            if number == 1:
                os.kill(workers.workers[0].process.pid, signal.SIGKILL)
                workers.workers[0].process.join()  # so that sending the request fails
            workers.start(weights(), 10)
            if number == 3:
                os.kill(workers.workers[1].process.pid, signal.SIGKILL)
            if number % 2:
                workers.wait()
            if number == 5:  # its part of the round is here already
                os.kill(workers.workers[0].process.pid, signal.SIGKILL)
            same(workers.finish(), theirs)


@pytest.mark.bar(14)
@pytest.mark.parametrize("processes", [0, 3])
@pytest.mark.parametrize("at", [1, 7, 20, 27])
def test_an_episode_whose_physics_break_is_cut_short(processes, at, tmp_path):
    """The next episode replaces the failed step in the rollout, and collection continues."""
    with Workers(plan(), 0) as workers:
        undisturbed = rounds(workers, 4)
    suite = Faulty(TASKS, horizon=20, name=f"physics-{at}")
    suite.marker = tmp_path / "marker"
    with Workers(plan(suite), processes) as workers:
        rollouts = rounds(workers, 4)
        state = workers.under_way
        after = rounds(workers, 2)
    broken, step = divmod(at - 1, 10)
    faults = [[tuple(fault) for fault in rollout.faults] for rollout in rollouts]
    assert faults == [
        [(1, 0, (at - 1) // 20, step)] if number == broken else [] for number in range(4)
    ]
    for number, (mine, theirs) in enumerate(zip(rollouts, undisturbed, strict=True)):
        for task in (0, 2):
            np.testing.assert_array_equal(mine.next_obs[task], theirs.next_obs[task])
        until = step if number == broken else 10 if number < broken else 0
        np.testing.assert_array_equal(mine.action[1, :, :until], theirs.action[1, :, :until])
        assert all(
            np.isfinite(getattr(mine, name)).all()
            for name in ("obs", "action", "reward", "next_obs")
        )
    if step:
        assert (
            np.abs(
                rollouts[broken].obs[1, 0, step] - rollouts[broken].next_obs[1, 0, step - 1]
            ).max()
            > 1e-3
        )
    assert rollouts[broken].begins[1, 0, step]
    with Workers(plan(), processes) as workers:  # with restored episodes
        workers.restore(state)
        for mine, theirs in zip(rounds(workers, 2), after, strict=True):
            same(mine, theirs)


@pytest.mark.bar(14)
@pytest.mark.parametrize("processes", [0, 2])
def test_physics_that_break_in_every_episode_end_the_run(processes):
    workers = Workers(plan(AlwaysBroken(TASKS, horizon=20, name="physics")), processes)
    with workers, pytest.raises(PhysicsError, match="the physics broke"):
        rounds(workers, 1)


@pytest.mark.bar(11)
def test_restarts_are_used_up(caplog):
    with Workers(plan(Faulty(TASKS, horizon=20, name="die-7")), 3, restarts=2) as workers:
        with pytest.raises(WorkerError, match="died: exit code 9"):
            rounds(workers, 2)
    assert caplog.text.count("a new one takes over") == 2


def test_old_restarts_do_not_count(monkeypatch):
    monkeypatch.setattr(pool, "WINDOW", 0.0)
    with Workers(plan(), 2, restarts=1) as workers:
        for _ in range(3):
            os.kill(workers.workers[0].process.pid, signal.SIGKILL)
            rounds(workers, 1)


@pytest.mark.bar(13)
def test_no_worker_outlives_a_killed_learner(tmp_path):
    script = Path(__file__).with_name("parent.py")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.bar(14)
@pytest.mark.parametrize("damage", ["nan position", "huge velocity", "nan action"])
def test_meta_worlds_physics_break_and_the_run_goes_on(damage, monkeypatch):
    suite = MetaWorld(["reach-v3", "push-v3"], horizon=20)
    step, count = MetaWorldEnv.step, [0]

    def damaged(env, action):
        count[0] += 1
        if count[0] == 9:  # of both environments together: the fifth step of the first
            if damage == "nan position":
                env._env.data.qpos[9] = np.nan
            elif damage == "huge velocity":
                env._env.data.qvel[3] = 1e12
            else:
                action = np.full(4, np.nan, np.float32)
        return step(env, action)

    torch.manual_seed(0)
    policy = published(MLP(39, 8, 2, 1, **network("mlp", num_layers=1, width=8)))
    with Workers(Plan(suite, policy, 0), 0) as workers:
        workers.start(flatten(policy), 10)
        expected = workers.finish()
    monkeypatch.setattr(MetaWorldEnv, "step", damaged)
    with Workers(Plan(suite, policy, 0), 0) as workers:
        workers.start(flatten(policy), 10)
        rollout = workers.finish()
        assert workers.under_way.steps.tolist() == [[6], [10]]
    assert [tuple(fault) for fault in rollout.faults] == [(0, 0, 0, 4)]
    assert all(
        np.isfinite(getattr(rollout, name)).all()
        for name in ("obs", "action", "reward", "next_obs")
    )
    np.testing.assert_array_equal(rollout.obs[0, :, :4], expected.obs[0, :, :4])
    np.testing.assert_array_equal(rollout.next_obs[1], expected.next_obs[1])


@pytest.mark.bar(10)
def test_ctrl_c_waits_until_a_worker_has_all_its_arguments(monkeypatch):
    start_worker(plan(), [0], [0], True, 10.0, inline=False).close()  # the fork server runs
    start, started = ForkServerProcess.start, []

    def interrupted(process: ForkServerProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start(process)
        started.append(process)

    monkeypatch.setattr(ForkServerProcess, "start", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            start_worker(plan(), [0], [0], True, 10.0, inline=False)
    finally:
        signal.signal(signal.SIGINT, before)
    (process,) = started
    process.kill()
    process.join()


@pytest.mark.bar(10)
@pytest.mark.parametrize("asked", [False, True])
def test_a_worker_whose_learner_has_gone_ends_without_a_word(asked):
    start_worker(plan(), [0], [0], True, 10.0, inline=False).close()  # the fork server runs
    ours, theirs = multiprocessing.Pipe()
    arguments = (pickle.dumps(plan()), [0], [0], True, shared_weights(plan()).arena, theirs)
    process = multiprocessing.get_context("forkserver").Process(
        target=serve, args=arguments, daemon=True
    )
    if not asked:
        ours.close()
    process.start()
    theirs.close()
    if asked:
        assert ours.recv()[1] == "ready"
        ours.close()
    process.join(20)
    assert process.exitcode == 0


def test_a_forked_process_starts_its_own_fork_server():
    """It cannot wait for that of its parent."""
    process.start_forkserver()
    if not (pid := os.fork()):
        try:
            process.start_forkserver()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_process_of_a_pool_starts_no_workers(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(WorkerError, match=r"multiprocessing.Pool may not.*workers.processes=0"):
        Workers(plan(), 1)
    cfg = typed(compose(["experiment=toy", "workers.processes=2"]))
    assert wanted_processes(cfg, {}) == 2
    cfg = typed(compose(["experiment=toy"]))
    assert wanted_processes(cfg, {"processes": 2}) == 0
    monkeypatch.undo()
    assert wanted_processes(cfg, {"processes": 2}) == 2
    assert wanted_processes(cfg, {}) is None


def test_a_task_set_of_a_notebook_is_named(monkeypatch):
    class Mine(Toy):
        pass

    Mine.__module__ = "__main__"
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "Mine", Mine, raising=False)
    Mine.__qualname__ = "Mine"
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.setattr(main, "__file__", "<stdin>", raising=False)
    with pytest.raises(WorkerError, match=r"cannot import Mine.*module of its own, or: workers"):
        Workers(plan(Mine(TASKS, horizon=20)), 1)


def test_a_script_without_a_main_guard_is_named():
    worker = ProcessWorker.__new__(ProcessWorker)
    worker.names, worker.ready, worker.imports_main = "toy-reach", False, True
    worker.process = SimpleNamespace(join=lambda _: None, exitcode=1, pid=7)
    assert "exit code 1; workers import the script, which needs `if __name__ ==" in worker._died()


@pytest.mark.parametrize("error", [BlockingIOError(11, "unavailable"), EOFError("unexpected EOF")])
def test_a_process_that_cannot_be_started_is_one_line(error, monkeypatch):
    """As with `ulimit -u`, and with a temporary folder in which there are no sockets."""

    def refuse() -> None:
        raise error

    monkeypatch.setattr(process, "start_forkserver", refuse)
    with pytest.raises(WorkerError, match=r"no process can be started \(.*workers.processes=0"):
        Workers(plan(), 1)


def test_a_transfer_that_stops_half_way_is_a_worker_that_does_not_answer():
    """Large replies exceed a socket's buffer, so a worker may stop in the middle of one."""
    worker, (silent, _) = ProcessWorker.__new__(ProcessWorker), os.pipe()
    worker.connection, theirs = multiprocessing.Pipe()
    worker.names, worker.timeout = "toy-reach", 0.3
    worker.process = SimpleNamespace(sentinel=silent)
    limit(worker.connection, worker.timeout)
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"the beginning")
    with pytest.raises(WorkerError, match=r"worker of toy-reach did not answer within 0\.3 s"):
        worker._receive()
    worker.ready, worker.number = True, 0
    with pytest.raises(WorkerError, match=r"did not answer within 0\.3 s"):
        worker.ask("collect", b"x" * 10_000_000)
