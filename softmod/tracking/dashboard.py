"""MLflow's dashboard: its address, and what the list of an experiment's runs shows.

MLflow opens an experiment as one of language models, with a list that shows no metrics. The
address names the view of training runs, and a stored view whose columns are success.
"""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmod.tracking import mlflow_store as store
from softmod.tracking.descriptions import Summary, experiment_note, with_own_lines
from softmod.tracking.names import SUCCESS_IQM, SUCCESS_MEAN, success_rate

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PORT = 5000
TRAINING = "workflowType=machine_learning"  # not language models
VIEW = "softmod"  # name of the stored view
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
PACKED = "deflate;"  # begin of a compressed view
MAX_COLUMNS = 10  # tasks in the list
NAME_COLUMN = "attributes.`Run Name`"
FIXED_COLUMNS = ("runDateAndNestInfo", "duration")  # start and duration, always shown
NAME_WIDTH = 240  # pixels
SECTIONS = ("eval/success_rate", "train/success_rate", "eval/undiscounted_return")  # first charts


def address(uri: str, experiment: str, run: str | None = None, port: int = PORT) -> str | None:
    """Return the address of an experiment's training runs in a browser, or that of one run.

    Args:
        uri: MLflow's address; a local store is taken to be served by `python -m softmod.ui`.
        experiment: id of the experiment.
        run: id of the run.
        port: of a local store's dashboard.

    Returns:
        The address, without a password; None if this kind of store has none.
    """
    shown = f"/{run}?{TRAINING}" if run else f"?{TRAINING}&viewStateShareKey={VIEW}"
    page = f"/#/experiments/{experiment}/runs{shown}"
    if store.database(uri) is not None:
        return f"http://127.0.0.1:{port}{page}"
    if not uri.startswith(("http:", "https:")):
        return None
    return re.sub(r"(://)[^/@]*@", r"\1", uri.partition("?")[0].rstrip("/")) + page


def line(uri: str, experiment: str, run: str | None = None) -> str | None:
    """Return the line that shows a person the way to the dashboard; None if there is none."""
    found = address(uri, experiment, run)
    if found is None:
        return None
    return f"dashboard: {found}" + (" (python -m softmod.ui)" if store.database(uri) else "")


def describe_experiment(client: MlflowClient, experiment: str, summary: Summary) -> None:
    """Set the description of an experiment, its main metric and its stored view, where they differ.

    Args:
        client: client of the store.
        experiment: id of the experiment.
        summary: of one of its runs, for the names of the tasks.
    """
    if not summary.tasks:
        return
    before: Mapping[str, str] = client.get_experiment(experiment).tags
    own = before.get(store.NOTE_TAG, "")
    note = with_own_lines(experiment_note(summary), own, store.MAX_EXPERIMENT_TAG)
    tags = {
        store.NOTE_TAG: note,
        "mlflow.experiment.primaryMetric.name": SUCCESS_MEAN,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        VIEW_TAG: packed(view(summary.tasks)),
    }
    for key, value in tags.items():
        if before.get(key) != value:
            client.set_experiment_tag(experiment, key, value)


def view(tasks: Sequence[str]) -> dict[str, Any]:
    """Return the view of an experiment's runs, in the form that MLflow stores for shared views.

    Args:
        tasks: names of the tasks; the first ones have a column and a chart each.
    """
    names = [SUCCESS_MEAN, *map(success_rate, tasks[:MAX_COLUMNS]), SUCCESS_IQM]
    keys = [store.accepted(name) for name in names]
    widths = {f"metrics.`{key}`": 40 + 7 * len(key) for key in keys}  # pixels
    attributes = [f"attributes.`{name}`" for name in ("Dataset", "User", "Source", "Models")]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [*widths, *attributes],
        "columnOrder": [NAME_COLUMN, *widths, *FIXED_COLUMNS, *attributes],
        "columnWidths": widths | {NAME_COLUMN: NAME_WIDTH},
        "compareRunCharts": [chart(key) for key in keys],
        "compareRunSections": [section(name) for name in SECTIONS],
        "isAccordionReordered": True,
    }


def packed(view: Mapping[str, Any]) -> str:
    """Return a view as MLflow stores it: compressed, because tags are short."""
    return PACKED + base64.b64encode(zlib.compress(json.dumps(view).encode())).decode()


def unpacked(value: str) -> dict[str, Any]:
    """Return the view that `packed` stored."""
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(value[len(PACKED) :])))
    return found


def section(name: str) -> dict[str, Any]:
    """Return a section of charts, in MLflow's form."""
    return {
        "uuid": name,
        "name": name,
        "display": True,
        "isReordered": False,
        "deleted": False,
        "isGenerated": True,
    }


def chart(key: str) -> dict[str, Any]:
    """Return a chart of success over env steps, from 0 to 1, in MLflow's form."""
    return {
        "type": "LINE",
        "uuid": key,
        "runsCountToCompare": 10,
        "metricSectionId": key.rpartition("/")[0],
        "deleted": False,
        "isGenerated": True,
        "displayName": key.rpartition("/")[2],
        "metricKey": key,
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {"yMin": 0, "yMax": 1.02},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def experiments(database: Path) -> list[tuple[str, str]]:
    """Return id and name of the experiments with runs in an sqlite store, the latest run's first.

    Empty if the store does not exist yet or cannot be read.
    """
    if not database.is_file():
        return []
    query = (
        "SELECT experiments.experiment_id, experiments.name FROM experiments JOIN runs"
        " ON runs.experiment_id = experiments.experiment_id"
        " WHERE experiments.lifecycle_stage = 'active' GROUP BY experiments.experiment_id"
        " ORDER BY max(runs.start_time) DESC"
    )
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            return [(str(one), str(name)) for one, name in connection.execute(query)]
    except sqlite3.Error:
        return []
