"""MLflow's side of tracking: the store, the experiment, a sweep's parent and a run, each found or
else made, once.

Imports MLflow only where it is talked to: that takes seconds.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmod.system.files import locked
from softmod.system.user import ensure_identity

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUN_TAG = "softmod.run_id"
SWEEP_TAG = "softmod.sweep_id"
ENDED_TAG = "softmod.ended"  # "unexpectedly", where the training process went without a word
PARENT_TAG = "mlflow.parentRunId"  # the sweep under which the dashboard shows a run: the latest
MEMBER_TAG = "softmod.sweep."  # with a parent's id behind it: every sweep that a run belongs to
CHANGED = (  # with a param behind it: its latest value, where a resumed run has another
    "softmod.changed."
)
KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # the dashboard opens with runs, not with chat traces
MAX_NAME = 250  # characters of a metric, param or tag
SQLITE = "sqlite:///"
ROUTING = "routing"  # the key of images


def prepare_environment() -> None:
    """MLflow reads these when it is imported; its time-outs are minutes otherwise."""
    ensure_identity()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


# --- the store ------------------------------------------------------------------------------------


def store_uri(uri: str | None) -> str:
    """Return MLflow's URI: as given, else MLFLOW_TRACKING_URI, else an sqlite file here.

    Paths become absolute.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    path, (_, mark, query) = database(uri), uri.partition("?")
    return uri if path is None else f"{SQLITE}{path}{mark}{query}"


def database(uri: str) -> Path | None:
    """The file of an sqlite store."""
    return (
        Path(uri.removeprefix(SQLITE).partition("?")[0]).expanduser().absolute()
        if uri.startswith(SQLITE)
        else None
    )


def artifact_root(uri: str) -> str | None:
    """Return the folder of artifacts: beside an sqlite file; None where a server decides."""
    if uri.startswith(("http:", "https:", "databricks")):
        return None
    path = database(uri)
    return ((path.parent if path else Path.cwd()) / "mlartifacts").as_uri()


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Parallel jobs that share an sqlite file take turns; a server keeps order itself."""
    path = database(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        locked(fd)
        yield
    finally:
        os.close(fd)


def connect(uri: str) -> MlflowClient:
    """A client of the store; call it in turn, since it makes the database where there is none."""
    from mlflow.tracking import MlflowClient

    path = database(uri)
    if (
        path is not None and not path.exists()
    ):  # a kill within the migrations must not leave half a database
        fresh = path.with_name(path.name + ".new")
        for left in (fresh, path.with_name(fresh.name + "-journal")):
            left.unlink(missing_ok=True)
        MlflowClient(f"{SQLITE}{fresh}").search_experiments(max_results=1)
        fresh.rename(path)
    return MlflowClient(uri)


# --- what is in it --------------------------------------------------------------------------------


def ensure_experiment(client: MlflowClient, name: str, artifacts: str | None = None) -> str:
    """The id of the experiment with this name; one that was deleted comes back."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        with suppress(MlflowException):  # somebody else's may be there by now
            return str(client.create_experiment(name, artifact_location=artifacts, tags=KIND))
        found = client.get_experiment_by_name(name)
        if found is None:
            raise ConnectionError(f"experiment {name!r} can be neither found nor made")
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def ensure_parent(client: MlflowClient, experiment: str, sweep: Mapping[str, str]) -> str:
    """The id of the one run under which a sweep's runs are shown; it is finished from the start.

    Args:
        experiment: the experiment's id.
        sweep: the sweep's `id` and `name`.
    """

    def make() -> Run:
        run = client.create_run(
            experiment, tags={SWEEP_TAG: sweep["id"]}, run_name=sweep["name"][:MAX_NAME]
        )
        client.set_terminated(run.info.run_id, "FINISHED")
        return run

    return _find_or_make(client, experiment, SWEEP_TAG, sweep["id"], make)[0]


def ensure_run(
    client: MlflowClient, experiment: str, identity: str, started: int, name: str
) -> tuple[str, bool]:
    """The id of the run that carries this identity, and whether it is new."""

    def make() -> Run:
        return client.create_run(
            experiment, start_time=started, tags={RUN_TAG: identity}, run_name=name[:MAX_NAME]
        )

    return _find_or_make(client, experiment, RUN_TAG, identity, make)


def delete_doubles(client: MlflowClient, experiment: str, identity: str, keep: str) -> None:
    """Delete other runs of this identity: a server that hangs may carry out a request twice, and
    late.
    """
    for run in _search(client, experiment, RUN_TAG, identity):
        if run.info.run_id != keep:
            client.delete_run(run.info.run_id)


def _find_or_make(
    client: MlflowClient, experiment: str, tag: str, value: str, make: Callable[[], Run]
) -> tuple[str, bool]:
    """Where several make one at the same time, all agree on the first."""
    if found := _search(client, experiment, tag, value):
        return found[0].info.run_id, False
    if found := _search(client, experiment, tag, value, deleted=True):
        client.restore_run(found[0].info.run_id)
        return found[0].info.run_id, False
    made = make().info.run_id
    first = next((run.info.run_id for run in _search(client, experiment, tag, value)), made)
    if first != made:
        client.delete_run(made)
    return first, first == made


def _search(
    client: MlflowClient, experiment: str, tag: str, value: str, deleted: bool = False
) -> list[Run]:
    """Runs by a tag, the first one first."""
    from mlflow.entities import ViewType

    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", run_view_type=view)
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def image_steps(client: MlflowClient, run: str, key: str) -> set[int]:
    """The steps at which a run has an image under this key whole: the small copy, named by step, is
    written last.
    """
    names = [posixpath.basename(file.path) for file in client.list_artifacts(run, "images")]
    found = [re.match(rf"{re.escape(key)}\+step\+(\d+)\+.*\+compressed", name) for name in names]
    return {int(match[1]) for match in found if match}


# --- what it accepts ------------------------------------------------------------------------------


def accepted(name: str) -> str:
    """The name of a metric, param or tag, in characters and a form that MLflow takes."""
    name = posixpath.normpath(re.sub(r"[^\w./\- :]", "_", name).strip("/"))
    return re.sub(r"^\.\.?(?=/|$)", "_", name)[:MAX_NAME].rstrip("/")


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """The items in pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
