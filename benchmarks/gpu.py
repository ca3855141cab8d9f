"""`python -m benchmarks.gpu`: rates of updates by the way to run them, and kernels of one chunk.

`benchmarks/gpu.sh` calls it. Every result is appended to a file in the output folder at once, so a
time limit loses nothing that was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.__main__ import machine
from benchmarks.updates import built

PER_GRAPH = 26  # updates per chunk: a multiple of the recipe's policy delay
RATES = "rates.jsonl"
CASES = ("mt10", "mt50", "paper_mt10", "paper_mt50")  # experiments
WAYS: dict[str, tuple[list[str], int]] = {  # overrides, and updates per graph
    "eager": (["fabric.compile=eager", "fabric.precision=tf32"], 0),
    "captured": (["fabric.compile=captured", "fabric.precision=tf32"], 0),
    "chunks": (["fabric.compile=captured", "fabric.precision=tf32"], PER_GRAPH),
    "chunks, bf16": (["fabric.compile=captured", "fabric.precision=bf16"], PER_GRAPH),
    "compiled": (["fabric.compile=compiled", "fabric.precision=tf32"], PER_GRAPH),
    "compiled, bf16": (["fabric.compile=compiled", "fabric.precision=bf16"], PER_GRAPH),
}
# Of a rehearsal: tf32 needs CUDA, and large batches take long.
REHEARSED = ["fabric.precision=32-true", "run.batch_per_task=2"]
SECONDS = 2.0  # of a measurement


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("what", choices=["rates", "kernels", "table"])
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rehearse", action="store_true", help="small sizes, without a GPU")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    if chosen.what == "table":
        print(table(read(chosen.output)))
        return
    if not chosen.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --rehearse runs without one")
    for case in chosen.cases:
        for way in chosen.ways:
            if chosen.what == "kernels":
                (chosen.output / f"kernels_{case}.txt").write_text(
                    kernels(case, way, chosen.rehearse)
                )
            else:
                append(chosen.output, rate(case, way, chosen.rehearse))


def rate(case: str, way: str, rehearse: bool) -> dict[str, Any]:
    """Measure the updates per second of an experiment in one way, after a warm-up."""
    began = time.perf_counter()
    learn, size = updates_of(case, way, rehearse)
    learn()
    _wait()
    start = time.perf_counter() - began
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < (SECONDS / 10 if rehearse else SECONDS):
        learn()
        made += size
        _wait()
    per_second = made / (time.perf_counter() - began)
    return {
        "case": case,
        "way": way,
        "updates/s": per_second,
        "start": start,
        "rehearsal": rehearse,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        **machine(),
    }


def updates_of(case: str, way: str, rehearse: bool) -> tuple[Callable[[], object], int]:
    """Return a function that makes a number of updates of an experiment, and that number."""
    overrides, per_graph = WAYS[way]
    device = "cpu" if rehearse else "cuda"
    line = [*overrides, f"fabric.accelerator={device}", *(REHEARSED if rehearse else [])]
    if rehearse and "bf16" in way:
        line.append("fabric.precision=bf16")
    torch._dynamo.reset()  # Dynamo stops recompiling a function after too many variants
    agent, replay, _, _ = built(case, line, per_graph)
    size = 2 if rehearse else PER_GRAPH
    return lambda: agent.learn(replay, size), size


def kernels(case: str, way: str, rehearse: bool) -> str:
    """Return a table of the kernels of some updates, by total time."""
    learn, size = updates_of(case, way, rehearse)
    for _ in range(3):
        learn()
    _wait()
    activities = [ProfilerActivity.CPU if rehearse else ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        learn()
        _wait()
    key = "self_cpu_time_total" if rehearse else "self_device_time_total"
    events = profiled.key_averages()
    count = sum(event.count for event in events)
    rows = events.table(sort_by=key, row_limit=40, max_name_column_width=60)
    return f"{case}, {way}: {size} updates, {count / size:.0f} kernels an update\n{rows}\n"


def append(output: Path, row: dict[str, Any]) -> None:
    """Add a measured rate to the output folder, and print it."""
    with (output / RATES).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['case']}, {row['way']}: {row['updates/s']:.0f} updates/s", flush=True)


def read(output: Path) -> Iterator[dict[str, Any]]:
    """Yield the rates in an output folder."""
    path = output / RATES
    for line in path.read_text().splitlines() if path.exists() else []:
        yield json.loads(line)


def table(rows: Iterator[dict[str, Any]]) -> str:
    """Return the rates as a Markdown table with a row per experiment and a column per way."""
    cells: dict[str, dict[str, str]] = {}
    title = "nothing was measured"
    for row in rows:
        title = f"{row['device']}, Python {row['python']}, PyTorch {row['torch']}, updates/s"
        if row["rehearsal"]:
            title += " (a rehearsal: tiny batches, means nothing)"
        text = f"{row['updates/s']:,.0f} (start {row['start']:.0f} s)"
        cells.setdefault(row["case"], {})[row["way"]] = text
    ways = [way for way in WAYS if any(way in of for of in cells.values())]
    lines = [f"{title}:", "", f"| | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for case, of in cells.items():
        lines.append(f"| `{case}` | {' | '.join(of.get(way, '') for way in ways)} |")
    return "\n".join(lines)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
