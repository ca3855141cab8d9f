"""Acting without PyTorch's cost per call: a policy's operations, recorded once and repeated in
numpy.

For the handful of rows that a worker acts for, calling PyTorch costs as much as computing. So the
operations of one call are recorded together with the tensors that they read and wrote, and repeated
on the same memory: a view needs no repeating, an operation known here is one or two numpy calls,
and any other is left to PyTorch. The weights are read where they lie, so whoever writes new ones
there has loaded them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from softmod.capture.recorder import NotRepeatableError, Operation, Recorder, aten, tensors

Array = NDArray[Any]
Call = Callable[[], object]
Function = Callable[..., Tensor]
Kernel = Callable[..., list[Call]]  # of the output and the arguments, tensors as arrays
FEW_ROWS = 7  # up to here, without AVX-512, a product row by row is the faster one
WIDE = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS's kernels with AVX-512
# rows x k x n up to which they have a kernel of its own, and the columns they take at once
SMALL = 1_000_000
TILE = 64
AGREES = 1e-4

log = logging.getLogger(__name__)


class Repeated:
    """A function of tensors as a call without arguments: `inputs` are arrays to be filled, the
    output is an array.

    Args:
        function: of `inputs`, giving one tensor; it is called under `torch.no_grad`.
        inputs: any values in the right shapes.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._function, self._tensors = function, [tensor.clone() for tensor in inputs]
        self.inputs: list[Array] = [tensor.numpy() for tensor in self._tensors]

    def __call__(self) -> Array:
        """The output for what `self.inputs` hold now; valid until the next call."""
        return self.called()

    def called(self) -> Array:
        """The same by PyTorch."""
        with torch.no_grad():
            return self._function(*self._tensors).numpy()


class Recorded(Repeated):
    """A function whose operations and shapes never change, repeated in numpy.

    Raises:
        NotRepeatableError: its operations depend on its inputs' values.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        super().__init__(function, inputs)
        with torch.no_grad(), Recorder() as recorder:
            self._output: Array = function(*self._tensors).numpy()
        self._operations = recorder.operations  # their memory is what the calls use
        for operation in self._operations:
            if operation.value is not None:
                raise NotRepeatableError(f"{operation.function} reads a value")
        computing = (operation for operation in self._operations if operation.computes)
        self._calls: list[Call] = [call for operation in computing for call in _repeat(operation)]
        self._check()

    def __call__(self) -> Array:
        for call in self._calls:
            call()
        return self._output

    def _check(self) -> None:
        draws = np.random.default_rng(0)
        held = [array.copy() for array in self.inputs]
        for array in self.inputs:
            array[...] = draws.standard_normal(array.shape)
        if not np.allclose(self(), self.called(), rtol=AGREES, atol=AGREES, equal_nan=True):
            raise NotRepeatableError("repeating its operations gives another result")
        for array, before in zip(self.inputs, held, strict=True):
            array[...] = before


def repeated(function: Function, inputs: Sequence[Tensor]) -> Repeated:
    """The function recorded, or, if it cannot be, as it is."""
    one_blas_thread()
    try:
        return Recorded(function, inputs)
    except NotRepeatableError as error:
        log.info("this network acts at PyTorch's speed: %s", error)
        return Repeated(function, inputs)


@cache
def one_blas_thread() -> None:
    """Let numpy multiply with one thread: the other cores have work of their own."""
    threadpool_limits(limits=1, user_api="blas")


@cache
def wide_products() -> bool:
    """Return whether numpy multiplies by OpenBLAS's kernels with AVX-512."""
    return any(library.get("architecture") in WIDE for library in threadpool_info())


def _repeat(operation: Operation) -> list[Call]:
    """Calls that write the outputs anew from what the arguments hold then."""
    func = operation.function
    args = operation.args
    kwargs = operation.kwargs
    outputs = operation.outputs
    kernel = KERNELS.get(func)
    if kernel is not None and set(kwargs) <= {"out", "memory_format", "pin_memory"}:
        return kernel(outputs[0].numpy(), *[_array(arg) for arg in args])

    def call() -> None:
        for target, value in zip(outputs, tensors((func(*args, **kwargs),)), strict=True):
            target.copy_(value)

    again: Call = partial(func, *args, **kwargs)
    return [again if operation.writes else call]


