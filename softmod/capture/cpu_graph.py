"""An update on the CPU without PyTorch's bookkeeping: recorded once, its operations are repeated on
the same memory.

In a small update most time goes into autograd's graph, views, and memory that is fetched and given
back. None of it is needed a second time: the operations and their order stay, bit by bit, and
whatever lies in the memory between them.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from softmod import kernels
from softmod.capture.recorder import (
    READS,
    NotRepeatableError,
    Operation,
    Recorder,
    mapped,
    place,
    tensors,
)

Metrics = dict[str, Tensor]
Call = Callable[[], object]
COPIES = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.clone.default,
)  # of other types, or in another layout

log = logging.getLogger(__name__)


class CpuGraph:
    """A function whose operations do not change, called again and again; the first call records,
    the second compares.

    The function may ask flags (`if flag:`). Where one is not what it was in the recording, what was
    done of the call is undone and the function called as it is; so is everything if it cannot be
    recorded.

    Args:
        function: reads and writes the same tensors each time. What it gives lies in memory that the
            next call overwrites.
        undo: puts back what the function changes before it asks its last flag, if it changes
            anything before.
        undone: the tensors that `undo` puts back.
    """

    def __init__(
        self,
        function: Callable[[], Metrics],
        undo: Callable[[], None] = lambda: None,
        undone: Sequence[Tensor] = (),
    ) -> None:
        self._function = function
        self._undo = undo
        self._undone = {place(tensor) for tensor in undone}
        self._calls: list[Call] = []
        self.names: list[str] = []  # of the operations that are repeated
        self._metrics: Metrics = {}
        self._changes: list[Tensor] = []  # what the function changes
        self._next: Callable[[], Metrics] = self._record

    def __call__(self) -> Metrics:
        return self._next()

    @property
    def settled(self) -> bool:
        """Return whether the operations are repeated from now on."""
        return self._next == self._repeated

    def _record(self) -> Metrics:
        with Recorder() as recorder:
            metrics = self._function()
        told = {name: tensor.clone() for name, tensor in metrics.items()}
        try:
            self._prepare(recorder.operations, metrics)
        except NotRepeatableError as error:
            self._give_up(str(error))
        return told

    def _compare(self) -> Metrics:
        """One call in both ways; repeating has to lead to the same, bit by bit."""
        before = [tensor.clone() for tensor in self._changes]
        if not self._repeat():
            return self._anew()
        repeated = [tensor.clone() for tensor in (*self._changes, *self._metrics.values())]
        torch._foreach_copy_(self._changes, before)
        metrics = self._function()
        if all(map(torch.equal, repeated, (*self._changes, *metrics.values()))):
            self._next = self._repeated
        else:
            self._give_up("repeating its operations gives another result")
        return metrics

    def seconds(self) -> list[float]:
        """Repeat all operations and return how long each of them takes, in the order of `names`;
        for measurements.
        """
        times = [time.perf_counter()]
        with torch.no_grad():
            for call in self._calls:
                call()
                times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]

    def _repeated(self) -> Metrics:
        return self._metrics if self._repeat() else self._anew()

    def _repeat(self) -> bool:
        """All operations; whether no flag was in the way."""
        with torch.no_grad():
            return all(call() is not False for call in self._calls)

    def _anew(self) -> Metrics:
        self._undo()
        return self._function()

    def _give_up(self, why: str) -> None:
        log.info("updates run at PyTorch's speed: %s", why)
        self._calls = []
        self.names = []
        self._next = self._function

    def _prepare(self, operations: list[Operation], metrics: Metrics) -> None:
        """Make calls of the operations, unless a flag was not set: then the next call records.

        Raises:
            NotRepeatableError: they depend on more than flags.
        """
        flags = flags_of(operations, self._undone)
        if not all(operation.value for operation in flags):
            return
        steps = [operation for operation in operations if operation.computes or operation in flags]
        moved = in_shared_memory(steps, operations, keep=metrics.values())
        self._calls = [call_of(operation, moved) for operation in steps]
        self.names = [operation.function._schema.name for operation in steps]
        self._changes = changes_of(operations)
        self._metrics = metrics
        self._next = self._compare


def flags_of(operations: Sequence[Operation], undone: set[int]) -> list[Operation]:
    """The operations that ask a flag, each flag once.

    Raises:
        NotRepeatableError: a value is read that is no flag, or one when something was changed that
            is not `undone`.
    """
    flags: dict[int, Operation] = {}
    created = places_of(operations)
    changed: set[int] = set()
    for operation in operations:
        if operation.value is not None and place(operation.inputs[0]) not in flags:
            if operation.function is not READS or operation.inputs[0].dtype is not torch.bool:
                raise NotRepeatableError(f"{operation.function} reads a value")
            if not changed <= undone:
                raise NotRepeatableError("a flag is asked after a change that cannot be undone")
            flags[place(operation.inputs[0])] = operation
        changed |= {place(tensor) for tensor in operation.written} - created
    return list(flags.values())


def changes_of(operations: Sequence[Operation]) -> list[Tensor]:
    """The tensors from before that are changed."""
    created = places_of(operations)
    written = [
        tensor
        for operation in operations
        for tensor in operation.written
        if place(tensor) not in created
    ]
    return list(
        {
            (place(tensor), tensor.storage_offset(), tensor.shape): tensor for tensor in written
        }.values()
    )


def places_of(operations: Iterable[Operation]) -> set[int]:
    """The memory that came to be meanwhile."""
    return {place(tensor) for operation in operations for tensor in operation.created}


def in_shared_memory(
    steps: Sequence[Operation], operations: Sequence[Operation], keep: Iterable[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Map each tensor to its memory in a repetition; memory is reused after the last step that
    reads it.
    """
    own = places_of(operations) - {place(tensor) for tensor in keep}
    last = {
        place(tensor): i for i, step in enumerate(steps) for tensor in (*step.inputs, *step.outputs)
    }
    free: dict[int, list[Tensor]] = defaultdict(list)
    memory: dict[int, Tensor] = {}
    for i, step in enumerate(steps):
        used = {
            place(tensor): tensor
            for tensor in (*step.inputs, *step.outputs)
            if place(tensor) in own
        }
        for where, tensor in used.items():
            if where not in memory:
                size = tensor.untyped_storage().nbytes()
                memory[where] = (
                    free[size].pop() if free[size] else torch.empty(size, dtype=torch.uint8)
                )
        for where in used:
            if last[where] == i:
                free[memory[where].numel()].append(memory[where])

    def moved(tensor: Tensor) -> Tensor:
        if place(tensor) not in memory:
            return tensor
        storage = memory[place(tensor)].untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return moved


