"""From the journal to MLflow: a process of its own that training starts, never waits for, and tells
when it ends.
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
from softmod.system.files import written_whole
from softmod.system.signals import kept_from_children
from softmod.tracking import mlflow_store as store
from softmod.tracking.journal import ENDED, in_use, now
from softmod.tracking.record import JOURNAL, Line, Record, lines
from softmod.tracking.redact import redacted

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

ABOUT = "tracking.json"
CURSOR = ".uploaded"
LOG = "upload.log"
SWEEPS = ".sweeps"  # those that the run belongs to, and where
LAST_WORDS = 2.0  # seconds that Ctrl-C leaves for uploading
MAX_METRICS = 1000  # in one request, by MLflow's rules, as are the next three
MAX_PARAMS = 100
MAX_PARAM = 6000  # characters
MAX_TAG = 5000


# --- the training process's side ------------------------------------------------------------------


class Uploader:
    """The process that uploads; close it when the journal has the run's end status."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self.process = process

    @property
    def complete(self) -> bool:
        """Return whether MLflow has everything. Where not, `python -m softmod.upload` goes on."""
        return self.process is not None and self.process.returncode == 0

    def close(self, drain_seconds: float) -> bool:
        """Let it finish, for so long; whether it did. Ctrl-C leaves it time for its last words."""
        process = self.process
        if process is None:
            return False
        try:
            _say_goodbye(process, drain_seconds)
            process.wait(drain_seconds)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(drain_seconds, LAST_WORDS))
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return self.complete


def start_uploader(folder: Path, tracking: TrackingConfig, about: Mapping[str, Any]) -> Uploader:
    """Start uploading a run's journal. Whatever goes wrong ends in the run's upload.log, not in
    training.

    Args:
        folder: the run's; its journal is there.
        about: `experiment` and `run_name`, and `sweep` (`id` and `name`) or None.
    """
    uri = store.store_uri(tracking.uri)
    facts = {
        "uri": redacted(uri),
        "artifacts": store.artifact_root(uri),
        "sweep": about.get("sweep"),
    }
    facts |= {"experiment": about["experiment"], "run_name": redacted(about["run_name"])}
    command = [sys.executable, "-m", "softmod.upload", str(folder), "--follow"]
    try:
        _replace(folder / ABOUT, facts)
        with (folder / LOG).open("ab") as log, kept_from_children():
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for training
                env=os.environ
                | {"MLFLOW_TRACKING_URI": uri},  # may hold a password: not for the command line
            )
    except OSError as error:
        logger.warning("%s: nothing is uploaded to MLflow for now (%s)", folder, error)
        return Uploader(None)
    return Uploader(process)


def belongs(folder: Path, tracking: TrackingConfig, sweep: Mapping[str, str] | None) -> bool:
    """Return whether MLflow has the run whole, as one of this sweep's; what belongs to no sweep is
    not asked about.
    """
    try:
        return (
            sweep is None or _member(tracking, sweep) in (folder / SWEEPS).read_text().splitlines()
        )
    except (OSError, ValueError):
        return False


def remember(folder: Path, tracking: TrackingConfig, sweep: Mapping[str, str] | None) -> None:
    """Note that MLflow has the run whole, as one of this sweep's."""
    if not belongs(folder, tracking, sweep) and sweep is not None:
        with (
            suppress(OSError),
            (folder / SWEEPS).open("a") as file,
        ):  # unknown, it is uploaded once more
            file.write(_member(tracking, sweep) + "\n")


def _member(tracking: TrackingConfig, sweep: Mapping[str, str]) -> str:
    return f"{sweep['id']} {redacted(store.store_uri(tracking.uri))}"


def _say_goodbye(process: subprocess.Popen[bytes], drain_seconds: float) -> None:
    """An end of the pipe without a word means that training is dead."""
    if process.stdin is None or process.stdin.closed:
        return
    try:
        process.stdin.write(f"{drain_seconds}\n".encode())
        process.stdin.close()
    except OSError:  # it is gone
        pass


def _replace(path: Path, facts: Mapping[str, Any]) -> None:
    with written_whole(path) as beside:
        beside.write_text(json.dumps(facts, indent=1))


# --- the uploading process's side -----------------------------------------------------------------


@dataclass
class Cursor:
    """Note how far a journal has been sent, to where."""

    uri: str = ""
    run: str = ""
    offset: int = 0
    status: str = ""
    status_time: int = 0
    status_sent: bool = True
    artifacts: list[list[str]] = field(
        default_factory=list
    )  # path and folder, of those that are still to be sent
    pictures: list[Line] = field(
        default_factory=list
    )  # what the journal says of routes, still to be drawn and sent


