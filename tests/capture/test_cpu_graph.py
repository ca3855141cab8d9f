"""Repetition of a function's operations gives the same results as calling the function."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from softmod.capture.cpu_graph import CpuGraph, Metrics, in_shared_memory
from softmod.capture.recorder import Recorder, address


class Calls:
    """A function with state that counts its calls."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.given, self.state, self.copy = torch.ones(4), torch.ones(4), torch.empty(4)
        self.step, self.count = step, 0

    def __call__(self) -> Metrics:
        self.count += 1
        self.copy.copy_(self.state)
        return {"sum": self.step(self.given, self.state)}

    def undo(self) -> None:
        self.state.copy_(self.copy)

    def graph(self) -> CpuGraph:
        return CpuGraph(self, self.undo, [self.state, self.copy])


def decay(given: Tensor, state: Tensor) -> Tensor:
    state.mul_(0.5)
    if (given > 0).all():  # a flag that is read after a change
        state.add_(given.exp())
    return state.sum()


def run(step: Callable[[Tensor, Tensor], Tensor], given: list[float]) -> tuple[list[float], int]:
    """Compare each call with the function itself; return the results and the number of calls."""
    ours, theirs = Calls(step), Calls(step)
    graph, told = ours.graph(), []
    for value in given:
        for calls in (ours, theirs):
            calls.given.fill_(value)
        told.append(float(graph()["sum"]))
        assert told[-1] == float(theirs()["sum"])
        assert torch.equal(ours.state, theirs.state)
    return told, ours.count


def test_the_third_call_and_later_ones_are_repeated():
    told, count = run(decay, [1.0, 2.0, 0.5, 3.0, 1.5])
    assert len(set(told)) == 5
    assert count == 2


def test_what_was_done_before_a_flag_is_undone():
    told, count = run(decay, [1.0, 2.0, -1.0, 2.0, -1.0, -2.0])
    assert count == 2 + 3
    assert told[2] < told[1]


def test_a_flag_that_is_not_set_at_first_only_delays_it():
    _, count = run(decay, [-1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    # Two incomplete recordings, the recording, a comparison that is not possible, the comparison.
    assert count == 5


def test_a_function_that_reads_a_number_is_called():
    _, count = run(lambda given, state: state.mul_(float(given[0])).sum(), [1.0, 2.0, 3.0, 4.0])
    assert count == 4


def test_a_function_that_cannot_be_undone_is_called():
    total = torch.zeros(())

    def step(given: Tensor, state: Tensor) -> Tensor:
        total.add_(1.0)
        return state.add_(1.0).sum() if (given > 0).all() else state.sum()

    assert run(step, [1.0, 2.0, 3.0])[1] == 3


def test_a_function_that_is_another_each_time_is_found_out():
    """The number is not a tensor, so the recording contains that of the first call."""
    numbers: dict[int, Iterator[int]] = {}

    def step(given: Tensor, state: Tensor) -> Tensor:
        number = next(numbers.setdefault(state.data_ptr(), iter(range(9))))
        return state.add_(given, alpha=float(number)).sum()

    assert run(step, [1.0, 2.0, 3.0, 4.0])[1] == 4


@pytest.mark.parametrize("affine", [False, True])
def test_a_layer_norm_and_its_gradient_are_repeated(affine: bool):
    """Without weights, two of the three outputs of the backward operation are undefined."""
    weights = (
        (torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 0.0, 1.0, 2.0])) if affine else ()
    )

    def step(given: Tensor, state: Tensor) -> Tensor:
        leaves = [tensor.clone().requires_grad_() for tensor in (state * given, *weights)]
        layer_norm(leaves[0] * state, (4,), *leaves[1:]).square().dot(given.cumsum(0)).backward()
        for leaf in leaves:
            state.add_(leaf.grad, alpha=0.1).add_(given.cumsum(0), alpha=0.1)
        return state.sum()

    told, count = run(step, [1.0, 2.0, 0.5, 3.0, 1.5])
    assert len(set(told)) == 5
    assert count == 2


def test_memory_is_used_again():
    x = torch.rand(1000)
    with Recorder() as recorder:
        y = x
        for _ in range(10):
            y = (y * 2).relu()
    steps = recorder.operations
    moved = in_shared_memory(steps, steps, keep=[y])
    places = {address(moved(step.outputs[0])) for step in steps}
    assert len({address(step.outputs[0]) for step in steps}) == 20
    assert len(places) == 3  # two that alternate, and that of the result
    assert address(moved(x)) == address(x)
    assert address(moved(y)) == address(y)
