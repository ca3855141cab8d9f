"""`python -m softmod.search`: hyperparameter search with Optuna.

Each trial is an ordinary run. All trials have one parent run in MLflow.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from softmod.command import sweep_identity, tell, to_the_end
from softmod.config.compose import compose, parse, typed
from softmod.config.sweeps import sweep_values
from softmod.errors import ConfigError, SaveError, SoftmodError
from softmod.system import signals
from softmod.system.streams import complain, exit_with, say
from softmod.tracking.mlflow_store import SQLITE

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import FrozenTrial

OWN = {"trials": "20", "storage": "sqlite:///optuna.db"}
HEARTBEAT = 60  # seconds; a trial without a heartbeat for twice as long counts as dead
LOCKED = 60  # seconds to wait for another process's lock on an sqlite file
ATTEMPTS = 3  # at a trial whose process died
USAGE = """usage: python -m softmod.search [trials=20] [storage=sqlite:///optuna.db]
           KEY=SPACE ... [KEY=VALUE ...]

  KEY=interval(A,B)             a number from A to B
  KEY=tag(log,interval(A,B))    a number from A to B, on a logarithmic scale
  KEY=int(interval(A,B))        a whole number from A to B
  KEY=range(A,B,STEP)           A, A+STEP, ... below B
  KEY=A,B or choice(A,B)        one of these; also for groups: model=soft_modular,mt_sac
  KEY=VALUE                     fixed in all trials, as for python -m softmod.train
  trials=20                     total number of finished trials
  storage=sqlite:///optuna.db   database of the Optuna study

Maximizes the mean success rate of a run's last evaluation with Optuna's TPE. The same command
resumes a stopped search. Several processes with the same command and storage share the trials.
Requires Optuna: pip install optuna.

  python -m softmod.search trials=30 env=quickstart \\
      "optimizer.actor.lr=tag(log,interval(1e-4,1e-3))" \\
      "algorithm.target_smoothing=tag(log,interval(1e-3,2e-2))" actor.num_modules=2,4"""


def main() -> None:
    """Run the command and exit with a code of docs/exit_codes.md."""
    exit_with(lambda: run(sys.argv[1:], ends=True))


def run(arguments: list[str], ends: bool = False) -> int:
    """Check the command line and run the trials; return the exit code.

    Args:
        arguments: Arguments of the command line.
        ends: True if the process ends afterwards.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        search = read(arguments)
        with signals.handled(ends):
            return to_the_end(search.make)
    except KeyboardInterrupt:
        complain("softmod: interrupted; run the same command again to resume the current trial")
        return 130
    except SoftmodError as error:
        return tell(error)


def read(arguments: list[str]) -> Search:
    """Parse a command line, and check a configuration at both ends of every range.

    Raises:
        ConfigError: The command line or one of these configurations is invalid.
    """
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise ConfigError(f"{flags[0]}: unknown flag; see --help")
    own = dict(OWN)
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in OWN:
            own[key] = value
        else:
            rest.append(argument)
    if not own["trials"].isdecimal() or int(own["trials"]) < 1:
        raise ConfigError(f"trials={own['trials']}: must be a whole number, at least 1")
    parsed = parse(rest)
    fixed = [override for override in parsed if not override.is_sweep_override()]
    space = {o.get_key_element(): distribution(o) for o in parsed if o.is_sweep_override()}
    refuse_ignored(parsed, space)
    if own["storage"] in (SQLITE, "sqlite://", f"{SQLITE}:memory:"):
        raise ConfigError(f"storage={own['storage']}: must be a file, to resume the search from")
    if not space:
        raise ConfigError(
            "no search space given; add one, for example algorithm.discount=interval(0.9,1)"
            " (--help lists the forms)"
        )
    sweep = study_identity(fixed, space) | {
        "runs": own["trials"],
        "command": shlex.join(["python", "-m", "softmod.search", *arguments]),
    }
    lines = [str(override.input_line) for override in fixed]
    search = Search(lines, space, int(own["trials"]), with_home(own["storage"]), sweep)
    first = {key: ends(one)[0] for key, one in space.items()}
    for key, one in space.items():
        for end in ends(one):
            search.compose(first | {key: end})
    return search


def refuse_ignored(parsed: list[Override], space: Mapping[str, BaseDistribution]) -> None:
    """Check that every override has an effect.

    Raises:
        ConfigError: One has none: sweeps, keys of Hydra, and a second value of a key with a space.
    """
    seen: set[str] = set()
    for override in parsed:
        key = override.get_key_element()
        if key == "sweep" or override.is_hydra_override():
            raise ConfigError(f"{override.input_line}: has no effect in a search; leave it out")
        if key in seen & set(space):
            raise ConfigError(f"{override.input_line}: {key} is given twice; leave one of them out")
        seen.add(key)


def study_identity(fixed: list[Override], space: Mapping[str, BaseDistribution]) -> dict[str, str]:
    """Return a study's id and name: another space, with the same keys, is another study."""
    from optuna.distributions import distribution_to_json

    identity = sweep_identity(fixed, list(space), "search")
    spaces = {key: distribution_to_json(one) for key, one in space.items()}
    digest = hashlib.sha256(json.dumps([identity["id"], spaces], sort_keys=True).encode())
    return identity | {"id": digest.hexdigest()[:16]}


def distribution(override: Override) -> BaseDistribution:
    """Convert a sweep in Hydra's grammar to an Optuna distribution.

    Raises:
        ConfigError: Optuna is not installed, or the space is empty or of an unsupported kind.
    """
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ImportError as error:
        raise ConfigError("a search requires Optuna: pip install optuna") from error
    space: Any = override.value()
    try:
        if isinstance(space, IntervalSweep):
            low = space.start
            high = space.end
            log = "log" in space.tags
            if (
                isinstance(low, int)
                and isinstance(high, int)
                and override.input_line
                and "int(" in override.input_line
            ):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low), float(high), log=log)  # type: ignore[arg-type]
        steps = space.range() if isinstance(space, RangeSweep) else None
        if isinstance(steps, range) and steps:
            return IntDistribution(steps[0], steps[-1], step=steps.step)
        return CategoricalDistribution(sweep_values(override))
    except ConfigError:
        raise
    except Exception as error:  # Hydra and Optuna raise many types
        raise ConfigError(
            f"{override.input_line}: not a search space ({error}); --help lists the forms"
        ) from error


