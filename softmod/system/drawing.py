"""matplotlib with its own defaults, whatever a matplotlibrc or MPLBACKEND of the user says.

A run must not end because LaTeX or a notebook's backend is not installed, and figures look the same
everywhere. Import matplotlib from here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_logger = logging.getLogger("matplotlib")
_level = _logger.level
_logger.setLevel(logging.ERROR)  # no advice on folders that it cannot write to
_backend = os.environ.pop("MPLBACKEND", None)  # a wrong one would be an error at the import
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
finally:
    _logger.setLevel(_level)
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

__all__ = ["Axes", "EngFormatter", "Figure", "FigureCanvasAgg", "drawn"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def drawn(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Draw in this function with matplotlib's default settings; the caller's are restored."""

    @wraps(function)
    def drawing(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return function(*args, **kwargs)

    return drawing
