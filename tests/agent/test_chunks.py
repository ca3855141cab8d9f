"""Updates in chunks, with random numbers of the counter-based generator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from softmod.agent.chunks import GRAPHS, Chunks
from softmod.agent.group import Group
from softmod.agent.mtsac import MTSAC, Metrics
from softmod.agent.replay import Replay, random_rollout
from softmod.networks.hard_routing import HardRouting
from softmod.networks.mlp import MLP
from softmod.networks.soft_modular import SoftModular
from tests.agent.test_mtsac import everything, live
from tests.capture.test_update_graph import NORM, RECIPE, SPEC, make

CASES = [
    (SoftModular, {}),
    (SoftModular, RECIPE | NORM[SoftModular] | {"n_step": 3}),
    (HardRouting, {"update_order": "released"}),
    (MLP, {"gradient_surgery": "pcgrad"}),
]


def agent_of(size: int, how: str = "eager", network: type = SoftModular, **options) -> MTSAC:
    """Make an agent that updates in chunks of up to `size`; 0: with torch's generators."""
    agent = make(how, network, **options)
    if size:
        agent.chunks = Chunks(agent, size)
    return agent


def replay(rows: int = 30, device: str = "cpu") -> Replay:
    filled = Replay(SPEC, 40, device)
    filled.extend(random_rollout(SPEC, rows))
    return filled


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def told(metrics: Metrics) -> dict[str, list[float]]:
    """Return copies of metrics, which the next update overwrites."""
    return {name: tensor.reshape(-1).tolist() for name, tensor in metrics.items()}


def rounds(agent: MTSAC, memory: Replay, number: int = 3) -> list[dict[str, list[float]]]:
    """Make some rounds of updates while the replay grows; return the metrics of each."""
    metrics = []
    for turn in range(number):
        metrics.append(told(agent.learn(memory, 13)))
        memory.extend(random_rollout(SPEC, 10, seed=turn))
    return metrics


@pytest.mark.parametrize(("network", "options"), CASES)
@pytest.mark.parametrize("how", ["eager", "captured"])
def test_the_size_of_a_chunk_changes_no_bit(how: str, network: type, options: dict[str, object]):
    agents = [agent_of(size, how, network, **options) for size in (10, 4, 2)]
    metrics = [rounds(agent, replay()) for agent in agents]
    assert metrics[0] == metrics[1] == metrics[2]
    assert "actor_loss" in metrics[0][-1]
    assert [agent.updates for agent in agents] == [39] * 3
    for other in agents[1:]:
        assert equal(everything(other), everything(agents[0]))
        assert equal(flat(other), flat(agents[0]))


def flat(agent: MTSAC) -> list[Tensor]:
    """Return the inputs of the last update."""
    batch, *noise = agent.last_given()
    return [*batch, *noise]


@pytest.mark.parametrize(("network", "options"), CASES)
def test_a_captured_chunk_updates_as_an_eager_one_does(network: type, options: dict[str, object]):
    eager, captured = (agent_of(4, how, network, **options) for how in ("eager", "captured"))
    assert rounds(eager, replay()) == rounds(captured, replay())
    assert equal(everything(captured), everything(eager))


