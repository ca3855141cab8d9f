"""Exported policies act as the policies do, with every network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from softmod.errors import ConfigError
from softmod.networks import portable
from softmod.networks.gaussian import Actor, Policy
from softmod.networks.portable import Portable, largest_difference, program, save_onnx, save_torch
from tests.networks.kinds import FORMS, SMALL

OBS, ACTION = 7, 4
TASKS = ("one", "two", "three")


def actor_of(kind: str, normalize_obs: bool = True) -> Actor:
    """Return a policy with large weights, so that tasks and observations matter."""
    torch.manual_seed(0)
    network = FORMS[kind](OBS, 2 * ACTION, len(TASKS), 1, **SMALL[kind])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.4)
    actor = Actor(network, "tanh", normalize_obs)
    if actor.normalizer is not None:
        actor.normalizer.set(torch.randn(OBS), torch.rand(OBS) + 0.5)
    return actor


@pytest.mark.parametrize("kind", [*SMALL])
def test_rows_are_independent_of_the_tasks_beside_them(kind: str):
    actor = actor_of(kind)
    obs = torch.randn(6, OBS)
    task = torch.tensor([2, 0, 0, 1, 2, 2])
    mixed = Portable(actor)(obs, task).detach()
    policy = Policy(actor)
    for row in range(6):
        alone = policy.act(obs[None, row : row + 1].numpy(), task[row : row + 1].numpy())[0]
        assert mixed[row].numpy() == pytest.approx(alone[0], abs=2e-6)


@pytest.mark.parametrize("kind", ["soft_modular_normed", "multi_head", "residual", "moore"])
def test_the_program_acts_as_the_policy(kind: str, tmp_path: Path):
    actor = actor_of(kind)
    save_torch(actor, TASKS, tmp_path / "policy.pt2")
    extra = {"tasks": ""}
    loaded = torch.export.load(tmp_path / "policy.pt2", extra_files=extra).module()
    assert json.loads(extra["tasks"]) == list(TASKS)
    for rows in (1, 50):
        obs, task = torch.randn(rows, OBS), torch.randint(len(TASKS), (rows,))
        torch.testing.assert_close(loaded(obs, task), Portable(actor)(obs, task).detach())


@pytest.mark.parametrize("kind", ["soft_modular_normed", "hard_routing", "single_task", "film"])
def test_onnx_acts_as_the_policy(kind: str, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    onnxruntime = pytest.importorskip("onnxruntime")
    actor = actor_of(kind, normalize_obs=kind != "film")
    path = tmp_path / "policy.onnx"
    save_onnx(actor, TASKS, path)
    assert largest_difference(actor, path) < 1e-5
    session = onnxruntime.InferenceSession(path)
    inputs = [(node.name, node.type, node.shape[1:]) for node in session.get_inputs()]
    assert inputs == [("obs", "tensor(float)", [OBS]), ("task", "tensor(int64)", [])]
    assert json.loads(session.get_modelmeta().custom_metadata_map["tasks"]) == list(TASKS)
    with torch.no_grad():  # negative control: another policy differs
        next(actor.network.parameters()).mul_(1.1)
    assert largest_difference(actor, path) > 1e-3


def test_nothing_is_left_of_the_training(monkeypatch: pytest.MonkeyPatch):
    actor = actor_of("soft_modular").train()
    exported = program(actor)
    assert not any(parameter.requires_grad for parameter in exported.parameters())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(portable, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(ConfigError, match="onnxscript is not installed: pip install onnxscript"):
        save_onnx(actor_of("mlp"), TASKS, tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())
