"""All ways to run an update give the same results; the memory that a graph reads and writes."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor

from softmod.agent.mtsac import MTSAC
from softmod.agent.replay import Batch
from softmod.agent.value_heads import Categorical, Squared
from softmod.capture.update_graph import Captured, run_programs
from softmod.errors import ConfigError
from softmod.networks.gaussian import Actor
from softmod.networks.mlp import MLP
from softmod.networks.residual import Residual
from softmod.networks.soft_modular import SoftModular
from softmod.spec import EnvSpec, Episode
from tests.agent.test_mtsac import everything, live
from tests.networks.kinds import KINDS
from tests.settings import algorithm
from tests.settings import network as settings

SPEC = EnvSpec(("a", "b", "c"), 5, 2, 10)
SIZES = {
    "num_layers": 2,
    "num_modules": 2,
    "module_width": 8,
    "embedding_width": 8,
    "gating_width": 8,
}


def sizes_of(network: type, norm: str) -> dict[str, object]:
    option = next(name for name, form in KINDS.items() if form is network)
    if issubclass(network, Residual):
        return settings(option, width=8, head_gain=1.0)
    sizes = SIZES if issubclass(network, SoftModular) else {"num_layers": 2, "width": 8}
    return settings(option, **sizes, init="torch", norm=norm)


def make(
    how: str,
    network=SoftModular,
    device: str = "cpu",
    fused: bool = True,
    norm: str = "none",
    precision: str = "32-true",
    **options,
) -> MTSAC:
    torch.manual_seed(3)
    sizes = sizes_of(network, norm)
    actor = network(SPEC.obs_dim, 2 * SPEC.action_dim, 3, 1, **sizes)
    head = options.pop("value_head", Squared())
    critic = network(SPEC.obs_dim + SPEC.action_dim, head.outputs, 3, 2, **sizes)
    optimizers = dict.fromkeys(
        ("actor", "critic", "temperature"), lambda p: torch.optim.Adam(p, lr=1e-2, fused=fused)
    )
    policy = options.pop("policy", {"log_std": "clamp", "normalize_obs": False})
    agent = MTSAC(
        SPEC, Actor(actor, **policy), critic, optimizers, 6, options.pop("seed", 0), head,
        **algorithm(**({"task_weights": "released"} | options)),
    )  # fmt: skip
    fabric = L.Fabric(
        accelerator="cuda" if device == "cuda" else "cpu", devices=1, precision=precision
    )
    fabric.to_device(agent)
    inner = agent.configure_optimizers()
    run_programs(agent, inner, how)
    fabric.setup(agent, *inner)
    return agent


def batches(
    count: int, device: str = "cpu", broken: int | None = None
) -> list[tuple[Batch, Tensor, Tensor]]:
    """Return batches and noise; in the batch `broken`, one reward is infinite.

    As with the replay's batches, tensors are views of packed rows.
    """
    draws = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        rows = torch.randn(3, 6, 13, generator=draws).to(device)
        if number == broken:
            rows[1, 2, 7] = torch.inf
        obs, action, reward, next_obs = rows.split((5, 2, 1, 5), -1)
        noise = torch.randn(2, 3, 6, 2, generator=draws).to(device)
        made.append(
            (
                Batch(
                    obs,
                    action.tanh(),
                    reward.squeeze(-1),
                    next_obs,
                    torch.full_like(reward[..., 0], 0.99),
                ),
                noise[0],
                noise[1],
            )
        )
    return made


@pytest.mark.bar(15)
@pytest.mark.parametrize("order", ["sequential", "released"])
@pytest.mark.parametrize(
    ("network", "surgery"),
    [(form, "none") for form in KINDS.values()] + [(MLP, "pcgrad"), (SoftModular, "pcgrad")],
)
def test_what_would_be_captured_updates_as_eager_does(order: str, network: type, surgery: str):
    options = {"update_order": order, "gradient_surgery": surgery}
    eager, captured = (make(how, network, **options) for how in ("eager", "captured"))
    for given in batches(6, broken=3):
        for agent in (eager, captured):
            agent.draw()
            agent.updates += 1
        ours, theirs = captured.programs["whole"](*given), eager.programs["whole"](*given)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert all(
        torch.equal(a, b) for a, b in zip(everything(captured), everything(eager), strict=True)
    )


@pytest.mark.bar(15)
@pytest.mark.parametrize("network", [form for form in KINDS.values() if form is not Residual])
def test_normalised_networks_update_as_eager_ones_do(network: type):
    eager, captured = (make(how, network, norm="layer") for how in ("eager", "captured"))
    for given in batches(4):
        for agent in (eager, captured):
            agent.draw()
            agent.updates += 1
        ours, theirs = captured.programs["whole"](*given), eager.programs["whole"](*given)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all(
        torch.equal(a, b) for a, b in zip(everything(captured), everything(eager), strict=True)
    )


RECIPE = {  # all options of the recipe
    "value_head": Categorical(11, -10.0, 10.0),
    "policy": {"log_std": "tanh", "normalize_obs": True},
    "reward_scaling": "return",
    "value_scaling": "spread",
    "task_weights": "unsolved",
    "policy_delay": 2,
    "policy_averaging": 0.1,
    "target_entropy_per_action": -0.5,
    "clip_norm": 0.0,
}


@pytest.mark.bar(15)
@pytest.mark.parametrize("network", [SoftModular, Residual])
def test_the_recipes_programs_are_captured_each_and_update_as_eager_ones_do(network: type):
    eager, captured = (
        make(how, network, **RECIPE, **NORM.get(network, {})) for how in ("eager", "captured")
    )
    for number, given in enumerate(batches(12, broken=7)):
        program = ("whole", "critics")[number % 2]
        for agent in (eager, captured):
            agent.return_scale.add(
                [Episode(task, 0, 0, 0.0, False, (1.0 + task + number,) * 5) for task in range(3)]
            )
            agent.success_rates.add([Episode(number % 3, 0, 0, 0.0, True)])
            agent.moments.add(given[0].obs.numpy())
            agent.actor.normalizer.set(agent.moments.mean, agent.moments.variance)
            agent.updates += 1
        ours, theirs = captured.programs[program](*given), eager.programs[program](*given)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert bool(ours["finite"]) == (number != 7)
    assert all(
        torch.equal(a, b) for a, b in zip(everything(captured), everything(eager), strict=True)
    )
    graphs = [program._replay for program in captured.programs.values()]
    assert all(graph._next == graph._replay for graph in graphs)  # no graph has fallen back


NORM = {SoftModular: {"norm": "layer"}}


@pytest.mark.parametrize(
    "options", [{"update_order": "sequential"}, {"update_order": "released"}, RECIPE]
)
def test_warming_up_changes_nothing(options: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    agent = make("captured", **options)
    before = everything(agent)
    monkeypatch.setattr(Captured, "_record", lambda self: lambda: {})  # only the warm-up runs
    for program in agent.programs.values():
        program(*batches(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(everything(agent), before, strict=True))


def test_a_graph_reads_its_own_memory():
    """The program may read its inputs only from the tensors that each call copies into."""
    agent = make("captured")
    seen: list[list[int]] = []
    update = agent.programs["whole"].program

    def watched(batch: Batch, noise: Tensor, next_noise: Tensor):
        seen.append([tensor.data_ptr() for tensor in (*batch, noise, next_noise)])
        return update(batch, noise, next_noise)

    agent.programs["whole"].program = watched
    for given in batches(4):
        agent.programs["whole"](*given)
    assert len(seen) == 3  # the warm-up, the recording and the comparison
    assert all(places == seen[0] for places in seen)


def test_only_a_fused_optimizer_can_be_captured():
    with pytest.raises(ConfigError, match=r"fabric\.compile=captured: only with a fused optimizer"):
        make("captured", fused=False)


@pytest.mark.cuda
@pytest.mark.parametrize("order", ["sequential", "released"])
def test_a_cuda_graph_updates_as_eager_does(order: str):
    eager, captured = (
        make(how, device="cuda", update_order=order) for how in ("eager", "captured")
    )
    for given in batches(20, "cuda", broken=7):
        captured.programs["whole"](*given)
        eager.programs["whole"](*given)
    for ours, theirs in zip(everything(captured), everything(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("network", "surgery"), [(form, "none") for form in KINDS.values()] + [(SoftModular, "pcgrad")]
)
def test_a_cuda_graph_serves_every_network(network: type, surgery: str):
    eager, captured = (
        make(how, network, "cuda", gradient_surgery=surgery) for how in ("eager", "captured")
    )
    for given in batches(6, "cuda", broken=3):
        for agent in (eager, captured):
            agent.draw()
            agent.updates += 1
        ours, theirs = captured.programs["whole"](*given), eager.programs["whole"](*given)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    for ours, theirs in zip(everything(captured), everything(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("network", [SoftModular, Residual])
def test_the_recipes_programs_are_cuda_graphs_and_update_as_eager_ones_do(network: type):
    options = RECIPE | NORM.get(network, {})
    eager, captured = (make(how, network, "cuda", **options) for how in ("eager", "captured"))
    for number, given in enumerate(batches(12, "cuda", broken=7)):
        program = ("whole", "critics")[number % 2]
        ours, theirs = captured.programs[program](*given), eager.programs[program](*given)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    for ours, theirs in zip(everything(captured), everything(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.bar(1)
@pytest.mark.parametrize("options", [{}, RECIPE])
def test_a_cuda_graph_recorded_anew_goes_on_to_the_bit(options: dict[str, object]):
    """As exact resume requires, an agent with another agent's state makes the same updates."""
    whole, half, rest = (make("captured", device="cuda", **options) for _ in range(3))
    given = list(
        zip(
            ("whole", "critics") * 10 if options else ("whole",) * 20,
            batches(20, "cuda", broken=7),
            strict=True,
        )
    )
    for program, batch in given:
        whole.programs[program](*batch)
    for program, batch in given[:10]:
        half.programs[program](*batch)
    with torch.no_grad():
        for mine, saved in zip(live(rest), live(half), strict=True):
            mine.copy_(saved)
    for program, batch in given[10:]:
        rest.programs[program](*batch)
    assert all(torch.equal(a, b) for a, b in zip(live(rest), live(whole), strict=True))
