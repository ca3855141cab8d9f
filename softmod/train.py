"""`python -m softmod.train`: compose and check a configuration, and run its jobs with Hydra.

In Python: `softmod.train(["env=mt10", "seed=3"])`. Heavy imports come after the command line was
checked.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.conf import HydraConf
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from softmod.command import Interface, sweep_identity, tell, to_the_end
from softmod.config import renamed
from softmod.config.compose import compose, hydra_of, parse, register, typed, without_hydra
from softmod.config.groups import conf_folder
from softmod.config.schema import TrainConfig
from softmod.config.sweeps import sweep_values
from softmod.errors import ConfigError, SoftmodError, near, one_line
from softmod.system import signals, slurm
from softmod.system.streams import complain, exit_with
from softmod.tracking.redact import redacted

if TYPE_CHECKING:
    from softmod.experiment.callbacks import Callback
    from softmod.spec import Result

FLAGS = {  # flags of Hydra, with a description of their value
    "--multirun": "", "-m": "", "--run": "", "-r": "", "--resolve": "", "--hydra-help": "",
    "--shell-completion": "", "-sc": "", "--info": "", "-i": "",
    "--cfg": "job, hydra or all", "-c": "job, hydra or all",
    "--package": "a part of the configuration, as in --package run",
    "-p": "a part of the configuration, as in -p run",
    "--config-dir": "a folder of your own beside conf/", "-cd": "a folder of your own beside conf/",
    "--config-name": "a configuration of your own, which begins with defaults: [train, _self_]",
    "-cn": "a configuration of your own, which begins with defaults: [train, _self_]",
}  # fmt: skip
REFUSED = {  # flags of Hydra that make no sense here, and why
    "--config-path": "softmod's conf/ is always used; --config-dir adds a folder of your own",
    "-cp": "softmod's conf/ is always used; --config-dir adds a folder of your own",
    "--experimental-rerun": "the same command resumes a stopped run",
}
CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
SHOWS = {"--cfg", "-c", "--info", "-i"}  # print the configuration and run nothing
COMPLETIONS = {"--shell-completion", "-sc"}
COMPLETION = "(install|uninstall|query)=(bash|fish|zsh)"
HELPS = {"--hydra-help", *COMPLETIONS}
MODES = {"--run", "-r", *SHOWS, *HELPS}
CHECKED = 256  # combinations of a sweep that are checked before the first one starts

Sweep = dict[str, str]  # see `command.sweep_identity` and `described`


@dataclass
class Command:
    """A command line: Hydra's flags with their values, overrides, and the primary configuration."""

    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_name: str = "train"

    def compose(self, overrides: list[str]) -> DictConfig:
        """Compose the configuration with these overrides, including Hydra's own part."""
        return compose(overrides, self.config_name, self.config_dir, hydra=True)


@dataclass(frozen=True)
class Checked:
    """Jobs that a command line requests, after it was checked.

    Attributes:
        composed: configuration of its first job, with Hydra's part.
        multirun: Hydra runs several jobs.
        sweep: that the runs belong to, if any.
    """

    composed: DictConfig
    multirun: bool
    sweep: Sweep | None


def train(
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    config_dir: str | Path | None = None,
) -> Result:
    """Train one run, as `python -m softmod.train OVERRIDES` does; return its result.

    The same call resumes a run that was stopped, and returns the result of one that is finished.
    Ctrl-C (in a notebook: interrupting the kernel) ends it, and what was saved before stays.

    Args:
        overrides: as on the command line, `["env=mt10", "seed=3"]`.
        callbacks: called while the run trains; `callbacks=[...]` in a configuration adds others.
        config_dir: a folder of YAML files of your own beside softmod's `conf/`.

    Raises:
        ConfigError: an override is wrong, or there are several runs in it.
        CheckpointError, SaveError, WorkerError, NumericalError: see docs/exit_codes.md.
    """
    if isinstance(overrides, str):
        raise ConfigError(f'overrides={overrides!r}: must be a list, as in ["env=mt10", "seed=3"]')
    lines = [str(override) for override in overrides]
    if flags := [line for line in lines if line.startswith("-")]:
        raise ConfigError(f"{flags[0]}: flags work on the command line only")
    if own := [line for line in lines if re.match(r"[+~]*hydra[./=]", line)]:
        raise ConfigError(f"{own[0]}: works on the command line only")
    folder = None if config_dir is None else os.path.expanduser(config_dir)
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"config_dir={config_dir}: there is no such folder")
    command = Command(overrides=lines, config_dir=None if folder is None else str(folder))
    asked = check(command)
    if asked.multirun or asked.sweep:
        raise ConfigError(
            "softmod.train makes one run: call it once for each seed or value, or sweep on the"
            " command line"
        )
    cfg = typed(compose(lines, config_dir=command.config_dir))
    from softmod.experiment.run import run_experiment

    with signals.handled():
        return run_experiment(cfg, lines, None, callbacks)


