"""`python -m softmod.export checkpoint=...`: a policy, or its episodes, for other programs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmod.command import tell
from softmod.config.compose import compose, typed
from softmod.config.schema import ExportConfig
from softmod.errors import ConfigError, SoftmodError
from softmod.experiment.folder import output_folder
from softmod.system.streams import exit_with, say

if TYPE_CHECKING:
    from softmod.networks.gaussian import Actor
    from softmod.spec import EnvSpec

USAGE = """usage: python -m softmod.export checkpoint=FOLDER [KEY=VALUE ...]

  checkpoint=FOLDER       a checkpoint, a run's folder (its newest checkpoint), or mt10 or
                          quickstart, the policies that ship with softmod
  formats=[onnx,torch]    what to write; several at once:
                            onnx      policy.onnx, which onnxruntime runs
                            torch     policy.pt2, which torch.export.load reads
                            weights   weights/, a checkpoint without replay and optimizers
                            rollouts  minari/, a Minari dataset of episodes of each task
                            replay    minari/, the same of the run's replay
  goals=10                with rollouts: goals per task, an episode each
  output=null             output folder; null: the folder export beside the checkpoints
  allow=[]                packages of your own that the checkpoint's tasks and networks come from

The policy's inputs are obs [rows, 39] (float32), as the environment returns them, and task [rows]
(int64), the number of each row's task; its output is action [rows, 4] (float32), without noise."""
ROWS = 1000  # observations on which the ONNX file is compared with the policy


def main() -> None:
    """Run the command and exit with a code of docs/exit_codes.md."""
    exit_with(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Check the command line and export; return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        if flags := [argument for argument in arguments if argument.startswith("-")]:
            raise ConfigError(f"{flags[0]}: unknown flag; see --help")
        if not any(re.match("checkpoint=.", argument) for argument in arguments):
            raise ConfigError("checkpoint: no value given; name a checkpoint or a run's folder")
        export(typed(compose(arguments, "export")))
    except SoftmodError as error:
        return tell(error)
    return 0


def export(cfg: ExportConfig) -> None:
    """Write a checkpoint's policy, or its episodes, in each of the formats.

    Raises:
        CheckpointError: There is no valid checkpoint at `cfg.checkpoint`, or it has no replay.
        ConfigError: Its classes are not allowed, a package is missing, or the output cannot be
            written.
        SaveError: A file cannot be written.
    """
    from softmod.checkpoint import files as checkpoint
    from softmod.checkpoint.load import find

    check_packages(cfg.formats)
    folder, metadata = find(Path(cfg.checkpoint), whole="replay" in cfg.formats)
    output = output_folder(cfg.output, folder, "export")
    for name in dict.fromkeys(cfg.formats):
        with checkpoint.writing(output):
            FORMATS[name](cfg, folder, metadata, output)


def check_packages(formats: list[str]) -> None:
    """Check that the packages that the formats need are installed.

    Raises:
        ConfigError: One is missing.
    """
    from softmod.networks.portable import ONNX, require

    if "onnx" in formats:
        require(*ONNX)
    if {"rollouts", "replay"} & set(formats):
        require("minari")


def write_onnx(cfg: ExportConfig, folder: Path, metadata: dict[str, Any], output: Path) -> None:
    """Write `policy.onnx`, and print how far its actions are from the policy's."""
    from softmod.networks.portable import largest_difference, save_onnx

    actor, spec = policy_of(cfg, folder, metadata)
    path = output / "policy.onnx"
    save_onnx(actor, spec.tasks, path)
    difference = largest_difference(actor, path, ROWS)
    say(f"written: {path} (actions on {ROWS:,} observations differ by at most {difference:.2g})")


def write_torch(cfg: ExportConfig, folder: Path, metadata: dict[str, Any], output: Path) -> None:
    """Write `policy.pt2`."""
    from softmod.networks.portable import save_torch

    actor, spec = policy_of(cfg, folder, metadata)
    path = output / "policy.pt2"
    save_torch(actor, spec.tasks, path)
    say(f"written: {path}")


def write_weights(cfg: ExportConfig, folder: Path, metadata: dict[str, Any], output: Path) -> None:
    """Write `weights`, a checkpoint without replay and optimizers."""
    from softmod.checkpoint.weights import save_weights

    say(f"written: {save_weights(folder, metadata, output / 'weights')}")


def write_rollouts(cfg: ExportConfig, folder: Path, metadata: dict[str, Any], output: Path) -> None:
    """Play the policy on `cfg.goals` goals of each task; write the episodes as Minari datasets."""
    from softmod.checkpoint.episodes import played, save_dataset
    from softmod.checkpoint.load import actor_of, suite_of

    suite = suite_of(metadata, cfg.allow)
    actor = actor_of(folder, metadata, cfg.allow)
    for task, name in enumerate(suite.spec.tasks):
        dataset = f"{metadata['config']['env']['name']}-rollouts/{name}-v0"
        episodes = played(suite, actor, task, cfg.goals)
        say(f"written: {save_dataset(dataset, episodes, suite.spec, output / 'minari')}")


def write_replay(cfg: ExportConfig, folder: Path, metadata: dict[str, Any], output: Path) -> None:
    """Write the episodes of the replay as Minari datasets."""
    from softmod.checkpoint.episodes import recorded, save_dataset

    spec = policy_of(cfg, folder, metadata)[1]
    for task, episodes in enumerate(recorded(folder, metadata)):
        dataset = f"{metadata['config']['env']['name']}-replay/{spec.tasks[task]}-v0"
        say(f"written: {save_dataset(dataset, episodes, spec, output / 'minari')}")


def policy_of(cfg: ExportConfig, folder: Path, metadata: dict[str, Any]) -> tuple[Actor, EnvSpec]:
    """Return the acting policy of a checkpoint, and the sizes of its task set."""
    from softmod.checkpoint import files as checkpoint
    from softmod.checkpoint.load import actor_of, spec_of

    with checkpoint.reading(folder):
        return actor_of(folder, metadata, cfg.allow), spec_of(metadata)


Write = Callable[[ExportConfig, Path, dict[str, Any], Path], None]
FORMATS: dict[str, Write] = {
    "onnx": write_onnx,
    "torch": write_torch,
    "weights": write_weights,
    "rollouts": write_rollouts,
    "replay": write_replay,
}

if __name__ == "__main__":
    main()
