"""A run's best policy as a model in MLflow: code around an ONNX file, without pickle."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmod.system.files import digest

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

POLICY = "policy.onnx"  # in the run's folder; as an artifact of a run, it becomes a model
NAME = "policy"
DIGEST = "softmod.policy"  # tag of a model: hash of its ONNX file
CODE = Path(__file__).with_name("served_policy.py")


def log_policy(
    client: MlflowClient, experiment: str, run: str, path: Path, register: str | None
) -> None:
    """Log an ONNX file as a model of a run, unless the run has it already.

    Args:
        client: client of the store.
        experiment, run: ids.
        path: the file, as `softmod.networks.portable` writes it.
        register: name under which the model is registered; None: it is not.
    """
    hashed = digest(path)
    model = logged(client, experiment, run, hashed)
    if model is None:
        model = log(client, experiment, run, path, hashed)
    if register:
        register_model(client, run, model, register)


def logged(client: MlflowClient, experiment: str, run: str, hashed: str) -> str | None:
    """Return the id of a run's complete model with this hash; None if there is none."""
    found = client.search_logged_models([experiment], f"source_run_id = '{run}'")
    ready = [model for model in found if str(model.status) == "READY"]
    same = [model.model_id for model in ready if model.tags.get(DIGEST) == hashed]
    return next((model for model in same if client.list_logged_model_artifacts(model)), None)


def log(client: MlflowClient, experiment: str, run: str, path: Path, hashed: str) -> str:
    """Log an ONNX file as a model of a run; return the model's id."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models.model import Model

    model = client.create_logged_model(
        experiment, name=NAME, source_run_id=run, tags={DIGEST: hashed}, model_type="policy"
    )
    about = Model(
        artifact_path=model.artifact_location, run_id=run, model_uuid=model.model_id,
        model_id=model.model_id,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(path, folder, about)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])
    return str(model.model_id)


def save(path: Path, folder: Path, about: Any = None) -> None:
    """Write an ONNX file as an MLflow model, with signature, input example and requirements.

    Args:
        path: the file, as `softmod.networks.portable` writes it.
        folder: the model's folder; created.
        about: its metadata; None: new ones.
    """
    import mlflow.pyfunc
    import numpy as np
    import onnxruntime
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    sizes = [node.shape[-1] for node in (session.get_inputs()[0], session.get_outputs()[0])]
    single, whole = np.dtype(np.float32), np.dtype(np.int64)
    signature = ModelSignature(
        Schema([TensorSpec(single, (-1, sizes[0]), "obs"), TensorSpec(whole, (-1,), "task")]),
        Schema([TensorSpec(single, (-1, sizes[1]))]),
    )
    needed = ("numpy", "onnxruntime")
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(CODE),
        artifacts={"policy": str(path)},
        signature=signature,
        input_example={"obs": np.zeros((1, sizes[0]), single), "task": np.zeros(1, whole)},
        pip_requirements=[f"{name}=={version(name)}" for name in needed],
        metadata={"tasks": json.loads(session.get_modelmeta().custom_metadata_map["tasks"])},
        mlflow_model=about,
    )


def register_model(client: MlflowClient, run: str, model: str, name: str) -> None:
    """Register a model as a new version under a name, unless it is one already."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:  # another run may have created it
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model}"
    versions = client.search_model_versions(f"name = '{name}'")
    if all(known.source != source for known in versions):
        client.create_model_version(name, source, run_id=run, model_id=model)
