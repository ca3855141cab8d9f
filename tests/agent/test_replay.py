"""The replay against a plain list per task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from softmod.agent.replay import Batch, Replay, bytes_per_transition, random_rollout
from softmod.counter import MASK
from softmod.errors import WorkerError
from softmod.spec import EnvSpec
from tests.stream import FRAMES, WHOLE, Stream

DISCOUNT = 0.9
SPECS = st.sampled_from([WHOLE, FRAMES])


def held(replay: Replay) -> list[list[float]]:
    """Return the actions of the transitions that can be drawn, per task, in order."""
    numbers = torch.arange(replay.written - replay.size, replay.written) % replay.ring
    return replay.rows[:, numbers, replay.spec.state_dim].tolist()


def agree(replay: Replay, stream: Stream, n_step: int = 1, draws: int = 64) -> None:
    """Compare contents, batches and newest observations with the lists, bit for bit."""
    size = min(len(stream.lists[0]), replay.capacity)
    assert replay.size == size
    assert held(replay) == [
        [transition.action for transition in kept[-size:]] for kept in stream.lists
    ]
    newest = [[transition.obs for transition in kept[-min(size, 5) :]] for kept in stream.lists]
    assert replay.newest(5).tolist() == newest
    check(
        replay.sample(draws, torch.Generator().manual_seed(size), n_step, DISCOUNT), stream, n_step
    )
    two = replay.sample_at(words(size, 2, draws // 4), n_step, DISCOUNT)
    for update in range(2):
        check(Batch(*(part[update] for part in two)), stream, n_step)


def words(seed: int, updates: int, batch: int) -> torch.Tensor:
    """Return random words for batches of three tasks."""
    return torch.randint(
        2**32, (updates, 3, batch), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )


def check(batch: Batch, stream: Stream, n_step: int) -> None:
    """Compare a batch with the lists, bit for bit."""
    for task in range(3):
        for row in range(batch.reward.shape[1]):
            number = round(batch.action[task, row, 0].item()) - 1000 * task
            reward, next_obs, discount = stream.expected(task, number, n_step, DISCOUNT)
            assert batch.obs[task, row].tolist() == stream.lists[task][number].obs
            assert batch.next_obs[task, row].tolist() == next_obs
            assert batch.reward[task, row].item() == pytest.approx(reward, rel=1e-6)
            assert batch.discount[task, row].item() == pytest.approx(discount, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    spec=SPECS, seed=st.integers(0, 1000), copies=st.integers(1, 3), n_step=st.integers(1, 5),
    capacity=st.integers(5, 60), faults=st.sampled_from([0.0, 0.1, 0.9]),
    rounds=st.lists(st.integers(1, 15), min_size=1, max_size=8),
)  # fmt: skip
def test_batches_are_those_of_a_list(spec, seed, copies, n_step, capacity, faults, rounds):
    stream, replay = Stream(spec, copies, seed, faults), Replay(spec, capacity, copies=copies)
    for steps in rounds:
        replay.extend(stream.rollout(steps))
    agree(replay, stream, n_step)


@pytest.mark.parametrize("spec", [WHOLE, FRAMES])
def test_more_episodes_than_expected_find_room(spec):
    """Faults end episodes after a step or two, so the table of episodes has to grow."""
    stream, replay = Stream(spec, 2, 0, faults=0.9), Replay(spec, 200, copies=2)
    room = replay.episodes.shape[1]
    for _ in range(8):
        replay.extend(stream.rollout(30))
        agree(replay, stream, 3)
    assert replay.episodes.shape[1] > 2 * room
    stream.faults, room = 0.0, replay.episodes.shape[1]
    for _ in range(40):
        replay.extend(stream.rollout(30))
    agree(replay, stream, 3)
    assert replay.episodes.shape[1] == room


def test_seen_failing_entries_that_share_a_slot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Replay, "_make_room", lambda _: None)
    with pytest.raises(AssertionError):
        test_more_episodes_than_expected_find_room(FRAMES)


def test_the_lists_have_episodes_that_end_in_every_way():
    """The data of these tests covers faults, time limits, and episodes that span rounds."""
    stream = Stream(WHOLE, 2)
    for _ in range(20):
        stream.rollout(7)
    kept, lengths = stream.lists[0], []
    for number in set(range(len(kept))) - {transition.follows for transition in kept}:
        last, length = number, 1
        while (before := kept[last].follows) is not None:
            last, length = before, length + 1
        lengths.append(length)
    assert WHOLE.horizon in lengths
    assert min(lengths) < WHOLE.horizon


def test_draws_of_tasks_are_independent_and_uniform():
    replay, stream = Replay(WHOLE, 50), Stream(WHOLE)
    replay.extend(stream.rollout(50))
    key = replay.sample(20_000, torch.Generator().manual_seed(3)).action[..., 0] % 1000
    counts = torch.stack([torch.bincount(row.long(), minlength=50) for row in key])
    assert counts.min() > 300  # 400 each are expected; six standard deviations are 119
    assert counts.max() < 520
    assert abs(np.corrcoef(key[0].numpy(), key[1].numpy())[0, 1]) < 0.03


def test_same_generator_same_batch():
    replay = Replay(FRAMES, 50)
    replay.extend(Stream(FRAMES).rollout(20))
    first, second = (replay.sample(8, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = replay.sample(8, torch.Generator().manual_seed(6))
    assert not torch.equal(first.obs, other.obs)


@pytest.mark.parametrize("spec", [WHOLE, FRAMES])
def test_words_draw_every_transition_and_no_other(spec):
    replay, stream = Replay(spec, 20), Stream(spec)
    for steps in (7, 20, 20):
        replay.extend(stream.rollout(steps))
        spread = torch.linspace(0, MASK, 200, dtype=torch.float64).long().expand(1, 3, -1)
        batch = replay.sample_at(spread, 1, DISCOUNT)
        drawn = [sorted(set(row.tolist())) for row in batch.action[0, ..., 0]]
        assert drawn == held(replay)


@pytest.mark.parametrize("spec", [WHOLE, FRAMES])
def test_recorded_samples_follow_the_replay(spec):
    """As long as the tables are the same tensors, a recording of `sample_at` stays valid."""
    replay, stream = Replay(spec, 50), Stream(spec, faults=0.0)
    replay.extend(stream.rollout(10))
    own, tables = words(0, 2, 8), (replay.rows, replay.episodes)
    recorded = make_fx(lambda given: tuple(replay.sample_at(given, 3, DISCOUNT)))(own)
    for round_ in range(12):
        own = words(round_, 2, 8)
        ours, theirs = recorded(own), replay.sample_at(own, 3, DISCOUNT)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        replay.extend(stream.rollout(10))
    assert replay.rows is tables[0]
    assert replay.episodes is tables[1]


def test_seen_failing_a_recorded_number_of_transitions(monkeypatch: pytest.MonkeyPatch):
    constant = property(lambda self: torch.tensor(self.written), lambda *_: None)
    monkeypatch.setattr(Replay, "end", constant, raising=False)
    with pytest.raises(AssertionError):
        test_recorded_samples_follow_the_replay(FRAMES)


@pytest.mark.cuda
@pytest.mark.parametrize("spec", [WHOLE, FRAMES])
def test_on_cuda_it_holds_the_same(spec):
    here, there, stream = (
        Replay(spec, 20, copies=2),
        Replay(spec, 20, "cuda", copies=2),
        Stream(spec, 2),
    )
    for _ in range(9):
        made = stream.rollout(3)
        here.extend(made)
        there.extend(made)
    assert torch.equal(there.rows.cpu(), here.rows)
    assert torch.equal(there.newest(5).cpu(), here.newest(5))
    batch = there.sample(64, torch.Generator("cuda").manual_seed(0), 3, DISCOUNT)
    for task in range(3):
        for row in range(64):
            number = round(batch.action[task, row, 0].item()) - 1000 * task
            assert batch.obs[task, row].tolist() == stream.lists[task][number].obs
            assert (
                batch.next_obs[task, row].tolist() == stream.expected(task, number, 3, DISCOUNT)[1]
            )


def test_nothing_can_be_drawn_from_an_empty_one():
    with pytest.raises(ValueError, match="empty"):
        Replay(WHOLE, 5).sample(1, torch.Generator())
    assert Replay(FRAMES, 5).newest(3).shape == (3, 0, 7)


@pytest.mark.parametrize(
    ("part", "at", "message"),
    [("next_obs", (1, 0, 4, 3), "b: the next observation does not hold the previous state"),
     ("next_obs", (1, 0, 4, 5), "b: the constant part changes within an episode"),
     ("obs", (1, 0, 4, 0), r"b: .* \(EnvSpec.frame=")],
)  # fmt: skip
def test_observations_of_another_make_are_refused(part, at, message):
    replay, made = Replay(FRAMES, 20), Stream(FRAMES, faults=0.0).rollout(9)
    getattr(made, part)[at] += 1.0
    with pytest.raises(WorkerError, match=message):
        replay.extend(made)
    assert replay.written == 0


def test_random_experience_is_of_the_right_make():
    spec = replace(FRAMES, train_horizon=5)
    replay = Replay(spec, 40, copies=2)
    replay.extend(random_rollout(spec, 20, copies=2))
    assert replay.running.max() == 7  # four episodes of each copy
    batch = replay.sample(30, torch.Generator().manual_seed(0), 3)
    assert all(part.isfinite().all() for part in batch)


def test_a_third_of_two_whole_observations():
    spec = EnvSpec(("a",), 39, 4, 500, 200, 18)
    replay = Replay(spec, 20_000)
    taken = 4 * (replay.rows.numel() + replay.episodes.numel()) / replay.capacity
    assert taken == pytest.approx(bytes_per_transition(spec), rel=0.01)
    assert taken < 4 * (2 * 39 + 4 + 2) / 3
