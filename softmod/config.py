"""From a command line to a checked configuration, without importing anything heavy."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from softmod import schema
from softmod.errors import ConfigError

GROUPS = (
    "env",
    "network",
    "algorithm",
    "optimizer",
    "method",
    "variant",
    "run",
    "workers",
    "fabric",
    "tracking",
    "experiment",
    "sweep",
)
PACKAGES = ("softmod", "torch.optim")  # what a _target_ may name, besides the user's own (`allow`)
PLACES = {  # and where the classes of each part lie: others could do harm when they are built
    "env": "softmod.envs", "actor": "softmod.networks", "critic": "softmod.networks", "algorithm": "softmod.agent",
    "optimizer": "torch.optim",
}  # fmt: skip
NOT_RESULTS = {
    "": ("seed", "name", "allow", "tracking"),
    "env": ("fast",),
    "run": ("steps_per_task", "max_minutes", "resume", "folder", "eval_every", "eval_goals", "final_eval_goals",
            "save_every", "log_every"),
    "workers": ("processes", "timeout"),
    "fabric": ("accelerator", "threads", "compile", "deterministic"),
}  # fmt: skip


LISTED = 12  # names, at most, in the answer to a faulty line


def conf_folder() -> Path:
    """`conf/` beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def options(group: str) -> list[str]:
    """The options of a group, from the files of `conf/`."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def register() -> None:
    """Tell Hydra the schemas."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=schema.TrainConfig)
    store.store(name="evaluate_schema", node=schema.EvaluateConfig)
    store.store(name="report_schema", node=schema.ReportConfig)
    store.store(group="schema/env", name="env", node=schema.EnvConfig)
    for name, node in schema.NETWORKS.items():
        store.store(group="schema/network", name=name, node=node)
    store.store(group="schema/optimizer", name="adam", node=schema.AdamConfig)


def parse(overrides: list[str]) -> list[Override]:
    """The overrides as Hydra reads them.

    Raises:
        ConfigError: one is not of the form key=value, or adds or deletes a key.
    """
    parsed = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text}: not of the form key=value ({str(error).splitlines()[0]})") from error
        if override.type is not None and override.type.name != "CHANGE" and not text.lstrip("+~").startswith("hydra"):
            raise ConfigError(f"{text}: keys are changed by key=value, none can be added or deleted")
        group = override.key_or_group
        if group in GROUPS and not override.is_sweep_override() and override.value() is None:
            raise ConfigError(f"{text}: {group} needs an option; it has {listed(options(group))}")
        parsed.append(override)
    return parsed


def check_sweep(overrides: Iterable[Override], config_dir: str | None) -> None:
    """
    Raises:
        ConfigError: there is no such sweep; Hydra would go on without, since none is needed.
    """
    names = options("sweep") + [path.stem for path in Path(config_dir or "", "sweep").glob("*.yaml") if config_dir]
    for override in overrides:
        chosen = override.value() if override.key_or_group == "sweep" and not override.is_sweep_override() else None
        if chosen is not None and str(chosen) not in names:
            line = f"sweep={chosen}: sweep has no option {chosen}; it has {listed(names, str(chosen))}"
            raise ConfigError(line + near(str(chosen), names))


def compose(
    overrides: list[str], name: str = "train", config_dir: str | None = None, hydra: bool = False
) -> DictConfig:
    """The configuration that these overrides make; with `hydra`, Hydra's own part too.

    Raises:
        ConfigError: with key, value, what is allowed and the nearest valid name, in one line.
    """
    register()
    parsed = parse(overrides)
    if name == "train":
        check_sweep(parsed, config_dir)
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return hydra_compose(name, overrides=overrides + extra, return_hydra_config=hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides, name)) from error
    except (YAMLError, RecursionError, OSError) as error:
        raise ConfigError(f"a file of the configuration is unreadable: {' '.join(str(error).split())}"[:300]) from error
    finally:
        GlobalHydra.instance().clear()


def typed(config: DictConfig) -> Any:
    """The dataclasses that a composed configuration stands for, checked.

    Raises:
        ConfigError: a type, a range, a choice or a rule across fields is broken.
    """
    try:
        cfg = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, [])) from error
    check_fields(cfg, "")
    if isinstance(cfg, schema.TrainConfig):
        check_rules(cfg)
    return cfg


