"""The code of a policy's model in MLflow, which MLflow copies into the model.

Needs numpy, onnxruntime and MLflow; imports nothing of softmod.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ServedPolicy(PythonModel):
    """Deterministic actions of a trained policy."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the ONNX file."""
        path = context.artifacts["policy"]
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return actions `[rows, action]`.

        Without annotations, because MLflow would check those instead of the model's signature.

        Args:
            context: of the model.
            model_input: `obs` `[rows, obs]` and `task` `[rows]`, the number of each row's task.
            params: not used.
        """
        obs = np.asarray(model_input["obs"], np.float32)
        task = np.asarray(model_input["task"], np.int64)
        return self.session.run(None, {"obs": obs, "task": task})[0]


set_model(ServedPolicy())
