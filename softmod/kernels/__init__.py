"""Fused operations for updates on a CPU, in C: compiled at first use, and left out where that is
not possible.
"""

from softmod.kernels.library import available, key
from softmod.kernels.norm import bound, fits, layer_norm
from softmod.kernels.switch import used

__all__ = ["available", "bound", "fits", "key", "layer_norm", "used"]
