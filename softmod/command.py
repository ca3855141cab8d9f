"""Parts shared by the commands: one-line failures, exit codes, the identity of a sweep."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hydra.core.override_parser.types import Override

from softmod.errors import SoftmodError
from softmod.system import signals, slurm
from softmod.system.streams import complain
from softmod.tracking.redact import redacted


class Interface(ModuleType):
    """A module of a command that Python calls as its function of the same name.

    `python -m softmod.train` is the command, `softmod.train(...)` the function.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the function's signature, for help in notebooks and editors."""
        return inspect.signature(self._function)

    @property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = vars(self)[self.__name__.rpartition(".")[2]]
        return function


def to_the_end(work: Callable[[], int]) -> int:
    """Run the jobs until they end or a signal stops them; return the exit code."""
    try:
        return work()
    except signals.StoppedError as stop:
        queued = slurm.ensure_rerun(signals.received())[1]
        complain("; ".join(part for part in (f"softmod: {stop}", stop.how, queued) if part))
        return signals.STOPPED
    except Exception:
        signals.check()
        raise


def sweep_identity(fixed: list[Override], swept: list[str], *kind: str) -> dict[str, str]:
    """Return the identity of a sweep: equal for equal fixed overrides and equal swept keys.

    The values of the swept keys do not matter, so that a sweep can be extended.

    Args:
        fixed: Overrides that all jobs share.
        swept: Keys that vary.
        *kind: Words that distinguish sweeps from searches.

    Returns:
        `id`, 16 hexadecimal digits, and for the sweep's run in MLflow `name`, `fixed` (the shared
        overrides, one a line) and `swept` (the keys).
    """
    lines = sorted(str(override.input_line) for override in fixed)
    digest = hashlib.sha256(json.dumps([lines, sorted(swept), *kind]).encode()).hexdigest()[:16]
    chosen = {override.get_key_element(): str(override.value()) for override in fixed}
    subject = chosen.get("experiment") or chosen.get("env", "quickstart")
    varied = ", ".join(sorted(swept)) or chosen.get("sweep", "sweep")
    return {
        "id": digest,
        "name": f"{subject}: {' '.join([*kind, varied])}",
        "fixed": "\n".join(lines),
        "swept": ", ".join(sorted(swept)),
    }


def tell(error: Exception, overrides: str = "") -> int:
    """Print an error in one line on stderr; return its exit code.

    An unexpected error is printed with its traceback. SOFTMOD_TRACEBACK=1 adds it to all errors.
    """
    complain(described(error, overrides))
    return error.exit_code if isinstance(error, SoftmodError) else 1


def described(error: BaseException, overrides: str = "") -> str:
    """Return what `tell` prints about an error, without passwords."""
    about = f" [{overrides}]" if overrides else ""
    line = f"softmod: {error}{about}"
    if isinstance(error, SoftmodError) and os.environ.get("SOFTMOD_TRACEBACK") != "1":
        return redacted(line)
    return redacted("".join(traceback.format_exception(error)).rstrip("\n") + f"\n{line}")