def call_of(operation: Operation, moved: Callable[[Tensor], Tensor]) -> Call:
    """The operation as a call without arguments; one that asks a flag tells it."""
    args = mapped(moved, operation.args)
    kwargs = dict(zip(operation.kwargs, mapped(moved, operation.kwargs.values()), strict=True))
    if not operation.created:  # it changes its inputs, or asks
        return partial(operation.function, *args, **kwargs)
    outputs = [moved(tensor) for tensor in operation.outputs]
    if own := kernels.bound(operation.function, args, outputs):
        return partial(_keeping, own, (args, outputs))
    if operation.function in COPIES:
        return partial(outputs[0].copy_, args[0])
    form = None if operation.writes else form_with_out(operation.function)
    if form is None or len(form[1]) > len(
        outputs
    ):  # none, or one that wants memory for outputs left undefined
        return partial(_call_and_copy, partial(operation.function, *args, **kwargs), outputs)
    function, names = form
    known = {argument.name for argument in function._schema.arguments}
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    if len(names) < len(outputs) or operation.gives_list:
        return partial(function, *args, **kwargs, **{names[0]: outputs})
    return _by_name(operation, args, kwargs, outputs) or partial(
        function, *args, **kwargs, **dict(zip(names, outputs, strict=True))
    )


def _keeping(call: Call, _: object) -> None:
    """Call it; the second argument only keeps its tensors alive."""
    call()


def _call_and_copy(call: Call, outputs: Sequence[Tensor]) -> None:
    for output, value in zip(outputs, tensors((call(),)), strict=True):
        output.copy_(value)


def _by_name(
    operation: Operation, args: Any, kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> Call | None:
    """The same by its name in `torch`, if it has one there that takes the arguments: half the cost
    of a call.
    """
    call: Any = getattr(torch, operation.function._schema.name.removeprefix("aten::"), None)
    if call is None or len(outputs) > 1:
        return None
    call = partial(call, *args, **kwargs, out=outputs[0])
    try:
        call()  # what it writes now is written again before it is read
    except (TypeError, RuntimeError):
        return None
    return call


@cache
def form_with_out(function: Any) -> tuple[Any, list[str]] | None:
    """The overload of a function that writes to tensors it is given, and their names; None if there
    is none.
    """
    name = function._schema.name.removeprefix("aten::")
    wanted = [str(argument.type) for argument in function._schema.arguments]
    packet = getattr(torch.ops.aten, name)
    for overload in (getattr(packet, name) for name in packet.overloads()):
        arguments = overload._schema.arguments
        names = [argument.name for argument in arguments if argument.is_out]
        if (
            names
            and [str(argument.type) for argument in arguments if not argument.is_out] == wanted
        ):
            return overload, names
    return None
