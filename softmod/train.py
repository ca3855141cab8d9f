"""`python -m softmod.train`: compose, validate, hand over.

Heavy imports come after the command line was checked.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from softmod.command import MAIN, sweep_identity, tell, to_the_end
from softmod.config.compose import compose, parse, register, typed
from softmod.config.groups import conf_folder
from softmod.config.hydra_keys import check_hydra
from softmod.errors import ConfigError, SoftmodError, near
from softmod.system import signals
from softmod.tracking.redact import redacted, without_passwords

SWEEP = "SOFTMOD_SWEEP"  # tells jobs, in whatever process they run, which sweep they belong to
MULTIRUN = "multirun.yaml"  # Hydra writes it, nobody reads it
FLAGS = {  # Hydra's flags that make sense here, and the value that each of them takes
    "-m": "", "--multirun": "", "--resolve": "",
    "--cfg": "job, hydra or all", "-c": "job, hydra or all",
    "--package": "a part of the configuration, as in --package run",
    "-p": "a part of the configuration, as in -p run",
    "--config-dir": "a folder of your own beside conf/", "-cd": "a folder of your own beside conf/",
}  # fmt: skip
CFG = ("job", "hydra", "all")
CHECKED = 256  # combinations of a sweep that are checked before the first one starts
failures: list[int] = []  # codes of the jobs that failed in this process


def main() -> None:
    """The command; exits with the codes of docs/exit_codes.md."""
    try:
        code = run(sys.argv[1:], ends=True)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def run(arguments: list[str], ends: bool = False) -> int:
    """Check the command line, run its jobs; the exit code.

    `ends`: the process does so after this.
    """
    if {"-h", "--help"} & set(arguments):
        from softmod.config import help

        print(help.text())
        return 0
    if "--version" in arguments:
        from importlib.metadata import version

        print(f"softmod {version('softmod')}")
        return 0
    failures.clear()
    os.environ[MAIN] = str(os.getpid())
    try:
        flags, overrides, folder = split(arguments)
        composed, sweep = check(flags, overrides, folder)
        os.environ[SWEEP] = json.dumps(sweep)
        alone = not is_multirun(flags, composed) and not {"--cfg", "-c"} & set(flags)
        with signals.heeded(ends):
            return to_the_end(
                partial(single, composed)
                if alone
                else partial(hand_over, [*with_numbers(flags), *overrides])
            )
    except KeyboardInterrupt:
        print(
            "softmod: interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except SoftmodError as error:
        return tell(error)


def failed_path() -> Path:
    """Where jobs in other processes, or on other machines, leave the codes of those that failed."""
    return Path(f".softmod-failed-{os.environ[MAIN]}")


def failures_elsewhere() -> list[int]:
    """The codes of jobs that failed in other processes; the file that told them is removed."""
    try:
        codes = [int(line) for line in failed_path().read_text().split()]
        failed_path().unlink()
    except FileNotFoundError:
        return []
    return codes


def check(
    flags: list[str], overrides: list[str], folder: str | None
) -> tuple[DictConfig, dict[str, str] | None]:
    """Check every job of a command line before any starts; the first one's configuration, the
    sweep's id and name.

    Raises:
        ConfigError: what is wrong, in one line.
    """
    fixed = [o for o in parse(overrides) if not o.is_sweep_override()]
    swept = {o.get_key_element(): _values(o) for o in parse(overrides) if o.is_sweep_override()}
    lines = [str(o.input_line) for o in fixed]
    first = [f"{key}={values[0]}" for key, values in swept.items()]
    composed = compose(lines + first, config_dir=folder, hydra=True)
    one_seed = [str(o.input_line) for o in parse(overrides) if o.get_key_element() == "seed"]
    if one_seed and composed.seeds is not None:
        raise ConfigError(f"{one_seed[-1]}: together with seeds=; seed is one, seeds are several")
    asked = [o for o in fixed if o.get_key_element() != "seeds"]
    if not is_multirun(flags, composed):
        if swept:
            raise ConfigError(
                f"{next(iter(swept))}: several values need -m (every combination, one after"
                " another)"
            )
        checked(composed)
        return composed, None if composed.seeds is None else sweep_identity(asked, ["seed"])
    swept = _file_sweep(composed) | swept
    for combination in itertools.islice(itertools.product(*swept.values()), CHECKED):
        job = [f"{key}={value}" for key, value in zip(swept, combination, strict=True)]
        checked(compose(lines + job, config_dir=folder, hydra=True))
    return composed, sweep_identity(
        asked, [*swept, *(["seed"] if composed.seeds is not None else [])]
    )


def is_multirun(flags: list[str], composed: DictConfig) -> bool:
    """Return whether there are several jobs: Hydra's flag says so, or its mode in the
    configuration.
    """
    return bool({"-m", "--multirun"} & set(flags)) or str(composed.hydra.mode).endswith("MULTIRUN")


def checked(composed: DictConfig) -> None:
    """
    Raises:
        ConfigError: something is wrong with a job, or with what it says of Hydra.
    """
    check_hydra(composed)
    typed(_without_hydra(composed))


def split(arguments: list[str]) -> tuple[list[str], list[str], str | None]:
    """Flags for Hydra (with their values), overrides, and the user's configuration folder; in any
    order.

    Raises:
        ConfigError: an unknown flag, or one without its value.
    """
    flags: list[str] = []
    overrides: list[str] = []
    folder, rest = None, iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, _, value = argument.partition("=")
        if flag not in FLAGS:
            raise ConfigError(
                f"{argument}: unknown flag{near(flag, FLAGS)}; --help lists what there is"
            )
        flags.append(flag)
        if FLAGS[flag]:
            value = value or next(rest, "")
            if not value:
                raise ConfigError(f"{flag}: no value given; {FLAGS[flag]}")
            flags.append(value)
        if flag in ("--cfg", "-c") and value not in CFG:
            raise ConfigError(f"{flag}={value}: must be one of {', '.join(CFG)}{near(value, CFG)}")
        if flag in ("--config-dir", "-cd"):
            folder = value
            if not os.path.isdir(folder):
                raise ConfigError(f"{flag}={folder}: there is no such folder")
    if {"--resolve", "--package", "-p"} & set(flags) and not {"--cfg", "-c"} & set(flags):
        raise ConfigError("--resolve and --package: only together with --cfg job")
    return flags, overrides, folder


def with_numbers(flags: list[str]) -> list[str]:
    """Let `--cfg job` show numbers instead of interpolations."""
    return [*flags, "--resolve"] if "job" in flags and "--resolve" not in flags else flags


def _values(override: Override) -> list[str]:
    """What a sweep goes through.

    Raises:
        ConfigError: that cannot be told beforehand, as with glob(*) and interval(0,1).
    """
    try:
        return list(override.sweep_string_iterator())
    except HydraException as error:
        raise ConfigError(
            f"{override.input_line}: name the values, as in key=a,b ({error})"
        ) from error


def _file_sweep(composed: DictConfig) -> dict[str, list[str]]:
    """The values that a sweep file goes through."""
    params = composed.hydra.sweeper.get("params") or {}
    parsed = parse([f"{key}={value}" for key, value in params.items()])
    return {
        o.get_key_element(): _values(o) if o.is_sweep_override() else [str(o.value())]
        for o in parsed
    }


def _without_hydra(composed: DictConfig) -> DictConfig:
    OmegaConf.set_readonly(composed, False)
    with_hydra = composed.copy()
    del with_hydra.__dict__["_content"]["hydra"]
    return with_hydra


def single(composed: DictConfig) -> int:
    """The one job of a command line; Hydra would compose it twice more.

    The code of its failure, or 0.
    """
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(composed)
    codes = one_run(_without_hydra(composed), list(composed.hydra.overrides.task))
    return codes[0] if codes else 0


def hand_over(arguments: list[str]) -> int:
    """Let Hydra run the jobs of a sweep, or show a configuration; the code of the first that
    failed, or 0.
    """
    import hydra

    register()
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")(job)()
    finally:
        failures.extend(failures_elsewhere())
    return failures[0] if failures else 0


def job(composed: DictConfig) -> None:
    """One run. A failure is told and noted; it does not end a sweep."""
    from hydra.core.hydra_config import HydraConfig

    strike_out_passwords(Path(HydraConfig.get().sweep.dir, MULTIRUN))
    overrides = list(HydraConfig.get().overrides.task)
    if os.environ.get(MAIN) == str(os.getpid()):
        failures.extend(one_run(composed, overrides))
        return
    with signals.heeded():  # a launcher's process, which has heard of no signals
        try:
            codes = one_run(composed, overrides)
        except signals.StoppedError:
            signals.requeue()
            raise
    if codes:
        with failed_path().open("a") as file:
            file.write(f"{codes[0]}\n")


def one_run(composed: DictConfig, overrides: list[str]) -> list[int]:
    """The run of one job; the code of its failure, if it failed."""
    sweep = json.loads(os.environ.get(SWEEP, "null"))
    try:
        cfg = typed(composed)
        resolved = without_passwords(OmegaConf.to_container(composed, resolve=True))
        from softmod.experiment.run import run_experiment, run_seeds

        signals.leave_if_told()
        if cfg.seeds is None:
            run_experiment(cfg, resolved, overrides, sweep)
            return []
        codes: list[int] = []
        run_seeds(
            cfg,
            resolved,
            overrides,
            sweep,
            lambda seed, error: codes.append(tell(error, f"seed={seed}")),
        )
        return codes
    except Exception as error:
        signals.check()
        line = " ".join(overrides)
        return [tell(error, line if sweep else "")]


def strike_out_passwords(path: Path) -> None:
    """From what Hydra writes down of a sweep, if it has."""
    with suppress(OSError, ValueError):
        text = path.read_text()
        if redacted(text) != text:
            path.write_text(redacted(text))


if __name__ == "__main__":
    main()
