"""Recorded operations of one agent, made for several at once: each with an axis of agents in front.

Agents of equal configuration do the same operations on different memory. Recording each of them
once shows which of their tensors correspond; these are laid side by side, and every operation is
made on all of them by PyTorch's batching rules (`torch.vmap`). Networks, losses and optimizers stay
as they are written, for one agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softmod.capture.recorder import (
    EMPTY,
    READS,
    NotRepeatableError,
    Operation,
    mapped,
    place,
    tensors,
)

aten = torch.ops.aten
Rule = Callable[["Axis", Operation, tuple[Any, ...], dict[str, Any]], Any]


class FlagError(Exception):
    """A flag that the recorded operations ask is not set for one of the agents."""


class Stack:
    """The memory behind corresponding tensors of all agents, laid side by side."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        self.own = [_bytes(tensor) for tensor in own]
        self.all = torch.stack(self.own)

    def tensor(self, key: Key) -> Tensor:
        """Return the tensor of this layout, with the axis of agents in front."""
        items = self.all.shape[1] // key.dtype.itemsize
        flat = self.all.view(-1).view(key.dtype)
        return flat.as_strided((len(self.own), *key.shape), (items, *key.stride), key.offset)


@dataclass(frozen=True)
class Key:
    """Identify a recorded tensor by its address and layout."""

    place: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Key:
        return cls(
            place(tensor), int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype
        )


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class Stacks:
    """The stacks of all memory that recorded programs find when they begin."""

    def __init__(self, agents: int) -> None:
        self.agents = agents
        self.of: dict[int, Stack] = {}  # by the place of the first agent's memory
        self.changed: set[int] = set()  # places that a program changes
        self.inputs: set[int] = set()  # places that are filled by hand

    def add(self, recordings: Sequence[Sequence[Operation]]) -> None:
        """Take in the memory that a program finds; a recording of it for each agent.

        Raises:
            NotRepeatableError: the agents did not do the same.
        """
        if len({len(recording) for recording in recordings}) > 1:
            raise NotRepeatableError("agents differ in what they do")
        made = {place(tensor) for operation in recordings[0] for tensor in operation.created}
        for of_all in zip(*recordings, strict=True):
            first = of_all[0]
            if any(_form(operation) != _form(first) for operation in of_all):
                raise NotRepeatableError(f"agents differ in {first.function}")
            for same in zip(*(operation.inputs for operation in of_all), strict=True):
                if place(same[0]) not in made and same[0].untyped_storage().nbytes():
                    self._add(same)
            self.changed |= {place(tensor) for tensor in first.written} - made

    def _add(self, same: Sequence[Tensor]) -> None:
        places = {place(tensor) for tensor in same}
        if len(places) == 1:  # they share it
            return
        if place(same[0]) not in self.of:
            self.of[place(same[0])] = Stack(same)
        stack = self.of[place(same[0])]
        if len(places) < len(same) or [place(tensor) for tensor in same] != [
            place(own) for own in stack.own
        ]:
            raise NotRepeatableError("agents share some of their memory")

    def load(self, state: bool) -> None:
        """Copy from the agents' memory what no program changes, or with `state` everything; inputs
        stay as they are.
        """
        wanted = self.of.keys() - self.inputs - (set() if state else self.changed)
        self._copy([self.of[where] for where in wanted], load=True)

    def store(self) -> None:
        """Copy to the agents' memory what programs change."""
        self._copy([stack for where, stack in self.of.items() if where in self.changed], load=False)

    @staticmethod
    def _copy(stacks: Iterable[Stack], load: bool) -> None:
        rows = [row for stack in stacks for row in stack.all]
        own = [memory for stack in stacks for memory in stack.own]
        if rows:
            torch._foreach_copy_(rows, own) if load else torch._foreach_copy_(own, rows)


def _form(operation: Operation) -> tuple[Any, ...]:
    """Return what two agents must have in common for an operation to be the same."""

    def layout(tensor: Tensor) -> Any:
        return tensor.shape, tensor.stride(), tensor.dtype

    return (
        operation.function,
        mapped(layout, operation.args),
        mapped(layout, operation.kwargs.values()),
    )


