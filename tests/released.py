"""The released weights, by their names in the authors' code, put into this package's stacked
networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softmod.networks.soft_modular import SoftModular
from tests.settings import network

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: data[key] for key in data.files}


def sizes(data: dict[str, Any]) -> dict[str, int]:
    names = (
        "obs",
        "action",
        "tasks",
        "layers",
        "modules",
        "width",
        "hidden",
        "embedding",
        "task",
        "gating",
        "gates",
    )
    return dict(zip(names, map(int, data["config"]), strict=False))


def build(
    data: dict[str, Any], members: list[str], in_dim: int, out_dim: int, **options: Any
) -> SoftModular:
    """A network with the released weights of `members` (say q1 and q2) as its stack."""
    size = sizes(data)
    arguments = {
        "num_layers": size["layers"],
        "num_modules": size["modules"],
        "module_width": size["width"],
        "embedding_width": size["embedding"],
        "gating_layers": size["gates"],
        "gating_width": size["gating"],
    } | options
    net = SoftModular(
        in_dim, out_dim, size["tasks"], len(members), **network("soft_modular", **arguments)
    ).double()
    load(net, data, members, size["layers"], size["modules"])
    return net


@torch.no_grad()
def load(
    network: SoftModular, data: dict[str, Any], members: list[str], layers: int, modules: int
) -> None:
    def linear(name: str) -> tuple[Tensor, Tensor]:
        weights = np.stack([data[f"{m}.{name}.weight"].T for m in members])
        biases = np.stack([data[f"{m}.{name}.bias"][None] for m in members])
        return torch.from_numpy(weights).double(), torch.from_numpy(biases).double()

    def put(layer: Any, name: str) -> None:
        weight, bias = linear(name)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)

    for i, layer in enumerate(network.state):
        put(layer, f"base.fc{i}")
    put(network.task, "em_base.fc0")
    for i, layer in enumerate(network.router.gating):
        put(layer, f"gating_fc_{i}")
    for i, layer in enumerate(network.router.output):
        put(layer, f"gating_weight_fc_{i}" if i < layers - 1 else "gating_weight_last")
    for i, layer in enumerate(network.router.condition):
        put(
            layer,
            f"gating_weight_cond_fc_{i + 1}" if i + 1 < layers - 1 else "gating_weight_cond_last",
        )
    put(network.last, "last")
    columns = [linear(f"module_0_{j}") for j in range(modules)]
    network.first.weight.copy_(torch.cat([w for w, _ in columns], -1))
    network.first.bias.copy_(torch.cat([b for _, b in columns], -1))
    for i, layer in enumerate(network.between):
        parts = [linear(f"module_{i + 1}_{j}") for j in range(modules)]  # (stack, d, d) each
        layer.weight.copy_(torch.stack([w for w, _ in parts], 1).flatten(0, 1))
        layer.bias.copy_(torch.stack([b for _, b in parts], 1).flatten(0, 1))
