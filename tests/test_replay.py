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
    place = start + np.arange(copies * steps).reshape(copies, steps)
    key = np.arange(3)[:, None, None] * 1000.0 + place[None]
    return Rollout(
        np.stack([key, key + 0.25], -1).astype(np.float32), (key + 0.5)[..., None].astype(np.float32),
        (key + 0.125).astype(np.float32), np.stack([key + 0.75, key + 0.875], -1).astype(np.float32),
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
    assert [tuple(part.shape) for part in batch] == [(3, 200, 2), (3, 200, 1), (3, 200), (3, 200, 2)]
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