class Axis:
    """Recorded operations, made for all agents at once.

    Args:
        operations: of the first agent.
        stacks: the memory that they begin from.
    """

    def __init__(self, operations: Sequence[Operation], stacks: Stacks) -> None:
        self.stacks = stacks
        self.size = stacks.agents
        self.steps = list(_asking_once(operations))
        self.made: dict[Key, Tensor] = {}

    @torch.no_grad()
    def run(self, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make all operations; what corresponds to the `wanted` tensors of the first agent,
        `[agent, ...]`.

        Raises:
            FlagError: a flag is not set for one of the agents; what was changed before stays
                changed.
            NotRepeatableError: an operation has no form for several agents.
        """
        self.made = {}
        for operation in self.steps:
            self._step(operation)
        return {name: self.of(tensor) for name, tensor in wanted.items()}

    def _step(self, operation: Operation) -> None:
        args = mapped(self.of, operation.args)
        kwargs = dict(
            zip(operation.kwargs, mapped(self.of, operation.kwargs.values()), strict=True)
        )
        rule = RULES.get(operation.function, _by_vmap)
        try:
            outputs = list(tensors((rule(self, operation, args, kwargs),)))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise NotRepeatableError(
                f"{operation.function} for several agents: {reason}"
            ) from error
        for recorded, output in zip(operation.outputs, outputs, strict=True):
            if output.shape != (self.size, *recorded.shape):
                raise NotRepeatableError(
                    f"{operation.function}: {tuple(output.shape)} from {tuple(recorded.shape)}"
                )
            self.made[Key.of(recorded)] = output

    def of(self, tensor: Tensor) -> Tensor:
        """Return what corresponds to a tensor of the first agent, `[agent, ...]`."""
        key = Key.of(tensor)
        if key in self.made:
            return self.made[key]
        if key.place in self.stacks.of:
            return self.stacks.of[key.place].tensor(key)
        return tensor.expand(self.size, *tensor.shape)  # the agents share it


def _asking_once(operations: Iterable[Operation]) -> Iterable[Operation]:
    """Leave out all questions for a flag but the first."""
    asked: set[int] = set()
    for operation in operations:
        if operation.function is READS:
            if place(operation.inputs[0]) in asked:
                continue
            asked.add(place(operation.inputs[0]))
        yield operation


# --- how operations are made for all agents -------------------------------------------------------


def _by_vmap(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not operation.inputs:
        return _factory(axis, operation, args, kwargs)

    def one(*given: Tensor) -> Any:
        following = iter(given)
        own = mapped(lambda _: next(following), args)
        named = dict(zip(kwargs, mapped(lambda _: next(following), kwargs.values()), strict=True))
        return tuple(tensors((operation.function(*own, **named),)))  # without those left undefined

    return torch.vmap(one)(*tensors((args, tuple(kwargs.values()))))


def _factory(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    made: Tensor = operation.function(*args, **kwargs)
    if operation.function in EMPTY:
        return made.new_empty((axis.size, *made.shape))
    return made.expand(axis.size, *made.shape).clone()


def _flag(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[()]:
    if args[0].dtype is not torch.bool:
        raise NotRepeatableError(f"{operation.function} reads a value")
    if not bool(args[0].all()):
        raise FlagError
    return ()


def _rows(axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that works on rows, however many."""
    return operation.function(*mapped(Tensor.contiguous, args), **kwargs)


def _elements(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """An operation on single elements, in place or into memory that is given."""
    rank = kwargs.get("out", args[0]).dim()
    made: Tensor = operation.function(
        *mapped(lambda tensor: _of_rank(tensor, rank), args), **kwargs
    )
    return made


def _of_rank(tensor: Tensor, rank: int) -> Tensor:
    return tensor.view(len(tensor), *[1] * (rank - tensor.dim()), *tensor.shape[1:])


def _lists(axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on single elements of lists of tensors."""
    made = operation.function(*args, **kwargs)
    return () if made is None or not operation.outputs else made


def _scaled_lists(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[()]:
    """Tensors times a number of each agent, in place."""
    parts, number = args
    for part in parts:
        part.mul_(_of_rank(number, part.dim()))
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
    """An operation in place, for each agent by itself."""
    for agent in range(axis.size):

        def own(tensor: Tensor, agent: int = agent) -> Tensor:
            return tensor[agent]

        named = dict(zip(kwargs, mapped(own, kwargs.values()), strict=True))
        operation.function(*mapped(own, args), **named)
    return ()


def _products(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """A batch of products `[agent, batch, ...]`, as one of `[agent * batch, ...]`."""
    made: Tensor = operation.function(*mapped(lambda tensor: tensor.flatten(0, 1), args), **kwargs)
    return made.unflatten(0, (axis.size, -1))


def _biased_products(
    axis: Axis, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    bias, *factors = args
    for_each = _of_rank(bias, 4).expand(-1, len(operation.outputs[0]), -1, -1)
    return _products(axis, operation, (for_each, *factors), kwargs)


RULES: dict[Any, Rule] = {
    READS: _flag,
    aten.bmm.default: _products,
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
