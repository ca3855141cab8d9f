"""How a learner on the CPU sets up the libraries under it: memory that is kept, the faster matrix
product.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

GLIBC = (
    (-3, 32 * 2**20),
    (-1, 2**31 - 1),
)  # M_MMAP_THRESHOLD, its largest value, and M_TRIM_THRESHOLD
EXACT = (
    1e-5  # relative; a product in fp32 errs by 1e-6 at the probe's size, one in bfloat16 by 3e-3
)


def keep_memory() -> bool:
    """Let the C library keep freed memory for the next update instead of giving it back; whether it
    does.

    An update allocates hundreds of megabytes and frees them again; each return to the system is
    paid for with page faults. Only where the library is glibc: elsewhere nothing changes.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(option, value) for option, value in GLIBC)
    except (OSError, AttributeError):
        return False


def fast_products() -> bool:
    """Multiply fp32 matrices with oneDNN instead of MKL where that is the faster one; return
    whether it now does.

    MKL takes its AVX-512 path on Intel's processors only; on others oneDNN, which PyTorch brings
    along, is more than twice as fast. PyTorch hands fp32 products to oneDNN once that is *allowed*
    to round their inputs to bfloat16. On processors without AMX it does not do so, and a probe
    refuses it if it does.
    """
    return better_with_onednn() and allow_onednn(True)


def allow_onednn(allowed: bool) -> bool:
    """Switch between the two libraries; whether oneDNN multiplies now.

    It does not if its products are not fp32.
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
    """Return whether the processor multiplies bfloat16 itself (AVX-512 BF16 or AMX); else fp32 is
    faster.
    """
    probes = (
        "_is_avx512_bf16_supported",
        "_is_amx_tile_supported",
    )  # of PyTorch, in the versions that have them
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, name, bool)() for name in probes
    )


def better_with_onednn() -> bool:
    """A processor with AVX-512 that is not Intel's, and a PyTorch that has both libraries and the
    switch.
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
    """The processor's maker as it names itself; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def product_error() -> float:
    """Return the largest error of fp32 products, relative to their largest entries, single ones and
    several at once.
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
