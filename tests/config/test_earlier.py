"""Configurations saved by earlier versions keep their meaning."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from softmod.config.compose import compose, from_saved
from softmod.config.earlier import ADDED
from softmod.config.identity import as_values
from softmod.errors import CheckpointError, ConfigError


def saved(*overrides: str) -> dict[str, Any]:
    """Return a configuration as it is saved."""
    values: Any = OmegaConf.to_container(compose(list(overrides)), resolve=True)
    return dict(values)


@pytest.mark.parametrize("model", ["soft_modular_small", "soft_modular_residual", "mt_sac"])
def test_keys_added_since_have_their_former_values(model: str):
    whole = saved("env=mt10", f"model={model}", "algorithm=mtsac")
    before = {name: dict(part) if isinstance(part, dict) else part for name, part in whole.items()}
    for key in ADDED:
        part, _, name = key.rpartition(".")
        del (before[part] if part else before)[name]
    del before["critic"]["norm"]
    if model != "soft_modular_residual":
        del before["actor"]["norm"]
    before["allow"] = ["lab"]
    assert as_values(from_saved(before, [])) == as_values(from_saved(whole, []))


def test_a_missing_key_of_all_versions_is_an_error():
    values = saved("env=toy")
    del values["algorithm"]["discount"]
    with pytest.raises(CheckpointError, match="discount"):
        from_saved(values, [])


@pytest.mark.parametrize(
    "env",
    ["${oc.create:{_target_:subprocess.Popen,args:[touch,ran]}}", {"name": "${oc.env:HOME}"}],
)
def test_an_interpolation_in_a_saved_configuration_is_refused(env: Any):
    with pytest.raises(ConfigError, match="no interpolations"):
        from_saved(saved("env=toy") | {"env": env}, [])
