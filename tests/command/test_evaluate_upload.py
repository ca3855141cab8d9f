"""`python -m softmod.evaluate`: its result and videos go to the run in MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softmod import evaluate, train
from softmod.spec import TaskScore
from softmod.tracking import dashboard, evaluation, names
from softmod.tracking import mlflow_store as store
from softmod.tracking.destination import DESTINATION
from tests.command.test_train import SMALL, here, only

__all__ = ["here"]  # a fixture
store.prepare_environment()


@pytest.fixture
def folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train a run that is sent to a store in this folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    line = [word for word in SMALL if word != "tracking=journal"]
    assert train.run([*line, "fabric.compile=eager"]) == 0
    return only(here)


def sent() -> Any:
    """Return the run in MLflow."""
    client = store.connect(store.store_uri(None))
    experiment = client.get_experiment_by_name("toy").experiment_id
    (run,) = client.search_runs([experiment])
    return run


def test_an_evaluation_goes_to_its_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check a run's address at both ends, its train.log, and evaluations of it: sent once, not sent
    with tracking=journal, and repeated by the printed command if the server is away.
    """
    number = sent().info.experiment_id
    line = dashboard.line(store.store_uri(None), number)
    assert line is not None
    log = (folder / "train.log").read_text()
    assert log.count(line) in (1, 2)  # a run may be over before the uploader has connected
    assert log.splitlines()[-1] == line
    artifacts = Path("mlartifacts", sent().info.run_id, "artifacts")
    log = (artifacts / "train.log").read_text()
    assert "env steps," in log
    assert "│ mean" in log

    before = set(sent().data.metrics)
    assert evaluate.run([f"checkpoint={folder}", "goals=3", "tracking=journal"]) == 0
    assert set(sent().data.metrics) == before
    (folder / "evaluation" / "task.mp4").write_bytes(b"old")  # older than the next evaluation
    scores = evaluate.evaluate(folder, goals=2)
    printed = capsys.readouterr().out
    assert f"sent to MLflow; dashboard: http://127.0.0.1:5000/#/experiments/{number}" in printed
    metrics = sent().data.metrics
    assert set(metrics) - before == {
        name
        for task in ("toy-reach", "toy-opposite", "toy-touch", "mean")
        for name in (names.evaluated_success_rate(task), names.evaluated_return(task))
    } - {names.evaluated_return("mean")}
    assert metrics[names.evaluated_success_rate("toy-reach")] == scores[0].success_rate
    kept = artifacts / "evaluation"
    assert [path.name for path in kept.iterdir()] == ["evaluation.json"]
    assert json.loads((kept / "evaluation.json").read_text())["env_steps"] == 600
    (folder / "evaluation" / "all.gif").write_bytes(b"new")
    for _ in range(2):  # sent again, without duplicates
        evaluation.send(folder, folder / "evaluation")
    assert (kept / "all.gif").read_bytes() == b"new"
    assert not (kept / "task.mp4").exists()
    client = store.connect(store.store_uri(None))
    name = names.evaluated_success_rate("mean")
    assert len(client.get_metric_history(sent().info.run_id, name)) == 1
    assert sent().info.status == "FINISHED"

    saved = json.loads((folder / DESTINATION).read_text())
    away = saved | {"uri": "http://127.0.0.1:9"}  # nobody listens there
    (folder / DESTINATION).write_text(json.dumps(away))
    scores = evaluate.evaluate(folder, goals=2)
    assert isinstance(scores[0], TaskScore)
    printed = capsys.readouterr().out
    assert "not sent to MLflow (" in printed
    inside = folder.relative_to(Path.cwd())
    assert f"python -m softmod.upload {inside} --evaluation {inside / 'evaluation'}\n" in printed


def test_a_run_without_mlflow_is_not_sent(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.run([*SMALL, "fabric.compile=eager"]) == 0
    assert evaluate.run([f"checkpoint={only(here)}", "goals=2"]) == 0
    assert "MLflow" not in capsys.readouterr().out
    assert not (here / "mlflow.db").exists()