def ends(space: Any) -> list[Any]:
    """List the values at which an invalid space would fail: its ends, or all choices."""
    return list(space.choices) if hasattr(space, "choices") else [space.low, space.high]


def draw(trial: Trial, key: str, space: Any) -> Any:
    """Draw a value for a trial."""
    if hasattr(space, "choices"):
        return trial.suggest_categorical(key, space.choices)
    if isinstance(space.low, int):
        return trial.suggest_int(key, space.low, space.high, step=space.step, log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)


@dataclass
class Search:
    """A study: the overrides of all trials, the search space, and the number of trials."""

    lines: list[str]
    space: dict[str, BaseDistribution]
    trials: int
    storage: str
    sweep: dict[str, str]
    codes: list[int] = field(default_factory=list)  # exit codes of failed trials

    def compose(self, values: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """Return a trial's configuration and its overrides.

        Raises:
            ConfigError: The configuration is invalid.
        """
        overrides = [*self.lines, *(f"{key}={value}" for key, value in values.items())]
        return typed(compose(overrides)), overrides

    def make(self) -> int:
        """Run the missing trials and print the best; return the first failure's code, or 0.

        Raises:
            SaveError: The storage failed.
        """
        try:
            return self.run_trials()
        except Exception as error:
            if innermost_package(error) not in ("optuna", "sqlalchemy"):
                raise
            raise SaveError(
                f"storage={self.storage}: cannot be used any more; was it locked or removed?"
                f" ({type(error).__name__}) The same command resumes"
            ) from error

    def run_trials(self) -> int:
        """Run the missing trials and print the best; return the first failure's code, or 0."""
        from optuna.study import MaxTrialsCallback
        from optuna.trial import TrialState

        study = self.study()
        done = (TrialState.COMPLETE,)
        if len(study.get_trials(states=done)) < self.trials:
            enough = MaxTrialsCallback(self.trials, states=done)
            study.optimize(self.one, callbacks=[enough, self.give_up], catch=SoftmodError)
        if study.get_trials(states=done):
            best = study.best_trial
            say(
                f"best of {len(study.get_trials(states=done))}: success {best.value:.3f} in trial"
                f" {best.number}"
            )
            say(
                "  python -m softmod.train "
                + shlex.join([*self.lines, *(f"{k}={v}" for k, v in best.params.items())])
            )
        return self.codes[0] if self.codes else 0

    def one(self, trial: Trial) -> float:
        """Run a trial and return its mean success rate in the last evaluation, over all seeds."""
        try:
            signals.check()
            trial.study.sampler = sampler(trial)
            cfg, overrides = self.compose(
                {key: draw(trial, key, one) for key, one in self.space.items()}
            )
            say(f"trial {trial.number}: {shown(trial.params)}")
            return self.success(cfg, overrides)
        except SoftmodError as error:
            self.codes.append(tell(error, shown(trial.params)))
            raise
        except BaseException:  # stopped: the next search resumes the run with these values
            trial.study.enqueue_trial(trial.params if len(trial.params) == len(self.space) else {})
            raise

    def success(self, cfg: Any, overrides: list[str]) -> float:
        """Train one seed, or several side by side; return the mean success rate."""
        from softmod.experiment.run import run_experiment, run_seeds

        if cfg.seeds is None:
            return run_experiment(cfg, overrides, self.sweep).success_rate
        errors: list[Exception] = []
        results = run_seeds(cfg, overrides, self.sweep, lambda seed, error: errors.append(error))
        if errors:
            raise errors[0]
        return fmean(result.success_rate for result in results.values())

    def give_up(self, study: Study, _: FrozenTrial) -> None:
        """Stop the study when more trials failed than were asked for."""
        if len(self.codes) > self.trials:
            study.stop()

    def study(self) -> Study:
        """Create or load the study; trials whose process died are repeated.

        Raises:
            ConfigError: The storage cannot be used.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # this module reports failed trials
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        try:
            again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=ATTEMPTS)
            waits = (
                {"connect_args": {"timeout": LOCKED}} if self.storage.startswith("sqlite") else {}
            )
            storage = optuna.storages.RDBStorage(
                self.storage,
                engine_kwargs=waits,
                heartbeat_interval=HEARTBEAT,
                heartbeat_stale_trial_callback=again,
            )
            study = optuna.create_study(
                storage=storage,
                study_name=self.sweep["id"],
                direction="maximize",
                load_if_exists=True,
            )
            study.set_user_attr("question", json.dumps([self.lines, sorted(self.space)]))
        except Exception as error:  # databases raise exceptions of their own
            raise ConfigError(
                f"storage={self.storage}: cannot be used ({' '.join(str(error).split())})"[:300]
            ) from error
        return study


def innermost_package(error: Exception) -> str:
    """Return the package whose code raised an exception."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals["__name__"]).partition(".")[0]


def sampler(trial: Trial) -> TPESampler:
    """Return a sampler seeded by the trial's number, not counting repeated trials.

    A stopped search draws the same values as an undisturbed one, and parallel processes draw
    different values. A repeated trial keeps its values or its seed.
    """
    from optuna.samplers import TPESampler

    upto = trial.study.get_trials(deepcopy=False)[: trial.number + 1]
    again = sum(1 for one in upto if {"fixed_params", "failed_trial"} & set(one.system_attrs))
    return TPESampler(seed=trial.number - again, constant_liar=True)


def with_home(storage: str) -> str:
    """Replace `~` in the address of an sqlite file by the home folder."""
    path = storage.removeprefix(SQLITE)
    return f"{SQLITE}{os.path.expanduser(path)}" if path.startswith("~") else storage


def shown(values: Mapping[str, Any]) -> str:
    """Write values as overrides, numbers with four digits."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )


if __name__ == "__main__":
    main()
