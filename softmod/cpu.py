"""How a learner on the CPU sets up the libraries under it: memory that is kept, the faster matrix product."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

GLIBC = ((-3, 32 * 2**20), (-1, 2**31 - 1))  # M_MMAP_THRESHOLD, its largest value, and M_TRIM_THRESHOLD
ISA = "ONEDNN_MAX_CPU_ISA"
NO_BF16 = "AVX512_CORE_VNNI"  # the last of oneDNN's instruction sets that cannot multiply bfloat16
EXACT = 1e-5  # relative; a product in fp32 errs by 1e-6 at the probe's size, one in bfloat16 by 3e-3


def keep_memory() -> bool:
    """Let the C library keep freed memory for the next update instead of giving it back; whether it does.

    An update allocates hundreds of megabytes and frees them again; each return to the system is paid for with page
    faults. Only where the library is glibc: elsewhere nothing changes.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(option, value) for option, value in GLIBC)
    except (OSError, AttributeError):
        return False


def fast_products(bf16: bool = False) -> bool:
    """Multiply fp32 matrices with oneDNN instead of MKL where that is the faster one; return whether it now does.

    MKL takes its AVX-512 path on Intel's processors only; on others oneDNN, which PyTorch brings along, is more than
    twice as fast. PyTorch hands fp32 products to oneDNN once that is *allowed* to round their inputs to bfloat16. It is
    not to do so: unless `bf16` says that the networks compute in bfloat16 themselves, oneDNN's instruction set is
    limited to one that has no such product. A probe refuses oneDNN if its fp32 products are rounded all the same.
    """
    if not better_with_onednn():
        return False
    if not bf16:
        os.environ.setdefault(ISA, NO_BF16)  # oneDNN reads it once, at its first use
    return allow_onednn(True)


def allow_onednn(allowed: bool) -> bool:
    """Switch between the two libraries; whether oneDNN multiplies now. It does not if its products are not fp32."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  (its type is not declared)
    matmul.fp32_precision = "bf16" if allowed else "none"
    if allowed and product_error() > EXACT:
        matmul.fp32_precision = "none"
        return False
    return allowed


def product_library() -> str:
    """Which library multiplies this process's fp32 matrices."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if getattr(matmul, "fp32_precision", "none") == "bf16":
        return "oneDNN"
    return "MKL" if torch.backends.mkl.is_available() else "BLAS"


def multiplies_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 itself (AVX-512 BF16 or AMX); else fp32 is faster."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of PyTorch, in the versions that have them
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in probes)


def better_with_onednn() -> bool:
    """A processor with AVX-512 that is not Intel's, and a PyTorch that has both libraries and the switch."""
    switch = hasattr(torch.backends.mkldnn, "matmul") and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(switch and torch.backends.mkl.is_available() and wide and vendor() not in ("", "GenuineIntel"))


def vendor() -> str:
    """The processor's maker as it names itself; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def product_error(size: int = 256) -> float:
    """The largest error of an fp32 product, relative to its largest entry."""
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=draws) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())
