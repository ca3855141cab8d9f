"""C functions compute the same bits with any number of threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.operations import captured
from softmod.kernels.binding import Native
from softmod.kernels.library import library
from softmod.kernels.switch import UPDATE

pytestmark = pytest.mark.usefixtures("compiler")

CASES = {
    "mt10, bf16": ["fabric.precision=bf16-mixed"],
    "mt10, fp32": ["fabric.precision=32-true"],
    "soft networks": ["model=soft_modular_normed", "fabric.precision=32-true"],
}


@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_number_of_threads(case: str):
    different, large = [], set()
    usual = torch.get_num_threads()
    for graph in captured("mt10", [*CASES[case], "fabric.kernels=auto"]).values():
        for name, call in zip(graph.names, graph._calls, strict=True):
            if not name.startswith("softmod::"):
                call()
                continue
            assert isinstance(call, Native)
            memory = list(tensors(call.kept))
            before = [tensor.clone() for tensor in memory]
            results = []
            for count in (1, 2, 3):
                for tensor, value in zip(memory, before, strict=True):
                    tensor.copy_(value)
                torch.set_num_threads(count)
                try:
                    call()
                finally:
                    torch.set_num_threads(usual)
                results.append([tensor.clone() for tensor in memory])
            large |= {name} if sum(tensor.numel() for tensor in memory) > 20000 else set()
            if not all(map(equal, results[0] * 2, [*results[1], *results[2]])):
                different.append(name)
    assert len(large) > 8
    assert not different


COUNT = """
import os
from threading import Thread
import torch
from softmod.capture.cpu_graph import CpuGraph
from softmod.kernels import layers, used
x = torch.ones(100, 100)  # too small for threads of PyTorch
y = torch.empty_like(x)
counts = []
def count():
    counts.append(len(os.listdir("/proc/self/task")))
def relu():
    with used(2):
        return {"relu": y.copy_(layers.relu(x))}
torch.set_num_threads(3)
count()
relu()
count()
torch.ones(1000, 1000).exp()
count()
torch.set_num_threads(1)
graph = CpuGraph(relu)
graph(), graph()
assert graph.settled
for call in (relu, graph):
    other = Thread(target=lambda: (call(), count()))
    other.start()
    other.join()
print(*counts)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_loops_are_shared_among_the_threads_of_pytorch():
    if b"omp_get_num_threads" not in Path(library(UPDATE)._name).read_bytes():
        pytest.skip("compiled without OpenMP")
    done = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True)
    before, ours, with_torch, *in_new_threads = map(int, done.stdout.split())
    assert ours == before + 2
    assert with_torch == ours
    assert in_new_threads == [ours + 1] * 2  # each with itself only


def tensors(kept: Any) -> Iterator[Tensor]:
    """Yield the tensors that a call reads and writes."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, list | tuple):
        for value in kept:
            yield from tensors(value)


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(value.reshape(-1).view(torch.uint8) for value in (a, b)))
