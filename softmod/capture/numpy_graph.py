"""Acting without PyTorch's overhead: a policy's operations, recorded once and repeated in numpy.

With the few rows of a worker, calls into PyTorch cost as much as their arithmetic. The operations
of one call are therefore recorded with their tensors and repeated on the same memory. Views need no
repetition. Operations in `KERNELS` become a few numpy calls; PyTorch runs all others. Weights are
read from their memory in each call, so writing there loads new ones.
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
Kernel = Callable[..., list[Call]]  # from the output array and the arguments to calls
FEW_ROWS = 7  # up to this number, and without AVX-512, products row by row are faster
WIDE = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS kernels with AVX-512
SMALL = 1_000_000  # rows x k x n up to which these use a special kernel for small products
TILE = 64  # columns per step of that kernel
AGREES = 1e-4  # relative and absolute tolerance of the check against PyTorch

log = logging.getLogger(__name__)


class NumpyFunction:
    """A function of tensors with numpy inputs and output, run by PyTorch.

    The caller fills the arrays `inputs`, then calls the object without arguments.

    Args:
        function: a function of `inputs` that returns one tensor; called under `torch.no_grad`.
        inputs: tensors of the right shapes, with any values.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._function = function
        self._tensors = [tensor.clone() for tensor in inputs]
        self.inputs: list[Array] = [tensor.numpy() for tensor in self._tensors]

    def __call__(self) -> Array:
        """Return the output for the current `inputs`; valid until the next call."""
        return self.eager()

    def eager(self) -> Array:
        """Return the output for the current `inputs`, computed by PyTorch."""
        with torch.no_grad():
            return self._function(*self._tensors).numpy()


class Recorded(NumpyFunction):
    """A function whose operations and shapes never change, repeated in numpy.

    Raises:
        NotRepeatableError: the operations depend on the values of the inputs.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        super().__init__(function, inputs)
        with torch.no_grad(), Recorder() as recorder:
            self._output: Array = function(*self._tensors).numpy()
        self._operations = recorder.operations  # keeps alive the memory that the calls use
        self._calls: list[Call] = []
        for operation in self._operations:
            if operation.value is not None:
                raise NotRepeatableError(f"{operation.function} reads a value")
            if operation.computes:
                self._calls.extend(_calls_of(operation))
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
        if not np.allclose(self(), self.eager(), rtol=AGREES, atol=AGREES, equal_nan=True):
            raise NotRepeatableError("repeating its operations gives another result")
        for array, before in zip(self.inputs, held, strict=True):
            array[...] = before


def record(function: Function, inputs: Sequence[Tensor]) -> NumpyFunction:
    """Record a function for repetition in numpy; if that is not possible, leave it to PyTorch."""
    one_blas_thread()
    try:
        return Recorded(function, inputs)
    except NotRepeatableError as error:
        log.info("the policy is not repeated in numpy: %s", error)
        return NumpyFunction(function, inputs)


@cache
def one_blas_thread() -> None:
    """Limit numpy's products to one thread, since other processes use the other cores."""
    threadpool_limits(limits=1, user_api="blas")


@cache
def wide_products() -> bool:
    """Return whether numpy uses OpenBLAS kernels with AVX-512."""
    return any(library.get("architecture") in WIDE for library in threadpool_info())


def _calls_of(operation: Operation) -> list[Call]:
    """Return calls that recompute an operation's outputs from its arguments' current values."""
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

    in_place: Call = partial(func, *args, **kwargs)
    return [in_place if operation.writes else call]


def _array(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach().numpy()
    if isinstance(argument, list | tuple):
        return [_array(entry) for entry in argument]
    return argument


# --- operations in numpy --------------------------------------------------------------------------


# Outputs are positional arguments and calls are `partial`: this saves a tenth of the time of a
# policy with 50 calls.


def _ufunc(function: Any) -> Kernel:
    return lambda out, *args: [partial(function, *args, out)]


def _product(out: Array, a: Array, b: Array) -> list[Call]:
    """Multiply `[..., rows, k] @ [..., k, n]` so that a row's result does not depend on `rows`.

    Without AVX-512, few rows are multiplied one by one, as vectors. With AVX-512, only a single row
    would use another kernel, so it is multiplied together with a row of zeros.
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
    """Multiply a single row together with a row of zeros."""
    two = np.zeros((*a.shape[:-2], 2, a.shape[-1]), a.dtype)
    both = np.zeros((*out.shape[:-2], 2, out.shape[-1]), out.dtype)
    calls: list[Call] = [
        partial(np.copyto, two[..., :1, :], a),
        *_products_of_columns(both, two, b),
    ]
    return [*calls, partial(np.copyto, out, both[..., :1, :])]


def _products_of_columns(out: Array, a: Array, b: Array) -> list[Call]:
    """Split a product by columns into small products of whole tiles, with the same results."""
    columns = b.shape[-1]
    width = SMALL // (a.shape[-2] * a.shape[-1]) // TILE * TILE or columns
    parts = [slice(first, first + width) for first in range(0, columns, width)]
    return [partial(np.matmul, a, b[..., part], out[..., part]) for part in parts]


def _product_and_bias(out: Array, bias: Array, a: Array, b: Array) -> list[Call]:
    return [*_product(out, a, b), partial(np.add, out, bias, out)]


def _relu(out: Array, x: Array) -> list[Call]:
    return [partial(np.maximum, x, np.zeros_like(x), out=out)]  # faster than a scalar zero


def _clamp(
    out: Array, x: Array, least: float | None = None, most: float | None = None
) -> list[Call]:
    low = np.array(-np.inf if least is None else least, x.dtype)
    high = np.array(np.inf if most is None else most, x.dtype)
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
    return [partial(x.take, index, axis, out, "clip")]  # other modes buffer the output


def _stack(out: Array, parts: list[Array], axis: int = 0) -> list[Call]:
    return [partial(np.stack, parts, axis, out)]


def _square(out: Array, x: Array, exponent: float) -> list[Call]:
    return [partial(np.square, x, out) if exponent == 2 else partial(np.power, x, exponent, out)]


def _one_over_root(out: Array, x: Array) -> list[Call]:
    return [partial(np.sqrt, x, out), partial(np.reciprocal, out, out)]


def _layer_norm(
    out: Array, x: Array, shape: Sequence[int], weight: Array | None, bias: Array | None, eps: float
) -> list[Call]:
    """Compute the first of three outputs; only gradients read the other two, mean and deviation."""
    rows = out.reshape(*out.shape[: -len(shape)], -1)  # a view
    before: list[Call] = []
    if len(shape) > 1:
        before.append(partial(np.copyto, out, x))
        x = rows
    width = rows.shape[-1]
    average = np.full(width, 1 / width, x.dtype)
    share = np.array(1 / width, x.dtype)
    least = np.array(eps, x.dtype)
    row = np.empty((*rows.shape[:-1], 1), x.dtype)  # first the mean of each row, then its deviation
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
