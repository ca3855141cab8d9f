"""Metrics of an agent on their way to the journal."""

from __future__ import annotations

from pathlib import Path

import torch

from softmod.clock import Clock
from softmod.spec import EnvSpec
from softmod.tracking.console import Progress
from softmod.tracking.journal import Journal
from softmod.tracking.metrics import Log, by_name

SPEC = EnvSpec(("reach", "push", "door"), obs_dim=4, action_dim=2, horizon=10)


def test_a_metric_of_any_shape_has_names():
    found = by_name(
        {
            "loss": torch.tensor(1.0),
            "temperature": torch.tensor([1.0, 2.0, 3.0]),
            "routing_entropy": torch.tensor([0.5, 0.25]),
            "mine": torch.tensor([4.0, 5.0]),
            "table": torch.ones(2, 2),
        },
        SPEC,
    )
    assert found["train/loss"] == 1.0
    assert found["train/temperature/push"] == 2.0
    assert found["routing/entropy/layer_2"] == 0.25
    assert found["train/mine/1"] == 5.0
    assert {"train/table/0", "train/table/3"} <= found.keys()
    assert len(found) == 12


def test_gradients_are_logged_once(tmp_path: Path):
    """They are measured for a log; a save before the next one does not repeat them."""
    journal = Journal(tmp_path / "run")
    log = Log(journal, SPEC, Progress(100), system_metrics=False)
    log.metrics = {"gradients/cosine": torch.tensor(0.5), "loss": torch.tensor(1.0)}
    log.write(Clock(env_steps=10))
    log.write(Clock(env_steps=20))
    journal.close()
    values = journal.record.values
    assert list(values["gradients/cosine"]) == [10]
    assert list(values["train/loss"]) == [10, 20]
