"""`python -m benchmarks [section ...]`: print tables of measurements and write them as JSON.

Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.pairing import Figure

Rows = list[dict[str, Any]]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument(
        "--turns", type=int, default=5, help="measurements per contender (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds per stepping measurement (%(default)s)"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="launches: compiled updates too, a minute more"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench.json"), help="default: %(default)s"
    )
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.sections if name not in SECTIONS]:
        parser.error(f"{unknown[0]}: no such section; choose from {', '.join(SECTIONS)}")
    result: dict[str, Any] = {"machine": machine(), "turns": chosen.turns}
    for name in chosen.sections or SECTIONS:
        result[name] = SECTIONS[name](chosen)
        show(name, result[name])
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(result, indent=1))
    print(f"written: {chosen.output}")


def machine() -> dict[str, str]:
    """Return processor, cores and versions of this machine."""
    packages = ("torch", "mujoco", "metaworld", "gymnasium", "numpy")
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), ""
    )
    about = {
        "processor": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
    }
    return about | {name: version(name) for name in packages}


def _cpuinfo() -> list[str]:
    """Return the lines of /proc/cpuinfo, or none if there is no such file."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# --- sections -------------------------------------------------------------------------------------


def stepping(chosen: argparse.Namespace) -> Rows:
    """Measure env steps on MT10: ours, Meta-World's vector environments, EnvPool, physics alone."""
    from benchmarks import stepping as section

    cores = len(os.sched_getaffinity(0))
    figures = section.measure("mt10", cores, chosen.seconds, chosen.turns)
    return compare(figures, [section.GYM.format("async"), section.PHYSICS.format(cores)])


def updates(chosen: argparse.Namespace) -> Rows:
    """Measure an update on all cores: ours, a matrix product of equal FLOP, and the naive form."""
    from benchmarks import updates as section

    cores = len(os.sched_getaffinity(0))
    rows: Rows = []
    for experiment, overrides, naive in section.CASES:
        figures, gflop = section.measure(experiment, overrides, chosen.turns, cores, naive)
        against = [section.PRODUCT, section.ONEDNN_PRODUCT, section.NAIVE]
        what = f"{experiment} {' '.join(overrides)}".strip()
        rows += [
            row | {"what": f"{what}: {row['what']}", "GFLOP": round(gflop, 2)}
            for row in compare(figures, against)
        ]
    return rows


def ways(chosen: argparse.Namespace) -> Rows:
    """Measure an update run eagerly, captured and (MT10) compiled, on CUDA if available."""
    import torch

    from benchmarks import updates as section

    rows: Rows = []
    for experiment in ("paper_mt10", "paper_mt50", "quickstart"):
        for precision in (
            ("32-true", "tf32", "bf16-mixed") if torch.cuda.is_available() else ("32-true",)
        ):
            compiled = (
                experiment == "paper_mt10" and precision != "bf16-mixed"
            )  # half a minute each
            figures = section.ways(experiment, precision, chosen.turns, compiled)
            rows += [
                row | {"what": f"{experiment} {precision}: {row['what']}"}
                for row in compare(figures, ["eager"])
            ]
    return rows


def models(chosen: argparse.Namespace) -> Rows:
    """Measure each model's update on MT10, all cores, with its parameters and operations."""
    from benchmarks import updates as section

    rows: Rows = []
    figures, costs = section.models(chosen.turns, len(os.sched_getaffinity(0)))
    for row in compare(figures, [section.SOFT]):
        actor, critics, gflop = costs[row["what"]]
        rows.append(
            row | {"actor": f"{actor:,}", "critics": f"{critics:,}", "GFLOP": round(gflop, 1)}
        )
    return rows


def ingredients(chosen: argparse.Namespace) -> Rows:
    """Measure an update of the default recipe on MT10 with and without each part, one thread."""
    from benchmarks import updates as section

    return compare(section.ingredients(chosen.turns), [section.RECIPE])


def operations(chosen: argparse.Namespace) -> Rows:
    """Split an update's time into matrix products and the rest, with and without fused kernels."""
    from benchmarks import operations as section

    return section.split(chosen.turns, len(os.sched_getaffinity(0)))


def launches(chosen: argparse.Namespace) -> Rows:
    """Count the operations of an update as a GPU makes it; needs none."""
    from benchmarks import launches as section

    return section.table() + (section.compiled_table() if chosen.compiled else [])


