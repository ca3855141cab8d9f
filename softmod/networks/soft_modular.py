"""Soft modularization: a base network of modules, and a routing network that weights connections.

Equations are those of Yang et al. (NeurIPS 2020). Numbers in comments refer to the differences
between the paper and the released code in docs/paper_and_code.md. Each difference is an option; the
defaults follow the released code.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softmod.networks.elementwise import product, relu, softmax
from softmod.networks.mixing import mix
from softmod.networks.network import Network
from softmod.networks.norm import normalized
from softmod.networks.stacked import StackedLinear, TaskEmbedding, spread


class Router(nn.Module):
    """The routing network: from the embedding `f(s) h(z)` to connection weights (Eq. 5 to 7)."""

    def __init__(
        self,
        stack: int,
        *,
        num_layers: int,
        num_modules: int,
        embedding_width: int,
        gating_layers: int,
        gating_width: int,
        reads: str,
        feeds: str,
        routed_head: bool,
        init: str,
    ) -> None:
        super().__init__()
        self.num_modules = num_modules
        self.reads = reads
        self.feeds = feeds
        widths = [embedding_width] + [gating_width] * gating_layers  # 1
        self.gating = nn.ModuleList(StackedLinear(stack, a, b, init) for a, b in pairwise(widths))
        targets = [num_modules] * (num_layers - 1) + [1] * routed_head  # 5
        links = num_modules**2
        self.condition = nn.ModuleList(  # W_u: from earlier routing to the embedding's width
            StackedLinear(stack, links * (layer if reads == "all" else 1), widths[-1], init)
            for layer in range(1, len(targets))
        )
        self.output = nn.ModuleList(  # W_d: from the embedding's width to the next layer's logits
            StackedLinear(stack, widths[-1], target * num_modules, init, kind="head")
            for target in targets
        )

    def forward(
        self,
        embedding: Float[Tensor, "stack rows width"],
        tasks: Int[Tensor, " task"] | None = None,
    ) -> list[Float[Tensor, "stack rows target source"]]:
        """Return the probabilities per routing layer; they sum to 1 over the sources."""
        for gate in self.gating:
            embedding = gate(relu(embedding))  # 1: ReLU, linear, ReLU, linear
        routes: list[Tensor] = []
        earlier: list[Tensor] = []
        for layer, output in enumerate(self.output):
            if layer == 0:
                logits = output(relu(embedding))  # Eq. 6
            else:
                condition = self.condition[layer - 1](self._read(earlier))
                logits = output(product(condition, embedding, relu=True))  # Eq. 5
            route = self.weigh(layer, logits.unflatten(-1, (-1, self.num_modules)), tasks)
            routes.append(route)
            earlier.append(logits if self.feeds == "logits" else route.flatten(-2))  # 7
        return routes

    def weigh(
        self,
        layer: int,
        logits: Float[Tensor, "stack rows target source"],
        tasks: Int[Tensor, " task"] | None,
    ) -> Float[Tensor, "stack rows target source"]:
        """Return the weights of a routing layer's connections."""
        return softmax(logits)  # Eq. 7

    def _read(self, earlier: list[Tensor]) -> Tensor:
        """Return the earlier routing that conditions the next routing layer."""
        if self.reads == "all" and len(earlier) > 1:  # 3
            return torch.cat(earlier, -1)
        return earlier[-1]


