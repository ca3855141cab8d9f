"""Upload of what `python -m softmod.evaluate` found, to the evaluated run in MLflow."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmod.errors import ConfigError
from softmod.spec import TaskScore
from softmod.tracking import dashboard, destination
from softmod.tracking import mlflow_store as store
from softmod.tracking.names import evaluated_return, evaluated_success_rate
from softmod.tracking.record import Record

RESULT = "evaluation.json"
UNDER = "evaluation"  # folder among the run's artifacts
VIDEOS = (".mp4", ".gif")


def send(folder: Path, output: Path) -> str:
    """Send an evaluation and its videos to the run in MLflow; return a line that says where it is.

    Sending it again changes nothing: the metrics have the time of the result file.

    Args:
        folder: the run's folder.
        output: the evaluation's folder, with `evaluation.json`.

    Raises:
        ConfigError: there is no evaluation or no journal, MLflow does not have the run yet, or the
            store's URI lacks its password.
        Exception: whatever MLflow raises.
    """
    from mlflow.entities import Metric

    result = output / RESULT
    try:
        time = result.stat().st_mtime_ns // 1_000_000
        step, values = read(json.loads(result.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{output}: holds no evaluation") from error
    record = Record.read(folder)
    to = destination.load(folder, record)
    with store.one_at_a_time(to["uri"]):
        client = store.connect(to["uri"])
        experiment = store.ensure_experiment(
            client, to["experiment"], store.artifact_root(to["uri"])
        )
    runs = store.search(client, experiment, store.RUN_TAG, record.run_id)
    if not runs:
        raise ConfigError(
            f"{folder}: not in MLflow yet; first run python -m softmod.upload"
            f" {shlex.quote(str(folder))}"
        )
    run = str(runs[0].info.run_id)
    metrics = [Metric(store.accepted(name), value, time, step) for name, value in values.items()]
    for batch in store.batches(metrics, store.MAX_METRICS):
        client.log_batch(run, metrics=batch, synchronous=True)
    for path in files(output):
        client.log_artifact(run, str(path), UNDER)
    return dashboard.line(to["uri"], experiment, run) or f"run {run} in MLflow"


def read(result: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Return the env steps of an evaluation, and its metrics by name.

    Raises:
        LookupError, TypeError, ValueError: it is not an evaluation.
    """
    scores = [
        TaskScore(str(one["task"]), float(one["success_rate"]), float(one["return"]), 0)
        for one in result["scores"]
    ]
    values = {evaluated_success_rate("mean"): float(result["success_rate"])}
    values |= {evaluated_success_rate(score.task): score.success_rate for score in scores}
    values |= {evaluated_return(score.task): score.episode_return for score in scores}
    return int(result["env_steps"]), values


def files(output: Path) -> list[Path]:
    """Return the result of an evaluation and the videos made with it; links are left out."""
    result = output / RESULT
    began = result.stat().st_mtime
    videos = [path for path in sorted(output.iterdir()) if path.suffix in VIDEOS]
    made = [path for path in videos if path.lstat().st_mtime >= began]
    return [path for path in (result, *made) if path.is_file() and not path.is_symlink()]
