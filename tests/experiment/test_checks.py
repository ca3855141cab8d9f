"""Networks of the user are checked before a run makes anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from softmod.config.compose import compose, typed
from softmod.errors import ConfigError
from softmod.experiment.checks import check_compiler, check_members
from softmod.networks.network import Network
from softmod.networks.stacked import StackedLinear


class Mine(Network):
    """A network in one of the ways in which people get it wrong."""

    def __init__(self, kind: str, tasks: int = 3) -> None:
        super().__init__(4, 2, tasks, 2)
        self.kind = kind
        if kind == "list":
            self.layers = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
        elif kind == "by task":
            self.layers = nn.ModuleList(StackedLinear(tasks, 4, 2, "torch") for _ in range(2))
        else:
            self.layer = StackedLinear(2, 4, 2, "torch")

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        if self.kind == "list":
            return torch.stack([layer(x) for layer in self.layers])
        if self.kind == "by task":
            return torch.stack([layer(x) for layer in self.layers])
        outputs = self.layer(x.flatten(0, 1).expand(2, -1, -1)).unflatten(1, x.shape[:2])
        return outputs[0] if self.kind == "shape" else outputs


@pytest.mark.parametrize(
    ("kind", "tasks", "message"),
    [
        ("list", 3, r"parameter layers.0.weight \[2, 4\] must have its 2 members"),
        ("by task", 3, r"parameter layers.0.weight \[3, 4, 2\] must have its 2 members"),
        ("by task", 4, r"parameter layers.0.weight \[4, 4, 2\] must have its 2 members"),
        ("shape", 3, r"outputs have shape \[3, 2, 2\], not \[2, 3, 2, 2\]"),
    ],
)
def test_a_network_that_breaks_the_contract_is_named(kind: str, tasks: int, message: str):
    with pytest.raises(ConfigError, match=f"critic._target_=lab.Mine: {message}"):
        check_members(Mine(kind, tasks), "critic", "lab.Mine")


def test_a_network_that_keeps_it_passes():
    network = Mine("stacked").train()
    check_members(network, "critic", "lab.Mine")
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_that_fails_is_named(monkeypatch: pytest.MonkeyPatch):
    network = Mine("stacked")
    monkeypatch.setattr(network, "forward", lambda x: x @ x)
    with pytest.raises(ConfigError, match=r"fails on inputs \[3, 2, 4\] \(RuntimeError"):
        check_members(network, "actor", "lab.Mine")


def test_compiling_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    check_compiler(typed(compose(["experiment=toy"])))
    cfg = typed(compose(["experiment=toy", "fabric.compile=compiled"]))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler \('(g|clang)\+\+' not found\)"):
        check_compiler(cfg)
    for wrong in ("no-such-compiler", "g++ -m16", '"', " ", ""):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(ConfigError, match=f"'{re.escape(wrong)}' not found"):
            check_compiler(cfg)


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = typed(compose(["experiment=toy", "fabric.compile=compiled"]))
    for text, reason in (
        ("#!/bin/sh\necho broken >&2\nexit 3\n", "cxx' fails: broken)"),
        ("#!/bin/sh\nexit 3\n", "cxx' fails: exit code 3)"),
        ("#!/missing\n", "cannot be run"),
    ):
        compiler = tmp_path / "cxx"
        compiler.write_text(text)
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        with pytest.raises(ConfigError, match=re.escape(reason)):
            check_compiler(cfg)
    monkeypatch.delenv("CXX")
    check_compiler(cfg)
