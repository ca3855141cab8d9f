"""Outputs and routing weights equal those of the released networks to 1e-5.

Negative controls: with any option flipped, they differ.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softmod.networks.gaussian import split
from tests.released import build, golden, sizes

FLIPS = {
    "embedding_relu": {"embedding_relu": False},
    "routing_reads": {"routing_reads": "last"},
    "relu": {"relu": "before_sum"},
    "routing_feeds": {"routing_feeds": "logits"},
}


def outputs(name: str, **options):
    data = golden(name)
    size = sizes(data)
    network = build(data, ["actor"], size["obs"], 2 * size["action"], **options)
    obs = torch.from_numpy(data["obs"]).double()
    with torch.no_grad():
        mean, log_std = split(network(obs)[0], "clamp")
        routes = [route[0] for route in network.routing(obs)]
    return data, mean.numpy(), log_std.numpy(), [route.numpy() for route in routes]


@pytest.mark.parametrize("name", ["dev_shallow", "dev_deep"])
def test_outputs_and_every_routing_weight_equal_the_released_network(name):
    data, mean, log_std, routes = outputs(name)
    np.testing.assert_allclose(mean, data["mean"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(log_std, data["log_std"], atol=1e-5, rtol=0)
    layers = sizes(data)["layers"]
    assert len(routes) == layers
    for layer in range(layers - 1):
        np.testing.assert_allclose(routes[layer], data[f"weight_{layer}"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(routes[-1][..., 0, :], data["last_weight"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flipped_option_misses_the_released_network(flip):
    if flip == "routing_reads":
        with pytest.raises(RuntimeError, match="size"):  # the condition has fewer inputs
            outputs("dev_deep", **FLIPS[flip])
        return
    data, mean, _, _ = outputs("dev_deep", **FLIPS[flip])
    assert np.abs(mean - data["mean"]).max() > 1e-3


def test_routing_is_far_from_uniform_so_that_the_comparison_means_something():
    data, _, _, routes = outputs("dev_deep")
    assert np.abs(routes[0] - 1 / sizes(data)["modules"]).max() > 0.2
