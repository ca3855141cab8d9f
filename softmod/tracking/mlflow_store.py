"""Access to MLflow: finds or creates the store, the experiment, a sweep's run and a run.

MLflow is imported within functions, because the import takes seconds.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmod.errors import ConfigError
from softmod.system.files import locked
from softmod.system.user import ensure_identity
from softmod.tracking.descriptions import TaskSet, with_own_lines
from softmod.tracking.journal import now
from softmod.tracking.redact import redacted

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUN_TAG = "softmod.run_id"
SWEEP_TAG = "softmod.sweep_id"
ENDED_TAG = "softmod.ended"  # "unexpectedly" if training ended without logging a status
PARENT_TAG = "mlflow.parentRunId"  # the latest sweep, under which the dashboard shows a run
MEMBER_TAG = "softmod.sweep."  # prefix of a parent's id: one tag for each sweep of a run
CHANGED = "softmod.changed."  # prefix of a param's name: its new value in a resumed run
KIND = {"mlflow.experimentKind": "custom_model_development"}  # dashboard shows runs, not traces
NOTE_TAG = "mlflow.note.content"  # description, in Markdown
# Limits of MLflow:
MAX_NAME = 250  # characters of the name of a metric, param or tag
MAX_METRICS = 1000  # per request
MAX_PARAMS = 100  # params or tags per request
MAX_PARAM = 6000  # characters
MAX_TAG = 5000  # characters
MAX_EXPERIMENT_TAG = 5000
MAX_NOTE = 8000  # of a run
SQLITE = "sqlite:///"
LOCATIONS = (  # tables and columns of an sqlite store with paths below the artifact folder
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
ROUTING = "routing"  # key of the routing images
LOCAL = ("127.0.0.1", "localhost", "::1")  # hosts that no proxy can reach


def prepare_environment() -> None:
    """Set MLflow's environment variables; call it before MLflow is imported.

    They disable telemetry and pickle, shorten time-outs from minutes to seconds, and exclude
    servers on this machine from proxies. Warnings that the user turned into errors are ignored,
    because importing MLflow causes some.
    """
    ensure_identity()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if excluded.strip() != "*":  # which must stand alone
        hosts = dict.fromkeys([*filter(None, excluded.replace(" ", "").split(",")), *LOCAL])
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)
    os.environ.pop("PYTHONWARNINGS", None)  # of child processes
    if any("error" in option for option in sys.warnoptions):
        warnings.simplefilter("ignore")


# --- the store ------------------------------------------------------------------------------------


def store_uri(uri: str | None) -> str:
    """Return MLflow's URI, with an absolute path if it is an sqlite file.

    Args:
        uri: None: MLFLOW_TRACKING_URI if set, else `mlflow.db` in the working directory.

    Raises:
        ConfigError: MLflow has no store of this kind.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if meant := misnamed(uri):
        raise ConfigError(
            f"MLflow store {redacted(uri)}: must be sqlite:///FILE, http://SERVER or the URI of a"
            f" database; did you mean {meant}?"
        )
    path, (_, mark, query) = database(uri), uri.partition("?")
    return uri if path is None else f"{SQLITE}{path}{mark}{query}"


