"""CARE and MOORE: networks that mix the encodings of several state encoders per task."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import relu

from softmod.networks.network import Network
from softmod.networks.norm import normalized
from softmod.networks.stacked import PerTaskLinear, StackedLinear, TaskEmbedding, spread


class Encoders(nn.Module):
    """A set of `num_experts` multi-layer perceptrons on the same input.

    They map `[task, batch, in]` to `[stack, expert, rows, width]`. Every layer but the last is
    followed by normalization, if any, and ReLU.
    """

    def __init__(
        self, stack: int, num_experts: int, widths: list[int], init: str, norm: str
    ) -> None:
        super().__init__()
        self.norm = norm
        self.stack = stack
        self.members = stack * num_experts
        self.layers = nn.ModuleList(
            StackedLinear(stack * num_experts, a, b, init) for a, b in pairwise(widths)
        )

    def forward(
        self, x: Float[Tensor, "task batch in_dim"]
    ) -> Float[Tensor, "stack expert rows width"]:
        first, *others = self.layers
        features = first(spread(x, self.members))
        for layer in others:
            features = layer(normalized(features, self.norm, relu=True))
        return features.unflatten(0, (self.stack, -1))


def mix_by_task(
    encodings: Float[Tensor, "stack expert rows width"], weights: Float[Tensor, "stack task expert"]
) -> Float[Tensor, "stack rows width"]:
    """Return the weighted sum of the experts, with one set of weights per task."""
    by_task = encodings.unflatten(2, (weights.shape[1], -1))  # (stack, expert, task, batch, width)
    return (by_task * weights.transpose(1, 2)[..., None, None]).sum(1).flatten(1, 2)


class CARE(Network):
    """Contextual attention over encoders (Sodhani et al. 2021).

    `k` encoders read the input. A context, computed from the task embedding, attends over their
    encodings. A shared network reads the mixed encoding and the context. The task embedding is
    learned; the authors start from a language model's embedding of a task description.

    Args:
        num_experts: k; 6 for MT10 and 10 for MT50 in the paper.
        encoder_layers, encoder_width: hidden layers of each encoder; `encoder_width` is also the
            width of encoding and context.
        num_layers, width: hidden layers of the shared network.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_experts: int,
        encoder_layers: int,
        encoder_width: int,
        num_layers: int,
        width: int,
        init: str,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.norm = norm
        self.encoders = Encoders(
            stack, num_experts, [in_dim] + [encoder_width] * (encoder_layers + 1), init, norm
        )
        self.task = TaskEmbedding(stack, num_tasks, encoder_width, init)
        self.context = nn.ModuleList(
            [
                StackedLinear(stack, encoder_width, encoder_width, init)
                for _ in range(encoder_layers)
            ]
        )
        self.attention = StackedLinear(stack, encoder_width, num_experts, init, kind="head")
        widths = [2 * encoder_width] + [width] * num_layers
        self.hidden = nn.ModuleList(StackedLinear(stack, a, b, init) for a, b in pairwise(widths))
        self.head = StackedLinear(stack, width, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        context = self._context(tasks)
        encoding = mix_by_task(self.encoders(x), self.attention(context).softmax(-1))
        rows = context.unsqueeze(2).expand(-1, -1, x.shape[1], -1).flatten(1, 2)
        features = torch.cat([encoding, rows], -1)
        for layer in self.hidden:
            features = normalized(layer(features), self.norm, relu=True)
        return self.head(features).unflatten(1, x.shape[:2])

    def routing(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> list[Float[Tensor, "stack task batch target source"]]:
        attention = self.attention(self._context(tasks)).softmax(-1)
        return [attention[:, :, None, None].expand(-1, -1, x.shape[1], -1, -1)]

    def _context(self, tasks: Tensor | None) -> Float[Tensor, "stack task width"]:
        context = relu(self.task(tasks))
        for layer in self.context:
            context = relu(layer(context))
        return context


class MOORE(Network):
    """A mixture of orthogonal experts (Hendawy et al. 2024).

    The experts' encodings are made orthonormal by Gram-Schmidt and mixed with unconstrained weights
    per task. A head per task follows, after a tanh.

    Args:
        num_experts: 4 for MT10 and 6 for MT50 in the paper.
        num_layers, width: layers of each expert; the last one is linear.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_experts: int,
        num_layers: int,
        width: int,
        init: str,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.experts = Encoders(stack, num_experts, [in_dim] + [width] * num_layers, init, norm)
        self.task = TaskEmbedding(stack, num_tasks, num_experts, init, bias=False)
        self.heads = PerTaskLinear(stack, num_tasks, width, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        features = mix_by_task(orthonormal(self.experts(x)), self.task(tasks)).tanh()
        return self.heads(features.unflatten(1, x.shape[:2]), tasks)


def orthonormal(
    vectors: Float[Tensor, "stack expert rows width"], smallest: float = 1e-12
) -> Float[Tensor, "stack expert rows width"]:
    """Orthonormalize the experts' vectors of each row, in order, by modified Gram-Schmidt.

    A vector in the span of the earlier ones becomes nearly zero, not an arbitrary unit vector.
    """
    basis: list[Tensor] = []
    for vector in vectors.unbind(1):
        rest = vector
        for unit in basis:
            rest = rest - (rest * unit).sum(-1, keepdim=True) * unit
        basis.append(rest * (rest.square().sum(-1, keepdim=True) + smallest).rsqrt())
    return torch.stack(basis, 1)