def main() -> None:
    """Run the command and exit with a code of docs/exit_codes.md."""
    exit_with(lambda: run(sys.argv[1:], ends=True))


def run(arguments: list[str], ends: bool = False) -> int:
    """Check a command line and run its jobs; return the exit code.

    Args:
        arguments: Arguments of the command line.
        ends: True if the process ends afterwards.
    """
    if {"-h", "--help"} & set(arguments):
        from softmod.config import help

        print(help.text())
        return 0
    if "--version" in arguments:
        from importlib.metadata import version

        print(f"softmod {version('softmod')}")
        return 0
    try:
        command = split(arguments)
        flags = {flag.partition("=")[0] for flag in command.flags}
        if HELPS & flags:
            return show(command)
        asked = check(command)
        if SHOWS & flags:
            refuse_several(command)
            check_package(command, asked.composed)
            return show(command)
        with signals.handled(ends):
            return to_the_end(partial(launch, command, asked))
    except KeyboardInterrupt:
        complain(
            "softmod: interrupted; run the same command again to resume from the last checkpoint"
        )
        return 130
    except SoftmodError as error:
        return tell(error)


def refuse_several(command: Command) -> None:
    """Check that a configuration to show is that of a single job.

    Raises:
        ConfigError: the command line has several jobs.
    """
    swept = [override for override in parse(command.overrides) if override.is_sweep_override()]
    if swept or {"-m", "--multirun"} & set(command.flags):
        line = str(swept[0].input_line) if swept else "-m"
        raise ConfigError(f"{line}: --cfg and --info show one job; name one value for each key")


def check_package(command: Command, composed: DictConfig) -> None:
    """Check that the part of the configuration to show exists.

    Raises:
        ConfigError: it does not.
    """
    values = dict(itertools.pairwise(command.flags))
    package = values.get("--package", values.get("-p", "_global_"))
    kind = values.get("--cfg", values.get("-c"))
    inside = package.partition(".")[0] == "hydra"
    there = kind == "all" or inside == (kind == "hydra")
    if package != "_global_" and not (there and OmegaConf.select(composed, package) is not None):
        raise ConfigError(f"--package={package}: there is no such part of --cfg {kind}")


def split(arguments: list[str]) -> Command:
    """Parse a command line; flags and overrides may come in any order.

    Raises:
        ConfigError: A flag is unknown or lacks its value.
    """
    command = Command()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            command.overrides.append(argument)
            continue
        flag, _, value = argument.partition("=")
        if flag in REFUSED:
            raise ConfigError(f"{flag}: {REFUSED[flag]}")
        if flag not in FLAGS:
            raise ConfigError(f"{argument}: unknown flag{near(flag, FLAGS)}; see --help")
        if flag in ("--info", "-i"):
            value = value or (rest.pop(0) if rest and rest[0] in INFO else "all")
        elif FLAGS[flag]:
            value = value or (rest.pop(0) if rest else "")
            if not value:
                raise ConfigError(f"{flag}: no value given; {FLAGS[flag]}")
        _take(command, flag, value)
    check_flags(command)
    return command


def check_flags(command: Command) -> None:
    """Check that the flags of a command line go together.

    Raises:
        ConfigError: They do not.
    """
    if {"--resolve", "--package", "-p"} & set(command.flags) and not {"--cfg", "-c"} & set(
        command.flags
    ):
        raise ConfigError("--resolve and --package: only together with --cfg job")
    if "--resolve" in command.flags and "hydra" in command.flags:
        raise ConfigError("--cfg=hydra: cannot be resolved alone; use --cfg all --resolve")
    if len(shown := [flag for flag in command.flags if flag.partition("=")[0] in MODES]) > 1:
        raise ConfigError(f"{shown[0]}: cannot be combined with {shown[1]}")
    if "--hydra-help" in shown and command.overrides:
        raise ConfigError(f"--hydra-help: leave {command.overrides[0]} out")
    if COMPLETIONS & set(shown) and not re.fullmatch(COMPLETION, " ".join(command.overrides)):
        raise ConfigError(f"{shown[0]}: takes install=bash, or uninstall=; also fish or zsh")


