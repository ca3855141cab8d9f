"""Upload of the journal to MLflow by a separate process.

Training starts it, never waits for it while it trains, and sends it a shutdown request at the end.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmod.config.schema import TrackingConfig
from softmod.errors import ConfigError
from softmod.system import faults
from softmod.system.files import atomic_write
from softmod.system.signals import kept_from_children
from softmod.tracking import mlflow_store as store
from softmod.tracking.journal import ENDED, in_use, now
from softmod.tracking.model import POLICY, log_policy
from softmod.tracking.record import JOURNAL, Line, Record, lines
from softmod.tracking.redact import redacted

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

DESTINATION = "tracking.json"  # store, experiment, name and sweep of the run
CURSOR = ".uploaded"
LOG = "upload.log"
SWEEPS = ".sweeps"  # sweeps of the run that MLflow has completely, and their stores
INTERRUPTED_DRAIN = 2.0  # seconds left for uploading after Ctrl-C
# Limits of MLflow:
MAX_METRICS = 1000  # per request
MAX_PARAMS = 100  # params or tags per request
MAX_PARAM = 6000  # characters
MAX_TAG = 5000  # characters


# --- training process -----------------------------------------------------------------------------


class Uploader:
    """Handle of the uploading process; close it once the journal has the run's final status.

    Args:
        process: None if it could not be started.
    """

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self.process = process

    @property
    def complete(self) -> bool:
        """Return True if MLflow has everything; else `python -m softmod.upload` completes it."""
        return self.process is not None and self.process.returncode == 0

    def close(self, drain_seconds: float) -> bool:
        """Wait for the upload to complete, then end the process; return True if it is complete.

        Args:
            drain_seconds: maximum time to wait; Ctrl-C reduces it to `INTERRUPTED_DRAIN`.
        """
        process = self.process
        if process is None:
            return False
        try:
            _request_shutdown(process, drain_seconds)
            process.wait(drain_seconds)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(drain_seconds, INTERRUPTED_DRAIN))
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return self.complete


def start_uploader(folder: Path, tracking: TrackingConfig, metadata: Mapping[str, Any]) -> Uploader:
    """Start uploading a run's journal; errors are written to the run's upload.log, not raised.

    Args:
        folder: the run's folder, with its journal.
        tracking: configuration of the store.
        metadata: `experiment` and `run_name`, and `sweep` (`id` and `name`) or None.
    """
    uri = store.store_uri(tracking.uri)
    destination = {
        "uri": redacted(store.saved_uri(tracking.uri, folder)),
        "sweep": metadata.get("sweep"),
        "experiment": metadata["experiment"],
        "run_name": redacted(metadata["run_name"]),
    }
    command = [sys.executable, "-m", "softmod.upload", str(folder), "--follow"]
    try:
        _replace(folder / DESTINATION, destination)
        with (folder / LOG).open("ab") as log, kept_from_children():
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # keeps Ctrl-C from the uploader
                # May contain a password, so it is not passed on the command line.
                env=os.environ | {"MLFLOW_TRACKING_URI": uri},
            )
    except OSError as error:
        logger.warning("%s: the upload to MLflow cannot be started (%s)", folder, error)
        return Uploader(None)
    return Uploader(process)


def is_uploaded(folder: Path, tracking: TrackingConfig, sweep: Mapping[str, str] | None) -> bool:
    """Return True if MLflow has the whole run as a member of this sweep; True without a sweep."""
    try:
        return (
            sweep is None or _member(tracking, sweep) in (folder / SWEEPS).read_text().splitlines()
        )
    except (OSError, ValueError):
        return False


def mark_uploaded(folder: Path, tracking: TrackingConfig, sweep: Mapping[str, str] | None) -> None:
    """Record that MLflow has the whole run as a member of this sweep.

    A failure is ignored: the run is then uploaded again.
    """
    if not is_uploaded(folder, tracking, sweep) and sweep is not None:
        with suppress(OSError), (folder / SWEEPS).open("a") as file:
            file.write(_member(tracking, sweep) + "\n")


def _member(tracking: TrackingConfig, sweep: Mapping[str, str]) -> str:
    """Return the line that marks a run as uploaded to this sweep and store."""
    return f"{sweep['id']} {redacted(store.store_uri(tracking.uri))}"


def _request_shutdown(process: subprocess.Popen[bytes], drain_seconds: float) -> None:
    """Send the drain time and close the pipe; a pipe closed without it means training died."""
    if process.stdin is None or process.stdin.closed:
        return
    try:
        process.stdin.write(f"{drain_seconds}\n".encode())
        process.stdin.close()
    except OSError:  # the process has ended
        pass


def _replace(path: Path, values: Mapping[str, Any]) -> None:
    """Write values to a JSON file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1))


