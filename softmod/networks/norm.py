"""Layer normalisation as an option of every network: without weights of its own, before a hidden layer's ReLU."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm


def normalised(x: Float[Tensor, "*rows width"], norm: str) -> Float[Tensor, "*rows width"]:
    """With `norm="layer"`, bring the last axis to mean 0 and variance 1; with "none", return `x` itself."""
    return layer_norm(x, x.shape[-1:]) if norm == "layer" else x
