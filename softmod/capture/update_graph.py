"""How the whole update runs: eagerly, as one graph, or that with compiled networks; results differ
by rounding.

On a CPU, where PyTorch has no graphs, what is captured are its operations
(`softmod.capture.cpu_graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softmod.capture.cpu_graph import CpuGraph
from softmod.errors import ConfigError

Metrics = dict[str, Tensor]
Update = Callable[..., Metrics]  # of a batch (a named tuple of tensors) and of noise

WARM_UPS = 3  # before a capture; libraries set themselves up in their first calls


def run_programs(agent: Any, optimizers: Sequence[torch.optim.Optimizer], how: str) -> None:
    """Let the agent's programs run as they come ("eager"), "captured" as a graph each, or with
    "compiled" networks.

    "auto" captures where the optimizers can be captured; on a GPU, updates with compiled networks
    are captured too.

    Raises:
        ConfigError: an optimizer cannot be captured.
    """
    if how == "compiled":
        for network in (agent.actor.network, agent.critic, agent.target_critic):
            network.compile()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    fused = all(group.get("fused") for group in groups)
    capture = how in ("captured", "auto") or (how == "compiled" and agent.device.type == "cuda")
    if not capture or (how != "captured" and not fused):
        return
    if not fused:
        raise ConfigError(
            "fabric.compile=captured: only with a fused optimizer (optimizer.*.fused=true, or"
            " eager)"
        )
    for group in groups:
        group["capturable"] = True
    agent.programs = {
        name: Captured(agent, run, name in agent.rollback_programs)
        for name, run in agent.programs.items()
    }


class Captured:
    """One of an agent's programs, whose operations are recorded once and repeated with one call.

    A graph reads its inputs from where they lay when it was recorded, so each call copies its own
    there first. Its metrics lie in memory that the next call overwrites. `undoes`: the program
    undoes a step with the agent's rollback.
    """

    def __init__(self, agent: Any, program: Update, undoes: bool) -> None:
        self._agent = agent
        self._program = program
        self._undoes = undoes
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Metrics] | None = None

    def __call__(self, batch: Any, *noise: Tensor) -> Metrics:
        given = [*batch, *noise]
        if self._replay is None:
            self._form = type(batch)
            self._inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in given]
            self._warm_up()
            self._replay = self._record()
        torch._foreach_copy_(self._inputs, given)
        return self._replay()

    def _run(self) -> Metrics:
        size = len(self._form._fields)
        return self._program(self._form(*self._inputs[:size]), *self._inputs[size:])

    def _warm_up(self) -> None:
        """Run updates whose changes are taken back."""
        if self._inputs[0].device.type == "cuda":
            return  # `cuda_graph` does
        live = state_of(self._agent)
        before = [tensor.clone() for tensor in live]
        self._run()
        with torch.no_grad():
            torch._foreach_copy_(live, before)

    def _record(self) -> Callable[[], Metrics]:
        if self._inputs[0].device.type == "cuda":
            return cuda_graph(self._run, state_of(self._agent))
        rollback: Any = self._agent.rollback if self._undoes else None
        return (
            CpuGraph(self._run, rollback.restore, rollback.touched)
            if rollback
            else CpuGraph(self._run)
        )


def cuda_graph(function: Callable[[], Metrics], live: list[Tensor]) -> Callable[[], Metrics]:
    """Record a function as a CUDA graph, after a few calls that warm up and whose changes of `live`
    are taken back.
    """
    device = live[0].device
    before = [tensor.clone() for tensor in live]
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(beside)
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
    """All tensors of an agent's state, and of its optimizers'."""
    states = [
        value
        for optimizer in agent.optimizers()
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return [*(tensor.detach() for tensor in agent.state_dict().values()), *states]
