"""A recorder of PyTorch operations, in order, with the tensors that they read and write."""

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
RECORDED = ("aten", "softmod")  # namespaces of recorded operations: PyTorch's and our own


class NotRepeatableError(SoftmodError):
    """A call that cannot be repeated from its recording."""


@dataclass
class Operation:
    """A recorded operation.

    Its tensors are detached aliases. They keep the memory alive and leave the originals unchanged.
    """

    function: Any  # an overload of aten
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    value: Any = None  # the result, if it is not a tensor

    @property
    def inputs(self) -> list[Tensor]:
        """Return all tensor arguments."""
        return list(tensors((self.args, tuple(self.kwargs.values()))))

    @property
    def returns_list(self) -> bool:
        """Return whether the output is a list of tensors of any length."""
        return "[]" in str(self.function._schema.returns[0].type)

    @property
    def writes(self) -> bool:
        """Return whether the operation changes memory that existed before."""
        return any(map(_is_written, self.function._schema.arguments))

    @property
    def written(self) -> list[Tensor]:
        """Return the inputs that the operation changes."""
        parameters = self.function._schema.arguments
        values = list(self.args)
        for parameter in parameters[len(self.args) :]:
            values.append(self.kwargs.get(parameter.name))
        changed = []
        for parameter, value in zip(parameters, values, strict=True):
            if _is_written(parameter):
                changed.append(value)
        return list(tensors(changed))

    @property
    def created(self) -> list[Tensor]:
        """Return the outputs in newly allocated memory."""
        addresses = {address(tensor) for tensor in self.inputs}
        return [output for output in self.outputs if address(output) not in addresses]

    @property
    def computes(self) -> bool:
        """Return whether a repetition has to run the operation.

        Views and allocations of uninitialized memory need not be repeated.
        """
        return self.writes or (bool(self.created) and self.function not in EMPTY)


def _is_written(parameter: Any) -> bool:
    return parameter.alias_info is not None and bool(parameter.alias_info.is_write)


class Recorder(TorchDispatchMode):
    """A context in which operations run as usual and are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing compiles within it, and to prevent that PyTorch would import its
        compiler, 0.8 s and 90 MB in each worker process.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace in RECORDED:
            outputs = tuple(_alias(tensor) for tensor in tensors((output,)))
            value = None if outputs or isinstance(output, list) else output
            aliases = map_tensors(_alias, args)
            named = dict(zip(kwargs, map_tensors(_alias, kwargs.values()), strict=True))
            self.operations.append(Operation(func, aliases, named, outputs, value))
        return output


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; it is the same for all views of a tensor."""
    return tensor.untyped_storage().data_ptr()


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors among the values and in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def map_tensors(function: Callable[[Tensor], object], values: Iterable[Any]) -> tuple[Any, ...]:
    """Apply a function to every tensor among the values; nested lists and tuples become lists."""
    results: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            results.append(function(value))
        elif isinstance(value, list | tuple):
            results.append(list(map_tensors(function, value)))
        else:
            results.append(value)
    return tuple(results)


def _alias(tensor: Tensor) -> Tensor:
    return tensor.detach()