# --- checks ---------------------------------------------------------------------------------------


def check_fields(node: Any, key: str) -> None:
    """Ranges and choices of a dataclass and of those within it."""
    if not dataclasses.is_dataclass(node):
        return
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), f"{key}.{field.name}".lstrip(".")
        if value == "???":
            raise ConfigError(f"{name}: no value given")
        check_fields(value, name)
        check_choice(name, value, field.metadata.get("choices"))
        if value is not None and "low" in field.metadata:
            check_range(name, value, **field.metadata)


def check_choice(name: str, value: Any, choices: Iterable[str] | None) -> None:
    if choices is not None and value not in choices:
        raise ConfigError(f"{name}={value}: must be one of {', '.join(choices)}{near(str(value), choices)}")


def check_range(name: str, value: float, low: float | None, high: float | None, open_low: bool) -> None:
    too_low = low is not None and (value < low or (open_low and value == low))
    if too_low or (high is not None and value > high) or not math.isfinite(value):
        above = "finite" if low is None else f"above {low:g}" if open_low else f"at least {low:g}"
        above += " and finite" if value == math.inf and low is not None else ""
        allowed = f"in {'(' if open_low else '['}{low:g}, {high:g}]" if high is not None else above
        raise ConfigError(f"{name}={value}: must be {allowed}")


def check_rules(cfg: schema.TrainConfig) -> None:
    """What holds across fields."""
    check_env(cfg)
    run = cfg.run
    if run.batch_per_task > run.replay_per_task:
        raise ConfigError(
            f"run.batch_per_task={run.batch_per_task}: larger than run.replay_per_task={run.replay_per_task}"
        )
    if run.warmup_per_task > run.replay_per_task:
        raise ConfigError(
            f"run.warmup_per_task={run.warmup_per_task}: larger than run.replay_per_task={run.replay_per_task}"
        )
    if cfg.env.horizon % run.round_steps:
        raise ConfigError(f"run.round_steps={run.round_steps}: must divide env.horizon={cfg.env.horizon}")
    if not plain(cfg.name):
        shown = cfg.name if cfg.name.isprintable() else ascii(cfg.name)
        raise ConfigError(f"name={shown:.100}: must be a plain folder name, of at most 200 bytes")
    check_targets(cfg)
    for name in ("actor", "critic", "temperature"):
        betas = getattr(getattr(cfg.optimizer, name), "betas", [0.0, 0.0])
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"optimizer.{name}.betas={betas}: must be two numbers in [0, 1)")


def plain(name: str) -> bool:
    """Whether a folder can have this name anywhere."""
    return 0 < len(name.encode(errors="replace")) <= 200 and name.isprintable() and not set(name) & set("/\\")


def check_env(cfg: schema.TrainConfig) -> None:
    from softmod.envs.tasks import MT50, TOY_TASKS, check_tasks

    known = {"softmod.envs.metaworld.MetaWorld": MT50, "softmod.envs.toy.Toy": TOY_TASKS}.get(cfg.env._target_)
    if not cfg.env.name:
        raise ConfigError("env.name=: must not be empty")
    if not cfg.env.tasks:
        raise ConfigError("env.tasks=[]: name at least one task (python -m softmod.envs lists them)")
    if known is not None:
        check_tasks(cfg.env.tasks, known)
    if known is TOY_TASKS and cfg.env.reward != "v2":
        raise ConfigError(f"env.reward={cfg.env.reward}: the toy tasks have only v2")


def check_targets(cfg: schema.TrainConfig) -> None:
    nodes = {"env": cfg.env, "actor": cfg.actor, "critic": cfg.critic, "algorithm": cfg.algorithm}
    nodes |= {f"optimizer.{name}": getattr(cfg.optimizer, name) for name in ("actor", "critic", "temperature")}
    for key, node in nodes.items():
        path = target_of(node)
        if not path:
            raise ConfigError(f"{key}._target_: no value given; it names the class to build")
        if not allowed(path, cfg.allow):
            packages = ", ".join([*PACKAGES, *cfg.allow])
            raise ConfigError(f"{key}._target_={path}: must lie in {packages} (allow=[package])")
        if not re.fullmatch(r"([a-z_]\w*\.)+[A-Z]\w*", path):
            raise ConfigError(f"{key}._target_={path}: must name a class, as in package.module.Class")
        within(key, path, cfg.allow)


