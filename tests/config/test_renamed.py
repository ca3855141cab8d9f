"""Messages for old names suggest new ones, and these compose."""

from __future__ import annotations

import pytest

from softmod import search, train
from softmod.config.compose import compose, typed
from softmod.config.groups import options
from softmod.config.renamed import OPTIONS
from softmod.errors import ConfigError

# options of the former group `method`
METHODS = [
    "pcgrad",
    "care_mt50",
    "moore_mt50",
    "soft_modular_small_balanced",
    *options("model"),
]
MOUNTED = {"network": "network@actor", "optimizer": "optimizer@optimizer.critic"}


def answer(*overrides: str) -> str:
    """Return the message for invalid overrides."""
    with pytest.raises(ConfigError) as error:
        compose(list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def typed_as(old: str) -> str:
    """Return an entry of the table as it was typed on a command line."""
    group, _, option = old.partition("=")
    return f"{MOUNTED.get(group, group)}={option}"


def suggestion(line: str) -> list[str]:
    """Return the overrides that a message suggests."""
    separator = " is now model: " if " is now model: " in line else " is now "
    return line.rpartition(separator)[2].split()


@pytest.mark.parametrize(
    "old", [*OPTIONS, *(f"method={name}" for name in METHODS if f"method={name}" not in OPTIONS)]
)
def test_replacements_compose(old):
    line = answer(typed_as(old))
    assert line.startswith(typed_as(old))
    typed(compose(suggestion(line)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("method=soft_modular", "method=soft_modular: method is now model: model=soft_modular"),
        ("method=pcgrad", "method is now model: model=mt_sac algorithm=pcgrad"),
        ("method=care_mt50", "method is now model: model=care"),
        ("method=soft_modular_small_balanced",
         "method is now model: model=soft_modular_small algorithm=balanced"),
        ("+method=mt_sac", "+method=mt_sac: method is now model: model=mt_sac"),
        ("~method", "~method: method is now model: model=..."),
        ("method=mt_sac,moore_mt50", "method is now model: model=mt_sac,moore"),
        ("method=mt_sac,pcgrad", "model=mt_sac, model=mt_sac algorithm=pcgrad (one command each)"),
        ("experiment=mt10_soft",
         "experiment=mt10_soft is now experiment=paper_mt10 model=soft_modular"),
        ("experiment=mt50_care", "experiment=mt50_care is now experiment=paper_mt50 model=care"),
        ("experiment=mt10_pcgrad", "is now experiment=paper_mt10 model=mt_sac algorithm=pcgrad"),
        ("experiment=mt10_soft,mt10_paco", "is now experiment=paper_mt10 model=soft_modular,paco"),
        ("experiment=mt10_soft,mt50_soft",
         "is now experiment=paper_mt10,paper_mt50 model=soft_modular"),
        ("experiment=mt10_soft method=care", "experiment=paper_mt10 model=care"),
        ("experiment=mt10_pcgrad model=care",
         "experiment=mt10_pcgrad is now experiment=paper_mt10"),
        ("algorithm=mtsac_fast", "algorithm=mtsac_fast is now algorithm=fast"),
        ("run=paper_mt50", "run=paper_mt50 is now run=paper"),
        ("network@critic=moore_mt50", "network@critic=moore_mt50 is now network@critic=moore"),
        ("optimizer@optimizer.actor=adam_fast",
         "is now optimizer@optimizer.actor=adam optimizer.actor.lr=5e-4"),
    ],
)  # fmt: skip
def test_messages_for_old_names(old, new):
    assert answer(*old.split()).endswith(new)


@pytest.mark.parametrize(
    "line", ["method=mt_sac", "-m method=mt_sac,care", "--cfg job method=mt_sac"]
)
def test_the_command_ends_with_two(line, capsys):
    assert train.run(line.split()) == 2
    assert "method is now model: model=mt_sac" in capsys.readouterr().err


def test_a_search_suggests_new_names_too(capsys):
    assert search.run(["method=mt_sac,care_mt50"]) == 2
    assert "method is now model: model=mt_sac,care" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "hint"),
    [
        ("experiment/mine", "defaults:\n  - override /method: mt_sac\n", "method is now model"),
        ("experiment/mine", "defaults:\n  - override /algorithm: mtsac_fast\n",
         "mtsac_fast is now algorithm=fast"),
        ("experiment/mine", "defaults:\n  - override /run: paper_mt50\n",
         "run=paper_mt50 is now run=paper"),
        ("model/mine", "method: mine\n", "method is now model"),
        ("sweep/mine",
         "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      method: mt_sac,care\n",
         "method is now model: model=mt_sac,care"),
    ],
)  # fmt: skip
def test_old_names_in_files_of_ones_own(tmp_path, file, text, hint, capsys):
    path = tmp_path / f"{file}.yaml"
    path.parent.mkdir()
    path.write_text(f"# @package _global_\n{text}")
    assert train.run(["--config-dir", str(tmp_path), file.replace("/", "=")]) == 2
    assert hint in capsys.readouterr().err
