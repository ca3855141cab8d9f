"""`python -m softmod.evaluate checkpoint=...`: success rates of a checkpoint, and videos."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf.errors import OmegaConfBaseException

from softmod.command import Interface, tell
from softmod.config.compose import compose, typed
from softmod.config.messages import plainly
from softmod.config.schema import EvaluateConfig
from softmod.config.trust import packages_of
from softmod.errors import ConfigError, SoftmodError, near
from softmod.experiment.folder import output_folder, run_of
from softmod.system.environment import of_children
from softmod.system.streams import exit_with, say
from softmod.tracking.destination import DESTINATION

if TYPE_CHECKING:
    from softmod.spec import TaskScore

USAGE = """usage: python -m softmod.evaluate checkpoint=FOLDER [KEY=VALUE ...]

  checkpoint=FOLDER    a checkpoint, a run's folder (its newest checkpoint), or mt10 or quickstart,
                       the policies that ship with softmod
  goals=50             goals per task
  processes=null       worker processes; null: as many as the run had
  video=false          true: also write an mp4 per task and a GIF of all tasks
  video_episodes=1     episodes per video
  output=null          folder for evaluation.json and videos; null: beside the checkpoints
  tracking=mlflow      send the result to the run in MLflow, if it is there; journal: do not send it
  allow=[]             packages of your own that the checkpoint's tasks and networks come from"""


def main() -> None:
    """Run the command and exit with a code of docs/exit_codes.md."""
    exit_with(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Check the command line and evaluate; return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        if flags := [argument for argument in arguments if argument.startswith("-")]:
            raise ConfigError(f"{flags[0]}: unknown flag; see --help")
        if not any(re.match("checkpoint=.", argument) for argument in arguments):
            raise ConfigError("checkpoint: no value given; name a checkpoint or a run's folder")
        evaluated(typed(compose(arguments, "evaluate")))
    except SoftmodError as error:
        return tell(error)
    return 0


def evaluate(
    checkpoint: str | Path, *, allow: Iterable[str] = (), **options: Any
) -> list[TaskScore]:
    """Evaluate the policy of a checkpoint, as `python -m softmod.evaluate` does.

    Args:
        checkpoint: a checkpoint, a run's folder (its newest checkpoint), or the name of a policy
            that ships with softmod.
        allow: packages of your own that the checkpoint's tasks and networks come from.
        options: the command's other keys, such as `goals=10`, `video=True` or `tracking="journal"`.

    Returns:
        The scores, one for each task.

    Raises:
        CheckpointError: there is no valid checkpoint.
        ConfigError: an option is wrong, or the checkpoint's classes are not allowed.
        WorkerError: an environment failed, or nothing can be rendered here.
    """
    tracking = options.pop("tracking", "mlflow")
    if not isinstance(tracking, str):
        raise ConfigError(f'tracking={tracking!r}: must be "mlflow" or "journal"')
    config = compose(["checkpoint=''", f"tracking={tracking}"], "evaluate")
    for name in options:
        if name not in config:
            raise ConfigError(f"{name}: evaluate takes no such option{near(name, config)}")
    values = options | {"checkpoint": str(checkpoint), "allow": packages_of(allow)}
    if options.get("output") is not None:
        values["output"] = str(options["output"])
    for name, value in values.items():
        try:
            config[name] = value.item() if hasattr(value, "item") else value  # a number of numpy
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}={value!r}: {plainly(str(error))}") from error
    from softmod.system.libraries import default_torch

    with default_torch():
        return evaluated(typed(config))


def evaluated(cfg: EvaluateConfig) -> list[TaskScore]:
    """Evaluate a checkpoint as its run does, and write `evaluation.json`; return the scores.

    Raises:
        CheckpointError: There is no valid checkpoint at `cfg.checkpoint`.
        ConfigError: Its classes are not allowed, or the output cannot be written.
        WorkerError: An environment failed, or this machine cannot render.
    """
    from softmod.checkpoint import files as checkpoint
    from softmod.checkpoint.load import actor_of, find, suite_of
    from softmod.networks.weights import flatten
    from softmod.report.video import encoder, record
    from softmod.spec import mean_success
    from softmod.tracking.console import print_table
    from softmod.workers.pool import Workers
    from softmod.workers.process import may_start_processes
    from softmod.workers.worker import Plan

    if cfg.video:
        encoder()  # before the work, which takes minutes
    folder, facts = find(Path(cfg.checkpoint))
    with checkpoint.reading(folder):
        suite = suite_of(facts, cfg.allow)
        actor = actor_of(folder, facts, cfg.allow)
        seed = int(facts["seed"])
        env_steps = int(facts["clock"]["env_steps"])
        before = int(facts["processes"]) if may_start_processes() else 0
        processes = before if cfg.processes is None else cfg.processes
    output = output_folder(cfg.output, folder, "evaluation")
    weights = flatten(actor)
    with Workers(Plan(suite, actor, seed), processes, training=False) as workers:
        scores = workers.evaluate(weights, cfg.goals)
    goals = scores[0].episodes
    print_table(scores, f"{folder}: {env_steps:,} env steps, {goals} goals per task")
    result = {
        "checkpoint": str(folder),
        "env_steps": env_steps,
        "success_rate": mean_success(scores),
        "scores": [score.as_dict() for score in scores],
    }
    with checkpoint.writing(output / "evaluation.json"):
        (output / "evaluation.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    say(f"written: {output / 'evaluation.json'}")
    if cfg.video:
        with checkpoint.writing(output):
            for path in record(suite, actor, min(goals, cfg.video_episodes), output):
                say(f"written: {path}")
    send(cfg, run_of(folder), output)
    return scores


def send(cfg: EvaluateConfig, run: Path, output: Path) -> None:
    """Send the result to the run in MLflow, if the run is tracked there.

    A failure is printed with the command that repeats it.
    """
    if not cfg.tracking.mlflow or not (run / DESTINATION).is_file():
        return
    command = ["-m", "softmod.upload", str(run), "--evaluation", str(output)]
    uri = {"MLFLOW_TRACKING_URI": cfg.tracking.uri} if cfg.tracking.uri else {}
    seconds = cfg.tracking.drain_seconds
    reason = f"no answer within {seconds:.0f} s"
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=os.environ | of_children() | uri,
        )
        if not done.returncode:
            say(f"sent to MLflow; {done.stdout.strip()}")
            return
        reason = (done.stderr.strip().splitlines() or ["unknown reason"])[-1]
    say(f"not sent to MLflow ({reason}); send it with: {shlex.join(['python', *command])}")


sys.modules[__name__].__class__ = Interface  # `softmod.evaluate(...)`

if __name__ == "__main__":
    main()
