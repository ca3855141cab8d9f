"""Recorded operations of one agent, batched over several agents with a leading agent axis.

Agents of equal configuration run the same operations on different memory. A recording of each agent
shows which tensors correspond. These are stacked, and every operation runs on the stacks by
PyTorch's batching rules (`torch.vmap`). Networks, losses and optimizers are written for one agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softmod import kernels
from softmod.capture.recorder import (
    EMPTY,
    READS,
    NotRepeatableError,
    Operation,
    address,
    map_tensors,
    tensors,
)

aten = torch.ops.aten
Rule = Callable[["Axis", Operation, tuple[Any, ...], dict[str, Any]], Any]


class FlagError(Exception):
    """A flag that the recorded operations read is False for one of the agents."""


class Stack:
    """A stacked copy of corresponding memory of all agents."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        self.own = [_bytes(tensor) for tensor in own]
        self.all = torch.stack(self.own)

    def tensor(self, key: Key) -> Tensor:
        """Return the stacked tensor `[agent, ...]` with a recorded tensor's layout."""
        items = self.all.shape[1] // key.dtype.itemsize
        flat = self.all.view(-1).view(key.dtype)
        return flat.as_strided((len(self.own), *key.shape), (items, *key.stride), key.offset)


@dataclass(frozen=True)
class Key:
    """The identity of a recorded tensor: its address and layout."""

    address: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Key:
        """Return the key of a tensor."""
        return cls(
            address(tensor),
            int(tensor.storage_offset()),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class Stacks:
    """The stacks of all memory that exists before recorded programs run."""

    def __init__(self, agents: int) -> None:
        self.agents = agents
        self.of: dict[int, Stack] = {}  # by the address of the first agent's memory
        self.changed: set[int] = set()  # addresses that a program changes
        self.inputs: set[int] = set()  # addresses that the caller fills

    def add(self, recordings: Sequence[Sequence[Operation]]) -> None:
        """Add the memory that a program uses, from a recording of each agent.

        Raises:
            NotRepeatableError: the agents' operations differ.
        """
        if len({len(recording) for recording in recordings}) > 1:
            raise NotRepeatableError("agents differ in the number of operations")
        created = {address(tensor) for operation in recordings[0] for tensor in operation.created}
        for corresponding in zip(*recordings, strict=True):
            first = corresponding[0]
            if any(_signature(operation) != _signature(first) for operation in corresponding):
                raise NotRepeatableError(f"agents differ in {first.function}")
            inputs = [operation.inputs for operation in corresponding]
            for own in zip(*inputs, strict=True):
                if address(own[0]) not in created and own[0].untyped_storage().nbytes():
                    self._add(own)
            self.changed |= {address(tensor) for tensor in first.written} - created

    def _add(self, own: Sequence[Tensor]) -> None:
        addresses = [address(tensor) for tensor in own]
        if len(set(addresses)) == 1:  # all agents share the memory
            return
        if addresses[0] not in self.of:
            self.of[addresses[0]] = Stack(own)
        stack = self.of[addresses[0]]
        stacked = [address(memory) for memory in stack.own]
        if len(set(addresses)) < len(own) or addresses != stacked:
            raise NotRepeatableError("agents share some of their memory")

    def load(self, state: bool) -> None:
        """Copy memory from the agents: with `state` all of it, otherwise what no program changes.

        Inputs are not copied.
        """
        wanted = self.of.keys() - self.inputs - (set() if state else self.changed)
        self._copy([self.of[key] for key in wanted], load=True)

    def store(self) -> None:
        """Copy the memory that programs change to the agents."""
        self._copy([stack for key, stack in self.of.items() if key in self.changed], load=False)

    @staticmethod
    def _copy(stacks: Iterable[Stack], load: bool) -> None:
        rows = [row for stack in stacks for row in stack.all]
        own = [memory for stack in stacks for memory in stack.own]
        if rows:
            torch._foreach_copy_(rows, own) if load else torch._foreach_copy_(own, rows)


def _signature(operation: Operation) -> tuple[Any, ...]:
    """Return the properties of an operation that must be equal for all agents."""

    def layout(tensor: Tensor) -> Any:
        return tensor.shape, tensor.stride(), tensor.dtype

    return (
        operation.function,
        map_tensors(layout, operation.args),
        map_tensors(layout, operation.kwargs.values()),
    )


class Axis:
    """Recorded operations, run with an agent axis.

    Args:
        operations: the operations of the first agent.
        stacks: the memory that exists before them.
    """

    def __init__(self, operations: Sequence[Operation], stacks: Stacks) -> None:
        self.stacks = stacks
        self.size = stacks.agents
        self.steps = list(_without_repeated_reads(operations))
        self.results: dict[Key, Tensor] = {}

    @torch.no_grad()
    def run(self, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run all operations.

        Args:
            wanted: recorded tensors of the first agent.

        Returns:
            The corresponding tensors of all agents, `[agent, ...]`.

        Raises:
            FlagError: a flag is False for one of the agents; earlier changes are not undone.
            NotRepeatableError: an operation cannot be batched.
        """
        self.results = {}
        for operation in self.steps:
            self._step(operation)
        return {name: self.of(tensor) for name, tensor in wanted.items()}

    def _step(self, operation: Operation) -> None:
        args = map_tensors(self.of, operation.args)
        kwargs = dict(
            zip(operation.kwargs, map_tensors(self.of, operation.kwargs.values()), strict=True)
        )
        rule = RULES.get(operation.function, _by_vmap)
        try:
            outputs = list(tensors((rule(self, operation, args, kwargs),)))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise NotRepeatableError(f"{operation.function} is not batched: {reason}") from error
        for recorded, output in zip(operation.outputs, outputs, strict=True):
            if output.shape != (self.size, *recorded.shape):
                raise NotRepeatableError(
                    f"{operation.function}: batching turns shape {tuple(recorded.shape)} into"
                    f" {tuple(output.shape)}"
                )
            self.results[Key.of(recorded)] = output

    def of(self, tensor: Tensor) -> Tensor:
        """Return the tensor `[agent, ...]` that corresponds to a tensor of the first agent."""
        key = Key.of(tensor)
        if key in self.results:
            return self.results[key]
        if key.address in self.stacks.of:
            return self.stacks.of[key.address].tensor(key)
        return tensor.expand(self.size, *tensor.shape)  # all agents share it


def _without_repeated_reads(operations: Iterable[Operation]) -> Iterable[Operation]:
    """Yield the operations, but only the first read of each flag."""
    flags: set[int] = set()
    for operation in operations:
        if operation.function is READS:
            if address(operation.inputs[0]) in flags:
                continue
            flags.add(address(operation.inputs[0]))
        yield operation


# --- rules for operations with an agent axis ------------------------------------------------------


def _by_vmap(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not operation.inputs:
        return _factory(axis, operation, args, kwargs)

    def one_agent(*inputs: Tensor) -> Any:
        remaining = iter(inputs)
        own = map_tensors(lambda _: next(remaining), args)
        own_kwargs = map_tensors(lambda _: next(remaining), kwargs.values())
        output = operation.function(*own, **dict(zip(kwargs, own_kwargs, strict=True)))
        return tuple(tensors((output,)))  # drops undefined outputs, which are None

    return torch.vmap(one_agent)(*tensors((args, tuple(kwargs.values()))))


def _factory(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    single: Tensor = operation.function(*args, **kwargs)
    if operation.function in EMPTY:
        return single.new_empty((axis.size, *single.shape))
    return single.expand(axis.size, *single.shape).clone()


def _flag(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[()]:
    if args[0].dtype is not torch.bool:
        raise NotRepeatableError(f"{operation.function} reads a value")
    if not bool(args[0].all()):
        raise FlagError
    return ()


def _rows(axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that works on any number of rows."""
    return operation.function(*map_tensors(Tensor.contiguous, args), **kwargs)


def _elements(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Run an elementwise operation, in place or with `out`."""
    rank = kwargs.get("out", args[0]).dim()
    aligned = map_tensors(lambda tensor: _of_rank(tensor, rank), args)
    result: Tensor = operation.function(*aligned, **kwargs)
    return result


def _of_rank(tensor: Tensor, rank: int) -> Tensor:
    """Insert axes of size 1 after the agent axis, up to `rank` axes."""
    return tensor.view(len(tensor), *[1] * (rank - tensor.dim()), *tensor.shape[1:])


def _separately(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Run an operation for each agent separately and stack the results."""
    results = []
    for agent in range(axis.size):

        def own(tensor: Tensor, agent: int = agent) -> Tensor:
            return tensor[agent]

        results.append(list(tensors((operation.function(*map_tensors(own, args), **kwargs),))))
    return [_stacked(corresponding) for corresponding in zip(*results, strict=True)]


def _stacked(own: Sequence[Tensor]) -> Tensor:
    """Stack tensors without gaps in memory, each in the layout of the first."""
    first = own[0]
    strides = (first.numel(), *first.stride())
    stacked = first.new_empty_strided((len(own), *first.shape), strides)
    for part, tensor in zip(stacked, own, strict=True):
        part.copy_(tensor)
    return stacked


def _lists(axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an elementwise operation on lists of tensors."""
    result = operation.function(*args, **kwargs)
    return () if result is None or not operation.outputs else result


def _scaled_lists(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[()]:
    """Multiply tensors in place by one factor per agent."""
    parts, factor = args
    for part in parts:
        part.mul_(_of_rank(factor, part.dim()))
    return ()


def _norms(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    parts, *rest = args
    return [
        torch.linalg.vector_norm(part, *rest, dim=tuple(range(1, part.dim()))) for part in parts
    ]


def _one_by_one(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[()]:
    """Run an in-place operation for each agent separately."""
    for agent in range(axis.size):

        def own(tensor: Tensor, agent: int = agent) -> Tensor:
            return tensor[agent]

        own_kwargs = dict(zip(kwargs, map_tensors(own, kwargs.values()), strict=True))
        operation.function(*map_tensors(own, args), **own_kwargs)
    return ()


def _products(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Run batched products `[agent, batch, ...]` as `[agent * batch, ...]`."""
    flat = map_tensors(lambda tensor: tensor.flatten(0, 1), args)
    result: Tensor = operation.function(*flat, **kwargs)
    return result.unflatten(0, (axis.size, -1))


def _biased_products(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    bias, *factors = args
    for_each = _of_rank(bias, 4).expand(-1, len(operation.outputs[0]), -1, -1)
    return _products(axis, operation, (for_each, *factors), kwargs)


RULES: dict[Any, Rule] = {
    READS: _flag,
    aten.bmm.default: _products,
    aten.bmm.dtype: _products,
    aten.baddbmm.default: _biased_products,
    aten.mul.out: _elements,
    aten.addcmul_.default: _elements,
    aten.clamp_.default: _elements,
    aten._foreach_add_.List: _lists,
    aten._foreach_add_.Scalar: _lists,
    aten._foreach_copy_.default: _lists,
    aten._foreach_lerp_.Scalar: _lists,
    aten._foreach_mul_.Scalar: _lists,
    aten._foreach_mul_.Tensor: _scaled_lists,
    aten._foreach_norm.Scalar: _norms,
    aten._foreach_sub.List: _lists,
    aten._fused_adam_.default: _one_by_one,
    aten._fused_adamw_.default: _one_by_one,
    torch.ops.softmod.layer_norm.default: _rows,
    torch.ops.softmod.layer_norm_backward.default: _rows,
}
for _function in kernels.operations(kernels.UPDATE):
    RULES[_function] = _separately
