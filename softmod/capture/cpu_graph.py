"""Updates on a CPU without PyTorch's bookkeeping: recorded operations, repeated on the same memory.

A small update spends most of its time on autograd's graph, views and memory allocation. A
repetition skips these. It runs the same operations in the same order, so results are bitwise equal.
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
    address,
    map_tensors,
    tensors,
)

Metrics = dict[str, Tensor]
Call = Callable[[], object]
# Copies that may change the dtype or the layout.
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)

log = logging.getLogger(__name__)


class CpuGraph:
    """A function whose operations are the same in every call.

    The first call records the operations. The second call compares a repetition with the function.
    All later calls repeat the operations.

    The function may branch on flags (`if flag:`). If a flag is False, the changes so far are undone
    and the function itself is called. A function that cannot be recorded is always called.

    Args:
        function: reads and writes the same tensors in each call. The next call overwrites the
            results.
        undo: restores what the function changes before it reads its last flag.
        undone: the tensors that `undo` restores.
    """

    def __init__(
        self,
        function: Callable[[], Metrics],
        undo: Callable[[], None] = lambda: None,
        undone: Sequence[Tensor] = (),
    ) -> None:
        self._function = function
        self._undo = undo
        self._undone = {address(tensor) for tensor in undone}
        self._calls: list[Call] = []  # one per operation
        self._program: list[Call] = []  # the calls, of which some are made by one function
        self.names: list[str] = []  # names of the repeated operations
        self._metrics: Metrics = {}
        self._changes: list[Tensor] = []  # tensors that the function changes
        self._next: Callable[[], Metrics] = self._record

    def __call__(self) -> Metrics:
        """Run the function or repeat its operations; return its results."""
        return self._next()

    @property
    def settled(self) -> bool:
        """Return whether all further calls repeat the operations."""
        return self._next == self._replay

    def _record(self) -> Metrics:
        with Recorder() as recorder:
            metrics = self._function()
        copies = {name: tensor.clone() for name, tensor in metrics.items()}
        try:
            self._prepare(recorder.operations, metrics)
        except NotRepeatableError as error:
            self._fall_back(str(error))
        return copies

    def _compare(self) -> Metrics:
        """Repeat the operations, then call the function from the same state.

        If the results are bitwise equal, later calls repeat the operations.
        """
        before = [tensor.clone() for tensor in self._changes]
        if not self._run_calls():
            return self._undo_and_call()
        repeated = [tensor.clone() for tensor in (*self._changes, *self._metrics.values())]
        torch._foreach_copy_(self._changes, before)
        metrics = self._function()
        if all(map(torch.equal, repeated, (*self._changes, *metrics.values()))):
            self._next = self._replay
        else:
            self._fall_back("repeating its operations gives another result")
        return metrics

    def seconds(self) -> list[float]:
        """Repeat all operations; return the seconds of each, in the order of `names`.

        For benchmarks only.
        """
        times = [time.perf_counter()]
        with torch.no_grad():
            for call in self._calls:
                call()
                times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]

    def _replay(self) -> Metrics:
        return self._metrics if self._run_calls() else self._undo_and_call()

    def _run_calls(self) -> bool:
        """Repeat the operations up to the first flag that is False; return whether all ran."""
        torch.get_num_threads()  # in a new Python thread, this sets OpenMP's number of threads
        with torch.no_grad():
            return all(call() is not False for call in self._program)

    def _undo_and_call(self) -> Metrics:
        self._undo()
        return self._function()

    def _fall_back(self, reason: str) -> None:
        log.info("updates are not captured: %s", reason)
        self._calls = []
        self._program = []
        self.names = []
        self._next = self._function

    def _prepare(self, operations: list[Operation], metrics: Metrics) -> None:
        """Turn the operations into calls; if a flag was False, leave recording to the next call.

        Raises:
            NotRepeatableError: the operations depend on values other than flags.
        """
        flags = flags_of(operations, self._undone)
        if not all(operation.value for operation in flags):
            return
        steps = [operation for operation in operations if operation.computes or operation in flags]
        moved = in_shared_memory(steps, operations, keep=metrics.values())
        fused = any(operation.function in kernels.BINDERS for operation in steps)
        self._calls = [call_of(operation, moved, fused) for operation in steps]
        self._program = kernels.joined(self._calls) if fused else self._calls
        self.names = [operation.function._schema.name for operation in steps]
        self._changes = changes_of(operations)
        self._metrics = metrics
        self._next = self._compare


def flags_of(operations: Sequence[Operation], undone: set[int]) -> list[Operation]:
    """Return the operations that read a flag, the first one for each flag.

    Raises:
        NotRepeatableError: an operation reads a value that is not a flag, or reads a flag after a
            change to memory that is not in `undone`.
    """
    flags: dict[int, Operation] = {}
    created = created_addresses(operations)
    changed: set[int] = set()
    for operation in operations:
        if operation.value is not None and address(operation.inputs[0]) not in flags:
            if operation.function is not READS or operation.inputs[0].dtype is not torch.bool:
                raise NotRepeatableError(f"{operation.function} reads a value")
            if not changed <= undone:
                raise NotRepeatableError("a flag is read after a change that cannot be undone")
            flags[address(operation.inputs[0])] = operation
        changed |= {address(tensor) for tensor in operation.written} - created
    return list(flags.values())


def changes_of(operations: Sequence[Operation]) -> list[Tensor]:
    """Return the tensors that existed before the operations and are changed by them."""
    created = created_addresses(operations)
    changes: dict[Any, Tensor] = {}
    for operation in operations:
        for tensor in operation.written:
            if address(tensor) not in created:
                key = address(tensor), tensor.storage_offset(), tensor.shape
                changes[key] = tensor
    return list(changes.values())


def created_addresses(operations: Iterable[Operation]) -> set[int]:
    """Return the addresses of memory that the operations allocate."""
    return {address(tensor) for operation in operations for tensor in operation.created}


def in_shared_memory(
    steps: Sequence[Operation], operations: Sequence[Operation], keep: Iterable[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Assign memory for a repetition, reusing it after the last step that uses it.

    Args:
        steps: the operations that are repeated.
        operations: all recorded operations.
        keep: tensors that stay in their recorded memory.

    Returns:
        A function from recorded tensors to tensors in the assigned memory.
    """
    own = created_addresses(operations) - {address(tensor) for tensor in keep}
    last_step: dict[int, int] = {}
    for number, step in enumerate(steps):
        for tensor in (*step.inputs, *step.outputs):
            last_step[address(tensor)] = number
    free: dict[int, list[Tensor]] = defaultdict(list)  # by size in bytes
    memory: dict[int, Tensor] = {}
    for number, step in enumerate(steps):
        used = {address(tensor): tensor for tensor in (*step.inputs, *step.outputs)}
        for key, tensor in used.items():
            if key in own and key not in memory:
                size = tensor.untyped_storage().nbytes()
                reused = free[size].pop() if free[size] else None
                memory[key] = torch.empty(size, dtype=torch.uint8) if reused is None else reused
        for key in used:
            if key in own and last_step[key] == number:
                free[memory[key].numel()].append(memory[key])

    def moved(tensor: Tensor) -> Tensor:
        if address(tensor) not in memory:
            return tensor
        storage = memory[address(tensor)].untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return moved


