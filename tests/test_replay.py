"""The replay against a plain list per task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softmod.replay import Replay
from softmod.types import EnvSpec, Rollout

SPEC = EnvSpec(("a", "b", "c"), 2, 1, 10)


def rollout(start: int, copies: int, steps: int) -> Rollout:
    """Every number says where it comes from: task, place in the stream, part."""
    place = start + np.arange(copies * steps).reshape(steps, copies).T  # rows are written step by step
    key = np.arange(3)[:, None, None] * 1000.0 + place[None]
    return Rollout(
        np.stack([key, key + 0.25], -1).astype(np.float32), (key + 0.5)[..., None].astype(np.float32),
        (key + 0.125).astype(np.float32), np.stack([key + 0.75, key + 0.875], -1).astype(np.float32),
        np.zeros(key.shape, bool),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 30), rounds=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 15)), max_size=6))
def test_holds_the_newest_of_each_task(capacity, rounds):
    replay, expected, start = Replay(SPEC, capacity), [[], [], []], 0
    for copies, steps in rounds:
        replay.extend(rollout(start, copies, steps))
        for task in range(3):
            expected[task] += [task * 1000.0 + start + i for i in range(copies * steps)]
        start += copies * steps
    assert replay.size == min(start, capacity)
    assert replay.written == start
    for task in range(3):
        held = sorted(replay.rows[task, : replay.size, 0].tolist())
        assert held == sorted(expected[task][-capacity:])


def test_rows_stay_whole_and_tasks_apart():
    replay = Replay(SPEC, 7)
    for start in range(0, 45, 9):
        replay.extend(rollout(start, 3, 3))
    batch = replay.sample(200, torch.Generator().manual_seed(0))
    assert [tuple(part.shape) for part in batch] == [(3, 200, 2), (3, 200, 1), (3, 200), (3, 200, 2), (3, 200)]
    key = batch.obs[..., 0]
    for part, offset in [(batch.obs[..., 1], 0.25), (batch.action[..., 0], 0.5), (batch.reward, 0.125)]:
        torch.testing.assert_close(part, key + offset)
    torch.testing.assert_close(batch.next_obs[..., 0], key + 0.75)
    assert torch.equal((key // 1000).long(), torch.arange(3)[:, None].expand(3, 200))
    assert set((key[0]).tolist()) == set(range(38, 45))  # the newest seven, all of them


@pytest.mark.parametrize(("count", "expected"), [(3, [42, 43, 44]), (9, range(38, 45))])
def test_the_newest_observations_in_order(count, expected):
    replay = Replay(SPEC, 7)
    assert replay.newest(3).shape == (3, 0, 2)
    for start in range(0, 45, 9):
        replay.extend(rollout(start, 3, 3))
    assert replay.newest(count)[1, :, 0].tolist() == [1000.0 + place for place in expected]


def test_draws_of_tasks_are_independent_and_uniform():
    replay = Replay(SPEC, 50)
    replay.extend(rollout(0, 1, 50))
    key = replay.sample(20_000, torch.Generator().manual_seed(3)).obs[..., 0] % 1000
    counts = torch.stack([torch.bincount(row.long(), minlength=50) for row in key])
    assert counts.min() > 300  # 400 each are expected; six standard deviations are 119
    assert counts.max() < 520
    assert abs(np.corrcoef(key[0].numpy(), key[1].numpy())[0, 1]) < 0.03


def test_same_generator_same_batch():
    replay = Replay(SPEC, 50)
    replay.extend(rollout(0, 1, 20))
    first, second = (replay.sample(8, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = replay.sample(8, torch.Generator().manual_seed(6))
    assert not torch.equal(first.obs, other.obs)


@pytest.mark.cuda
def test_on_cuda_it_holds_the_same_and_draws_what_it_holds():
    here, there = Replay(SPEC, 7), Replay(SPEC, 7, "cuda")
    for start in range(0, 45, 9):
        for replay in (here, there):
            replay.extend(rollout(start, 3, 3))
    assert torch.equal(there.rows.cpu(), here.rows)
    assert torch.equal(there.newest(5).cpu(), here.newest(5))
    batch = there.sample(200, torch.Generator("cuda").manual_seed(0))
    key = batch.obs[..., 0].cpu()
    assert torch.equal((key // 1000).long(), torch.arange(3)[:, None].expand(3, 200))
    assert set(key[0].tolist()) == set(range(38, 45))
    torch.testing.assert_close(batch.next_obs[..., 1].cpu(), key + 0.875)


def test_nothing_can_be_drawn_from_an_empty_one():
    with pytest.raises(ValueError, match="empty"):
        Replay(SPEC, 5).sample(1, torch.Generator())


# --- several steps ----------------------------------------------------------------------------------------------------

DISCOUNT = 0.9


class Stream:
    """Episodes of one task in several environments, some of them cut short, as rollouts and as plain lists."""

    def __init__(self, seed: int, copies: int) -> None:
        self.draws, self.copies, self.time = np.random.default_rng(seed), copies, 0
        self.current: list[list[int]] = [[] for _ in range(copies)]  # numbers of the episode's transitions, per copy
        self.number = 0  # of transitions so far, step by step and copy by copy
        self.reward: list[float] = []
        self.follows: dict[int, int] = {}  # the transition after one, where there is one in its episode

    def rollout(self, steps: int) -> Rollout:
        shape = (3, self.copies, steps)
        reward, begins = np.zeros(shape, np.float32), np.zeros(shape, bool)
        obs, next_obs = np.zeros((*shape, 2), np.float32), np.zeros((*shape, 2), np.float32)
        for step in range(steps):
            for copy in range(self.copies):
                episode, number = self.current[copy], self.number
                if not episode or len(episode) == SPEC.horizon or self.draws.random() < 0.1:  # a new one, or a fault
                    episode = self.current[copy] = []
                    begins[:, copy, step] = True
                else:
                    self.follows[episode[-1]] = number
                episode.append(number)
                self.reward.append(float(self.draws.integers(1, 100)))
                reward[:, copy, step] = self.reward[-1]
                obs[:, copy, step, 0], next_obs[:, copy, step, 0] = number, number + 0.5
                self.number += 1
        return Rollout(obs, np.zeros((*shape, 1), np.float32), reward, next_obs, begins)

    def expected(self, number: int, n_step: int) -> tuple[float, float, float]:
        """The reward, the next observation and the discount of a transition over `n_step` steps."""
        total, factor, last = self.reward[number], DISCOUNT, number
        while n_step > 1 and last in self.follows:
            last = self.follows[last]
            total, factor, n_step = total + factor * self.reward[last], factor * DISCOUNT, n_step - 1
        return total, last + 0.5, factor


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), copies=st.integers(1, 3), n_step=st.integers(1, 5), capacity=st.integers(5, 60),
    rounds=st.lists(st.integers(1, 15), min_size=1, max_size=8),
)  # fmt: skip
def test_several_steps_are_those_of_a_list(seed, copies, n_step, capacity, rounds):
    stream, replay = Stream(seed, copies), Replay(SPEC, capacity, copies=copies)
    for steps in rounds:
        replay.extend(stream.rollout(steps))
    batch = replay.sample(64, torch.Generator().manual_seed(seed), n_step, DISCOUNT)
    for task in range(3):
        for row in range(64):
            number = int(batch.obs[task, row, 0])
            reward, next_obs, discount = stream.expected(number, n_step)
            assert number >= stream.number - capacity
            assert batch.reward[task, row].item() == pytest.approx(reward, rel=1e-6)
            assert batch.next_obs[task, row, 0].item() == next_obs
            assert batch.discount[task, row].item() == pytest.approx(discount, rel=1e-6)


def test_the_lists_have_episodes_that_end_in_every_way():
    """What the test above is worth: faults, time limits, and episodes that go on over rounds and copies."""
    stream = Stream(0, 2)
    for _ in range(20):
        stream.rollout(7)
    lengths, ends = [], set(range(stream.number)) - set(stream.follows)
    for last in ends:
        before, length = {after: number for number, after in stream.follows.items()}, 1
        while last in before:
            last, length = before[last], length + 1
        lengths.append(length)
    assert SPEC.horizon in lengths
    assert min(lengths) < SPEC.horizon