@pytest.mark.parametrize(("network", "options"), [CASES[1], CASES[3]])
def test_a_compiled_chunk_has_the_metrics_of_an_eager_one(
    network: type, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
):
    """Traced graphs run as they are: a program is traced once, so it always returns the same."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    eager, ours = (agent_of(4, how, network, **options) for how in ("eager", "compiled"))
    expected, metrics = rounds(eager, replay()), rounds(ours, replay())
    for mine, theirs in zip(metrics, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-3)


def test_chunks_make_the_updates_of_their_inputs():
    """A chunk is a sequence of plain updates on what it says it was given."""
    chunked, plain, memory = agent_of(4), agent_of(0), replay()
    for _ in range(9):
        latest = chunked.learn(memory, 1)
        batch, noise, next_noise = chunked.last_given()
        metrics = plain.programs["whole"](batch, noise, next_noise)
        assert torch.equal(latest["critic_loss"], metrics["critic_loss"])
    assert equal(everything(chunked), everything(plain))


def test_transitions_and_noise_are_those_of_the_replay_and_of_a_normal_distribution():
    agent, memory, seen = agent_of(5, network=MLP), replay(), []
    for _ in range(60):
        agent.learn(memory, 1)
        seen.append([tensor.clone() for tensor in flat(agent)])
    noise = torch.stack([torch.stack(given[-2:]) for given in seen]).double()
    assert abs(noise.mean()) < 0.1  # of 4,320 numbers
    assert abs(noise.var() - 1) < 0.1
    assert len(noise.unique()) > 0.99 * noise.numel()
    actions = torch.stack([given[1] for given in seen])
    for task in range(3):
        stored = memory.rows[task, :30, SPEC.state_dim]
        assert set(actions[:, task, :, 0].flatten().tolist()) == set(stored.tolist())


def lengths(agent: MTSAC, updates: int) -> Iterator[int]:
    while updates:
        _, length = agent.chunks.next_chunk(updates)
        agent.updates += length
        updates -= length
        yield length


def test_a_chunk_ends_before_a_policy_update_or_with_its_round():
    agent = agent_of(4, policy_delay=2)
    assert list(lengths(agent, 13)) == [4, 4, 4, 1]
    assert list(lengths(agent, 13)) == [5, 4, 4]
    assert list(lengths(agent, 3)) == [3]
    assert list(lengths(agent, 1)) == [1]


def test_a_stop_falls_between_chunks_and_the_rest_is_made_to_the_bit():
    options = RECIPE | NORM[SoftModular]
    whole, halves, memory = (*(agent_of(4, **options) for _ in range(2)), replay())
    expected = whole.learn(memory, 13)
    calls = iter([False, True])
    halves.learn(memory, 13, lambda: next(calls))
    assert halves.updates == 4
    rest = agent_of(10, **options)  # as after a restart, with chunks of another size
    rest.updates = halves.updates
    with torch.no_grad():
        for mine, saved in zip(live(rest), live(halves), strict=True):
            mine.copy_(saved)
    metrics = rest.learn(memory, 9)
    assert told(metrics) == told(expected)
    assert equal(everything(rest), everything(whole))


@pytest.mark.parametrize("size", [3, 10])
def test_non_finite_updates_are_counted_within_chunks(size: int):
    agent, memory = agent_of(size), replay()
    agent.learn(memory, 2)
    broken = Replay(SPEC, 40)
    broken.extend(random_rollout(SPEC, 30))
    broken.rows[..., -2] = torch.inf  # rewards
    assert agent.learn(broken, 7)["skipped_in_a_row"] == 7
    assert agent.skipped_in_a_row() == 7
    agent.skipped = torch.tensor(4.0)  # as restored from a checkpoint
    assert agent.learn(broken, 2)["skipped_in_a_row"] == 6
    agent.learn(memory, 1)
    assert agent.skipped_in_a_row() == 0


def test_insight_and_fault_reports_see_the_last_update():
    agent, memory = agent_of(4, network=HardRouting), replay()
    metrics = agent.learn(memory, 7, examine=True)
    assert {"routing_entropy", "gradients/conflicts/critic"} <= metrics.keys()
    inside = [noise.clone() for noise in agent.critic.router.noise]
    agent.updates -= 1
    agent.draw()  # as the replay of a fault does
    assert equal(inside, agent.critic.router.noise)


def test_seeds_have_streams_of_their_own():
    first, again, other = (agent_of(4, seed=seed) for seed in (1, 1, 2))
    for agent in (first, again, other):
        agent.learn(replay(), 3)
    assert equal(flat(first), flat(again))
    obs, noise = (torch.equal(flat(first)[at], flat(other)[at]) for at in (0, -1))
    assert not obs
    assert not noise


def test_nothing_can_be_learned_from_an_empty_replay():
    with pytest.raises(ValueError, match="empty"):
        agent_of(4).learn(Replay(SPEC, 40), 1)


@pytest.mark.parametrize("how", ["eager", "captured"])
def test_in_a_group_the_streams_are_those_of_an_agent_alone(how: str):
    options = RECIPE | NORM[SoftModular]
    ours, theirs = ([agent_of(4, how, seed=seed, **options) for seed in range(3)] for _ in range(2))
    group, memory = Group(ours), [replay() for _ in range(3)]
    for updates in ([13, 13, 13], [5, 6, 5]):
        group.learn(memory, updates)
        for agent, own, number in zip(theirs, memory, updates, strict=True):
            agent.learn(own, number)
        for mine, other in zip(ours, theirs, strict=True):
            assert equal(flat(mine), flat(other))
            for a, b in zip(everything(mine), everything(other), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        for own in memory:
            own.extend(random_rollout(SPEC, 5))


class Recorded:
    """Stands in for a CUDA graph: counts recordings and calls the function itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr("softmod.agent.chunks.cuda_graph", self)

    def __call__(self, function, tensors):
        self.count += 1
        return function