class SoftModular(Network):
    """The soft modularization network: `L` softly connected layers of `n` modules of width `d`.

    Args:
        in_dim, out_dim: sizes of the input (state, or state and action) and of the output.
        num_tasks: the number of task embeddings `h(z)`.
        stack: independent networks (1 for an actor, 2 for twin critics).
        num_layers, num_modules, module_width: L >= 2, n, d.
        embedding_width: D, the width of `f(s)` (two layers) and `h(z)`.
        state_in_routing: whether the router reads state and task, or only the task (an ablation of
            the paper).
        norm: "layer" normalizes both layers of `f(s)`, and each weighted sum of modules before its
            ReLU. With `relu="before_sum"`, sums have no ReLU and are normalized as well.
        gating_layers, gating_width, embedding_relu, routing_reads, relu, head, routing_feeds, init:
            differences 1, 2, 3, 4, 5, 7 and 11 between paper and code (docs/paper_and_code.md).
    """

    router_class = Router

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_tasks: int,
        stack: int = 1,
        *,
        num_layers: int,
        num_modules: int,
        module_width: int,
        embedding_width: int,
        state_in_routing: bool,
        gating_layers: int,
        gating_width: int,
        embedding_relu: bool,
        routing_reads: str,
        relu: str,
        head: str,
        routing_feeds: str,
        init: str,
        norm: str,
    ) -> None:
        super().__init__(in_dim, out_dim, num_tasks, stack)
        self.norm = norm
        self.num_modules = num_modules
        self.embedding_relu = embedding_relu
        self.relu = relu
        self.head_kind = head
        self.state_in_routing = state_in_routing
        n = num_modules
        d = module_width
        width = embedding_width
        self.state = nn.ModuleList(
            [StackedLinear(stack, in_dim, width, init), StackedLinear(stack, width, width, init)]
        )
        self.task = TaskEmbedding(stack, num_tasks, width, init)
        self.router = self.router_class(
            stack,
            num_layers=num_layers,
            num_modules=n,
            embedding_width=width,
            gating_layers=gating_layers,
            gating_width=gating_width,
            reads=routing_reads,
            feeds=routing_feeds,
            routed_head=head == "routed",
            init=init,
        )
        # One wide layer holds the modules of the first layer, since they share their input.
        self.first = StackedLinear(stack, width, n * d, init, units=n)
        layers = num_layers - 1 if head == "routed" else num_layers - 2
        self.between = nn.ModuleList(StackedLinear(stack * n, d, d, init) for _ in range(layers))
        last_stack = stack if head == "routed" else stack * n  # 5
        self.last = StackedLinear(last_stack, d, out_dim, init, kind="head")

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> Float[Tensor, "stack task batch out_dim"]:
        state, routes = self._embed(x, tasks)
        inputs = relu(state) if self.embedding_relu else state  # 2
        outputs = self._base(inputs, routes)
        return outputs.unflatten(1, x.shape[:2])

    def routing(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Int[Tensor, " task"] | None = None
    ) -> list[Float[Tensor, "stack task batch target source"]]:
        return [route.unflatten(1, x.shape[:2]) for route in self._embed(x, tasks)[1]]

    def _embed(self, x: Tensor, tasks: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return f(s) `[stack, rows, D]`, and the routes computed from f(s) h(z), or h(z) alone."""
        hidden = self.state[0](spread(x, self.stack), self.norm, relu=True)
        state = self.state[1](hidden, self.norm)
        by_task = state.unflatten(1, x.shape[:2])  # (stack, task, batch, D)
        task = self.task(tasks).unsqueeze(2)
        embedding = product(by_task, task) if self.state_in_routing else task.expand_as(by_task)
        return state, self.router(embedding.flatten(1, 2), tasks)

    def _base(self, inputs: Tensor, routes: list[Tensor]) -> Tensor:
        """Map `[stack, rows, D]` to `[stack, rows, out]` by the base network (Eq. 8, 9)."""
        by_module = self.first(inputs).unflatten(-1, (self.num_modules, -1))
        outputs = by_module.transpose(1, 2)  # (stack, module, rows, d)
        for layer, route in zip(self.between, routes, strict=False):
            mixed = self._mix(outputs, route)
            outputs = layer(mixed.flatten(0, 1)).view_as(mixed)
        if self.head_kind == "sum":
            return self._sum_of_heads(self._mix(outputs, routes[-1]))
        return self.last(self._mix(outputs, routes[-1]).squeeze(1))  # 5

    def _mix(self, outputs: Tensor, route: Tensor) -> Tensor:
        """Return each target's weighted sum of source modules (Eq. 8), with ReLU (4)."""
        if self.relu == "before_sum":
            return normalized(mix(relu(outputs), route), self.norm)
        if self.norm == "none":
            return mix(outputs, route, relu=True)
        return normalized(mix(outputs, route), self.norm, relu=True)

    def _sum_of_heads(self, inputs: Tensor) -> Tensor:
        """Return the unweighted sum of the last layer's modules, which are the heads (Eq. 9)."""
        return self.last(inputs.flatten(0, 1)).unflatten(0, (self.stack, self.num_modules)).sum(1)
