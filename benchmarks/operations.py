"""Time of an update in matrix products and in all other operations, with and without kernels."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from benchmarks.updates import built
from softmod.capture.cpu_graph import CpuGraph
from softmod.capture.update_graph import Captured

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
TRIES = 20  # the shortest time of each operation counts, since disturbances only add time
CASES: dict[str, tuple[str, list[str]]] = {
    "mt10": ("mt10", []),
    "mt10, fp32": ("mt10", ["fabric.precision=32-true"]),
    "quickstart": ("quickstart", []),
    "quickstart, bf16": ("quickstart", ["fabric.precision=bf16-mixed"]),
    "paper_mt10": ("paper_mt10", []),
}
KERNELS = ("off", "auto")


def split(turns: int, cores: int) -> list[dict[str, Any]]:
    """Measure the milliseconds of each case's programs, with kernels off and on.

    All are measured on one thread, and the programs with kernels also on all cores.
    """
    ways = {"kernels off": ("off", 1), "kernels auto": ("auto", 1)}
    if cores > 1:
        ways[f"kernels auto, {cores} threads"] = ("auto", cores)
    rows = []
    for case, (experiment, overrides) in CASES.items():
        graphs = {
            how: captured(experiment, [*overrides, f"fabric.kernels={how}"]) for how in KERNELS
        }
        for program in graphs["off"]:
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(turns):
                for way, (how, threads) in ways.items():
                    torch.set_num_threads(threads)
                    times[way].append(milliseconds(graphs[how][program]))
            for way, (how, _) in ways.items():
                rest = [pair[1] for pair in times[way]]
                row: dict[str, Any] = {
                    "what": f"{case}: {program}, {way}",
                    "operations": len(graphs[how][program].names),
                    "products ms": median(pair[0] for pair in times[way]),
                    "others ms": median(rest),
                }
                off = times["kernels off"]
                ratios = [mine / pair[1] for mine, pair in zip(rest, off, strict=True)]
                row["others, x off"] = (median(ratios), min(ratios), max(ratios))
                row["all, x products"] = median(sum(pair) / pair[0] for pair in times[way])
                rows.append(row)
    return rows


def captured(experiment: str, overrides: list[str]) -> dict[str, CpuGraph]:
    """Return the captured programs of an agent after enough updates to capture all."""
    agent, replay, _, cfg = built(experiment, overrides)
    torch.set_num_threads(1)
    agent.learn(replay, 3 * cfg.algorithm.policy_delay)
    graphs = {}
    for name, program in agent.programs.items():
        graph = program._replay if isinstance(program, Captured) else None
        if isinstance(graph, CpuGraph) and graph.names:
            graphs[name] = graph
    return graphs


def milliseconds(graph: CpuGraph) -> tuple[float, float]:
    """Return the milliseconds of matrix products and of all other operations."""
    best = [
        min(times) * 1e3 for times in zip(*(graph.seconds() for _ in range(TRIES)), strict=True)
    ]
    products = sum(time for name, time in zip(graph.names, best, strict=True) if name in PRODUCTS)
    return products, sum(best) - products