def misnamed(uri: str) -> str | None:
    """Return what was probably meant by the URI of a store that MLflow cannot use; else None.

    These are paths, servers without a scheme, and MLflow's folders of files, which it has given up.
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "sqlite":
        return None if uri.startswith(SQLITE) else f"{SQLITE}{rest.lstrip('/') or 'mlflow.db'}"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        return f"http://{uri}"
    if ("://" in uri and scheme != "file") or re.fullmatch(r"databricks(-uc)?|uc(:.*)?", uri):
        return None
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("1", "true"):
        return None
    return f"{SQLITE}{uri}" if uri.endswith((".db", ".sqlite")) else f"{SQLITE}mlflow.db"


def database(uri: str) -> Path | None:
    """Return the absolute path of an sqlite store; None for other stores."""
    return (
        Path(os.path.expanduser(uri.removeprefix(SQLITE).partition("?")[0])).absolute()
        if uri.startswith(SQLITE)
        else None
    )


def saved_uri(uri: str | None, folder: Path) -> str:
    """Return a store's URI as a run's folder keeps it.

    An sqlite file in the working directory, or named by a relative path, belongs to the project:
    its path is relative to the run's folder, so that a project can be moved and copied.

    Args:
        uri: as for `store_uri`.
        folder: the run's folder.
    """
    given = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    path, (_, mark, query) = database(given), given.partition("?")
    if path is None:
        return given
    if given.removeprefix(SQLITE).startswith(("/", "~")):
        path = path.resolve()
        if not path.is_relative_to(Path.cwd()):
            return store_uri(uri)
    return f"{SQLITE}{os.path.relpath(path, folder)}{mark}{query}"


def located_uri(saved: str, folder: Path) -> str:
    """Return the URI of a store that a run's folder keeps (`saved_uri`).

    A run whose store did not move with it, or was in a folder that is gone, goes to the store of
    the working directory.
    """
    if not saved.startswith(SQLITE):
        return saved
    name, mark, query = saved.removeprefix(SQLITE).partition("?")
    found = Path(os.path.normpath(folder.absolute() / name))
    there = found.parent.is_dir() if name.startswith("/") else found.exists()
    return f"{SQLITE}{found}{mark}{query}" if there else store_uri(None)


def artifact_root(uri: str) -> str | None:
    """Return the URI of the artifact folder, beside an sqlite file; None if a server decides."""
    if uri.startswith(("http:", "https:", "databricks")):
        return None
    path = database(uri)
    return ((path.parent if path else Path.cwd()) / "mlartifacts").as_uri()


def may_have(uri: str, run: str) -> bool:
    """Return False if an sqlite store does not exist or has no run of this id.

    A deleted run that can be restored counts. Needs no MLflow, so that the answer takes no seconds.
    """
    path = database(uri)
    if path is None:
        return True
    query = "SELECT 1 FROM runs WHERE run_uuid = ?"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as found:
            return found.execute(query, (run,)).fetchone() is not None
    except sqlite3.Error:
        return False


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Serialize processes that share an sqlite store, with a lock file; no-op for other stores."""
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
    """Return a client of the store; create the database of an sqlite store if it is missing.

    Call it within `one_at_a_time`.
    """
    from mlflow.tracking import MlflowClient

    path = database(uri)
    if path is not None and not path.exists():
        # Migrate under another name: a kill must not leave an incomplete database.
        fresh = path.with_name(path.name + ".new")
        for left in (fresh, path.with_name(fresh.name + "-journal")):
            left.unlink(missing_ok=True)
        MlflowClient(f"{SQLITE}{fresh}").search_experiments(max_results=1)
        fresh.rename(path)
    if path is not None:
        follow_move(path)
    return MlflowClient(uri)


def follow_move(path: Path) -> None:
    """Point runs and models of an sqlite store that was moved or copied to the artifacts beside it.

    MLflow keeps absolute paths. Artifacts of the moved project would go to where it was.
    """
    new = artifact_root(f"{SQLITE}{path}")
    with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=10.0)) as store, store:
        elsewhere = store.execute(
            "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags"
            " USING (experiment_id) WHERE key = ? AND artifact_location LIKE 'file://%/mlartifacts'"
            " AND artifact_location <> ?",
            (*KIND, new),
        ).fetchall()
        for (old,) in elsewhere:
            for table, column in LOCATIONS:
                store.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old) + 1, f"{old}/"),
                )
            store.execute(
                "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?",
                (new, old),
            )


# --- experiments and runs -------------------------------------------------------------------------


