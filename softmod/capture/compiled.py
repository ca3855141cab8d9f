"""Programs of an agent compiled as a whole: forward and backward passes and optimizer steps.

Operations are traced below autograd, as they reach PyTorch, so a backward pass does not break the
graph. The traced graph is compiled by TorchInductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from softmod import kernels
from softmod.capture.recorder import address

Metrics = dict[str, Tensor]
MODES = {"cuda": "max-autotune-no-cudagraphs", "cpu": "default"}

aten = torch.ops.aten


class Compiled:
    """A program, traced and compiled in its first call.

    The program must not read values on the host. State that it reads or changes stays where it is.

    Args:
        program: reads and changes the same state in each call.
        live: returns the tensors that the program may change. Changes by the trace are undone.
    """

    def __init__(
        self, program: Callable[..., Metrics], live: Callable[[], Sequence[Tensor]]
    ) -> None:
        self._program = program
        self._live = live
        self._compiled: Callable[..., Sequence[Tensor]] | None = None
        self._state: list[Tensor] = []
        self._names: list[str] = []

    def __call__(self, batch: Any, *noise: Tensor) -> Metrics:
        """Run the program on a batch and noise; return its metrics."""
        inputs = [tensor.contiguous() for tensor in (*batch, *noise)]
        if self._compiled is None:
            self._compiled = self._compile(type(batch), inputs)
        with torch.no_grad():
            outputs = self._compiled(*self._state, *inputs)
        return dict(zip(self._names, outputs, strict=True))

    def _compile(
        self, batch_type: Any, inputs: Sequence[Tensor]
    ) -> Callable[..., Sequence[Tensor]]:
        size = len(batch_type._fields)

        def run(*own: Tensor) -> list[Tensor]:
            metrics = self._program(batch_type(*own[:size]), *own[size:])
            self._names = list(metrics)
            return list(metrics.values())

        graph, self._state = traced(run, inputs, self._live())
        mode = MODES[inputs[0].device.type]
        compiled: Any = torch.compile(graph, fullgraph=True, dynamic=False, mode=mode)
        return compiled


def traced(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], live: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """Trace a function in one call, and undo the call's changes to the tensors `live`.

    Returns:
        The graph, a function of state and inputs, and the state: all memory that existed before.
    """
    before = [tensor.detach().clone() for tensor in live]
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

    # Context variables do not reach the thread in which a backward pass on a GPU runs by default.
    with kernels.traced(), torch.autograd.set_multithreading_enabled(False):
        graph = make_fx(function, _allow_non_fake_inputs=True)(*inputs)
    with torch.no_grad():
        torch._foreach_copy_(list(live), before)
    return graph, lift(graph)


def lift(module: fx.GraphModule) -> list[Tensor]:
    """Turn tensors that a graph holds into inputs, in front of its own; return them.

    Tensors that share memory, such as parameters in a flat buffer, become views of one input.
    """
    graph = module.graph
    holders = [node for node in graph.nodes if node.op == "get_attr"]
    held = {node: getattr(module, node.target) for node in holders}
    state: dict[int, Tensor] = {}
    for tensor in held.values():
        state.setdefault(address(tensor), whole(tensor))
    first = next(iter(graph.nodes))
    names: dict[int, fx.Node] = {}
    with graph.inserting_before(first):
        for number, key in enumerate(state):
            names[key] = graph.placeholder(f"state_{number}")
    for node, tensor in held.items():
        with graph.inserting_before(node):
            node.replace_all_uses_with(_view(graph, names[address(tensor)], tensor))
        graph.erase_node(node)
    graph.lint()
    module.recompile()
    return list(state.values())


def whole(tensor: Tensor) -> Tensor:
    """Return the memory that a tensor is in as a tensor with one axis."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.dtype.itemsize
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (size,), (1,))


def _view(graph: fx.Graph, source: fx.Node, tensor: Tensor) -> fx.Node:
    """Insert the view of an input that a tensor is."""
    start = int(tensor.storage_offset())
    if not tensor.is_contiguous():
        layout = (list(tensor.shape), list(tensor.stride()), start)
        return graph.call_function(aten.as_strided.default, (source, *layout))
    part = graph.call_function(aten.slice.Tensor, (source, 0, start, start + tensor.numel()))
    return graph.call_function(aten.view.default, (part, list(tensor.shape)))