def within(part: str, path: str, allow: Iterable[str]) -> None:
    """
    Raises:
        ConfigError: the class lies neither where those of this part do nor in a package of the user's own.
    """
    places = (PLACES[part.split(".")[0]], *allow)
    if not lies_in(path, places):
        raise ConfigError(f"{part}._target_={path}: must lie in {', '.join(places)} (allow=[package])")


def listed(names: list[str], word: str = "") -> str:
    """Names in a line: all of them, or of many those that are most like `word`, and how many more there are."""
    if len(names) <= LISTED:
        return ", ".join(names)
    close = difflib.get_close_matches(word, names, LISTED, 0.0)
    return f"{', '.join(close)} and {len(names) - LISTED} more (--help)"


def near(word: str, names: Iterable[str]) -> str:
    """The nearest valid name, if one is near."""
    close = difflib.get_close_matches(word, list(names), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


# --- what Hydra and OmegaConf say, in one line ----------------------------------------------------


def explain(error: BaseException, overrides: list[str], name: str = "train") -> str:
    """Key, value, what is allowed, the nearest valid name."""
    cause: BaseException = error
    while isinstance(cause.__cause__, (HydraException, OmegaConfBaseException)):
        cause = cause.__cause__
    text = plainly((str(cause).strip() or type(cause).__name__).splitlines()[0])
    about = str(getattr(cause, "full_key", None) or "")
    for override in reversed(overrides):  # of two for the same key, the last one counts
        others = [other for other in overrides if other != override]
        if line := explain_override(override, others, f"{error}\n", about, text, name):
            return line
    return f"{about}: {text}" if about and about not in text else text


WANTED = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "Boolean": "true or false"}
MOUNTED = {"network": ("network@actor", "network@critic"), "optimizer": ("optimizer@optimizer.actor",)}


def plainly(text: str) -> str:
    """What OmegaConf says of a value of the wrong type, in words of the command line."""
    if "is not a ListConfig" in text:
        return "must be a list, as in [a,b]"
    if "is not Optional" in text:
        return "must not be null"
    kind = re.search(r"(?:could not be converted to|is not a valid) (\w+)", text)
    return f"must be {WANTED[kind[1]]}" if kind and kind[1] in WANTED else text


def explain_override(
    override: str, overrides: list[str], message: str, about: str, text: str, config_name: str
) -> str | None:
    """A line about this override, if the error is about it; `overrides` are the others."""
    key, _, value = override.partition("=")
    group = key.split("@")[0]
    if group in GROUPS and f"/{value.strip('[]')}'" in message:
        names = options(group)
        return f"{override}: {group} has no option {value}; it has {listed(names, value)}{near(value, names)}"
    unknown = "is not in struct" in text or "not in '" in text
    if f"Could not override '{key}'" in message or (unknown and (about == "" or key.startswith(about))):
        return f"{override}: there is no key or group {key}{nearest_key(key, overrides, config_name)}"
    if about == key:
        return f"{override}: {text}"
    return None


def nearest_key(key: str, overrides: list[str], config_name: str) -> str:
    """What a mistyped key may have meant, or else what its parent has."""
    if key in MOUNTED:
        return f"; did you mean {' or '.join(MOUNTED[key])}?"
    if "@" in key or "." not in key:
        words = {name.split(".")[0] for name in keys((), config_name)}
        if config_name == "train":
            words |= {*GROUPS, "network@actor", "network@critic"}
        return near(key, sorted(word for word in words if ("@" in word) == ("@" in key)))
    try:
        known = keys(tuple(overrides), config_name)
    except ConfigError:  # more than one override is wrong
        known = keys_of_groups(overrides, config_name)
    parent, _, name = key.rpartition(".")
    names = [word.removeprefix(f"{parent}.") for word in known if word.startswith(f"{parent}.")]
    if close := near(name, names):
        return close.replace("did you mean ", f"did you mean {parent}.")
    return f"; {parent} has {', '.join(n for n in names if n != '_target_')}" if names else near(key, known)


