"""Values of a swept key, as in `key=a,b` and `key=range(0,4)`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException

from softmod.errors import ConfigError

MOST = 10_000  # values of a key


def sweep_values(override: Override) -> list[str]:
    """List the values of a swept key.

    Raises:
        ConfigError: There is none, there are more than 10,000, or they are not known beforehand,
            as with glob(*) and interval(0,1).
    """
    line = override.input_line
    space = override.value()
    try:
        steps: Iterable[float] = space.range() if isinstance(space, RangeSweep) else ()
        if len(list(islice(steps, MOST + 1))) > MOST:
            raise ConfigError(f"{line}: names more than {MOST:,} values")
        values = list(override.sweep_string_iterator())
    except (HydraException, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{line}: name the values, as in key=a,b or key=range(0,4)") from error
    if not values:
        raise ConfigError(f"{line}: names no value")
    return values
