"""Layer normalization without weights, an option of every network before a hidden layer's ReLU."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from softmod import kernels


def normalized(
    x: Float[Tensor, "*rows width"], norm: str, relu: bool = False
) -> Float[Tensor, "*rows width"]:
    """Normalize the last axis to mean 0 and variance 1 (`norm="layer"`), or not at all ("none").

    With `relu`, apply ReLU too, which may overwrite `x`. The result has the dtype of `x`.
    """
    if norm != "layer":
        return x.relu_() if relu else x
    if kernels.fits(x):
        return kernels.layers.normalize(x, relu)
    if kernels.fits_norm(x):
        return kernels.layer_norm(x, relu)
    y = functional.layer_norm(x, x.shape[-1:])
    return y.relu_() if relu else y
