"""Reference layers in plain tensors."""

from __future__ import annotations

from torch import Tensor


def standard(x: Tensor, norm: str = "layer") -> Tensor:
    """Normalize by the formula of layer normalization; with "none", return `x`."""
    if norm == "none":
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def chain(x: Tensor, layers: list[tuple[Tensor, Tensor]], norm: str = "none") -> Tensor:
    """Apply linear layers, with normalization, if any, and ReLU between them."""
    for number, (weight, bias) in enumerate(layers):
        x = x @ weight + bias if number == 0 else standard(x, norm).relu() @ weight + bias
    return x