@dataclass
class Chunk:
    """Hold what some lines of a journal say."""

    metrics: dict[tuple[str, int], Metric] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Sender:
    """Sends what MLflow does not have yet of a run's journal. Any call may fail, and may be
    repeated.

    Raises:
        ConfigError: the folder holds no journal, or the store's address is not known.
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
        about = _about(folder, record)
        with store.one_at_a_time(about["uri"]):
            self.client = store.connect(about["uri"])
            self.experiment = store.ensure_experiment(
                self.client, about["experiment"], about["artifacts"]
            )
            sweep = about["sweep"]
            parent = store.ensure_parent(self.client, self.experiment, sweep) if sweep else None
        self.run, new = store.ensure_run(
            self.client, self.experiment, self.identity, record.started, about["run_name"]
        )
        if parent:
            self.client.set_tag(self.run, store.PARENT_TAG, parent)
            self.client.set_tag(self.run, store.MEMBER_TAG + parent, "member")
        self.cursor = self._load_cursor(redacted(about["uri"]))
        self.known: dict[str, set[int]] | None = None if new or self.cursor.offset else {}
        self.overruled = False

    def send(self) -> None:
        """Everything that the journal holds by now; metrics first."""
        while self._send_chunk():
            self._save_cursor()
        self.known = None
        if not self.cursor.status_sent:
            self._send_status()
        self._send_artifacts()
        self._send_pictures()

    def end(self) -> None:
        """Nobody trains any more: where the journal has no end, say so; then see that the run is
        there once.
        """
        status = self.cursor.status
        time = self.cursor.status_time
        for line, _ in lines(self.folder / JOURNAL, self.cursor.offset):
            if line["kind"] == "status":
                status = line["status"]
                time = line["time"]
        if status in ENDED:  # first of all: there may not be time for more
            self.client.set_terminated(self.run, status, end_time=time)
        elif not in_use(self.folder, patience=0.5):
            self.client.set_terminated(self.run, "FAILED", end_time=now())
            self.client.set_tag(self.run, store.ENDED_TAG, "unexpectedly")
            self.overruled = True
        store.delete_doubles(self.client, self.experiment, self.identity, keep=self.run)

    def _send_chunk(self) -> bool:
        """A request's worth of lines; whether there were any."""
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
        """Those that MLflow does not have, where the cursor got lost; equal ones it would tell
        apart by itself.
        """
        if self.known is None:
            return metrics
        for key in {metric.key for metric in metrics} - self.known.keys():
            self.known[key] = {
                metric.step for metric in self.client.get_metric_history(self.run, key)
            }
        return [metric for metric in metrics if metric.step not in self.known[metric.key]]

    def _send_params(self, chunk: Chunk) -> None:
        """Params and tags.

        A param cannot change in MLflow: what a resumed run has otherwise becomes a tag.
        """
        from mlflow.entities import Param, RunTag

        params = {
            store.accepted(name): _text(value)[:MAX_PARAM] for name, value in chunk.params.items()
        }
        tags = dict(chunk.tags)
        if params:
            data = self.client.get_run(self.run).data
            there = data.params
            changed = {key for key, value in params.items() if there.get(key, value) != value}
            changed |= {
                key for key in params if f"{store.CHANGED}{key}" in data.tags
            }  # and perhaps changed back
            tags |= {f"{store.CHANGED}{key}": params[key] for key in changed}
            params = {key: value for key, value in params.items() if key not in there}
        for batch in store.batches(
            [Param(key, value) for key, value in params.items()], MAX_PARAMS
        ):
            self.client.log_batch(self.run, params=batch, synchronous=True)
        sent = [RunTag(store.accepted(key), value[:MAX_TAG]) for key, value in tags.items()]
        for batch in store.batches(sent, MAX_PARAMS):
            self.client.log_batch(self.run, tags=batch, synchronous=True)

    def _send_status(self) -> None:
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
        """Each as it is now; one that cannot be sent does not hold up the others."""
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
        if whole.exists() and whole.is_relative_to(self.folder.resolve()):
            self.client.log_artifact(self.run, str(whole), under or None)
            self.artifacts_sent += 1
        else:
            logger.warning("%s is not in the run's folder; not uploaded", path)

    def _send_pictures(self) -> None:
        """What routes look like at a step, as an image with a slider; one that is there stays."""
        if not self.cursor.pictures:
            return
        from softmod.tracking.figures import routes_figure

        there = store.image_steps(self.client, self.run, store.ROUTING)
        while self.cursor.pictures:
            told = self.cursor.pictures[0]
            if told["step"] not in there:
                try:
                    image = routes_figure(told["step"], told["tasks"], told["layers"])
                except (ValueError, TypeError, AttributeError) as error:  # of a damaged line
                    logger.warning("routes at step %d: cannot be drawn (%s)", told["step"], error)
                else:
                    self.client.log_image(
                        self.run, image, key=store.ROUTING, step=told["step"], synchronous=True
                    )
                    there.add(told["step"])
            del self.cursor.pictures[0]
            self._save_cursor()

    def _load_cursor(self, uri: str) -> Cursor:
        """Where an earlier process stopped, if that was with the same run in the same store."""
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
        except OSError as error:  # it will be sent again, which is harmless
            logger.warning("%s: cannot be written (%s)", self.folder / CURSOR, error.strerror)


def _about(folder: Path, record: Record) -> dict[str, Any]:
    """Where the run belongs, as training left it; a run that was only journalled goes to the usual
    place.
    """
    facts: dict[str, Any] = {
        "experiment": str(record.params.get("env.name", "softmod")),
        "sweep": None,
    }
    facts["run_name"] = f"{folder.absolute().parent.name}/{folder.name}"
    try:
        told = json.loads((folder / ABOUT).read_text())
        facts |= {
            name: told[name] for name in ("uri", "artifacts", "sweep", "experiment", "run_name")
        }
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        facts["uri"] = store.store_uri(None)
        facts["artifacts"] = store.artifact_root(facts["uri"])
    if "***" not in facts["uri"]:
        return facts
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redacted(uri) != facts["uri"]:
        raise ConfigError(f"{folder}: set MLFLOW_TRACKING_URI to {facts['uri']} with its password")
    return facts | {"uri": uri}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