# --- uploading process ----------------------------------------------------------------------------


@dataclass
class Cursor:
    """State of an upload: the destination, the position in the journal, and what is unsent."""

    uri: str = ""
    run: str = ""
    offset: int = 0  # bytes of the journal that were sent
    status: str = ""
    status_time: int = 0  # milliseconds since the epoch
    status_sent: bool = True
    artifacts: list[list[str]] = field(default_factory=list)  # unsent: path and folder of each
    pictures: list[Line] = field(default_factory=list)  # unsent: the journal's lines of routes


@dataclass
class Chunk:
    """Metrics, params and tags from some lines of a journal, sent together."""

    metrics: dict[tuple[str, int], Metric] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Sender:
    """Sends to MLflow what it lacks of a run's journal. Any call may fail, and may be repeated.

    Args:
        folder: the run's folder.

    Raises:
        ConfigError: the folder holds no journal, or the store's URI lacks its password.
        Exception: whatever MLflow raises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics_sent = 0
        self.artifacts_sent = 0
        record = Record.read(folder)
        if not record.run_id:
            raise ConfigError(f"{folder}: holds no journal of a run (it has no header)")
        self.identity = record.run_id
        self.register = record.params.get("tracking.register")  # name of the policy's model
        to = _destination(folder, record)
        with store.one_at_a_time(to["uri"]):
            self.client = store.connect(to["uri"])
            self.experiment = store.ensure_experiment(
                self.client, to["experiment"], store.artifact_root(to["uri"])
            )
            sweep = to["sweep"]
            parent = store.ensure_parent(self.client, self.experiment, sweep) if sweep else None
        self.run, new = store.ensure_run(
            self.client, self.experiment, self.identity, record.started, to["run_name"]
        )
        if parent:
            self.client.set_tag(self.run, store.PARENT_TAG, parent)
            self.client.set_tag(self.run, store.MEMBER_TAG + parent, "member")
        self.cursor = self._load_cursor(redacted(to["uri"]))
        # Steps that MLflow has, by metric; None if the cursor suffices to avoid duplicates.
        self.known: dict[str, set[int]] | None = None if new or self.cursor.offset else {}
        self.overruled = False  # FAILED was sent because training ended without a status

    def send(self) -> None:
        """Send all that is new in the journal, metrics first."""
        while self._send_chunk():
            self._save_cursor()
        self.known = None
        if not self.cursor.status_sent:
            self._send_status()
        self._send_artifacts()
        self._send_pictures()

    def end(self) -> None:
        """Send the final status after training ended, and delete duplicates of the run.

        If the journal has no final status and no process trains the run, it is FAILED.
        """
        status = self.cursor.status
        time = self.cursor.status_time
        for line, _ in lines(self.folder / JOURNAL, self.cursor.offset):
            if line["kind"] == "status":
                status = line["status"]
                time = line["time"]
        if status in ENDED:  # sent first, because the time may not suffice for more
            self.client.set_terminated(self.run, status, end_time=time)
        elif not in_use(self.folder, patience=0.5):
            self.client.set_terminated(self.run, "FAILED", end_time=now())
            self.client.set_tag(self.run, store.ENDED_TAG, "unexpectedly")
            self.overruled = True
        store.delete_duplicates(self.client, self.experiment, self.identity, keep=self.run)

    def _send_chunk(self) -> bool:
        """Send the next lines of the journal, up to one request; return True if there were any."""
        chunk = Chunk()
        start = self.cursor.offset
        for line, offset in lines(self.folder / JOURNAL, start):
            self._sort(line, chunk)
            self.cursor.offset = offset
            if len(chunk.metrics) >= MAX_METRICS:
                break
        try:
            self._send_params(chunk)
            self._send_metrics(list(chunk.metrics.values()))
        except BaseException:
            self.cursor.offset = start
            raise
        return self.cursor.offset > start

    def _sort(self, line: Line, chunk: Chunk) -> None:
        """Add a line to the chunk, or to the unsent artifacts, pictures or status."""
        from mlflow.entities import Metric

        match line["kind"]:
            case "params":
                chunk.params |= line["values"]
            case "tags":
                chunk.tags |= line["values"]
            case "metrics":
                step = line["step"]
                time = line["time"]
                for name, value in line["values"].items():
                    key = store.accepted(name)
                    chunk.metrics.setdefault((key, step), Metric(key, float(value), time, step))
            case "artifact":
                if (artifact := [line["path"], line["under"]]) not in self.cursor.artifacts:
                    self.cursor.artifacts.append(artifact)
            case "routes":
                self.cursor.pictures.append(
                    {name: line[name] for name in ("step", "tasks", "layers")}
                )
            case "status":
                self.cursor.status = line["status"]
                self.cursor.status_time = line["time"]
                self.cursor.status_sent = False

    def _send_metrics(self, metrics: list[Metric]) -> None:
        for batch in store.batches(self._unknown(metrics), MAX_METRICS):
            self.client.log_batch(self.run, metrics=batch, synchronous=True)
            self.metrics_sent += len(batch)
            faults.point("upload.batch")

    def _unknown(self, metrics: list[Metric]) -> list[Metric]:
        """Return the metrics that MLflow lacks; all of them unless the cursor was lost.

        MLflow itself discards only exact duplicates.
        """
        if self.known is None:
            return metrics
        for key in {metric.key for metric in metrics} - self.known.keys():
            self.known[key] = {
                metric.step for metric in self.client.get_metric_history(self.run, key)
            }
        return [metric for metric in metrics if metric.step not in self.known[metric.key]]

    def _send_params(self, chunk: Chunk) -> None:
        """Send params and tags.

        Params are immutable in MLflow, so a value that changed in a resumed run becomes a tag.
        """
        from mlflow.entities import Param, RunTag

        params = {
            store.accepted(name): _text(value)[:MAX_PARAM] for name, value in chunk.params.items()
        }
        tags = dict(chunk.tags)
        if params:
            data = self.client.get_run(self.run).data
            sent = data.params
            changed = {key for key, value in params.items() if sent.get(key, value) != value}
            # A param that changed before may have changed back.
            changed |= {key for key in params if f"{store.CHANGED}{key}" in data.tags}
            tags |= {f"{store.CHANGED}{key}": params[key] for key in changed}
            params = {key: value for key, value in params.items() if key not in sent}
        for batch in store.batches(
            [Param(key, value) for key, value in params.items()], MAX_PARAMS
        ):
            self.client.log_batch(self.run, params=batch, synchronous=True)
        run_tags = [RunTag(store.accepted(key), value[:MAX_TAG]) for key, value in tags.items()]
        for batch in store.batches(run_tags, MAX_PARAMS):
            self.client.log_batch(self.run, tags=batch, synchronous=True)

    def _send_status(self) -> None:
        """Send the status; RUNNING also removes the tag of an unexpected end."""
        status = self.cursor.status
        if not self.overruled and status in ENDED:
            self.client.set_terminated(self.run, status, end_time=self.cursor.status_time)
        elif not self.overruled:
            self.client.update_run(self.run, status="RUNNING")
            if store.ENDED_TAG in self.client.get_run(self.run).data.tags:
                self.client.delete_tag(self.run, store.ENDED_TAG)
        self.cursor.status_sent = True
        self._save_cursor()

    def _send_artifacts(self) -> None:
        """Send the artifacts with their current content; a failure does not stop the others.

        Raises:
            Exception: the last failure.
        """
        failure: Exception | None = None
        for path, under in list(self.cursor.artifacts):
            try:
                self._send_artifact(path, under)
            except Exception as error:
                failure = error
            else:
                self.cursor.artifacts.remove([path, under])
                self._save_cursor()
        if failure is not None:
            raise failure

    def _send_artifact(self, path: str, under: str) -> None:
        whole = (self.folder / path).resolve()
        if not whole.exists() or not whole.is_relative_to(self.folder.resolve()):
            logger.warning("%s: not in the run's folder; not uploaded", path)
            return
        self.client.log_artifact(self.run, str(whole), under or None)
        if path == POLICY:
            log_policy(self.client, self.experiment, self.run, whole, self.register)
        self.artifacts_sent += 1

    def _send_pictures(self) -> None:
        """Draw and send the routing probabilities of each step that has no image yet."""
        if not self.cursor.pictures:
            return
        from softmod.tracking.figures import routes_figure

        sent = store.image_steps(self.client, self.run, store.ROUTING)
        while self.cursor.pictures:
            routes = self.cursor.pictures[0]
            step = routes["step"]
            if step not in sent:
                try:
                    image = routes_figure(step, routes["tasks"], routes["layers"])
                except (ValueError, TypeError, AttributeError) as error:  # of a damaged line
                    logger.warning("routes at step %d: cannot be drawn (%s)", step, error)
                else:
                    self.client.log_image(
                        self.run, image, key=store.ROUTING, step=step, synchronous=True
                    )
                    sent.add(step)
            del self.cursor.pictures[0]
            self._save_cursor()

    def _load_cursor(self, uri: str) -> Cursor:
        """Load the cursor of an earlier process; a new one if run, store or journal differ."""
        try:
            cursor = Cursor(**json.loads((self.folder / CURSOR).read_text()))
            size = (self.folder / JOURNAL).stat().st_size
            same = (cursor.uri, cursor.run) == (uri, self.run) and 0 <= cursor.offset <= size
        except (OSError, ValueError, TypeError, RecursionError):
            return Cursor(uri, self.run)
        return cursor if same else Cursor(uri, self.run)

    def _save_cursor(self) -> None:
        try:
            _replace(self.folder / CURSOR, asdict(self.cursor))
        except OSError as error:  # harmless: entries are sent again
            logger.warning("%s: cannot be written (%s)", self.folder / CURSOR, error.strerror)


def _destination(folder: Path, record: Record) -> dict[str, Any]:
    """Return store, experiment, name and sweep of a run, as training saved them.

    A run that was trained without MLflow goes to the default store.

    Raises:
        ConfigError: the saved URI lacks its password, and MLFLOW_TRACKING_URI does not supply it.
    """
    try:
        saved = json.loads((folder / DESTINATION).read_text())
        names = ("uri", "sweep", "experiment", "run_name")
        destination: dict[str, Any] = {name: saved[name] for name in names}
        destination["uri"] = store.located_uri(destination["uri"], folder)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        destination = {
            "uri": store.store_uri(None),
            "sweep": None,
            "experiment": str(record.params.get("env.name", "softmod")),
            "run_name": f"{folder.absolute().parent.name}/{folder.name}",
        }
    if "***" not in destination["uri"]:
        return destination
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redacted(uri) != destination["uri"]:
        raise ConfigError(
            f"{folder}: set MLFLOW_TRACKING_URI to {destination['uri']} with its password"
        )
    return destination | {"uri": uri}


def _text(value: Any) -> str:
    """Return a param's value as text."""
    return value if isinstance(value, str) else json.dumps(value)