def _take(command: Command, flag: str, value: str) -> None:
    """Add a flag and its value to the command.

    Raises:
        ConfigError: The value is not allowed.
    """
    allowed = {"--cfg": CFG, "-c": CFG, "--info": INFO, "-i": INFO}.get(flag)
    if allowed and value not in allowed:
        raise ConfigError(
            f"{flag}={value}: must be one of {', '.join(allowed)}{near(value, allowed)}"
        )
    if flag in ("--config-dir", "-cd"):
        command.config_dir = value = os.path.expanduser(value)
        if not os.path.isdir(value):
            raise ConfigError(f"{flag}={value}: there is no such folder")
    if flag in ("--config-name", "-cn"):
        command.config_name = value.removesuffix(".yaml")
    command.flags += [flag, value] if value and flag not in ("--info", "-i") else []
    command.flags += [f"--info={value}"] if flag in ("--info", "-i") else []
    command.flags += [] if value else [flag]


def check(command: Command) -> Checked:
    """Check every job of a command line before any starts.

    Raises:
        ConfigError: A job is invalid.
    """
    parsed = parse(command.overrides)
    for override in parsed:
        if override.key_or_group == "allow":
            raise ConfigError(f"{override.input_line}: {renamed.ALLOW}")
    fixed = [o for o in parsed if not o.is_sweep_override()]
    swept = {o.get_key_element(): sweep_values(o) for o in parsed if o.is_sweep_override()}
    lines = [str(o.input_line) for o in fixed]
    first = [f"{key}={values[0]}" for key, values in swept.items()]
    composed = command.compose(lines + first)
    number = len(composed.get("seeds") or [0])
    one_seed = [str(o.input_line) for o in parsed if o.get_key_element() == "seed"]
    several = composed.get("seeds") is not None
    if one_seed and several:
        raise ConfigError(f"{one_seed[-1]}: cannot be combined with seeds=; leave one of them out")
    asked = [o for o in fixed if o.get_key_element() != "seeds"]
    seeds = ["seed"] if several else []
    if not is_multirun(command, composed):
        if varied := swept or composed.hydra.sweeper.get("params"):
            raise ConfigError(
                f"{next(iter(varied))}: several values need -m (every combination, one after"
                " another)"
            )
        checked(composed, command.config_name)
        own = sweep_identity(asked, seeds) | described(command, number) if several else None
        return Checked(composed, False, own)
    check_sweeper(composed)
    swept = _file_sweep(composed) | swept
    for combination in itertools.islice(itertools.product(*swept.values()), CHECKED):
        job = [f"{key}={value}" for key, value in zip(swept, combination, strict=True)]
        checked(command.compose(lines + job), command.config_name)
    jobs = math.prod(len(values) for values in swept.values())
    own = sweep_identity(asked, [*swept, *seeds]) | described(command, jobs * number)
    return Checked(composed, True, own)


def check_sweeper(composed: DictConfig) -> None:
    """Check numbers on which launchers and sweepers would fail.

    Raises:
        ConfigError: one is 0.
    """
    for key in ("launcher.n_jobs", "sweeper.max_batch_size"):
        if OmegaConf.select(composed.hydra, key) == 0:
            raise ConfigError(f"hydra.{key}=0: must not be 0")


def described(command: Command, runs: int) -> Sweep:
    """Return the number of runs of a sweep and its command, for its run in MLflow."""
    words = ["python", "-m", "softmod.train", *command.flags, *command.overrides]
    return {"runs": str(runs), "command": shlex.join(words)}


def is_multirun(command: Command, composed: DictConfig) -> bool:
    """Return whether there are several jobs, by the flag or by `hydra.mode`."""
    mode = str(composed.hydra.mode).endswith("MULTIRUN")
    return mode or bool({"-m", "--multirun"} & set(command.flags))


def checked(composed: DictConfig, name: str) -> None:
    """Check the configuration of one job.

    Raises:
        ConfigError: It is invalid.
    """
    if not isinstance(typed(without_hydra(composed)), TrainConfig):
        raise ConfigError(
            f"--config-name={name}: not a configuration of a run; begin it with"
            " defaults: [train, _self_]"
        )


def _file_sweep(composed: DictConfig) -> dict[str, list[str]]:
    """Return the swept keys of a sweep file with their values."""
    params = composed.hydra.sweeper.get("params") or {}
    parsed = parse([f"{key}={value}" for key, value in params.items()])
    return {
        o.get_key_element(): sweep_values(o) if o.is_sweep_override() else [str(o.value())]
        for o in parsed
    }


