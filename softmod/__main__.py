"""`python -m softmod`: the list of commands."""

from __future__ import annotations

import sys

from softmod.errors import near
from softmod.system.streams import complain, exit_with

COMMANDS = {
    "train": "train a run, or several with -m; the same command resumes a run",
    "search": "search hyperparameters with Optuna",
    "evaluate": "evaluate a checkpoint; video=true records it",
    "report": "compare runs, or show how a policy uses its modules",
    "export": "write a policy as ONNX",
    "ui": "serve MLflow's dashboard",
    "upload": "send to MLflow what it lacks of a run",
    "state": "show the hashes of a run's state, or pack it for another machine",
    "envs": "list the tasks and task sets",
    "replay_fault": "repeat an update that gave non-finite numbers",
}


def main() -> int:
    """List the commands; return the exit code: 2 if anything but help was asked for."""
    asked = next((word for word in sys.argv[1:] if word not in ("-h", "--help")), None)
    if asked in COMMANDS:
        complain(f"softmod: write python -m softmod.{asked}")
        return 2
    if asked is not None:
        complain(f"softmod: {asked}: there is no such command{near(asked, COMMANDS)}")
        return 2
    width = max(map(len, COMMANDS))
    print("usage: python -m softmod.COMMAND [KEY=VALUE ...], or --help\n")
    for name, meaning in COMMANDS.items():
        print(f"  softmod.{name:<{width}}  {meaning}")
    return 0


if __name__ == "__main__":
    exit_with(main)