def keys_of_groups(overrides: list[str], config_name: str) -> tuple[str, ...]:
    """The keys that there are by the groups among the overrides, as far as these are valid."""
    chosen = tuple(override for override in overrides if override.partition("=")[0].split("@")[0] in GROUPS)
    try:
        return keys(chosen, config_name)
    except ConfigError:
        return keys((), config_name)


@cache
def keys(overrides: tuple[str, ...], config_name: str) -> tuple[str, ...]:
    """Every key of a configuration, dotted."""
    composed = compose(list(overrides), config_name)
    return tuple(flat(OmegaConf.to_container(composed, resolve=False)))  # type: ignore[arg-type]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return result


# --- identity -------------------------------------------------------------------------------------


def as_values(cfg: schema.TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(cfg)


def of_results(cfg: schema.TrainConfig) -> dict[str, Any]:
    """Everything that changes results, except the seed."""
    values = as_values(cfg)
    for part, names in NOT_RESULTS.items():
        node = values[part] if part else values
        for name in names:
            node.pop(name)
    return values


def identity(cfg: schema.TrainConfig) -> str:
    """A hash of everything that changes results, except the seed: two runs with one identity can be compared."""
    return hashlib.sha256(json.dumps(of_results(cfg), sort_keys=True).encode()).hexdigest()[:8]


def run_folder(cfg: schema.TrainConfig) -> Path:
    """`runs/<name>-<identity>/seed_<seed>`"""
    return Path(cfg.run.folder) / f"{cfg.name}-{identity(cfg)}" / f"seed_{cfg.seed}"


# --- building what a configuration names ----------------------------------------------------------


def target_of(node: Any) -> str:
    return str(node.get("_target_", "") if isinstance(node, Mapping) else getattr(node, "_target_", ""))


def allowed(module: str, allow: Iterable[str]) -> bool:
    return lies_in(module, (*PACKAGES, *allow))


def lies_in(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def resolve_target(path: str, allow: Iterable[str] = (), part: str = "") -> type:
    """The class that a `_target_` names, judged by what it resolves to and not by its spelling.

    Raises:
        ConfigError: not there, not a class, or its own module lies elsewhere, or where this `part` (see PLACES)
            has none.
    """
    module, _, name = path.rpartition(".")
    line = f"{part}._target_={path}".lstrip(".")
    if not allowed(path, allow):
        raise ConfigError(f"{line}: must lie in {', '.join([*PACKAGES, *allow])} (allow=[package])")
    found: Any = None
    try:
        found = importlib.import_module(module)
        found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{line}: not found ({error}){near(name, classes(found))}") from error
    if not isinstance(found, type) or not allowed(found.__module__, allow):
        raise ConfigError(f"{line}: must be a class of {', '.join([*PACKAGES, *allow])}{near(name, classes(found))}")
    if part:
        within(part, f"{found.__module__}.{found.__qualname__}", allow)
    return found


def classes(module: Any) -> list[str]:
    """The names of the classes in a module."""
    return [name for name, value in vars(module).items() if isinstance(value, type)] if inspect.ismodule(module) else []


def build(node: Any, allow: Iterable[str] = (), part: str = "", **extra: Any) -> Any:
    """An object of the class that `node._target_` names, made from the node's other fields and `extra`.

    Raises:
        ConfigError: the class is not allowed, is none of this `part`'s (see PLACES), or refuses the fields.
    """
    values = (
        dict(node) if isinstance(node, Mapping) else {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    )
    path = values.pop("_target_")
    target, line = resolve_target(path, allow, part), f"{part}._target_={path}".lstrip(".")
    try:
        inspect.signature(target).bind(**extra, **values)
    except TypeError as error:
        raise ConfigError(f"{line}: {error}") from error
    try:
        return target(**extra, **values)
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{line}: {error}") from error
    except (ArithmeticError, RuntimeError, MemoryError) as error:  # of numbers beyond what memory or PyTorch can hold
        told = (str(error).splitlines() or [type(error).__name__])[0]
        numbers = {name: value for name, value in values.items() if isinstance(value, int)}
        most = max(numbers, key=lambda name: numbers[name], default="")
        largest = f"; {part}.{most}={numbers[most]} is the largest of its numbers" if most else ""
        raise ConfigError(f"{line}: cannot be built ({told}){largest}") from error
