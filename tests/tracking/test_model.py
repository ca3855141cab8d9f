"""The best policy as a model in MLflow, on a real store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

import softmod
from softmod.experiment.publish import write_policy
from softmod.networks import portable
from softmod.tracking import mlflow_store as store
from softmod.tracking.journal import Journal
from softmod.tracking.model import POLICY
from softmod.tracking.sender import CURSOR, Sender
from tests.command.test_train import SMALL

LINE = [*(word for word in SMALL if word != "tracking=journal"), "fabric.compile=eager"]
LINE += ["tracking.model=true", "tracking.system_metrics=false", "tracking.uri=sqlite:///mlflow.db"]

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {forbidden}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
obs = np.load(sys.argv[2])
task = np.arange(len(obs)) % 3
np.save(sys.argv[3], model.predict({"obs": obs, "task": task}))
"""
FORBIDDEN = {"softmod", "torch", "lightning", "mujoco", "metaworld", "gymnasium", "onnx", "hydra"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train a run in a folder of its own; return the run's folder."""
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("model"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield softmod.train([*LINE, "tracking.register=toys"]).folder.resolve()


def client_of(run: Path) -> MlflowClient:
    return store.connect(f"sqlite:///{run.parents[2] / 'mlflow.db'}")


def models(run: Path) -> list[Any]:
    client = client_of(run)
    experiment = client.get_experiment_by_name("toy").experiment_id
    return list(client.search_logged_models([experiment]))


def test_the_model_acts_as_the_best_policy_and_needs_no_simulator(run: Path, tmp_path: Path):
    (model,) = models(run)
    obs = np.random.default_rng(0).standard_normal((9, 9)).astype(np.float32)
    np.save(tmp_path / "obs.npy", obs)
    code = ALONE.replace("{forbidden}", repr(FORBIDDEN))
    folder = model.artifact_location.removeprefix("file://")
    line = [sys.executable, "-c", code, folder, "obs.npy", "action.npy"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    policy = softmod.load(run / "checkpoints" / "best")
    expected = [policy.act(row, index % 3) for index, row in enumerate(obs)]
    assert np.load(tmp_path / "action.npy") == pytest.approx(np.stack(expected), abs=1e-5)
    assert not list(Path(folder).rglob("*.pkl"))


def test_signature_example_and_tasks_are_with_it(run: Path):
    import mlflow

    (model,) = models(run)
    loaded = mlflow.pyfunc.load_model(model.artifact_location)
    inputs, outputs = loaded.metadata.signature.inputs, loaded.metadata.signature.outputs
    assert [(spec.name, spec.shape) for spec in inputs] == [("obs", (-1, 9)), ("task", (-1,))]
    assert [spec.shape for spec in outputs] == [(-1, 2)]
    assert loaded.predict(loaded.input_example).shape == (1, 2)
    assert loaded.metadata.metadata["tasks"] == ["toy-reach", "toy-opposite", "toy-touch"]
    with pytest.raises(Exception, match="schema"):
        loaded.predict({"obs": np.zeros((1, 8), np.float32), "task": np.zeros(1, np.int64)})


def test_it_is_sent_and_registered_once(run: Path):
    client = client_of(run)
    (version,) = client.search_model_versions("name = 'toys'")
    (model,) = models(run)
    source = f"models:/{model.model_id}"
    assert (version.source, version.run_id) == (source, model.source_run_id)
    (run / CURSOR).unlink()  # everything is sent again
    Sender(run).send()
    assert [again.model_id for again in models(run)] == [model.model_id]
    assert len(client.search_model_versions("name = 'toys'")) == 1


def test_without_the_packages_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(portable, "find_spec", lambda name: None)
    with closing(Journal(tmp_path)) as journal:
        write_policy(journal, tmp_path)
    assert not (tmp_path / POLICY).exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no model of the policy in MLflow: onnx, onnxscript, onnxruntime")
    assert line.endswith(": pip install onnx onnxscript onnxruntime")


def test_a_failure_is_a_warning(tmp_path: Path, caplog):
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    with closing(Journal(tmp_path)) as journal:
        write_policy(journal, tmp_path)  # there is no checkpoint
    assert "policy.onnx could not be written" in caplog.text