def test_a_graph_is_recorded_once_until_the_replay_has_new_tables(monkeypatch: pytest.MonkeyPatch):
    recorded, memory = Recorded(monkeypatch), replay()
    agent, plain = agent_of(10, network=MLP), agent_of(10, network=MLP)
    agent.chunks.as_graph = True
    for turn in range(3):
        agent.learn(memory, 20)
        plain.learn(memory, 20)
        memory.extend(random_rollout(SPEC, 10, seed=turn))
    assert recorded.count == 1
    memory.episodes = memory.episodes.clone()
    agent.learn(memory, 13)
    plain.learn(memory, 13)
    assert recorded.count == 3
    assert equal(everything(agent), everything(plain))
    for length in range(1, 9):
        agent.learn(memory, length)
    assert len(agent.chunks.recorded) == GRAPHS


# --- on a GPU -------------------------------------------------------------------------------------


def near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize(("network", "options"), CASES)
def test_on_cuda_a_graph_of_updates_updates_as_eager_ones_do(
    network: type, options: dict[str, object]
):
    """The replay grows meanwhile, and its table of episodes is replaced once."""
    eager, captured = (
        agent_of(4, how, network, device="cuda", **options) for how in ("eager", "captured")
    )
    assert captured.chunks.as_graph
    assert not eager.chunks.as_graph
    ours, theirs = replay(device="cuda"), replay(device="cuda")
    for turn in range(4):
        near(list(captured.learn(ours, 13).values()), list(eager.learn(theirs, 13).values()))
        near(flat(captured), flat(eager))
        for memory in (ours, theirs):
            memory.extend(random_rollout(SPEC, 10, seed=turn))
        if turn == 1:
            ours.episodes = ours.episodes.clone()
    near(everything(captured), everything(eager))


@pytest.mark.cuda
@pytest.mark.parametrize(("network", "options"), CASES)
def test_on_cuda_the_inputs_of_updates_are_those_on_a_cpu(network: type, options: dict):
    here, there = (
        agent_of(4, "eager", network, device=device, **options) for device in ("cpu", "cuda")
    )
    memories = [replay(device=device) for device in ("cpu", "cuda")]
    for _ in range(3):
        here.learn(memories[0], 7)
        there.learn(memories[1], 7)
        assert equal(flat(here), [tensor.cpu() for tensor in flat(there)])
        assert torch.equal(here.order, there.order.cpu())


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_on_cuda_a_graph_recorded_anew_goes_on_to_the_bit(options: dict[str, object]):
    whole, half, rest = (agent_of(4, "captured", device="cuda", **options) for _ in range(3))
    memory = replay(device="cuda")
    whole.learn(memory, 26)
    calls = iter([False, False, True])
    half.learn(memory, 26, lambda: next(calls))
    assert half.updates == 8
    rest.updates = 8
    with torch.no_grad():
        for mine, saved in zip(live(rest), live(half), strict=True):
            mine.copy_(saved)
    rest.learn(memory, 18)
    assert equal(live(rest), live(whole))
