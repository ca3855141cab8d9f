"""Sequences of calls of C functions as one C function.

Threads that learn side by side then do not wait for Python's interpreter lock between operations.
Calls and results are the same. PyTorch's matrix products and copies are among the C functions: its
libraries export them for compiled models (the functions named `aoti_torch_*`).
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmod.kernels.binding import Call, Native
from softmod.kernels.library import CompilerError, build

aten = torch.ops.aten
LIBRARY = Path(torch.__file__).parent / "lib"  # of PyTorch's own libraries
NAMES = ("libtorch_cpu.so", "libtorch_cpu.dylib")

# How C functions take an operation's output, inputs and numbers.
Order = Callable[..., tuple[Any, ...]]
FUNCTIONS: dict[Any, tuple[str, Order]] = {
    aten.mm.default: ("aoti_torch_cpu_mm_out", lambda out, a, b: (out, a, b)),
    aten.bmm.default: ("aoti_torch_cpu_bmm_out", lambda out, a, b: (out, a, b)),
    aten.addmm.default: (
        "aoti_torch_cpu_addmm_out",
        lambda out, bias, a, b: (out, bias, a, b, 1.0, 1.0),
    ),
    aten.baddbmm.default: (
        "aoti_torch_cpu_baddbmm_out",
        lambda out, bias, a, b: (out, bias, a, b, 1.0, 1.0),
    ),
    aten._to_copy.default: ("aoti_torch_copy_", lambda out, source: (out, source, 0)),
    aten.clone.default: ("aoti_torch_copy_", lambda out, source: (out, source, 0)),
    aten.copy_.default: ("aoti_torch_copy_", lambda out, source: (out, source, 0)),
}


def native(function: Any, args: Sequence[Any], output: Tensor) -> Native | None:
    """Return an operation of PyTorch as a call of a C function; None if it has none.

    Args:
        function: the operation.
        args: its positional arguments, of which all are tensors; those of `copy_` are its source.
        output: the tensor that it writes.
    """
    if function not in FUNCTIONS or not all(isinstance(value, Tensor) for value in args):
        return None
    name, order = FUNCTIONS[function]
    try:
        called = getattr(_library(), name)
        handles = [_Handle(tensor) for tensor in (output, *args)]
    except (OSError, AttributeError):  # a PyTorch without these functions
        return None
    called.restype = ctypes.c_int32
    called.errcheck = _check
    call = Native(called, *map(_number, order(*(handle.value for handle in handles))))
    call.kept = handles
    return call


def joined(calls: Iterable[Call]) -> list[Call]:
    """Join successive calls of C functions to one; the others stay as they are.

    Without a compiler, all calls stay as they are.
    """
    parts = [
        (of_c, list(part)) for of_c, part in groupby(calls, lambda call: isinstance(call, Native))
    ]
    texts = [_text(number, part) for number, (of_c, part) in enumerate(parts) if of_c]
    try:
        library = build("program", "\n".join([HEADER, *texts]))
    except CompilerError:
        return [call for _, part in parts for call in part]
    result: list[Call] = []
    for number, (of_c, part) in enumerate(parts):
        result += [_call(getattr(library, f"run_{number}"), part)] if of_c else part
    return result


# --- C source -------------------------------------------------------------------------------------

HEADER = """\
#include <stdint.h>
#include <string.h>
typedef uint64_t word;
static float f32(word w) { float x; memcpy(&x, &w, sizeof x); return x; }
static double f64(word w) { double x; memcpy(&x, &w, sizeof x); return x; }
"""
TYPES: dict[type, tuple[str, str]] = {  # of arguments in C, and how they are read from a word
    ctypes.c_int32: ("int32_t", "(int32_t)"),
    ctypes.c_int64: ("int64_t", "(int64_t)"),
    ctypes.c_float: ("float", "f32"),
    ctypes.c_double: ("double", "f64"),
}
POINTER = ("void *", "(void *)")


def _text(number: int, calls: Sequence[Call]) -> str:
    """Return a C function that makes the calls; it reads addresses and arguments from `w`.

    The function returns 0, or the number of the call that failed, counted from 1.
    """
    lines = [f"int32_t run_{number}(const word *w) {{"]
    at = 0
    for count, call in enumerate(calls, 1):
        assert isinstance(call, Native)
        kinds = [TYPES.get(type(value), POINTER) for value in call.args]
        values = [f"{read}(w[{at + 1 + i}])" for i, (_, read) in enumerate(kinds)]
        function: Any = call.func
        checked = function.restype is not None
        kind = f"{'int32_t' if checked else 'void'} (*)({', '.join(name for name, _ in kinds)})"
        made = f"(({kind})w[{at}])({', '.join(values)})"
        lines.append(f"  if ({made}) return {count};" if checked else f"  {made};")
        at += 1 + len(values)
    return "\n".join([*lines, "  return 0;", "}"])


def _call(function: Any, calls: Sequence[Call]) -> Native:
    """Return a call of the C function that makes the calls."""
    words: list[int] = []
    for call in calls:
        assert isinstance(call, Native)
        called: Any = call.func
        words.append(ctypes.cast(called, ctypes.c_void_p).value or 0)
        words += [_word(value) for value in call.args]
    function.restype = ctypes.c_int32
    function.errcheck = _check
    made = Native(function, (ctypes.c_uint64 * len(words))(*words))
    made.kept = list(calls)
    return made


def _word(value: Any) -> int:
    """Return an argument as 64 bits."""
    if isinstance(value, ctypes.Array):
        return ctypes.addressof(value)
    if isinstance(value, ctypes.c_float):
        return int(struct.unpack("<I", struct.pack("<f", value.value))[0])
    if isinstance(value, ctypes.c_double):
        return int(struct.unpack("<Q", struct.pack("<d", value.value))[0])
    return (value.value or 0) & 0xFFFFFFFFFFFFFFFF


def _check(result: int, function: Any, arguments: Any) -> None:
    if result:
        raise RuntimeError(f"an operation of a recorded update failed ({result})")


# --- PyTorch's C functions ------------------------------------------------------------------------


@cache
def _library() -> ctypes.CDLL:
    for name in NAMES:
        if (LIBRARY / name).exists():
            return ctypes.CDLL(str(LIBRARY / name))
    raise OSError(f"no {NAMES[0]}")


POINTER_IN = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Handle:
    """A tensor as PyTorch's C functions take it, freed with this object."""

    def __init__(self, tensor: Tensor) -> None:
        free = _library().aoti_torch_delete_tensor_object
        (capsule,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])
        self.value = ctypes.c_void_p(POINTER_IN(capsule, None))
        weakref.finalize(self, free, self.value).atexit = False


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int32(value) if isinstance(value, int) else value
