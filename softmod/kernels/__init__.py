"""Fused operations: in C for updates on a CPU, in Triton for optimizer steps on a GPU.

Those in C are compiled at first use and optional.
Version 1 fuses layer normalization. Version 2 also fuses the losses, the policy's samples, mixing
and the optimizers. A run keeps the version that it started with.
"""

from softmod.kernels import flat, heads, layers, optimizer, policy
from softmod.kernels.binding import BINDERS, bound, fits, in_fp32, operations
from softmod.kernels.halves import follow, gradient, halve, halves, same_dtype
from softmod.kernels.library import available, key, newest
from softmod.kernels.norm import fits as fits_norm
from softmod.kernels.norm import layer_norm
from softmod.kernels.program import joined, native
from softmod.kernels.switch import NORM, UPDATE, compiling, traced, used, version_in_use

__all__ = [
    "BINDERS",
    "NORM",
    "UPDATE",
    "available",
    "bound",
    "compiling",
    "fits",
    "fits_norm",
    "flat",
    "follow",
    "gradient",
    "halve",
    "halves",
    "heads",
    "in_fp32",
    "joined",
    "key",
    "layer_norm",
    "layers",
    "native",
    "newest",
    "operations",
    "optimizer",
    "policy",
    "same_dtype",
    "traced",
    "used",
    "version_in_use",
]
