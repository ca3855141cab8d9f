"""Sender of a run's journal to MLflow, each value once; it works in the uploading process."""

from __future__ import annotations

import getpass
import json
import logging
import posixpath
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmod.errors import ConfigError
from softmod.system import faults
from softmod.system.files import write_json
from softmod.system.user import ensure_identity
from softmod.tracking import dashboard, destination
from softmod.tracking import mlflow_store as store
from softmod.tracking.descriptions import Summary, TaskSet
from softmod.tracking.journal import ENDED, in_use, now
from softmod.tracking.model import POLICY, log_policy
from softmod.tracking.record import JOURNAL, Line, Record, lines
from softmod.tracking.redact import redacted
from softmod.tracking.sweeps import Sweep
from softmod.tracking.uploader import CURSOR, report_start

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

# Most seconds to wait for worker processes of a killed run to end; they hold its lock, too.
PATIENCE = 5.0


@dataclass
class Cursor:
    """State of an upload: the destination, the position in the journal, and what is unsent."""

    uri: str = ""
    run: str = ""
    experiment: str = ""  # id, for the dashboard's address
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
        self.summary = Summary.of(record)
        to = destination.load(folder, record)
        self.uri = redacted(to["uri"])
        import mlflow.tracking  # noqa: F401  (seconds, so not while others wait for the store)

        with store.one_at_a_time(to["uri"]):
            report_start(folder)
            self.client = store.connect(to["uri"])
            self.experiment = store.ensure_experiment(
                self.client, to["experiment"], store.artifact_root(to["uri"])
            )
            sweep = to["sweep"]
            self.sweep = Sweep(self.client, self.experiment, sweep) if sweep else None
        self.run, new = store.ensure_run(
            self.client, self.experiment, self.identity, record.started, to["run_name"]
        )
        if self.sweep:
            self.sweep.enter(self.run)
        self.cursor = self._load_cursor()
        self.cursor.experiment = self.experiment
        self.described = ""  # the description that MLflow has, as far as is known
        # Steps that MLflow has, by metric; None if the cursor suffices to avoid duplicates.
        self.known: dict[str, set[int]] | None = None if new or self.cursor.offset else {}
        self.overruled = False  # FAILED was sent because training ended without a status
        self._status = threading.Lock()  # held while a status is sent
        self._save_cursor()

    def send(self) -> None:
        """Send all that is new in the journal, metrics first."""
        while self._send_chunk():
            self._save_cursor()
        self.known = None
        if not self.cursor.status_sent:
            self._send_status()
        self._send_artifacts()
        self._send_pictures()
        self._describe()

    def end(self) -> None:
        """Send the final status after training ended, and delete duplicates of the run."""
        self.send_final_status()
        store.delete_duplicates(
            self.client, self.experiment, store.RUN_TAG, self.identity, keep=self.run
        )

    def send_final_status(self) -> None:
        """Send the final status to the run and its sweep, while another thread may send the rest.

        If the journal has no final status and no process trains the run, it is FAILED.
        """
        with self._status:
            status = self.cursor.status
            time = self.cursor.status_time
            for line, _ in lines(self.folder / JOURNAL, self.cursor.offset):
                if line["kind"] == "status":
                    status = line["status"]
                    time = line["time"]
            if status in ENDED:
                self.client.set_terminated(self.run, status, end_time=time)
            elif not in_use(self.folder, patience=PATIENCE):
                self.client.set_terminated(self.run, "FAILED", end_time=now())
                self.client.set_tag(self.run, store.ENDED_TAG, "unexpectedly")
                self.overruled = True
            if self.sweep:
                self.sweep.enter(self.run)
                self.sweep.end(interrupted=self.overruled or status == "KILLED")

    def start_over_if_artifacts_are_lost(self) -> None:
        """Read the journal from its beginning if MLflow lacks an artifact that was sent.

        Metrics and images that MLflow has are not sent again.
        """
        sent: dict[str, set[str]] = {}
        for line, offset in lines(self.folder / JOURNAL):
            if line["kind"] == "artifact" and offset <= self.cursor.offset:
                unsent = [line["path"], line["under"]] in self.cursor.artifacts
                if not unsent and (whole := self._own(line["path"])):
                    sent.setdefault(line["under"], set()).add(whole.name)
        for under, names in sent.items():
            found = self.client.list_artifacts(self.run, under or None)
            if names - {posixpath.basename(file.path) for file in found}:
                self.cursor = Cursor(self.uri, self.run, self.experiment)
                self.known = {}
                return

    def sum_up(self) -> None:
        """Bring the sweep up to date after everything was sent."""
        if self.sweep:
            self.sweep.sum_up(self._source_tags())

    def _send_chunk(self) -> bool:
        """Send the next lines of the journal, up to one request; return True if there were any."""
        chunk = Chunk()
        start = self.cursor.offset
        for line, offset in lines(self.folder / JOURNAL, start):
            self._sort(line, chunk)
            self.cursor.offset = offset
            if len(chunk.metrics) >= store.MAX_METRICS:
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

        self.summary.absorb(line)
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

    def _describe(self) -> None:
        """Describe the run and its experiment; no-op unless something is new."""
        note = self.summary.note()
        if note == self.described:
            return
        if not self.described:  # of this process
            dashboard.describe_experiment(self.client, self.experiment, self.summary)
            for key, value in self._source_tags().items():
                self.client.set_tag(self.run, key, value)
            if task_set := TaskSet.of(self.summary):
                store.log_task_set(self.client, self.run, task_set)
                if self.sweep:
                    store.log_task_set(self.client, self.sweep.run, task_set)
        store.describe_run(self.client, self.run, note)
        self.described = note

    def _source_tags(self) -> dict[str, str]:
        ensure_identity()
        return self.summary.source_tags(getpass.getuser())

    def _send_metrics(self, metrics: list[Metric]) -> None:
        for batch in store.batches(self._unknown(metrics), store.MAX_METRICS):
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
            store.accepted(name): _text(value)[: store.MAX_PARAM]
            for name, value in chunk.params.items()
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
            [Param(key, value) for key, value in params.items()], store.MAX_PARAMS
        ):
            self.client.log_batch(self.run, params=batch, synchronous=True)
        run_tags = [
            RunTag(store.accepted(key), value[: store.MAX_TAG]) for key, value in tags.items()
        ]
        for batch in store.batches(run_tags, store.MAX_PARAMS):
            self.client.log_batch(self.run, tags=batch, synchronous=True)

    def _send_status(self) -> None:
        """Send the status, and remove the tag of an unexpected end of an earlier session."""
        status = self.cursor.status
        with self._status:
            if not self.overruled:
                if status in ENDED:
                    self.client.set_terminated(self.run, status, end_time=self.cursor.status_time)
                else:
                    self.client.update_run(self.run, status="RUNNING")
                    if self.sweep:
                        self.sweep.resume()
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
        whole = self._own(path)
        if whole is None:
            logger.warning("%s: not in the run's folder; not uploaded", path)
            return
        self.client.log_artifact(self.run, str(whole), under or None)
        if path == POLICY:
            log_policy(self.client, self.experiment, self.run, whole, self.register)
        self.artifacts_sent += 1

    def _own(self, path: str) -> Path | None:
        """Return the full path of an artifact; None unless it is in the run's folder."""
        whole = (self.folder / path).resolve()
        return whole if whole.exists() and whole.is_relative_to(self.folder.resolve()) else None

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

    def _load_cursor(self) -> Cursor:
        """Load the cursor of an earlier process; a new one if run, store or journal differ."""
        try:
            cursor = Cursor(**json.loads((self.folder / CURSOR).read_text(encoding="utf-8")))
            size = (self.folder / JOURNAL).stat().st_size
            same = (cursor.uri, cursor.run) == (self.uri, self.run) and 0 <= cursor.offset <= size
        except (OSError, ValueError, TypeError, RecursionError):
            return Cursor(self.uri, self.run)
        return cursor if same else Cursor(self.uri, self.run)

    def _save_cursor(self) -> None:
        try:
            write_json(self.folder / CURSOR, asdict(self.cursor))
        except OSError as error:  # harmless: entries are sent again
            logger.warning("%s: cannot be written (%s)", self.folder / CURSOR, error.strerror)


def _text(value: Any) -> str:
    """Return a param's value as text."""
    return value if isinstance(value, str) else json.dumps(value)
