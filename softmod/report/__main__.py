"""`python -m softmod.report`: tables and figures of many runs as an HTML page, also in MLflow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from softmod.command import tell
from softmod.config.compose import compose, typed
from softmod.config.schema import ReportConfig
from softmod.errors import ConfigError, SoftmodError
from softmod.system.streams import exit_with, say

QUOTES = "\"'"
USAGE = """usage: python -m softmod.report SOURCE [KEY=VALUE ...]    where SOURCE is one of

  sweep=PARENT         a sweep in MLflow, by id or name of its parent run; logs the report to it
  runs=[FOLDER,...]    run folders, or their parent folders; reads the journals, without MLflow
  results=[FOLDER,...] folders with saved results, one JSON file per seed
  checkpoint=FOLDER    a checkpoint, a run's folder, or mt10 or quickstart, the policies that ship
                       with softmod; reports on its routing

and KEY is one of

  output=report        folder for report.html, figures and tables (CSV, LaTeX, Markdown)
  save=FOLDER          with runs=: save the runs as results in this folder
  level=0.8            mean success rate for the steps-to-reach column, in [0, 1]
  episodes=5           with checkpoint=: episodes per task
  video=false          with checkpoint=: an mp4 per task with the routing graph beside the robot,
                       and a WebP of all tasks
  swap=false           with checkpoint=: success of each task with the routing of the others,
                       and with constant routing; takes minutes
  uri=null             MLflow store; null: MLFLOW_TRACKING_URI, or mlflow.db in this folder
  allow=[]             packages of your own that tasks and networks come from"""


def main() -> None:
    """Run the command and exit with a code of docs/exit_codes.md."""
    exit_with(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Check the command line and write the report; return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        if flags := [argument for argument in arguments if argument.startswith("-")]:
            raise ConfigError(f"{flags[0]}: unknown flag; see --help")
        cfg: ReportConfig = typed(compose([_renamed(argument) for argument in arguments], "report"))
        if sum(map(bool, (cfg.parent, cfg.runs, cfg.results, cfg.checkpoint))) != 1:
            raise ConfigError("sweep, runs, results, checkpoint: give one of them; see --help")
        if cfg.save and not cfg.runs:
            raise ConfigError(f"save={cfg.save}: only with runs=[FOLDER,...]")
        from softmod.report.report import report

        say(f"written: {report(cfg, Path(cfg.output))}")
    except SoftmodError as error:
        return tell(error)
    return 0


def _renamed(argument: str) -> str:
    """Rename `sweep`, which is a group of `conf/`, to `parent`, and quote its value."""
    key, _, value = argument.partition("=")
    return f"parent={json.dumps(value.strip(QUOTES))}" if key == "sweep" else argument


if __name__ == "__main__":
    main()
