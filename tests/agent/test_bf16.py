"""Products in bfloat16 with fp32 weights: close to fp32, and the same for every way of steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from softmod.agent.mtsac import MTSAC
from softmod.agent.steps import inner
from softmod.networks import products
from softmod.networks.hard_routing import HardRouting
from softmod.networks.network import Network
from softmod.networks.residual import Residual
from softmod.networks.soft_modular import SoftModular
from tests.agent.test_mtsac import everything
from tests.capture.test_update_graph import RECIPE, batches, make
from tests.networks.kinds import KINDS

# A hard router may choose another module where logits are close.
CONTINUOUS = [form for form in KINDS.values() if form is not HardRouting]


def in_bf16(how: str = "eager", network: type[Network] = SoftModular, **options: Any) -> MTSAC:
    agent = make(how, network, **options)
    agent.bf16 = True
    return agent


def gradients(agent: MTSAC) -> torch.Tensor:
    parts = (*agent.critic.parameters(), *agent.actor.parameters())
    return torch.cat([part.grad.reshape(-1) for part in parts if part.grad is not None])


def test_a_product_has_factors_in_bfloat16_and_results_in_fp32():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, generator=draws, requires_grad=True)
    weight = torch.randn(2, 5, 4, generator=draws, requires_grad=True)
    out_grad = torch.randn(2, 6, 4, generator=draws)
    with products.in_bf16({}):
        out = products.product(x, weight, products.copy_of(weight))
    out.backward(out_grad)
    rough_x, rough_weight, rough_grad = (
        tensor.detach().bfloat16().double() for tensor in (x, weight, out_grad)
    )
    expected = (
        rough_x @ rough_weight,
        rough_grad @ rough_weight.mT,
        rough_x.mT @ rough_grad,
    )
    for ours, theirs in zip((out, x.grad, weight.grad), expected, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", CONTINUOUS)
def test_an_updates_gradient_is_close_to_that_in_fp32(network: type[Network]):
    exact, ours = make("eager", network, clip_norm=0.0), in_bf16(network=network, clip_norm=0.0)
    (given,) = batches(1)
    theirs, mine = exact.update(*given), ours.update(*given)
    assert cosine_similarity(gradients(ours), gradients(exact), dim=0) > 0.99
    torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.05)
    for name, value in mine.items():
        assert value.dtype is theirs[name].dtype
    assert not torch.equal(gradients(ours), gradients(exact))


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (SoftModular, {"clip_norm": 0.5}),
        (SoftModular, {"update_order": "released"}),
        (SoftModular, {"gradient_surgery": "pcgrad"}),
        (Residual, RECIPE),
    ],
)
def test_captured_and_flat_updates_are_those_of_eager_ones(
    network: type[Network], options: dict[str, Any]
):
    """The policy's loss reads the critics as they are after their step."""
    eager, captured, flat = (
        in_bf16(how, network, **options) for how in ("eager", "captured", "eager")
    )
    flat.flatten([inner(own) for own in flat.own_optimizers()], triton=False)
    for number, given in enumerate(batches(6, broken=3)):
        name = "critics" if options is RECIPE and number % 2 else "whole"
        for agent in (eager, captured, flat):
            agent.draw()
            agent.updates += 1
        theirs = eager.programs[name](*given)
        mine = captured.programs[name](*given)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        # An element that is rounded the other way changes a loss by up to a part in 256.
        flattened = flat.programs[name](*given)
        torch.testing.assert_close(flattened, theirs, rtol=1e-2, atol=1e-3, equal_nan=True)
    pairs = zip(everything(captured), everything(eager), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_that_are_loaded_between_updates_are_read():
    one, other = in_bf16(), in_bf16()
    first, second = batches(2)
    for agent in (one, other):
        agent.update(*first)
    with torch.no_grad():
        for agent in (one, other):
            for parameter in agent.critic.parameters():
                parameter.mul_(1.5)
    other.plain_steps._copies.clear()  # as in a new process
    torch.testing.assert_close(one.update(*second), other.update(*second), rtol=0, atol=0)
