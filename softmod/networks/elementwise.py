"""Elementwise functions of routers, fused where `softmod.kernels` is in use."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from softmod import kernels


def relu(x: Tensor) -> Tensor:
    """Return the ReLU of a tensor."""
    return kernels.layers.relu(x) if kernels.fits(x) else functional.relu(x)


def softmax(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Return the softmax over the last axis."""
    return kernels.layers.softmax(x) if kernels.fits(x) else x.softmax(-1)


def product(
    x: Float[Tensor, "*group batch width"],
    y: Float[Tensor, "*group one width"],
    relu: bool = False,
) -> Float[Tensor, "*group batch width"]:
    """Return `x * y`, with ReLU if `relu`; each row of `y` multiplies one row of `x`, or a group.

    Fused, the result has the dtype of `x`.
    """
    if kernels.fits(x, y):
        return kernels.layers.product(x, y.to(x.dtype), relu)
    return functional.relu(x * y) if relu else x * y
