"""The table of promises: every test marked `bar(number)` is an attempt at one, every
`control(number)` breaks one.

`make test-reliability` runs them all, the minutes-long ones too: first those that may run side by
side, then those that look at the clock (`timed`), one by one. Each run of pytest adds its outcomes
to a file (`--outcomes FILE`), and `python -m tests.reliability.table OUTCOMES TABLE` makes the
table of it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

BARS = {
    1: "equal runs have equal hashes, with 0, 1 and 2 workers; another seed differs",
    2: "stopped at any moment and resumed: equal hash",
    3: "`kill -9` at any moment: equal hash, one MLflow run, each metric once, nothing left over",
    4: "replay and model of a checkpoint come from one instant",
    5: "a damaged checkpoint is detected and the one before it used, with one warning",
    6: "killed at every point of a save: a valid checkpoint exists; nothing is written elsewhere",
    7: "disk full, file-size limit, folder gone: loud, exit 4 after three, the old one intact",
    8: (
        "a checkpoint after a session's first writes only what is new, pauses at most 1 s, adds at"
        " most 10 % memory"
    ),
    9: "SIGTERM, SIGUSR1, SIGHUP and similar: saved, exit 143, a second one is safe, one requeue",
    10: "Ctrl-C: exit 130, few lines, no orphans, KILLED",
    11: "a worker dies: seen, named, replaced up to 3 times; the same run",
    12: "a worker hangs: replaced at its time-out; no stale reply is used",
    13: "the learner is killed: no process and no shared memory is left",
    14: "broken physics: caught at the step, episode cut short, replay finite, exit 6 if too many",
    15: "non-finite losses: nothing changes, ten in a row exit 6 with a bundle that repeats it",
    16: "the replay against a list: never an unwritten slot, exact after wrap-around and reload",
    17: "equal seeds, equal episodes; copies differ; global random states untouched",
    18: "tracking server away, killed or silent: training unhindered, everything arrives",
    19: "six jobs at once on a new sqlite file; a corrupt or read-only one stops nothing",
    20: "statuses are true; a sweep survives a failed job and names it",
    21: "faulty command lines: exit 2, key, value, allowed, nearest; nothing created",
    22: "hostile files: no code runs, nothing written elsewhere, one line",
    23: "the dashboard listens on 127.0.0.1; passwords are nowhere",
    24: "100,000 steps: memory, files, threads and processes stay",
}
NO_GPU = "Skipped: no CUDA device"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--outcomes", help="add what became of attempts and controls to this file of JSON lines"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[Any]:
    report = yield
    report.marks = [
        (mark.name, number)
        for mark in item.iter_markers()
        if mark.name in ("bar", "control", "case")
        for number in mark.args
    ]
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = config.getoption("--outcomes", None)
    if path and not hasattr(
        config, "workerinput"
    ):  # of a process of pytest-xdist, whose reports come here too
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        reports = [
            report
            for kind in ("passed", "failed", "skipped", "error")
            for report in terminalreporter.getreports(kind)
        ]
        with Path(path).open("a") as file:
            file.writelines(
                json.dumps(outcome) + "\n" for outcome in map(outcome_of, reports) if outcome
            )


def outcome_of(report: Any) -> dict[str, Any] | None:
    """Return the outcome of a promise in a report; None if the report has none."""
    marks = getattr(report, "marks", ())
    if not marks or (report.when != "call" and report.outcome == "passed"):
        return None
    told = [f"{name}: {value}" for name, value in report.user_properties]
    return {
        "test": report.nodeid,
        "marks": marks,
        "outcome": report.outcome,
        "told": told,
        "took": report.duration,
        "why": str(report.longrepr[2]) if report.outcome == "skipped" else "",
    }


def main() -> None:
    """Write and print the table; exit with an error if a promise did not hold."""
    outcomes = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    text = "\n".join(lines(outcomes))
    Path(sys.argv[2]).write_text(text + "\n")
    print(text)
    failed = [outcome["test"] for outcome in tried(outcomes) if outcome["outcome"] != "passed"]
    sys.exit("\n".join(["did not hold:", *failed]) if failed else 0)


def tried(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the outcomes of tests that ran; those that need a GPU are skipped without one."""
    return [outcome for outcome in outcomes if outcome["why"] != NO_GPU]


def lines(outcomes: list[dict[str, Any]]) -> Iterator[str]:
    """Return the table in Markdown."""
    attempts: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    told: dict[int, list[str]] = defaultdict(list)
    for outcome in tried(outcomes):
        for kind, number in outcome["marks"]:
            attempts[kind, number][outcome["outcome"]] += 1
            told[number] += outcome["told"]
    yield "# Reliability: the 24 promises\n"
    yield (
        "Written by `make test-reliability`. An attempt is a test with its own runs or data; many"
        " make several tries,"
    )
    yield (
        "which the second part lists. A control breaks what keeps a promise and must make the"
        " check fail.\n"
    )
    yield (
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        + ", ".join(
            f"{package} {version(package)}"
            for package in ("torch", "mujoco", "metaworld", "mlflow")
        )
    )
    yield "\n| | promise | attempts | held | controls, seen failing |"
    yield "|---|---|---|---|---|"
    for number, promise in BARS.items():
        bar, control = attempts["bar", number], attempts["control", number]
        held = "yes" if bar["passed"] == bar.total() else f"**{bar['passed']} of {bar.total()}**"
        seen = f"{control['passed']} of {control.total()}" if control else "-"
        yield f"| {number} | {promise} | {bar.total()} | {held if bar else '-'} | {seen} |"
    yield "\n## What was tried or measured"
    for number, promise in BARS.items():
        if told[number]:
            yield f"\n**{number}. {promise[:1].upper()}{promise[1:]}**\n"
            yield from (f"- {shown(line)}" for line in told[number])


def shown(line: str) -> str:
    """Return a line of what was told, with the answers of a command as code."""
    name, _, value = line.partition(": ")
    return f"{name}: ``{value}``" if name == "answered" else line


if __name__ == "__main__":
    main()
