"""What PyTorch does in a call: its operations, one after the other, with the tensors that they read
and wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softmod.errors import SoftmodError

aten = torch.ops.aten
READS = aten._local_scalar_dense.default  # bool(tensor)
EMPTY = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)


RECORDED = ("aten", "softmod")  # whose operations are kept: PyTorch's and our own


class NotRepeatableError(SoftmodError):
    """A call cannot be repeated from what was recorded of it."""


@dataclass
class Operation:
    """One operation.

    Its tensors are aliases: holding them keeps their memory and changes nothing for who made them.
    """

    function: Any  # an overload of aten
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    value: Any = None  # what it told, if that is no tensor

    @property
    def inputs(self) -> list[Tensor]:
        return list(tensors((self.args, tuple(self.kwargs.values()))))

    @property
    def gives_list(self) -> bool:
        """Return whether its output is a list of tensors, however many."""
        return "[]" in str(self.function._schema.returns[0].type)

    @property
    def writes(self) -> bool:
        """Return whether it changes memory that was there before."""
        return any(
            a.alias_info is not None and a.alias_info.is_write
            for a in self.function._schema.arguments
        )

    @property
    def written(self) -> list[Tensor]:
        """Inputs that it changes."""
        values = (
            *self.args,
            *(self.kwargs.get(a.name) for a in self.function._schema.arguments[len(self.args) :]),
        )
        arguments = zip(self.function._schema.arguments, values, strict=True)
        return list(
            tensors(
                value
                for a, value in arguments
                if a.alias_info is not None and a.alias_info.is_write
            )
        )

    @property
    def created(self) -> list[Tensor]:
        """Outputs in memory that was not there before."""
        places = {place(tensor) for tensor in self.inputs}
        return [output for output in self.outputs if place(output) not in places]

    @property
    def computes(self) -> bool:
        """Return whether there is something to repeat: it neither only views memory nor only
        reserves it.
        """
        return self.writes or (bool(self.created) and self.function not in EMPTY)


class Recorder(TorchDispatchMode):
    """While it is entered, operations run as always and are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace in RECORDED:
            outputs = tuple(_alias(tensor) for tensor in tensors((output,)))
            told = None if outputs else output
            named = dict(zip(kwargs, mapped(_alias, kwargs.values()), strict=True))
            self.operations.append(Operation(func, mapped(_alias, args), named, outputs, told))
        return output


def place(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, which views of one another share."""
    return tensor.untyped_storage().data_ptr()


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in these, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def mapped(function: Callable[[Tensor], object], values: Iterable[Any]) -> tuple[Any, ...]:
    """The same values, lists of them too, with every tensor replaced."""
    return tuple(
        (
            function(value)
            if isinstance(value, Tensor)
            else [*mapped(function, value)]
            if isinstance(value, list | tuple)
            else value
        )
        for value in values
    )


def _alias(tensor: Tensor) -> Tensor:
    return tensor.detach()
