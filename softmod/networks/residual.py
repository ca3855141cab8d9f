"""A residual network with layer normalization and a task embedding (BRC, Nauman et al. 2025)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from softmod import kernels
from softmod.networks import products
from softmod.networks.network import Network
from softmod.networks.norm import normalized
from softmod.networks.stacked import StackedLinear, spread


class Residual(Network):
    """A residual network on the input and a learned task embedding.

    Dense, LayerNorm and ReLU are followed by blocks `x + LN(Dense(ReLU(LN(Dense x))))`. The
    embedding lies on the unit sphere. Weights are initially orthogonal, biases zero.

    Args:
        num_blocks, width: residual blocks of two layers each.
        embedding_width: the width of the task embedding.
        head_gain: the gain of the head's initial weights; it is sqrt(2) for all other layers.
        norm: "layer", or "none" for an ablation.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_blocks: int,
        width: int,
        embedding_width: int,
        head_gain: float,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.task = nn.Parameter(normalize(torch.randn(stack, num_tasks, embedding_width), dim=-1))
        self.norm = norm
        self.first = orthogonal(stack, in_dim + embedding_width, width)
        self.blocks = nn.ModuleList(Block(stack, width, norm) for _ in range(num_blocks))
        self.head = orthogonal(stack, width, out_dim, head_gain)

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        features = self._first(x, tasks).flatten(1, 2)
        for block in self.blocks:
            features = block(features)
        return self.head(features).unflatten(1, x.shape[:2])

    def _first(self, x: Tensor, tasks: Tensor | None) -> Float[Tensor, "stack task batch width"]:
        """Apply the first layer to input and embedding, as a sum of two products, and normalize.

        The product with the embedding is one row per task, added to all rows of the task.
        """
        widths = (self.in_dim, self.task.shape[-1])
        first = self.first
        if self.norm == "layer" and (fused := kernels.same_dtype(x, first.weight, first.bias)):
            x, weight, bias = fused
            for_input, for_task = weight.split(widths, 1)
            rows = kernels.layers.linear((spread(x, self.stack), for_input, bias))
            added = self._embedding(tasks).to(weight.dtype) @ for_task
            return kernels.layers.normalized_sum(rows.unflatten(1, x.shape[:2]), added)
        for_input, for_task = first.weight.split(widths, 1)
        copy = products.copy_of(first.weight)
        copy = None if copy is None else copy[:, : self.in_dim]
        rows = products.linear(spread(x, self.stack), for_input, first.bias, copy)
        by_task = rows.unflatten(1, x.shape[:2])
        summed = by_task + (self._embedding(tasks) @ for_task).unsqueeze(2)
        return normalized(summed, self.norm, relu=True)

    def _embedding(self, tasks: Tensor | None) -> Float[Tensor, "stack task width"]:
        rows = self.task if tasks is None else self.task.index_select(1, tasks)
        return kernels.layers.unit(rows) if kernels.in_fp32(rows) else normalize(rows, dim=-1)


class Block(nn.Module):
    """A residual block `x + LN(Dense(ReLU(LN(Dense x))))`."""

    def __init__(self, stack: int, width: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.inner = orthogonal(stack, width, width)
        self.outer = orthogonal(stack, width, width)

    def forward(self, x: Float[Tensor, "stack rows width"]) -> Float[Tensor, "stack rows width"]:
        inner, outer = self.inner, self.outer
        weights = inner.weight, inner.bias, outer.weight, outer.bias
        if self.norm == "layer" and (fused := kernels.same_dtype(x, *weights)):
            return kernels.layers.block(fused[0], *fused[1:])
        return x + outer(inner(x, self.norm, relu=True), self.norm)


@torch.no_grad()
def orthogonal(
    stack: int, fan_in: int, fan_out: int, gain: float = math.sqrt(2.0)
) -> StackedLinear:
    """Make stacked linear layers with orthogonal weights per member and zero biases."""
    layer = StackedLinear(stack, fan_in, fan_out, "torch")
    for weight in layer.weight:
        nn.init.orthogonal_(weight, gain)
    layer.bias.zero_()
    return layer
