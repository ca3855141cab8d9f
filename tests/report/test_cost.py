"""Cost of models: every model is counted, and counts equal those by hand."""

from __future__ import annotations

import pytest
import torch

from softmod.config.compose import compose, typed
from softmod.config.groups import options
from softmod.report import cost
from softmod.spec import EnvSpec

SPEC = EnvSpec(("toy-reach", "toy-opposite", "toy-touch"), 9, 2, 50)


def of(*overrides: str) -> cost.Cost:
    """Count the cost of a configuration on the toy tasks."""
    return cost.of(
        typed(compose(["experiment=toy", "fabric=cpu", "run.batch_per_task=4", *overrides])), SPEC
    )


@pytest.mark.parametrize("model", [name for name in options("model") if not name.endswith("_wide")])
def test_every_model_is_counted(model):
    counted = of(f"model={model}")
    assert min(counted) > 0


def test_of_a_product_and_its_gradients_by_hand():
    weight = torch.randn(5, 7, requires_grad=True)
    with cost.Counter() as counter:
        (torch.randn(3, 5) @ weight).sum().backward()
    assert counter.flop == 2 * 3 * 5 * 7 * 2  # forward, and the weight's gradient


def test_of_a_gradient_that_is_asked_for():
    layer = torch.nn.Linear(5, 7)
    with cost.Counter() as counter:
        torch.autograd.grad(layer(torch.randn(3, 5)).sum(), list(layer.parameters()))
    assert counter.flop == 2 * 3 * 5 * 7 * 2


def test_surgery_costs_more_than_the_same_network_without():
    assert of("model=mt_sac", "algorithm=pcgrad").gflop > of("model=mt_sac").gflop
    assert of("model=mt_sac", "algorithm=pcgrad")[:2] == of("model=mt_sac")[:2]
