"""`python -m softmod.search`: hyper-parameters by Optuna; each trial is a run as any, under one
parent in MLflow.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from softmod.command import sweep_identity, tell, to_the_end
from softmod.config.compose import compose, parse, typed
from softmod.errors import ConfigError, SoftmodError
from softmod.system import signals

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import FrozenTrial

OWN = {"trials": "20", "storage": "sqlite:///optuna.db"}
HEARTBEAT = (
    60  # seconds; a trial whose process is silent for longer than two of them is taken for dead
)
ATTEMPTS = 3  # at a trial whose process died
USAGE = """usage: python -m softmod.search [trials=20] [storage=sqlite:///optuna.db]
           KEY=SPACE ... [KEY=VALUE ...]

  KEY=interval(A,B)             any number from A to B
  KEY=tag(log,interval(A,B))    the same, on a logarithmic scale
  KEY=int(interval(A,B))        whole numbers, both ends included
  KEY=range(A,B,STEP)           A, A+STEP, ... below B
  KEY=A,B or choice(A,B)        one of these; groups too: model=soft_modular,mt_sac
  KEY=VALUE                     what all trials share, as for python -m softmod.train
  trials=20                     how many are to be finished in all
  storage=sqlite:///optuna.db   where Optuna keeps the study

Maximizes the mean success of a run's last evaluation, with Optuna's TPE. The same command goes on
where it stopped, and several of them at once, on one storage, share the work.
Needs Optuna: pip install -e ".[search]".

  python -m softmod.search trials=30 env=quickstart \\
      "optimizer.actor.lr=tag(log,interval(1e-4,1e-3))" \\
      "algorithm.target_smoothing=tag(log,interval(1e-3,2e-2))" actor.num_modules=2,4"""


def main() -> None:
    """The command; exits with the codes of docs/exit_codes.md."""
    sys.exit(run(sys.argv[1:], ends=True))


def run(arguments: list[str], ends: bool = False) -> int:
    """Check the command line, make the trials; the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        search = read(arguments)
        with signals.heeded(ends):
            return to_the_end(search.make)
    except KeyboardInterrupt:
        print(
            "softmod: interrupted; the same command goes on with the trial under way",
            file=sys.stderr,
        )
        return 130
    except SoftmodError as error:
        return tell(error)


def read(arguments: list[str]) -> Search:
    """Read what a command line asks for, tried at the ends of every range.

    Raises:
        ConfigError: what is wrong, in one line.
    """
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise ConfigError(f"{flags[0]}: unknown flag; --help lists what there is")
    own = dict(OWN)
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in OWN:
            own[key] = value
        else:
            rest.append(argument)
    if not own["trials"].isdigit() or int(own["trials"]) < 1:
        raise ConfigError(f"trials={own['trials']}: must be a whole number, at least 1")
    parsed = parse(rest)
    fixed = [override for override in parsed if not override.is_sweep_override()]
    space = {o.get_key_element(): distribution(o) for o in parsed if o.is_sweep_override()}
    if not space:
        raise ConfigError(
            "no space given: nothing to search; --help shows how, as in"
            " algorithm.discount=interval(0.9,1)"
        )
    search = Search([str(override.input_line) for override in fixed], space, int(own["trials"]),
                    own["storage"],
                    sweep_identity(fixed, list(space), "search"))  # fmt: skip
    first = {key: ends(one)[0] for key, one in space.items()}
    for key, one in space.items():
        for end in ends(one):
            search.compose(first | {key: end})
    return search


def distribution(override: Override) -> BaseDistribution:
    """Optuna's word for a space in Hydra's.

    Raises:
        ConfigError: Optuna is not installed, or the space is empty or of a kind that cannot be
            drawn from.
    """
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ImportError as error:
        raise ConfigError('a search needs Optuna: pip install -e ".[search]"') from error
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
        if (
            isinstance(space, RangeSweep)
            and isinstance(space.start, int)
            and isinstance(space.step, int)
        ):
            steps = range(space.start, space.stop, space.step)  # type: ignore[arg-type]
            return IntDistribution(steps[0], steps[-1], step=space.step)
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except Exception as error:  # Hydra and Optuna have many
        raise ConfigError(
            f"{override.input_line}: no space to search ({error}); --help shows the forms"
        ) from error


def ends(space: Any) -> list[Any]:
    """The values at which a mistake would show."""
    return list(space.choices) if hasattr(space, "choices") else [space.low, space.high]


def draw(trial: Trial, key: str, space: Any) -> Any:
    """A value for a trial."""
    if hasattr(space, "choices"):
        return trial.suggest_categorical(key, space.choices)
    if isinstance(space.low, int):
        return trial.suggest_int(key, space.low, space.high, step=space.step, log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)


@dataclass
class Search:
    """A study: what its trials share, what they differ in, how many there are to be."""

    lines: list[str]
    space: dict[str, BaseDistribution]
    trials: int
    storage: str
    sweep: dict[str, str]
    codes: list[int] = field(default_factory=list)  # of the trials that failed

    def compose(self, values: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """Return a trial's configuration and its overrides.

        Raises:
            ConfigError: something is wrong with it.
        """
        overrides = [*self.lines, *(f"{key}={value}" for key, value in values.items())]
        return typed(compose(overrides)), overrides

    def make(self) -> int:
        """Make what is missing of the trials; the code of the first failure among them, or 0."""
        from optuna.study import MaxTrialsCallback
        from optuna.trial import TrialState

        study = self.study()
        done = (TrialState.COMPLETE,)
        if len(study.get_trials(states=done)) < self.trials:
            enough = MaxTrialsCallback(self.trials, states=done)
            study.optimize(self.one, callbacks=[enough, self.give_up], catch=SoftmodError)
        if study.get_trials(states=done):
            best = study.best_trial
            print(
                f"best of {len(study.get_trials(states=done))}: success {best.value:.3f} in trial"
                f" {best.number}"
            )
            print(
                "  python -m softmod.train "
                + " ".join([*self.lines, *(f"{k}={v}" for k, v in best.params.items())])
            )
        return self.codes[0] if self.codes else 0

    def one(self, trial: Trial) -> float:
        """The mean success of a trial's last evaluation, and over its seeds; MLflow has its runs
        like any other.
        """
        try:
            signals.check()
            trial.study.sampler = sampler(trial)
            cfg, overrides = self.compose(
                {key: draw(trial, key, one) for key, one in self.space.items()}
            )
            print(f"trial {trial.number}: {told(trial.params)}", flush=True)
            return self.success(cfg, overrides)
        except SoftmodError as error:
            self.codes.append(tell(error, told(trial.params)))
            raise
        except (
            BaseException
        ):  # told to stop: these values come first next time, and their run goes on
            trial.study.enqueue_trial(trial.params if len(trial.params) == len(self.space) else {})
            raise

    def success(self, cfg: Any, overrides: list[str]) -> float:
        """Train, with several seeds side by side if there are some; the mean success."""
        from softmod.experiment.run import run_experiment, run_seeds
        from softmod.spec import mean_success

        if cfg.seeds is None:
            return mean_success(run_experiment(cfg, overrides, self.sweep))
        errors: list[Exception] = []
        results = run_seeds(cfg, overrides, self.sweep, lambda seed, error: errors.append(error))
        if errors:
            raise errors[0]
        return fmean(map(mean_success, results.values()))

    def give_up(self, study: Study, _: FrozenTrial) -> None:
        """Not every trial can fail."""
        if len(self.codes) > self.trials:
            study.stop()

    def study(self) -> Study:
        """The study, new or as it was left; trials whose process died are tried again.

        Raises:
            ConfigError: the storage cannot be used.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # failed trials are told by this program
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        try:
            again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=ATTEMPTS)
            storage = optuna.storages.RDBStorage(
                self.storage, heartbeat_interval=HEARTBEAT, heartbeat_stale_trial_callback=again
            )
            study = optuna.create_study(
                storage=storage,
                study_name=self.sweep["id"],
                direction="maximize",
                load_if_exists=True,
            )
            study.set_user_attr("question", json.dumps([self.lines, sorted(self.space)]))
        except Exception as error:  # of the database, which has its own
            raise ConfigError(
                f"storage={self.storage}: cannot be used ({' '.join(str(error).split())})"[:300]
            ) from error
        return study


def sampler(trial: Trial) -> TPESampler:
    """Of a trial's own stream: a search draws the same again, also when it was stopped; several at
    once draw apart.

    A trial that is made again has its values or its stream; it takes no number from those that
    follow.
    """
    from optuna.samplers import TPESampler

    upto = trial.study.get_trials(deepcopy=False)[: trial.number + 1]
    again = sum(1 for one in upto if {"fixed_params", "failed_trial"} & set(one.system_attrs))
    return TPESampler(seed=trial.number - again, constant_liar=True)


def told(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )


if __name__ == "__main__":
    main()
