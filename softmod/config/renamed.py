"""Names of groups and options that were replaced, with their replacements."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.types import Override

from softmod.config.sweeps import sweep_values
from softmod.errors import ConfigError

ALLOW = "overrides and configuration files of your own are trusted; leave allow out"
Words = dict[str, str]  # group (or key) -> option (or value), as typed

MODELS = {  # former methods and experiments whose name changed -> their overrides now
    "soft": "model=soft_modular",
    "soft_deep": "model=soft_modular_deep",
    "soft_paper": "model=soft_modular_paper",
    "soft_wide": "model=soft_modular_wide",
    "soft_modular_small_balanced": "model=soft_modular_small algorithm=balanced",
    "pcgrad": "model=mt_sac algorithm=pcgrad",
    "care_mt50": "model=care",
    "moore_mt50": "model=moore",
}
EXPERIMENTS = (  # each had the prefixes mt10_ and mt50_
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
EXTRA = {"optimizer=adam_fast": ("lr", "5e-4")}  # a key to set where the option is mounted


def check(overrides: Sequence[Override]) -> None:
    """Reject names that were replaced.

    Raises:
        ConfigError: An override uses one. The message has the replacement.
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
            raise ConfigError(f"{_prefix(old)} {each} (one command each)")
        if override.key_or_group == "experiment":  # typed overrides win over implied ones
            words = {
                key: value
                for key, value in words.items()
                if key == "experiment" or not {key, "model"} & typed
            }
        new |= words
    raise ConfigError(f"{_prefix(old)} {_line(new)}")


def hint(message: str) -> str:
    """Suggest the replacement if Hydra's message is about an old name in a file of the user.

    Returns:
        The hint, or an empty string.
    """
    found = re.search(r"'([a-z]+)/([a-z0-9_]+)'", message)
    if found and (new := OPTIONS.get(f"{found[1]}={found[2]}")):
        return f"; {found[1]}={found[2]} is now {new}"
    if re.search(r"'allow'", message):
        return f"; {ALLOW}"
    return "; method is now model" if re.search(r"'(method|method/\w+)'", message) else ""


def _is_old(override: Override) -> bool:
    """Return whether an override uses a name that was replaced."""
    key = override.key_or_group
    return key == "method" or any(f"{key}={value}" in OPTIONS for value in _values(override))


def _typed_key(override: Override) -> str:
    """Return the key of an override, with `model` for `method`."""
    key = override.get_key_element().lstrip("+~")
    return "model" if key == "method" else key


def _values(override: Override) -> list[str]:
    """List the options of an override: several for a sweep, else one."""
    if not override.is_sweep_override():
        return [str(override.value())]
    try:
        return sweep_values(override)
    except ConfigError:  # the values are unknown, as with glob(*)
        return [str(override.input_line).partition("=")[2]]


def _successor(override: Override, value: str) -> Words:
    """Return the replacement of one option, or the option itself if it was not replaced."""
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
    """Merge several choices into one sweep.

    Returns:
        The sweep, and whether its combinations are exactly these choices.
    """
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


def _prefix(old: Iterable[Override]) -> str:
    """Return the beginning of the message, which repeats the old overrides."""
    line = " ".join(str(override.input_line) for override in old)
    return f"{line}: method is now model:" if "method" in line else f"{line} is now"


def _line(words: Words) -> str:
    """Write words as overrides."""
    return " ".join(f"{key}={value}" for key, value in words.items())