def ensure_experiment(client: MlflowClient, name: str, artifacts: str | None = None) -> str:
    """Return the id of the experiment with this name; create it, or restore it if deleted.

    Args:
        client: client of the store.
        name: name of the experiment.
        artifacts: URI of its artifact folder; None: the server decides.

    Raises:
        ConnectionError: it can neither be found nor created.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        with suppress(MlflowException):  # another process may have created it meanwhile
            return str(client.create_experiment(name, artifact_location=artifacts, tags=KIND))
        found = client.get_experiment_by_name(name)
        if found is None:
            raise ConnectionError(f"experiment {name!r} can be neither found nor created")
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def ensure_parent(
    client: MlflowClient, experiment: str, sweep: Mapping[str, str]
) -> tuple[str, bool]:
    """Return the id of a sweep's run, created if it is missing, and True if it is new.

    Args:
        client: client of the store.
        experiment: id of the experiment.
        sweep: `id` and `name` of the sweep.
    """

    def make() -> Run:
        return client.create_run(
            experiment,
            start_time=now(),  # so that the oldest was created first
            tags={SWEEP_TAG: sweep["id"]},
            run_name=sweep["name"][:MAX_NAME],
        )

    return _find_or_make(client, experiment, SWEEP_TAG, sweep["id"], make)


def ensure_run(
    client: MlflowClient, experiment: str, identity: str, started: int, name: str
) -> tuple[str, bool]:
    """Return the id of a run, created or restored if necessary, and True if it is new.

    Args:
        client: client of the store.
        experiment: id of the experiment.
        identity: the run's id in its journal.
        started: milliseconds since the epoch.
        name: name of the run.
    """

    def make() -> Run:
        return client.create_run(
            experiment, start_time=started, tags={RUN_TAG: identity}, run_name=name[:MAX_NAME]
        )

    return _find_or_make(client, experiment, RUN_TAG, identity, make)


def delete_duplicates(
    client: MlflowClient, experiment: str, tag: str, value: str, keep: str
) -> None:
    """Delete other runs with this tag.

    They exist if a slow server executed a request twice, after a retry, or if two processes
    created the run of a sweep at the same time.
    """
    for run in search(client, experiment, tag, value):
        if run.info.run_id != keep:
            client.delete_run(run.info.run_id)


def _find_or_make(
    client: MlflowClient, experiment: str, tag: str, value: str, make: Callable[[], Run]
) -> tuple[str, bool]:
    """Return the id of the run with this tag, created if necessary, and True if it is new.

    If several processes create one at the same time, all keep the first and delete the others.
    """
    if found := search(client, experiment, tag, value):
        return found[0].info.run_id, False
    if found := search(client, experiment, tag, value, deleted=True):
        client.restore_run(found[0].info.run_id)
        return found[0].info.run_id, False
    made = make().info.run_id
    first = next((run.info.run_id for run in search(client, experiment, tag, value)), made)
    if first != made:
        client.delete_run(made)
    return first, first == made


def search(
    client: MlflowClient, experiment: str, tag: str, value: str, deleted: bool = False
) -> list[Run]:
    """Return the runs with this tag, oldest first."""
    from mlflow.entities import ViewType

    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", run_view_type=view)
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def describe_run(client: MlflowClient, run: str, text: str) -> None:
    """Set the description of a run; what a person wrote below the previous one stays."""
    before = client.get_run(run).data.tags.get(NOTE_TAG, "")
    after = with_own_lines(text, before, MAX_NOTE)
    if after != before:
        client.set_tag(run, NOTE_TAG, after)


def log_task_set(client: MlflowClient, run: str, task_set: TaskSet) -> None:
    """Log the task set of a run as its data set; logging it again changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tasks = json.dumps({"tasks": task_set.tasks})
    profile = json.dumps({"tasks": len(task_set.tasks)})
    dataset = Dataset(task_set.name, task_set.digest, "softmod", tasks, profile=profile)
    used_in = InputTag("mlflow.data.context", "training")
    client.log_inputs(run, [DatasetInput(dataset, [used_in])])


def image_steps(client: MlflowClient, run: str, key: str) -> set[int]:
    """Return the steps at which a run has a complete image with this key.

    An image is complete if its compressed copy exists, which is written last.
    """
    names = [posixpath.basename(file.path) for file in client.list_artifacts(run, "images")]
    found = [re.match(rf"{re.escape(key)}\+step\+(\d+)\+.*\+compressed", name) for name in names]
    return {int(match[1]) for match in found if match}


# --- limits ---------------------------------------------------------------------------------------


def accepted(name: str) -> str:
    """Return the name of a metric, param or tag in a form that MLflow accepts."""
    name = posixpath.normpath(re.sub(r"[^\w./\- :]", "_", name).strip("/"))
    return re.sub(r"^\.\.?(?=/|$)", "_", name)[:MAX_NAME].rstrip("/")


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in lists of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
