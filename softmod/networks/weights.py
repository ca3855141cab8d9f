"""A network's weights as one flat array, for the transfer from the learner to workers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmod.spec import Floats


def flatten(network: nn.Module) -> Float[Tensor, " number"]:
    """Return a copy of a network's parameters and buffers on the CPU, in the order of its state
    dict.
    """
    return torch.cat(
        [tensor.detach().reshape(-1) for tensor in network.state_dict().values()]
    ).cpu()


def count(network: nn.Module) -> int:
    """Return the length of a network's flat array."""
    return sum(tensor.numel() for tensor in network.state_dict().values())


def bind(network: nn.Module, weights: Floats) -> None:
    """Make a network's parameters and buffers views of a flat array; writing there loads them."""
    offset = 0
    for tensor in network.state_dict(keep_vars=True).values():
        tensor.data = torch.from_numpy(weights[offset : offset + tensor.numel()]).view(tensor.shape)
        offset += tensor.numel()