def call_of(operation: Operation, moved: Callable[[Tensor], Tensor], fused: bool = False) -> Call:
    """Return an operation as a call without arguments; a read of a flag returns its value.

    Args:
        operation: a recorded operation.
        moved: the function from recorded tensors to their memory in a repetition.
        fused: call C functions where there are some, to be joined by `kernels.joined`.
    """
    args = map_tensors(moved, operation.args)
    kwargs = dict(zip(operation.kwargs, map_tensors(moved, operation.kwargs.values()), strict=True))
    outputs = [moved(tensor) for tensor in operation.outputs]
    if bound := kernels.bound(operation.function, args, outputs):
        return bound
    if fused and (product := _in_c(operation, args, outputs)):
        return product
    if not operation.created:  # an in-place operation or a read
        return partial(operation.function, *args, **kwargs)
    if operation.function in COPIES:
        return partial(outputs[0].copy_, args[0])
    overload = None if operation.writes else overload_with_out(operation.function)
    # An overload with more outputs than recorded would need memory for undefined outputs.
    if overload is None or len(overload[1]) > len(outputs):
        return partial(_call_and_copy, partial(operation.function, *args, **kwargs), outputs)
    function, names = overload
    known = {argument.name for argument in function._schema.arguments}
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    if len(names) < len(outputs) or operation.returns_list:
        return partial(function, *args, **kwargs, **{names[0]: outputs})
    if call := _torch_call(operation, args, kwargs, outputs):
        return call
    return partial(function, *args, **kwargs, **dict(zip(names, outputs, strict=True)))


def _in_c(operation: Operation, args: Sequence[Any], outputs: Sequence[Tensor]) -> Call | None:
    """Return PyTorch's C function of an operation with one output; None if there is none."""
    if len(outputs) != 1 or (operation.kwargs and operation.function not in COPIES):
        return None
    if operation.function is torch.ops.aten.copy_.default:
        args = args[1:]
    return kernels.native(operation.function, args, outputs[0])


def _call_and_copy(call: Call, outputs: Sequence[Tensor]) -> None:
    for output, value in zip(outputs, tensors((call(),)), strict=True):
        output.copy_(value)


def _torch_call(
    operation: Operation, args: Any, kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> Call | None:
    """Return a call of the function of the same name in `torch`, at half the cost.

    Return None if there is no such function or it does not accept the arguments. The only way to
    find out is a trial call; its output is written again before it is read.
    """
    function: Any = getattr(torch, operation.function._schema.name.removeprefix("aten::"), None)
    if function is None or len(outputs) > 1:
        return None
    call = partial(function, *args, **kwargs, out=outputs[0])
    try:
        call()
    except (TypeError, RuntimeError):
        return None
    return call


@cache
def overload_with_out(function: Any) -> tuple[Any, list[str]] | None:
    """Return the overload of a function with output arguments, and their names; None if none."""
    wanted = [str(argument.type) for argument in function._schema.arguments]
    packet = getattr(torch.ops.aten, function._schema.name.removeprefix("aten::"))
    for name in packet.overloads():
        overload = getattr(packet, name)
        outputs = []
        inputs = []
        for argument in overload._schema.arguments:
            if argument.is_out:
                outputs.append(argument.name)
            else:
                inputs.append(str(argument.type))
        if outputs and inputs == wanted:
            return overload, outputs
    return None
