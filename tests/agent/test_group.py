"""Agents in a group learn the same as agents that learn alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from softmod.agent.group import Group, Turns
from softmod.agent.mtsac import MTSAC, Metrics
from softmod.agent.replay import Batch, Replay, random_rollout
from softmod.agent.steps import inner
from softmod.capture import batched
from softmod.networks.mlp import MLP
from softmod.networks.residual import Residual
from softmod.networks.soft_modular import SoftModular
from softmod.spec import Episode
from tests.agent.test_mtsac import everything
from tests.capture.test_update_graph import NORM, RECIPE, SPEC, make
from tests.networks.kinds import KINDS

Breaks = Callable[[int, int], bool]  # from agent and update numbers: make the update non-finite


def never(agent: int, update: int) -> bool:
    return False


def agents(
    count: int, how: str = "captured", network: type = SoftModular, **options
) -> list[MTSAC]:
    """Make agents with different weights and seeds."""
    made = []
    for seed in range(count):
        agent = make(how, network, seed=seed, **options)
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.mul_(1.0 + 0.1 * seed)
        made.append(agent)
    return made


def replays(count: int) -> list[Replay]:
    made = []
    for seed in range(count):
        replay = Replay(SPEC, 60)
        replay.extend(random_rollout(SPEC, 60, seed=seed))
        made.append(replay)
    return made


def break_some(of: list[MTSAC], breaks: Breaks) -> None:
    """Add infinity to the rewards of some updates."""
    for number, agent in enumerate(of):
        sample = agent.sample

        def sampled(
            replay: Replay, agent: MTSAC = agent, number: int = number, sample=sample
        ) -> Batch:
            batch = sample(replay)
            if breaks(number, agent.updates):
                batch = batch._replace(reward=batch.reward + torch.inf)
            return batch

        agent.sample = sampled  # type: ignore[method-assign]


def by_themselves(of: list[MTSAC], memory: list[Replay], updates: list[int]) -> list[Metrics]:
    return [
        agent.learn(replay, number)
        for agent, replay, number in zip(of, memory, updates, strict=True)
    ]


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare norms, not elements: Adam scales up rounding errors of gradients near zero."""
    known = b.isfinite()
    if not torch.equal(known, a.isfinite()):
        return False
    mine, other = a[known].double(), b[known].double()
    return bool((mine - other).norm() <= 1e-2 * other.norm() + 1e-4)


def check_equal(
    group: list[MTSAC], alone: list[MTSAC], ours: list[Metrics], theirs: list[Metrics]
) -> None:
    for mine, other in zip(group, alone, strict=True):
        assert mine.updates == other.updates
        assert all(map(near, everything(mine), everything(other)))
    for mine_told, other_told in zip(ours, theirs, strict=True):
        assert mine_told.keys() == other_told.keys()
        assert all(near(mine_told[name], other_told[name]) for name in mine_told)


def compare(
    rounds: list[list[int]],
    breaks: Breaks = never,
    threads: int = 1,
    network: type = SoftModular,
    **options,
) -> Group:
    """Compare a group with agents that learn alone; return the group.

    `rounds` holds the updates of each agent in each round.
    """
    count = len(rounds[0])
    ours, theirs = (agents(count, network=network, **options) for _ in range(2))
    for of in (ours, theirs):
        break_some(of, breaks)
    group, memory = Group(ours, threads), replays(count)
    for number, updates in enumerate(rounds):
        for agent in (*ours, *theirs):
            observe(agent, number)
        told = group.learn(memory, updates)
        check_equal(ours, theirs, told, by_themselves(theirs, memory, updates))
    return group


def observe(agent: MTSAC, number: int) -> None:
    """Change the statistics, differently for each agent."""
    size = 1.0 + agent.seed + number
    if agent.return_scale is not None:
        agent.return_scale.add([Episode(task, 0, 0, 0.0, False, (size,) * 5) for task in range(3)])
    if agent.success_rates is not None:
        agent.success_rates.add([Episode(number % 3, 0, 0, 0.0, True)])
    if agent.moments is not None and agent.actor.normalizer is not None:
        agent.moments.add(
            size * torch.randn(20, 5, generator=torch.Generator().manual_seed(number)).numpy()
        )
        agent.actor.normalizer.set(agent.moments.mean, agent.moments.variance)


def settled(group: Group) -> bool:
    """Return whether all programs run batched over agents."""
    together = [program for part in group.parts for program in part.programs.values()]
    return bool(together) and all(
        program._next == program._repeat and program.settled for program in together
    )


@pytest.mark.bar(15)
@pytest.mark.parametrize(
    ("network", "order"),
    [*((network, "sequential") for network in KINDS.values()), (SoftModular, "released")],
)
def test_agents_learn_side_by_side_what_they_learn_by_themselves(network: type, order: str):
    assert settled(compare([[5, 5], [2, 2]], network=network, update_order=order))


@pytest.mark.bar(15)
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("network", [SoftModular, Residual])
def test_agents_with_the_recipe_learn_what_they_learn_by_themselves(network: type, threads: int):
    group = compare(
        [[7, 7, 7], [4, 4, 4]], threads=threads, network=network, **RECIPE, **NORM.get(network, {})
    )
    assert len(group.parts) == (1 if threads == 1 else 3)
    assert settled(group) or threads > 1  # parts with a single agent are not batched


