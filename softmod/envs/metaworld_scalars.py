"""Stand-ins for functions of scalars and short vectors in Meta-World's tasks, with less overhead.

Each stand-in returns the same bits *and the same type* as the original. Types determine how the
next operation rounds: a Python float times a `float32` is a `float32`, a `float64` times a
`float32` is a `float64`. Only common cases are implemented; all others call the original. Sums
whose order a library determines (`dot`) use the same library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt
from types import ModuleType
from typing import Any

import numpy as np
from metaworld.utils import reward_utils
from numpy import float64
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

DOUBLE = np.dtype(float64)
NUMBERS = (float, float64)
SCALARS = (np.float32, float64)
Pairs = tuple[tuple[Any, Any], ...]  # originals and their replacements


def norm(x: Any, ord: Any = None, *args: Any, **options: Any) -> Any:
    """Compute `np.linalg.norm`; fast for float64 vectors and scalars."""
    kind = type(x)
    if kind is np.ndarray and x.ndim == 1 and x.dtype is DOUBLE and x.flags.c_contiguous:
        if (ord is None or ord == 2) and not (args or options):
            return float64(sqrt(x.dot(x)))
    elif kind is float64 and ord is None and not (args or options):
        return float64(sqrt(x * x))
    return np.linalg.norm(x, ord, *args, **options)


def clip(x: Any, low: Any = None, high: Any = None, *args: Any, **options: Any) -> Any:
    """Compute `np.clip`; fast for a scalar strictly between integer bounds."""
    if (
        type(x) in SCALARS
        and type(low) is int
        and type(high) is int
        and low < x < high
        and not (args or options)
    ):
        return x
    return np.clip(x, low, high, *args, **options)


def hstack(arrays: Any, **options: Any) -> Any:
    """Compute `np.hstack`; fast for vectors."""
    if not options and all(type(array) is np.ndarray and array.ndim == 1 for array in arrays):
        return np.concatenate(arrays)
    return np.hstack(arrays, **options)


def tolerance(
    x: Any,
    bounds: Any = (0.0, 0.0),
    margin: Any = 0.0,
    sigmoid: Any = "gaussian",
    value_at_margin: float = 0.1,
) -> Any:
    """Compute `reward_utils.tolerance`; fast for scalars with a margin and the sigmoids in use."""
    lower, upper = bounds
    slope = SLOPES.get(sigmoid)
    if slope and type(x) in NUMBERS and type(margin) in NUMBERS and margin > 0 and lower <= upper:
        if lower <= x <= upper:
            return 1.0
        try:
            return slope(float((lower - x if x < lower else x - upper) / margin), value_at_margin)
        except OverflowError:  # numpy returns infinity
            pass
    return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)


def _long_tail(distance: float, value_at_1: float) -> float:
    return 1 / ((distance * _long_tail_stretch(value_at_1)) ** 2 + 1)


def _gaussian(distance: float, value_at_1: float) -> float:
    """Compute a Gaussian with numpy's `exp`, which rounds differently from `math.exp`."""
    return float(np.exp(-0.5 * (distance * _gaussian_stretch(value_at_1)) ** 2))


@cache
def _long_tail_stretch(value_at_1: float) -> float:
    return float(np.sqrt(1 / value_at_1 - 1))


@cache
def _gaussian_stretch(value_at_1: float) -> float:
    return float(np.sqrt(-2 * np.log(value_at_1)))


SLOPES: dict[str, Callable[[float, float], float]] = {
    "long_tail": _long_tail,
    "gaussian": _gaussian,
}


def rect_prism_tolerance(curr: Any, zero: Any, one: Any) -> Any:
    """Compute `reward_utils.rect_prism_tolerance`.

    Inside the box with corners `zero` and `one`, each `[3]`, it is the product of the relative
    distances from `zero`; outside, 1.
    """
    share = 1.0
    for x, start, end in zip(curr.tolist(), zero.tolist(), one.tolist(), strict=True):
        if not (start <= x <= end if start <= end else end <= x <= start):
            return 1.0
        if start == end:  # numpy divides by zero
            return reward_utils.rect_prism_tolerance(curr, zero, one)
        share *= (x - start) / (end - start)
    return float64(share)


class Quaternion:
    """The part of scipy's `Rotation` that the tasks use: matrices `[3, 3]` to quaternions `[4]`."""

    __slots__ = ("_matrix",)

    def __init__(self, matrix: NDArray[np.float64]) -> None:
        self._matrix = matrix

    @classmethod
    def from_matrix(cls, matrix: NDArray[np.float64]) -> Quaternion:
        """Return the rotation of an orthogonal matrix."""
        return cls(matrix)

    def as_quat(self) -> NDArray[np.float64]:
        """Return the normalized quaternion `[x, y, z, w]`.

        As in scipy, it is computed from the largest of diagonal and trace. MuJoCo's matrices come
        from unit quaternions, so scipy would not orthogonalise them.
        """
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = self._matrix.tolist()
        trace = xx + yy + zz
        if trace > xx and trace > yy and trace > zz:
            x = zy - yz
            y = xz - zx
            z = yx - xy
            w = 1 + trace
        elif xx >= yy and xx >= zz:
            x = 1 - trace + 2 * xx
            y = yx + xy
            z = zx + xz
            w = zy - yz
        elif yy >= zz:
            x = yx + xy
            y = 1 - trace + 2 * yy
            z = zy + yz
            w = xz - zx
        else:
            x = zx + xz
            y = zy + yz
            z = 1 - trace + 2 * zz
            w = yx - xy
        length = sqrt(x * x + y * y + z * z + w * w)
        return np.array((x / length, y / length, z / length, w / length))


def _stand_in(module: ModuleType, **replaced: Any) -> ModuleType:
    """Return a copy of a module with some names replaced; the module itself is unchanged."""
    copy = ModuleType(module.__name__, module.__doc__)
    vars(copy).update({**vars(module), **replaced})
    return copy


STAND_INS: Pairs = (
    (np, _stand_in(np, linalg=_stand_in(np.linalg, norm=norm), clip=clip, hstack=hstack)),
    (
        reward_utils,
        _stand_in(reward_utils, tolerance=tolerance, rect_prism_tolerance=rect_prism_tolerance),
    ),
    (reward_utils.tolerance, tolerance),
    (Rotation, Quaternion),
)