def _array(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach().numpy()
    return [_array(entry) for entry in argument] if isinstance(argument, list | tuple) else argument


# --- operations in numpy --------------------------------------------------------------------------


# Outputs are handed over by position and calls are partial: in a policy of 50 calls that is a tenth
# of the time.


def _ufunc(function: Any) -> Kernel:
    return lambda out, *args: [partial(function, *args, out)]


def _product(out: Array, a: Array, b: Array) -> list[Call]:
    """Matrices `[..., rows, k] @ [..., k, n]`, so that few rows have the same results in any
    company.

    Without AVX-512 they are multiplied one by one, as vectors. With it only a single row is another
    product, and so it is given company.
    """
    rows = a.shape[-2]
    if wide_products():
        return _product_of_two(out, a, b) if rows == 1 else _products_of_columns(out, a, b)
    if 1 < rows <= FEW_ROWS:
        a = a[..., :, None, :]
        b = b[..., None, :, :]
        out = out[..., :, None, :]
    return [partial(np.matmul, a, b, out)]


def _product_of_two(out: Array, a: Array, b: Array) -> list[Call]:
    """A single row and a row of zeros."""
    two = np.zeros((*a.shape[:-2], 2, a.shape[-1]), a.dtype)
    both = np.zeros((*out.shape[:-2], 2, out.shape[-1]), out.dtype)
    calls: list[Call] = [
        partial(np.copyto, two[..., :1, :], a),
        *_products_of_columns(both, two, b),
    ]
    return [*calls, partial(np.copyto, out, both[..., :1, :])]


def _products_of_columns(out: Array, a: Array, b: Array) -> list[Call]:
    """By as many columns as make a small product each, in whole tiles, which leaves the results as
    they are.
    """
    columns = b.shape[-1]
    width = SMALL // (a.shape[-2] * a.shape[-1]) // TILE * TILE or columns
    parts = [slice(first, first + width) for first in range(0, columns, width)]
    return [partial(np.matmul, a, b[..., part], out[..., part]) for part in parts]


def _product_and_bias(out: Array, bias: Array, a: Array, b: Array) -> list[Call]:
    return [*_product(out, a, b), partial(np.add, out, bias, out)]


def _relu(out: Array, x: Array) -> list[Call]:
    return [partial(np.maximum, x, np.zeros_like(x), out=out)]  # faster than one zero for all


def _clamp(
    out: Array, x: Array, least: float | None = None, most: float | None = None
) -> list[Call]:
    low, high = (
        np.array(bound, x.dtype)
        for bound in (-np.inf if least is None else least, np.inf if most is None else most)
    )
    return [partial(np.maximum, x, low, out=out), partial(np.minimum, out, high, out=out)]


def _multiply_add(out: Array, x: Array, a: Array, b: Array) -> list[Call]:
    both = np.empty(np.broadcast_shapes(a.shape, b.shape), out.dtype)
    return [partial(np.multiply, a, b, both), partial(np.add, x, both, out)]


def _softmax(out: Array, x: Array, axis: int, _: bool) -> list[Call]:
    extreme = np.empty_like(np.max(x, axis, keepdims=True))
    return [
        partial(np.maximum.reduce, x, axis, None, extreme, True),
        partial(np.subtract, x, extreme, out),
        partial(np.exp, out, out),
        partial(np.add.reduce, out, axis, None, extreme, True),
        partial(np.divide, out, extreme, out),
    ]


def _copy(out: Array, x: Array) -> list[Call]:
    return [partial(np.copyto, out, x)]


def _sum(out: Array, x: Array, axes: Sequence[int], keepdims: bool = False) -> list[Call]:
    return [partial(np.add.reduce, x, tuple(axes), None, out, keepdims)]


def _concatenate(out: Array, parts: list[Array], axis: int = 0) -> list[Call]:
    return [partial(np.concatenate, parts, axis, out)]


def _select(out: Array, x: Array, axis: int, index: Array) -> list[Call]:
    return [partial(x.take, index, axis, out, "clip")]  # any other mode buffers


def _stack(out: Array, parts: list[Array], axis: int = 0) -> list[Call]:
    return [partial(np.stack, parts, axis, out)]


def _square(out: Array, x: Array, exponent: float) -> list[Call]:
    return [partial(np.square, x, out) if exponent == 2 else partial(np.power, x, exponent, out)]


def _one_over_root(out: Array, x: Array) -> list[Call]:
    return [partial(np.sqrt, x, out), partial(np.reciprocal, out, out)]


def _layer_norm(
    out: Array, x: Array, shape: Sequence[int], weight: Array | None, bias: Array | None, eps: float
) -> list[Call]:
    """Write the first of three outputs: mean and deviation are read by gradients alone."""
    rows = out.reshape(*out.shape[: -len(shape)], -1)  # a view
    before: list[Call] = []
    if len(shape) > 1:
        before.append(partial(np.copyto, out, x))
        x = rows
    width = rows.shape[-1]
    average = np.full(width, 1 / width, x.dtype)
    share = np.array(1 / width, x.dtype)
    least = np.array(eps, x.dtype)
    row = np.empty(
        (*rows.shape[:-1], 1), x.dtype
    )  # a number per row: first its mean, then its deviation
    after: list[Call] = [] if weight is None else [partial(np.multiply, out, weight, out)]
    after += [] if bias is None else [partial(np.add, out, bias, out)]
    return [
        *before,
        partial(np.vecdot, x, average, row[..., 0]),
        partial(np.subtract, x, row, rows),
        partial(np.vecdot, rows, rows, row[..., 0]),
        partial(np.multiply, row, share, row),
        partial(np.add, row, least, row),
        partial(np.sqrt, row, row),
        partial(np.divide, rows, row, rows),
        *after,
    ]


def _length(
    out: Array,
    x: Array,
    order: float = 2,
    axes: Sequence[int] | None = None,
    keepdims: bool = False,
) -> list[Call]:
    axis = None if axes is None else tuple(axes)
    if order != 2:
        norm = partial(np.linalg.vector_norm, x, axis=axis, keepdims=keepdims, ord=order)
        return [lambda: np.copyto(out, norm())]
    squares = np.empty_like(x)
    return [
        partial(np.square, x, squares),
        partial(np.add.reduce, squares, axis, None, out, keepdims),
        partial(np.sqrt, out, out),
    ]


def _zeros(out: Array, _: Array) -> list[Call]:
    return [partial(out.fill, 0.0)]


def _argmax(out: Array, x: Array, axis: int, keepdims: bool = False) -> list[Call]:
    return [lambda: np.argmax(x, axis, out, keepdims=keepdims)]


def _scatter(out: Array, x: Array, axis: int, index: Array, value: float) -> list[Call]:
    return [partial(np.copyto, out, x), partial(np.put_along_axis, out, index, value, axis)]


KERNELS: dict[Any, Kernel] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _product_and_bias,
    aten.baddbmm.default: _product_and_bias,
    aten.relu.default: _relu,
    aten.relu_.default: _relu,
    aten.clamp.default: _clamp,
    aten.mul.Tensor: _ufunc(np.multiply),
    aten.mul.out: _ufunc(np.multiply),
    aten.mul_.Tensor: _ufunc(np.multiply),
    aten.add.Tensor: _ufunc(np.add),
    aten.add_.Tensor: _ufunc(np.add),
    aten.sub.Tensor: _ufunc(np.subtract),
    aten.div.Tensor: _ufunc(np.divide),
    aten.clamp_min.default: _ufunc(np.maximum),
    aten.native_layer_norm.default: _layer_norm,
    aten.linalg_vector_norm.default: _length,
    aten.sum.dim_IntList: _sum,
    aten.pow.Tensor_Scalar: _square,
    aten.rsqrt.default: _one_over_root,
    aten.addcmul.default: _multiply_add,
    aten.addcmul_.default: _multiply_add,
    aten.exp.default: _ufunc(np.exp),
    aten.tanh.default: _ufunc(np.tanh),
    aten._softmax.default: _softmax,
    aten.clone.default: _copy,
    aten.cat.default: _concatenate,
    aten.stack.default: _stack,
    aten.zeros_like.default: _zeros,
    aten.argmax.default: _argmax,
    aten.scatter.value: _scatter,
    aten.index_select.default: _select,
}
