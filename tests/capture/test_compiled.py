"""Programs compiled as a whole: the traced graph, and updates against those of eager execution."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from softmod.agent.mtsac import MTSAC
from softmod.errors import ConfigError
from softmod.networks.mlp import MLP
from softmod.networks.network import Network
from softmod.networks.residual import Residual
from softmod.networks.soft_modular import SoftModular
from tests.agent.test_mtsac import everything
from tests.capture.test_update_graph import NORM, RECIPE, batches, make
from tests.networks.kinds import KINDS

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
CASES: list[tuple[type[Network], dict[str, Any]]] = [
    *((form, {}) for form in KINDS.values()),
    (SoftModular, {"update_order": "released", "clip_norm": 0.5}),
    (MLP, {"gradient_surgery": "pcgrad"}),
    (Residual, RECIPE),
]


def compare(eager: MTSAC, ours: MTSAC, device: str = "cpu", rough: float = 1.0) -> None:
    """Make updates of both agents, one of which is not finite.

    Args:
        eager: updates eagerly.
        ours: the other agent.
        device: the device of both.
        rough: a factor of all tolerances.
    """
    delay = eager.policy_delay
    tolerances = {"rtol": 1e-4 * rough, "atol": 1e-5 * rough}
    for number, given in enumerate(batches(4 + 2 * delay, device, broken=4)):
        name = eager.program(number)
        for agent in (eager, ours):
            agent.draw()
            agent.updates += 1
        before = everything(ours)
        mine, theirs = ours.programs[name](*given), eager.programs[name](*given)
        torch.testing.assert_close(mine, theirs, equal_nan=True, **tolerances)
        assert bool(mine["finite"]) == (number != 4)
        if number == 4:
            pairs = zip(everything(ours), before, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    # Adam's first steps are as large for tiny gradients, which are mostly rounding, as for others.
    state = everything(ours), everything(eager)
    torch.testing.assert_close(*state, rtol=1e-3 * rough, atol=2e-4 * rough)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run traced graphs as they are."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("network", "options"), CASES)
def test_traced_programs_update_as_eager_ones_do(network: type[Network], options: dict[str, Any]):
    if options is RECIPE:
        options = options | NORM.get(network, {})
    eager, ours = (make(how, network, **options) for how in ("eager", "compiled"))
    compare(eager, ours)


@pytest.mark.usefixtures("quick")
def test_traced_programs_in_bf16():
    eager, ours = (make(how, clip_norm=0.5) for how in ("eager", "compiled"))
    eager.bf16 = ours.bf16 = True
    compare(eager, ours, rough=100.0)


@pytest.mark.usefixtures("quick")
def test_statistics_that_change_between_updates_are_read():
    options = RECIPE | {"policy_delay": 1}
    eager, ours = (make(how, MLP, **options) for how in ("eager", "compiled"))
    for number, given in enumerate(batches(4)):
        for agent in (eager, ours):
            agent.success_rates.rates.add_(0.1 * torch.arange(3))
            agent.return_scale.largest.add_(1.0 + number)
            agent.moments.add(given[0].obs.numpy())
            agent.actor.normalizer.set(agent.moments.mean, agent.moments.variance)
        mine, theirs = ours.programs["whole"](*given), eager.programs["whole"](*given)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_a_trace_changes_nothing_and_its_state_is_a_few_flat_buffers():
    """Parameters are views of inputs, so the compiled program changes them in place."""
    agent = make("compiled", MLP)
    before = everything(agent)
    program = agent.programs["whole"]
    batch, *noise = batches(1)[0]
    program._compile(type(batch), [tensor.contiguous() for tensor in (*batch, *noise)])
    assert all(torch.equal(a, b) for a, b in zip(everything(agent), before, strict=True))
    places = {tensor.data_ptr() for tensor in program._state}
    assert len(places) == len(program._state)
    for network in (agent.actor, agent.critic, agent.target_critic):
        owners = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        assert len(owners & places) == 1


def test_only_adam_can_be_compiled():
    with pytest.raises(ConfigError, match=r"fabric\.compile=compiled: only with a fused Adam"):
        make("compiled", fused=False)


@compiler
def test_compiled_programs_update_as_eager_ones_do():
    eager, ours = (make(how, MLP, **RECIPE) for how in ("eager", "compiled"))
    torch._dynamo.utils.counters.clear()
    compare(eager, ours)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the whole update, and the critics'


@pytest.mark.cuda
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("network", "options"),
    [(SoftModular, {}), (SoftModular, {"update_order": "released"}), (Residual, RECIPE)],
)
def test_compiled_programs_on_a_gpu(network: type[Network], options: dict[str, Any], bf16: bool):
    eager, ours = (make(how, network, "cuda", **options) for how in ("eager", "compiled"))
    eager.bf16 = ours.bf16 = bf16
    compare(eager, ours, "cuda", rough=100.0 if bf16 else 1.0)