@pytest.mark.parametrize(
    ("count", "threads", "sizes"),
    [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (7, 3, [2, 2, 2, 1]), (2, 4, [1, 1])],
)
def test_threads_share_the_agents_evenly(count: int, threads: int, sizes: list[int]):
    group = compare([[4] * count, [3] * count], threads=threads, network=MLP)
    assert [len(part.agents) for part in group.parts] == sizes


def test_threads_advance_the_part_with_the_most_remaining_updates():
    order = []

    def part(name: str, remaining: int) -> Iterator[int]:
        while remaining:
            order.append(name)
            remaining -= 1
            yield remaining

    Turns([part("a", 2), part("b", 4)]).take()
    assert "".join(order) == "abbbab"


def test_an_error_in_one_part_ends_the_work_of_all_threads():
    ours, memory = agents(3), replays(3)

    def broken(replay: Replay) -> Batch:
        raise ArithmeticError("an error of this test")

    ours[2].sample = broken  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError, match="of this test"):
        Group(ours, 2).learn(memory, [10_000] * 3)
    assert max(agent.updates for agent in ours) < 1_000


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", [{"clip_norm": 0.5}, {"update_order": "released"}, RECIPE])
def test_agents_whose_steps_are_on_flat_buffers_as_on_a_gpu(
    options: dict[str, object], bf16: bool, monkeypatch: pytest.MonkeyPatch
):
    separate = agents

    def flat(*args, **kwargs) -> list[MTSAC]:
        made = separate(*args, **kwargs)
        for agent in made:
            agent.bf16 = bf16
            agent.flatten([inner(own) for own in agent.own_optimizers()], triton=False)
        return made

    monkeypatch.setitem(globals(), "agents", flat)
    assert settled(
        compare([[6, 6], [3, 3]], lambda *which: which == (1, 4), network=MLP, **options)
    )


@pytest.mark.parametrize("options", [{}, {"gradient_surgery": "pcgrad"}, {"clip_norm": 0.0}])
def test_agents_with_other_options_learn_what_they_learn_by_themselves(options: dict[str, object]):
    assert settled(compare([[6, 6]], network=MLP, **options))


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_an_update_that_is_not_finite_disturbs_no_other_agent(at: int, options: dict[str, object]):
    group = compare(
        [[8, 8, 8], [3, 3, 3]], lambda agent, update: (agent, update) == (1, at), **options
    )
    assert settled(group)
    assert [float(agent.skipped) for agent in group.parts[0].agents] == [0.0, 0.0, 0.0]


def test_a_broken_agent_counts_what_it_skips():
    group = compare([[5, 5]], lambda agent, update: agent == 1 and update > 2)
    assert [float(agent.skipped) for agent in group.parts[0].agents] == [0.0, 2.0]


def test_one_that_is_behind_catches_up_by_itself():
    assert settled(compare([[5, 5, 5], [2, 0, 4], [4, 6, 2], [3, 3, 3]]))


def test_agents_that_differ_are_seen_to():
    """The comparison fails for agents with different weights."""
    one, other = agents(2)
    by_themselves([one, other], replays(2), [4, 4])
    assert not all(map(near, everything(one), everything(other)))


def test_an_agent_alone_learns_by_itself():
    group = compare([[4]])
    assert not group.parts[0].programs


@pytest.mark.parametrize("how", ["eager"])
def test_agents_that_are_not_captured_learn_one_after_another(how: str):
    ours, theirs, memory = agents(2, how), agents(2, how), replays(2)
    group = Group(ours)
    check_equal(ours, theirs, group.learn(memory, [4, 4]), by_themselves(theirs, memory, [4, 4]))
    assert not settled(group)


@pytest.mark.parametrize("program", [0, 1])
def test_what_cannot_be_made_at_once_is_made_one_after_another(
    program: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Batching fails for one of the programs, possibly while the stacks hold the state."""
    run, seen = batched.Axis.run, []

    def fails(axis: batched.Axis, wanted: Metrics) -> Metrics:
        if axis not in seen:
            seen.append(axis)
        metrics = run(axis, wanted)
        if seen.index(axis) == program:
            raise batched.NotRepeatableError("an operation of this test")
        return metrics

    monkeypatch.setattr(batched.Axis, "run", fails)
    with caplog.at_level(logging.INFO):
        compare([[9, 9], [4, 4]], **RECIPE)
    assert "one after another: an operation of this test" in caplog.text


def test_a_stop_is_heard_between_updates():
    ours, theirs, memory = agents(2), agents(2), replays(2)
    asked = iter([False, False, False, True])
    Group(ours).learn(memory, [6, 6], lambda: next(asked))
    by_themselves(theirs, memory, [3, 3])
    check_equal(ours, theirs, [], [])


def test_operations_do_not_grow_with_agents():
    """Nearly all operations run once for all agents; only optimizer steps run per agent."""
    few, many = ([[3] * 2], [[3] * 4])
    counts = [len(compare(rounds).parts[0].programs["whole"].graph.names) for rounds in (few, many)]
    assert counts[1] - counts[0] == 2 * 3  # a step of each optimizer


def test_agents_of_different_form_are_not_laid_side_by_side(caplog: pytest.LogCaptureFixture):
    ours = [*agents(1), *agents(1, norm="layer")]
    with caplog.at_level(logging.INFO):
        Group(ours).learn(replays(2), [4, 4])
    assert "agents differ" in caplog.text
