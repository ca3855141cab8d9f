"""The best policy as a model in MLflow, on a real store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softmod
from softmod.experiment import publish
from softmod.networks import portable
from softmod.tracking import mlflow_store as store
from softmod.tracking.sender import CURSOR, Sender
from tests.command.test_train import SMALL, here

__all__ = ["here"]

LINE = [*(word for word in SMALL if word != "tracking=journal"), "fabric.compile=eager"]
LINE += ["tracking.system_metrics=false", "tracking.uri=sqlite:///mlflow.db"]

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


def models(run: Path) -> list[Any]:
    client = store.connect(f"sqlite:///{Path('mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("toy").experiment_id
    return list(client.search_logged_models([experiment]))


@pytest.fixture
def run(here: Path) -> Path:
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    return softmod.train([*LINE, "tracking.register=toys"]).folder


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
    client = store.connect(f"sqlite:///{Path('mlflow.db').absolute()}")
    (version,) = client.search_model_versions("name = 'toys'")
    (model,) = models(run)
    assert (version.model_id, version.run_id) == (model.model_id, model.source_run_id)
    (run / CURSOR).unlink()  # everything is sent again
    Sender(run).send()
    assert [again.model_id for again in models(run)] == [model.model_id]
    assert len(client.search_model_versions("name = 'toys'")) == 1
    softmod.train([*LINE, "tracking.register=toys", "seed=1"])
    assert len(client.search_model_versions("name = 'toys'")) == 2


def test_without_the_packages_one_line_says_how_to_get_it(here: Path, monkeypatch, capsys):
    monkeypatch.setattr(portable, "find_spec", lambda name: None)
    folder = softmod.train(LINE).folder
    assert not (folder / publish.POLICY).exists()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no model" in line]
    assert line.startswith(
        "no model of the policy in MLflow: onnx, onnxscript, onnxruntime are not"
    )
    assert line.endswith(": pip install onnx onnxscript onnxruntime")


@pytest.mark.parametrize("more", ["tracking.model=false", "tracking=journal"])
def test_it_can_be_left_out(here: Path, more: str):
    folder = softmod.train([*LINE, more]).folder
    assert not (folder / publish.POLICY).exists()
