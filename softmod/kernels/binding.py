"""PyTorch operations from C functions, and calls of these functions without arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from softmod.kernels.library import library
from softmod.kernels.switch import NORM, UPDATE, version_in_use

WIDEST = 8192  # largest row length; a row is a buffer on the C stack
LETTER = {torch.float32: "f", torch.bfloat16: "b"}  # dtypes in the names of the C functions

Call = Callable[[], object]
Binder = Callable[[Sequence[Any], Sequence[Tensor]], Call]
Allocator = Callable[..., Sequence[Tensor]]

_operations = torch.library.Library("softmod", "FRAGMENT")
BINDERS: dict[Any, Binder] = {}


class Native(partial[None]):
    """A call of a C function: `args` are ctypes values, and `kept` is memory that it reads."""

    kept: list[Any]


def operation(schema: str, allocate: Allocator, bind: Binder) -> Any:
    """Define a PyTorch operation that runs a C function.

    Args:
        schema: the operation's name and signature; outputs are tensors.
        allocate: returns the output tensors for given arguments.
        bind: returns the C function, bound to the memory of arguments and outputs.

    Returns:
        The operation.
    """
    _operations.define(schema)
    name = schema.partition("(")[0]
    single = schema.endswith("-> Tensor")
    listed = schema.endswith("-> Tensor[]")

    def run(*args: Any) -> Any:
        outputs = allocate(*args)
        bind(args, outputs)()
        if single:
            return outputs[0]
        if listed:
            return list(outputs)
        return tuple(outputs) if outputs else None

    _operations.impl(name, run, "CPU")
    overload = getattr(torch.ops.softmod, name).default
    BINDERS[overload] = bind
    return overload


def operations(version: int) -> list[Any]:
    """Return the operations of a version."""
    norm = [name for name in BINDERS if "layer_norm" in str(name)]
    return norm if version == NORM else [name for name in BINDERS if name not in norm]


def bound(function: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> Call | None:
    """Return the C function of an operation, bound to its memory; None for other operations."""
    bind = BINDERS.get(function)
    return None if bind is None else bind(args, outputs)


def call(name: str, version: int, *values: Any) -> Call:
    """Return a C function with its arguments.

    Tensors, lists of them and None become pointers, bools 32-bit and other integers 64-bit
    integers, and floats single-precision numbers.
    """
    kept: list[Any] = []  # memory that the call reads
    arguments = [_argument(value, kept) for value in values]
    native = Native(function(name, version), *arguments)
    native.kept = kept
    return native


def fits(*values: Tensor) -> bool:
    """Return whether version 2 is in use and supports these tensors."""
    return version_in_use() >= UPDATE and all(
        value.device.type == "cpu"
        and value.dtype in LETTER
        and 0 < (value.shape[-1] if value.dim() else 1) <= WIDEST
        for value in values
    )


def in_fp32(*values: Tensor) -> bool:
    """Return whether version 2 is in use and all tensors are in fp32."""
    return fits(*values) and all(value.dtype is torch.float32 for value in values)


def _argument(value: Any, kept: list[Any]) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        kept.append(value)
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Array):
        kept.append(value)
        return value
    if isinstance(value, list | tuple):
        kept.append(value)
        pointers = (ctypes.c_void_p * len(value))(
            *(None if tensor is None else tensor.data_ptr() for tensor in value)
        )
        kept.append(pointers)
        return pointers
    if isinstance(value, bool):
        return ctypes.c_int32(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_float(value)


def sizes(tensors: Sequence[Tensor]) -> Any:
    """Return the numbers of elements as a C array."""
    return (ctypes.c_int64 * len(tensors))(*(tensor.numel() for tensor in tensors))


@cache
def function(name: str, version: int) -> Any:
    """Return a function of the C library without a result."""
    found = getattr(library(version), name)
    found.restype = None
    return found