def show(command: Command) -> int:
    """Print a configuration, the search path or Hydra's help with Hydra; return 0."""
    import hydra

    register()
    logging.raiseExceptions = False  # in case the reader closes the pipe, as `head` does
    flags = command.flags
    if "job" in flags and "--resolve" not in flags:
        flags = [*flags, "--resolve"]  # numbers instead of interpolations
    sys.argv = [sys.argv[0], *flags, *command.overrides]
    shown = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")
    shown(lambda composed: None)()
    return 0


def launch(command: Command, asked: Checked) -> int:
    """Run the jobs with Hydra; return the exit code of the first that failed, or 0.

    Raises:
        ConfigError: A launcher or a callback does not exist, a folder is not writable, or a cluster
            does not take the jobs.
    """
    from softmod.experiment import jobs

    failed: list[int] = []  # exit codes of jobs in this process; some sweepers return nothing
    task = partial(job, sweep=asked.sweep, main=os.getpid(), failed=failed)
    name = command.config_name
    overrides = command.overrides
    try:
        with hydra_of(command.config_dir) as hydra, jobs.waited_for(asked.composed):
            if asked.multirun:
                returned = hydra.multirun(name, task, overrides)
            else:
                returned = hydra.run(name, task, overrides)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"Hydra: {one_line(error)}") from error
    except RuntimeError as error:
        raise jobs.explained(error) from error
    return next((code for code in (*failed, *codes(returned)) if code), 0)


def codes(returned: Any) -> Iterator[int]:
    """Yield the exit codes of jobs from the nested lists that a sweeper returns."""
    if isinstance(returned, JobReturn):
        yield int(returned.return_value)
    elif isinstance(returned, list | tuple):
        for one in returned:
            yield from codes(one)


def job(composed: DictConfig, sweep: Sweep | None, main: int, failed: list[int]) -> int:
    """Run one job and return its exit code; a failure is reported and does not end a sweep.

    Args:
        composed: Configuration of the job.
        sweep: Sweep that it belongs to, if any.
        main: Process id of the command. Launchers run jobs in other processes too.
        failed: Output list of exit codes, filled in the process of the command.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if hydra.verbose:  # Hydra has set the levels already
        logging.basicConfig(format="%(name)s: %(message)s")
    strike_out_passwords(hydra)
    overrides = list(hydra.overrides.task)
    if os.getpid() == main:
        code = one_job(composed, overrides, sweep)
        failed.append(code)
        return code
    return job_elsewhere(composed, overrides, sweep)


def job_elsewhere(composed: DictConfig, overrides: list[str], sweep: Sweep | None) -> int:
    """Run one job in a process of a launcher; return its exit code.

    Raises:
        StoppedError: SLURM stopped the job and will run it again. Without a return value, submitit
            waits for that of the next time.
    """
    signals.handle_all()
    try:
        return one_job(composed, overrides, sweep)
    except signals.StoppedError as stop:
        again, how = slurm.ensure_rerun(signals.received())
        complain(f"softmod: {stop}; {how or stop.how}")
        if again:
            raise
        return signals.STOPPED


def one_job(composed: DictConfig, overrides: list[str], sweep: Sweep | None) -> int:
    """Run one seed, or several side by side; return the exit code of the first failure, or 0."""
    failed: list[int] = []
    try:
        cfg = typed(composed)
        from softmod.experiment.run import run_experiment, run_seeds

        signals.leave_if_told()
        if cfg.seeds is None:
            run_experiment(cfg, overrides, sweep)
        else:

            def fail(seed: int, error: Exception) -> None:
                failed.append(tell(error, f"seed={seed}"))

            run_seeds(cfg, overrides, sweep, fail)
    except Exception as error:
        signals.check()
        failed.append(tell(error, " ".join(overrides) if sweep else ""))
    return failed[0] if failed else 0


def strike_out_passwords(hydra: HydraConf) -> None:
    """Strike out passwords in the files that Hydra wrote, if any."""
    files = [Path(hydra.runtime.cwd, hydra.sweep.dir, "multirun.yaml")]
    if hydra.output_subdir is not None:
        files += Path(hydra.runtime.output_dir, hydra.output_subdir).glob("*.yaml")
    for path in files:
        with suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8")
            if redacted(text) != text:
                path.write_text(redacted(text), encoding="utf-8")


sys.modules[__name__].__class__ = Interface  # `softmod.train(...)`

if __name__ == "__main__":
    main()
