"""Fused operations in C for updates on a CPU, compiled at first use and optional."""

from softmod.kernels.library import available, key
from softmod.kernels.norm import bound, fits, layer_norm
from softmod.kernels.switch import used

__all__ = ["available", "bound", "fits", "key", "layer_norm", "used"]
