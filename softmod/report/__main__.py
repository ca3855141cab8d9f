"""`python -m softmod.report`: tables and figures of many runs, with intervals, as a page; into
MLflow too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from softmod.command import tell
from softmod.config.compose import compose, typed
from softmod.config.schema import ReportConfig
from softmod.errors import ConfigError, SoftmodError

QUOTES = "\"'"
USAGE = """usage: python -m softmod.report SOURCE [KEY=VALUE ...]    where SOURCE is one of

  sweep=PARENT         a sweep in MLflow, by its parent run's id or name, to which it is logged
  runs=[FOLDER,...]    run folders, or folders of them: reads their journals, no MLflow
  results=[FOLDER,...] folders with results that were saved: one JSON file for each seed
  checkpoint=FOLDER    a checkpoint or a run's folder: how its policy uses its modules

and KEY is one of

  output=report        the folder for report.html, figures and tables (CSV, LaTeX)
  save=FOLDER          with runs=: save them as results there, to be committed
  level=0.8            the mean success whose environment steps are told
  episodes=5           episodes of each task, with checkpoint=
  video=false          with checkpoint=: an mp4 per task, the routes moving beside the robot
  uri=null             the MLflow store; null: MLFLOW_TRACKING_URI, or mlflow.db here
  allow=[]             packages of your own that tasks and networks come from"""


def main() -> None:
    """The command; exits with the codes of docs/exit_codes.md."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Check the command line, write the report; the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        if flags := [argument for argument in arguments if argument.startswith("-")]:
            raise ConfigError(f"{flags[0]}: unknown flag; --help lists what there is")
        cfg: ReportConfig = typed(compose([_renamed(argument) for argument in arguments], "report"))
        if sum(map(bool, (cfg.parent, cfg.runs, cfg.results, cfg.checkpoint))) != 1:
            raise ConfigError(
                "sweep, runs, results, checkpoint: give one of them; --help tells what each reads"
            )
        if cfg.save and not cfg.runs:
            raise ConfigError(f"save={cfg.save}: only with runs=[FOLDER,...]")
        from softmod.report.report import report

        print(f"written: {report(cfg, Path(cfg.output))}")
    except KeyboardInterrupt:
        return 130
    except SoftmodError as error:
        return tell(error)
    return 0


def _renamed(argument: str) -> str:
    """`sweep` is a group of `conf/` to Hydra; a parent's name has spaces."""
    key, _, value = argument.partition("=")
    return f"parent={json.dumps(value.strip(QUOTES))}" if key == "sweep" else argument


if __name__ == "__main__":
    main()
