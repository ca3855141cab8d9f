"""Linear layers with an ensemble axis: stacked weights, multiplied by one product."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod import kernels
from softmod.networks import products
from softmod.networks.norm import normalized

HEAD_BOUND = 3e-3  # 11: heads and routing outputs start within +-3e-3
HIDDEN_BIAS = 0.1  # 11


class StackedLinear(nn.Module):
    """A stack of linear layers: weight `[stack, in, out]`, bias `[stack, 1, out]`.

    Args:
        stack: the number of layers.
        fan_in, fan_out: inputs and outputs of each layer.
        init: "released" draws hidden weights from U(+-1/sqrt(fan_out)) with bias 0.1, and heads
            from U(+-3e-3) (difference 11 of docs/paper_and_code.md). "torch" draws all values from
            U(+-1/sqrt(fan_in)), as `torch.nn.Linear` does.
        kind: "hidden" or "head", for the initial values.
        units: the number of layers that share the output axis, each with `fan_out / units` outputs.
    """

    def __init__(
        self, stack: int, fan_in: int, fan_out: int, init: str, kind: str = "hidden", units: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(stack, 1, fan_out))
        fill(self.weight, self.bias, fan_in, fan_out // units, init, kind)

    def forward(
        self, x: Float[Tensor, "stack rows fan_in"], norm: str = "none", relu: bool = False
    ) -> Float[Tensor, "stack rows fan_out"]:
        """Return the layer's outputs, normalized as in `normalized`, and with ReLU if `relu`."""
        if fused := kernels.same_dtype(x, self.weight, self.bias):
            return kernels.layers.linear(fused, norm == "layer", relu)
        y = products.linear(x, self.weight, self.bias, products.copy_of(self.weight))
        return normalized(y, norm, relu)

    def extra_repr(self) -> str:
        stack, fan_in, fan_out = self.weight.shape
        return f"{stack} x ({fan_in} -> {fan_out})"


class PerTaskLinear(nn.Module):
    """A linear layer per task: weight `[stack * task, in, out]`, bias `[stack * task, 1, out]`."""

    def __init__(
        self, stack: int, num_tasks: int, fan_in: int, fan_out: int, init: str, kind: str = "hidden"
    ) -> None:
        super().__init__()
        self.stack = stack
        self.weight = nn.Parameter(torch.empty(stack * num_tasks, fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(stack * num_tasks, 1, fan_out))
        fill(self.weight, self.bias, fan_in, fan_out, init, kind)

    def forward(
        self, x: Float[Tensor, "stack task batch fan_in"], tasks: Int[Tensor, " task"] | None
    ) -> Float[Tensor, "stack task batch fan_out"]:
        weight = self.weight.unflatten(0, (self.stack, -1))
        bias = self.bias.unflatten(0, (self.stack, -1))
        copy = products.copy_of(self.weight)
        if copy is not None:
            copy = copy.unflatten(0, (self.stack, -1))
        if tasks is not None:
            weight = weight.index_select(1, tasks)
            bias = bias.index_select(1, tasks)
            copy = None if copy is None else copy.index_select(1, tasks)
        return products.product(x, weight, copy) + bias  # one product per task


class TaskEmbedding(nn.Module):
    """A linear layer on the one-hot task: one row per task, weight `[stack, task, width]`."""

    def __init__(
        self, stack: int, num_tasks: int, width: int, init: str, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, num_tasks, width))
        self.bias = nn.Parameter(torch.zeros(stack, 1, width), requires_grad=bias) if bias else None
        fill(self.weight, self.bias, num_tasks, width, init, "hidden")

    def forward(self, tasks: Int[Tensor, " task"] | None) -> Float[Tensor, "stack task width"]:
        rows = self.weight if tasks is None else self.weight.index_select(1, tasks)
        return rows if self.bias is None else rows + self.bias


@torch.no_grad()
def fill(
    weight: Tensor, bias: Tensor | None, fan_in: int, fan_out: int, init: str, kind: str
) -> None:
    """Draw a layer's initial values in place (see `StackedLinear`)."""
    if init == "torch":
        bound = bias_bound = 1.0 / math.sqrt(fan_in)
    elif kind == "head":
        bound = bias_bound = HEAD_BOUND
    else:
        bound = 1.0 / math.sqrt(fan_out)
        bias_bound = None
    weight.uniform_(-bound, bound)
    if bias is not None:
        if bias_bound is None:
            bias.fill_(HIDDEN_BIAS)
        else:
            bias.uniform_(-bias_bound, bias_bound)


def spread(x: Float[Tensor, "task batch width"], stack: int) -> Float[Tensor, "stack rows width"]:
    """Return the rows of `x`, expanded to every member of a stack without a copy."""
    rows = x.reshape(1, -1, x.shape[-1])
    return rows.expand(stack, -1, -1)
