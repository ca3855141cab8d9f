"""Execution of the whole update: eager, captured as one graph, or compiled.

Results differ only by rounding. PyTorch has no graphs on a CPU, so there the operations are
captured (`softmod.capture.cpu_graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softmod import kernels
from softmod.capture.compiled import Compiled
from softmod.capture.cpu_graph import CpuGraph
from softmod.errors import ConfigError

Metrics = dict[str, Tensor]
Update = Callable[..., Metrics]  # from a batch (a named tuple of tensors) and noise

WARM_UPS = 3  # calls before a capture, in which libraries initialize themselves


def run_programs(agent: Any, optimizers: Sequence[torch.optim.Optimizer], how: str) -> None:
    """Choose the execution of the agent's programs.

    Args:
        agent: its `programs` are replaced if they are captured.
        optimizers: the agent's optimizers.
        how: "eager"; "captured", as one graph per program; "compiled", each program as a whole and,
            on a GPU, captured too; "auto", captured if the optimizers support it.

    Raises:
        ConfigError: the optimizers do not support `how`.
    """
    on_cuda = is_cuda(agent.device)
    if on_cuda or how == "compiled":
        agent.flatten(optimizers, on_cuda and kernels.flat.triton_works(agent.device))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    fused = all(group.get("fused") for group in groups)
    if how == "eager" or (how == "auto" and not fused):
        return
    if not fused or (how == "compiled" and agent.flat_steps is None):
        kind = "fused Adam or AdamW" if how == "compiled" else "fused optimizer"
        raise ConfigError(
            f"fabric.compile={how}: only with a {kind} (optimizer.*.fused=true, or eager)"
        )
    for group in groups:
        group["capturable"] = True
    if how == "compiled":
        agent.programs = {
            name: Compiled(run, lambda: state_of(agent)) for name, run in agent.programs.items()
        }
        if not on_cuda:
            return
    agent.programs = {
        name: Captured(agent, run, name in agent.rollback_programs)
        for name, run in agent.programs.items()
    }


def is_cuda(device: torch.device) -> bool:
    """Return whether a device is a GPU; counts of operations replace this function."""
    return device.type == "cuda"


class Captured:
    """One of an agent's programs as a graph: recorded in the first call, replayed in later calls.

    A graph reads its inputs from fixed memory, so each call copies its inputs there first. The next
    call overwrites the metrics.

    Args:
        agent: the agent whose state the program changes.
        program: a method of the agent.
        uses_rollback: the program may undo a step with the agent's rollback.
    """

    def __init__(self, agent: Any, program: Update, uses_rollback: bool) -> None:
        self._agent = agent
        self.program = program
        self._uses_rollback = uses_rollback
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Metrics] | None = None

    def __call__(self, batch: Any, *noise: Tensor) -> Metrics:
        """Run the program on a batch and noise; return its metrics."""
        inputs = [*batch, *noise]
        if self._replay is None:
            self._batch_type = type(batch)
            self._inputs = [
                tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs
            ]
            self._warm_up()
            self._replay = self._record()
        torch._foreach_copy_(self._inputs, inputs)
        return self._replay()

    def _run(self) -> Metrics:
        size = len(self._batch_type._fields)
        return self.program(self._batch_type(*self._inputs[:size]), *self._inputs[size:])

    def _warm_up(self) -> None:
        """Run the program once and undo its changes."""
        if self._inputs[0].device.type == "cuda":
            return  # `cuda_graph` warms up itself
        live = state_of(self._agent)
        before = [tensor.clone() for tensor in live]
        self._run()
        with torch.no_grad():
            torch._foreach_copy_(live, before)

    def _record(self) -> Callable[[], Metrics]:
        if self._inputs[0].device.type == "cuda":
            return cuda_graph(self._run, state_of(self._agent))
        rollback: Any = self._agent.rollback if self._uses_rollback else None
        if rollback is None:
            return CpuGraph(self._run)
        return CpuGraph(self._run, rollback.restore, rollback.touched)


def cuda_graph(function: Callable[[], Metrics], live: list[Tensor]) -> Callable[[], Metrics]:
    """Record a function as a CUDA graph; return its replay.

    Warm-up calls come first. Their changes to the tensors `live` are undone.
    """
    device = live[0].device
    before = [tensor.clone() for tensor in live]
    side_stream = torch.cuda.Stream(device)
    side_stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(side_stream)
    with torch.no_grad():
        torch._foreach_copy_(live, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = function()

    def replay() -> Metrics:
        graph.replay()
        return metrics

    return replay


def state_of(agent: Any) -> list[Tensor]:
    """Return all tensors of the state of an agent and its optimizers."""
    values = [tensor.detach() for tensor in agent.state_dict().values()]
    for optimizer in agent.optimizers():
        for state in optimizer.state.values():
            values.extend(state.values())
    return values