def seeds(chosen: argparse.Namespace) -> Rows:
    """Measure updates of five seeds side by side in one process, and of the same seeds alone."""
    from benchmarks import seeds as section

    cores = len(os.sched_getaffinity(0))
    against = [
        section.IN_A_ROW.format(1),
        section.IN_A_ROW.format(cores),
        section.AT_A_TIME.format(cores),
    ]
    return [
        row | {"what": f"{case}: {row['what']}"}
        for case in section.CASES
        for row in compare(section.measure(case, cores, chosen.turns), against)
    ]


def growth(chosen: argparse.Namespace) -> Rows:
    """Measure collecting and learning per env step as tasks, width and modules grow, all cores."""
    from benchmarks import stepping as collecting
    from benchmarks import updates as learning

    cores = len(os.sched_getaffinity(0))
    rows = [
        row | {"what": f"collecting, {row['what']}"}
        for row in compare(
            collecting.growth(("mt10", "mt50"), cores, chosen.seconds, chosen.turns), ["mt10"]
        )
    ]
    figures = learning.growth(chosen.turns, cores)
    return rows + [row | {"what": f"learning, {row['what']}"} for row in compare(figures, ["mt10"])]


def checkpoints(chosen: argparse.Namespace) -> Rows:
    """Measure a whole checkpoint of MT10 with a million transitions: write, restore, size."""
    from benchmarks import saving

    return saving.measure("paper_mt10", 1_000_000, chosen.turns)


def runs(chosen: argparse.Namespace) -> Rows:
    """Measure a whole run, collecting alone and learning alone, and the use of all cores."""
    from benchmarks import whole

    rows = []
    for experiment, steps in (("quickstart", 8_000), ("mt10", 4_000), ("paper_mt10", 600)):
        figures = whole.rates(experiment, steps, max(1, chosen.turns // 2))
        for row in compare(figures, [whole.COLLECT, whole.LEARN]):
            rows.append(row | {"what": f"{experiment}: {row['what']}"})
        busy = Figure(
            "",
            "of all cores",
            [whole.busy(experiment, 30.0) for _ in range(max(1, chosen.turns // 2))],
        )
        row = {
            "what": f"{experiment}: cores busy",
            "median": busy.median,
            "unit": busy.unit,
            "each": busy.rates,
        }
        rows.append(row)
    return rows


def startup(chosen: argparse.Namespace) -> Rows:
    """Measure the seconds to the first round (goals cached) and of --help, and a run's memory."""
    from benchmarks import whole

    rows = []
    for name, measure in {
        "paper_mt10: command to first round": lambda: whole.startup("paper_mt10"),
        "paper_mt50: command to first round": lambda: whole.startup("paper_mt50"),
        "--help": whole.help_seconds,
    }.items():
        measure()  # fills the caches of goals and byte code
        rows.append(_seconds(name, measure, chosen.turns))
    for experiment in ("paper_mt10", "paper_mt50"):
        gib = whole.peak_memory(experiment, 60.0)
        rows.append({"what": f"{experiment}: memory after a minute", "median": gib, "unit": "GiB"})
    return rows


def _seconds(name: str, measure: Callable[[], float], turns: int) -> dict[str, Any]:
    """Return the row of a duration that is measured several times."""
    figure = Figure(name, "s", [measure() for _ in range(turns)])
    return {"what": name, "median": figure.median, "unit": "s", "each": figure.rates}


SECTIONS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "stepping": stepping,
    "updates": updates,
    "models": models,
    "ingredients": ingredients,
    "operations": operations,
    "launches": launches,
    "seeds": seeds,
    "ways": ways,
    "growth": growth,
    "checkpoints": checkpoints,
    "runs": runs,
    "startup": startup,
}


# --- output ---------------------------------------------------------------------------------------


def compare(figures: list[Figure], against: list[str]) -> Rows:
    """Return a row per figure, with its ratios to the figures named in `against`."""
    by_name = {figure.name: figure for figure in figures}
    return [
        {"what": figure.name, "median": figure.median, "unit": figure.unit, "each": figure.rates}
        | {f"x {name}": figure.ratio(by_name[name]) for name in against if name in by_name}
        for figure in figures
    ]


def show(name: str, rows: Rows) -> None:
    """Print a section's table: medians, and ratios with minimum and maximum."""
    print(f"\n{name}: {(SECTIONS[name].__doc__ or '').strip()}")
    table = Table()
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "each"))
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("what", "unit") else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=150).print(table)


def _cell(value: Any) -> str:
    """Format a cell."""
    if isinstance(value, tuple):
        return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
