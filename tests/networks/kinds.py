"""Small forms of every network of the package, with and without normalization."""

from __future__ import annotations

from typing import Any

from softmod.networks.experts import CARE, MOORE
from softmod.networks.film import FiLM
from softmod.networks.hard_routing import HardRouting
from softmod.networks.mixed_experts import MixedExperts
from softmod.networks.mlp import MLP
from softmod.networks.multi_head import MultiHead
from softmod.networks.network import Network
from softmod.networks.paco import PaCo
from softmod.networks.residual import Residual
from softmod.networks.single_task import SingleTask
from softmod.networks.soft_modular import SoftModular
from tests.settings import network

MODULES = {
    "num_layers": 3,
    "num_modules": 3,
    "module_width": 5,
    "embedding_width": 7,
    "gating_width": 6,
}
LAYERS = {"num_layers": 2, "width": 8}
KINDS: dict[str, type[Network]] = {
    "soft_modular": SoftModular,
    "hard_routing": HardRouting,
    "mlp": MLP,
    "multi_head": MultiHead,
    "single_task": SingleTask,
    "mixed_experts": MixedExperts,
    "care": CARE,
    "paco": PaCo,
    "moore": MOORE,
    "film": FiLM,
    "residual": Residual,
}
CHANGED: dict[str, dict[str, Any]] = {
    "soft_modular": MODULES,
    "hard_routing": MODULES,
    "mlp": LAYERS,
    "multi_head": LAYERS,
    "single_task": LAYERS,
    "mixed_experts": LAYERS | {"num_experts": 3, "gate_width": 6},
    "care": LAYERS | {"num_experts": 3, "encoder_width": 5},
    "paco": LAYERS | {"num_sets": 3},
    "moore": LAYERS | {"num_experts": 3},
    "film": LAYERS | {"embedding_width": 5},
    "residual": {"num_blocks": 2, "width": 8, "embedding_width": 5},
}
CHANGED["residual"] |= {"head_gain": 1.0}
SMALL = {kind: network(kind, **changed) for kind, changed in CHANGED.items()}
NORMED = {
    f"{kind}_normed": kind for kind in KINDS if kind != "residual"
}  # the residual network is normalized by default
FORMS = KINDS | {name: KINDS[kind] for name, kind in NORMED.items()}
SMALL |= {name: SMALL[kind] | {"norm": "layer"} for name, kind in NORMED.items()}
EVERY = list(FORMS)
ROUTING_LAYERS = {"soft_modular": 3, "hard_routing": 3, "mixed_experts": 1, "care": 1}
ROUTING_LAYERS |= {
    name: ROUTING_LAYERS[kind] for name, kind in NORMED.items() if kind in ROUTING_LAYERS
}
