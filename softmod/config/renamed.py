"""Names of groups and options that were replaced, and what to type instead."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from softmod.errors import ConfigError

ALLOW = "what is typed or in a configuration of your own is trusted; leave allow out"
Words = dict[str, str]  # group (or key) -> option (or value), as typed

MODELS = {  # of what used to be methods and experiments, where the name is another one now
    "soft": "model=soft_modular",
    "soft_deep": "model=soft_modular_deep",
    "soft_paper": "model=soft_modular_paper",
    "soft_wide": "model=soft_modular_wide",
    "soft_modular_small_balanced": "model=soft_modular_small algorithm=balanced",
    "pcgrad": "model=mt_sac algorithm=pcgrad",
    "care_mt50": "model=care",
    "moore_mt50": "model=moore",
}
EXPERIMENTS = (  # each existed as mt10_... and mt50_...
    "soft", "soft_deep", "soft_paper", "soft_wide", "single_task", "mt_sac", "mt_mh_sac",
    "mt_mh_sac_wide",
    "mixed_experts", "hard_routing", "care", "paco", "moore", "film", "pcgrad",
)  # fmt: skip
OPTIONS = {
    **{f"method={name}": new for name, new in MODELS.items()},
    **{
        f"experiment={tasks}_{name}": (
            f"experiment=paper_{tasks} {MODELS.get(name, f'model={name}')}"
        )
        for tasks in ("mt10", "mt50")
        for name in EXPERIMENTS
    },
    "algorithm=mtsac_fast": "algorithm=fast",
    "run=paper_mt50": "run=paper",
    "network=care_mt50": "network=care",
    "network=moore_mt50": "network=moore",
    "optimizer=adam_fast": "optimizer=adam",
    "sweep=methods": "sweep=models",
    "sweep=small_methods": "sweep=small_models",
}
EXTRA = {"optimizer=adam_fast": ("lr", "5e-4")}  # a key of the place where the option is mounted


def check(overrides: Sequence[Override]) -> None:
    """Refuse names that were replaced.

    Raises:
        ConfigError: there are some; the line has what to type instead.
    """
    old = [override for override in overrides if _is_old(override)]
    if not old:
        return
    typed = {_typed_key(override) for override in overrides}
    new: Words = {}
    for override in old:
        words, product = _swept([_successor(override, value) for value in _values(override)])
        if not product:
            each = ", ".join(_line(_successor(override, value)) for value in _values(override))
            raise ConfigError(f"{_said(old)} {each} (one command each)")
        if override.key_or_group == "experiment":  # what it implies yields to what was typed
            words = {
                key: value
                for key, value in words.items()
                if key == "experiment" or not {key, "model"} & typed
            }
        new |= words
    raise ConfigError(f"{_said(old)} {_line(new)}")


def hint(message: str) -> str:
    """Return what a message of Hydra's means if it is about a name that was replaced in a file of
    the user's own.
    """
    found = re.search(r"'([a-z]+)/([a-z0-9_]+)'", message)
    if found and (new := OPTIONS.get(f"{found[1]}={found[2]}")):
        return f"; {found[1]}={found[2]} is now {new}"
    if re.search(r"'allow'", message):
        return f"; {ALLOW}"
    return "; method is now model" if re.search(r"'(method|method/\w+)'", message) else ""


def _is_old(override: Override) -> bool:
    key = override.key_or_group
    return key == "method" or any(f"{key}={value}" in OPTIONS for value in _values(override))


def _typed_key(override: Override) -> str:
    key = override.get_key_element().lstrip("+~")
    return "model" if key == "method" else key


def _values(override: Override) -> list[str]:
    """The options that an override goes through; one, if it is no sweep."""
    if not override.is_sweep_override():
        return [str(override.value())]
    try:
        return list(override.sweep_string_iterator())
    except HydraException:  # whose values cannot be known, as with glob(*)
        return [str(override.input_line).partition("=")[2]]


def _successor(override: Override, value: str) -> Words:
    """Return what to type instead of one option; the option itself, if it is not replaced."""
    group = override.key_or_group
    old = f"{group}={value}"
    if group == "method" and override.value() is None:  # as in ~method
        return {"model": "..."}
    words = dict(
        word.split("=") for word in OPTIONS.get(old, old.replace("method=", "model=")).split()
    )
    place = override.package
    if place is None:
        return words
    mounted = {f"{key}@{place}": option for key, option in words.items()}
    if old in EXTRA:
        key, extra = EXTRA[old]
        mounted[f"{place}.{key}"] = extra
    return mounted


def _swept(choices: list[Words]) -> tuple[Words, bool]:
    """One line for several choices, and whether its combinations are these choices."""
    lists: dict[str, list[str]] = {}
    for words in choices:
        for key, value in words.items():
            if value not in lists.setdefault(key, []):
                lists[key].append(value)
    combinations = [
        dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
    ]
    same = all(words in choices for words in combinations) and all(
        words in combinations for words in choices
    )
    return {key: ",".join(values) for key, values in lists.items()}, same


def _said(old: Iterable[Override]) -> str:
    line = " ".join(str(override.input_line) for override in old)
    return f"{line}: method is now model:" if "method" in line else f"{line} is now"


def _line(words: Words) -> str:
    return " ".join(f"{key}={value}" for key, value in words.items())
