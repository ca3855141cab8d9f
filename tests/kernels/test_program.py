"""Calls of C functions joined to one give the results of the single calls, to the bit."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import pytest
import torch

from softmod.kernels import library, program
from softmod.kernels.binding import Native
from softmod.kernels.program import joined, native

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("compiler")


def tensors(*shape: int, count: int = 3) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


PRODUCTS = {
    "mm": (aten.mm.default, [(3, 4), (4, 5)]),
    "bmm": (aten.bmm.default, [(2, 3, 4), (2, 4, 5)]),
    "addmm": (aten.addmm.default, [(5,), (3, 4), (4, 5)]),
    "baddbmm": (aten.baddbmm.default, [(2, 1, 5), (2, 3, 4), (2, 4, 5)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_pytorch(name: str, dtype: torch.dtype):
    function, shapes = PRODUCTS[name]
    inputs = [tensors(*shape)[0].to(dtype) for shape in shapes]
    expected = function(*inputs)
    for run in (lambda call: call(), lambda call: joined([call])[0]()):
        out = torch.full_like(expected, 7.0)
        call = native(function, inputs, out)
        assert call is not None
        run(call)
        assert torch.equal(out, expected)


def test_a_copy_converts():
    source = tensors(4)[0]
    out = torch.empty(4, dtype=torch.bfloat16)
    call = native(aten._to_copy.default, [source], out)
    assert call is not None
    joined([call])[0]()
    assert torch.equal(out, source.bfloat16())


def test_other_operations_have_no_c_function():
    a = tensors(3, 3)[0]
    assert native(aten.add.Tensor, [a, a], a) is None
    assert native(aten.mm.default, [a, 2.0], a) is None


def test_only_successive_calls_of_c_functions_are_joined():
    a, b, c = tensors(3, 3)
    log: list[str] = []
    first, second, third = (native(aten.mm.default, [a, b], c) for _ in range(3))
    python = partial(log.append, "python")
    calls: Any = [first, second, python, third]
    one, same, other = joined(calls)
    assert isinstance(one, Native)
    assert same is python
    assert isinstance(other, Native)


def test_arguments_of_every_type_arrive():
    """The copy of a source in every type of argument that a call may have."""
    source = """
    #include <stdint.h>
    void write(double *out, int32_t a, int64_t b, float c, double d) {
      out[0] = a; out[1] = (double)b; out[2] = c; out[3] = d;
    }"""
    function = library.build("arguments", source).write
    function.restype = None
    out = torch.zeros(4, dtype=torch.float64)
    numbers = (
        ctypes.c_int32(-3),
        ctypes.c_int64(-(2**40)),
        ctypes.c_float(0.1),
        ctypes.c_double(-0.1),
    )
    call = Native(function, ctypes.c_void_p(out.data_ptr()), *numbers)
    call.kept = []
    joined([call, call])[0]()
    assert out.tolist() == [-3.0, -(2.0**40), ctypes.c_float(0.1).value, -0.1]


def test_a_failing_call_raises():
    a, b, _ = tensors(3, 3)
    call = native(aten.mm.default, [a, b[:2]], torch.empty(3, 3))
    assert call is not None
    with pytest.raises(RuntimeError, match=r"failed \(1\)"):
        call()
    fine = native(aten.mm.default, [a, b], torch.empty(3, 3))
    assert fine is not None
    with pytest.raises(RuntimeError, match=r"failed \(2\)"):
        joined([fine, call])[0]()


def test_without_a_compiler_calls_stay_single(monkeypatch: pytest.MonkeyPatch):
    def fails(name: str, source: str) -> Any:
        raise library.CompilerError("none")

    monkeypatch.setattr(program, "build", fails)
    a, b, c = tensors(3, 3)
    calls: Any = [native(aten.mm.default, [a, b], c), native(aten.mm.default, [b, a], c)]
    assert joined(calls) == calls


def test_a_pytorch_without_the_functions_is_called_from_python(monkeypatch: pytest.MonkeyPatch):
    name, order = program.FUNCTIONS[aten.mm.default]
    monkeypatch.setitem(program.FUNCTIONS, aten.mm.default, (f"{name}_unknown", order))
    a, b, c = tensors(3, 3)
    assert native(aten.mm.default, [a, b], c) is None
