"""Positions of normalization: inputs of ReLUs have mean 0 and variance 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.networks.kinds import FORMS, NORMED, SMALL

# ReLUs with normalized inputs, and all ReLUs; the others are in routers, embeddings and contexts.
READ = {
    # f(s) twice, three weighted sums; the router's gating twice, and before each output
    "soft_modular": (5, 10),
    "hard_routing": (5, 10),
    "mlp": (2, 2),
    "multi_head": (2, 2),
    "single_task": (2, 2),
    "mixed_experts": (4, 4),  # experts and gate
    "care": (4, 7),  # encoders and the shared network; the context
    "paco": (2, 2),
    "moore": (1, 1),  # the experts' last layer is linear
    "film": (2, 3),  # without its modulation; the embedding
    "residual": (3, 3),
}


class ReLUs(TorchDispatchMode):
    """A recorder of the inputs of all ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            self.read.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def normalised_relus(name: str) -> tuple[int, int]:
    torch.manual_seed(3)
    net = FORMS[name](4, 3, 3, 2, **SMALL[name]).double().eval()
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, -3.0, 3.0)
    if hasattr(net, "modulation"):
        torch.nn.init.zeros_(net.modulation.weight)
        torch.nn.init.zeros_(net.modulation.bias)
    with torch.no_grad(), ReLUs() as relus:
        net(torch.randn(3, 20, 4, dtype=torch.float64))
    means = [x.mean(-1).abs().max() for x in relus.read]
    variances = [x.var(-1, correction=0) for x in relus.read]
    normal = [
        mean < 1e-6 and (var - 1).abs().max() < 0.02
        for mean, var in zip(means, variances, strict=True)
    ]
    return sum(map(bool, normal)), len(normal)


@pytest.mark.parametrize("kind", list(READ))
def test_rows_have_mean_0_and_variance_1_before_their_relu(kind: str):
    name = kind if kind == "residual" else f"{kind}_normed"
    assert normalised_relus(name) == READ[kind]


@pytest.mark.parametrize("kind", sorted(NORMED.values()))
def test_without_the_option_nothing_is_normalized(kind: str):
    assert normalised_relus(kind) == (0, READ[kind][1])


@pytest.mark.parametrize("kind", sorted(NORMED.values()))
def test_normalisation_adds_no_weights(kind: str):
    plain, normed = (
        FORMS[name](4, 3, 3, **SMALL[name]).state_dict() for name in (kind, f"{kind}_normed")
    )
    assert {name: x.shape for name, x in plain.items()} == {
        name: x.shape for name, x in normed.items()
    }
