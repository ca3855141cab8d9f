"""`python -m tests.cluster.table OUTCOMES PAGE`: the table of the cases of `make test-cluster`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]


def main() -> None:
    """Write and print the table; exit with an error if a case did not hold."""
    outcomes = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    skipped = [outcome for outcome in outcomes if outcome["outcome"] == "skipped"]
    failed = [outcome["test"] for outcome in outcomes if outcome["outcome"] == "failed"]
    text = "\n".join(lines(outcomes)) + "\n"
    print(text)
    if skipped:
        sys.exit(f"{len(skipped)} cases were skipped ({skipped[0]['why']}); the page stays")
    Path(sys.argv[2]).write_text(text)
    sys.exit("\n".join(["did not hold:", *failed]) if failed else 0)


def lines(outcomes: list[Outcome]) -> Iterator[str]:
    """Return the page in Markdown."""
    cases: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        for kind, name in outcome["marks"]:
            if kind == "case":
                cases[name].append(outcome)
    yield "# What was tried on a cluster\n"
    yield (
        "Written by `make test-cluster`, which starts a SLURM of two nodes and a PostgreSQL on one"
        " machine. After each case that stops a run, the hashes of its state equal those of an"
        " undisturbed run, there is one MLflow run with each value once, and its status is true.\n"
    )
    yield (
        f"{platform.machine()}; {slurm_version()}; Python {platform.python_version()},"
        f" submitit {version('submitit')}, MLflow {version('mlflow')}\n"
    )
    yield "| case | held | seconds |"
    yield "|---|---|---|"
    for name, tests in cases.items():
        held = all(test["outcome"] == "passed" for test in tests)
        told = "".join(f"; {text.partition(': ')[2]}" for test in tests for text in test["told"])
        took = " and ".join(f"{test['took']:.0f}" for test in tests)
        yield f"| {name}{told} | {'yes' if held else '**no**'} | {took} |"
    total = sum(test["took"] for tests in cases.values() for test in tests)
    yield f"\n{total / 60:.0f} minutes in all."


def slurm_version() -> str:
    """Return the version of SLURM, as in slurm-wlm 22.05.8."""
    try:
        done = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=False)
    except OSError:
        return "no SLURM"
    return done.stdout.strip()


if __name__ == "__main__":
    main()
