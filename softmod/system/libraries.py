"""Setup of the libraries under a learner: PyTorch's defaults, memory and matrix products."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GLIBC = (  # options of mallopt
    (-3, 32 * 2**20),  # M_MMAP_THRESHOLD, at its largest value
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
)
EXACT = 1e-5  # relative error; at the probe's size fp32 has 1e-6 and bfloat16 has 3e-3


@contextmanager
def default_torch() -> Iterator[None]:
    """Compute in float32 and with gradients within this, whatever the caller's settings are."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)


def keep_memory() -> bool:
    """Make glibc keep freed memory for the next update; return True on success.

    An update allocates and frees hundreds of megabytes. If they were returned to the system each
    time, the next update would pay with page faults. Without glibc nothing changes.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(option, value) for option, value in GLIBC)
    except (OSError, AttributeError):
        return False


def fast_products() -> bool:
    """Use oneDNN instead of MKL for fp32 matrix products where it is faster; return True if used.

    MKL takes its AVX-512 path on Intel processors only. On others oneDNN, which ships with PyTorch,
    is more than twice as fast. PyTorch dispatches fp32 products to oneDNN only if oneDNN is
    *allowed* to round their inputs to bfloat16. Without AMX it does not round; a probe checks this,
    and MKL stays in use if it does.
    """
    return better_with_onednn() and allow_onednn(True)


def allow_onednn(allowed: bool) -> bool:
    """Switch fp32 products to oneDNN or back to MKL; return True if oneDNN is used.

    oneDNN is switched off again if its products do not have the accuracy of fp32.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  (its type is not declared)
    matmul.fp32_precision = "bf16" if allowed else "none"
    if allowed and product_error() > EXACT:
        matmul.fp32_precision = "none"
        return False
    return allowed


def product_library() -> str:
    """Return the name of the library that multiplies this process's fp32 matrices."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if getattr(matmul, "fp32_precision", "none") == "bf16":
        return "oneDNN"
    return "MKL" if torch.backends.mkl.is_available() else "BLAS"


def multiplies_bf16() -> bool:
    """Return True if the CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX).

    On other CPUs fp32 is faster.
    """
    # Not every version of PyTorch has these functions.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, name, bool)() for name in probes
    )


def better_with_onednn() -> bool:
    """Return True if oneDNN is expected to beat MKL and can be selected.

    That is on a CPU with AVX-512 that is not Intel's, with a PyTorch that has both libraries and
    the switch between them.
    """
    switch = hasattr(torch.backends.mkldnn, "matmul") and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(
        switch
        and torch.backends.mkl.is_available()
        and wide
        and vendor() not in ("", "GenuineIntel")
    )


def vendor() -> str:
    """Return the processor's vendor id, such as GenuineIntel; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def product_error() -> float:
    """Return the largest error of fp32 products, relative to their largest entries.

    Covers single and batched products, with and without a transposed operand.
    """
    draws = torch.Generator().manual_seed(0)
    error = 0.0
    for shape in ((256, 256), (2, 320, 256)):
        a = torch.randn(shape, generator=draws)
        b = torch.randn((*shape[:-2], 256, 256), generator=draws)
        for right in (b, b.transpose(-1, -2)):
            exact = a.double() @ right.double()
            error = max(
                error, float(((a @ right).double() - exact).abs().max() / exact.abs().max())
            )
    return error
