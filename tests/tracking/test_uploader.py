"""From journal to MLflow, with a real sqlite store and the uploader as a separate process."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests.utils

from softmod.config.compose import compose, typed
from softmod.errors import ConfigError
from softmod.experiment.publish import drain
from softmod.report.runs import Run, from_mlflow
from softmod.tracking import mlflow_store as store
from softmod.tracking.journal import Journal
from softmod.tracking.mlflow_store import MAX_METRICS
from softmod.tracking.record import JOURNAL, Record
from softmod.tracking.sender import CURSOR, Sender
from softmod.tracking.uploader import (
    LOCK,
    LOG,
    STARTED,
    Patience,
    is_uploaded,
    mark_uploaded,
    start_uploader,
)
from softmod.upload import once
from tests import settings

store.prepare_environment()
SWEEP = {"id": "5eed", "name": "balance"}


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an empty store, once, because that takes a second."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def here(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a working folder with an empty store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def journal(here: Path) -> Iterator[Journal]:
    opened = Journal(Path("runs/toy/seed_0"))
    yield opened
    opened.close()


def about(seed: int = 0, sweep: dict[str, str] | None = None) -> dict[str, Any]:
    return {"experiment": "toy", "run_name": f"toy seed={seed}", "sweep": sweep}


def client() -> Any:
    return store.connect(store.store_uri(None))


def runs(tag: str = store.RUN_TAG) -> list[Any]:
    found = client().search_runs([client().get_experiment_by_name("toy").experiment_id])
    return [run for run in found if tag in run.data.tags]


def only_run() -> Any:
    (run,) = runs()
    return run


def upload(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "softmod.upload", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def assert_equal(run: Any, record: Record) -> None:
    """Assert that MLflow has what the journal has, and each metric once per step."""
    assert set(run.data.metrics) == set(record.values)
    for name in record.names():
        sent = client().get_metric_history(run.info.run_id, name)
        assert Counter(metric.step for metric in sent) == Counter(record.values[name].keys()), name
        for metric in sent:
            value = record.values[name][metric.step]
            same = metric.value == value or (math.isnan(value) and math.isnan(metric.value))
            assert same or (math.isinf(value) and abs(metric.value) == sys.float_info.max)


def reported() -> Run:
    """Return the sweep's only run, as a report reads it."""
    _, (run,) = from_mlflow(store.store_uri(None), "balance")
    return run


@pytest.mark.bar(20)
def test_a_run_and_its_resumption(journal: Journal) -> None:
    """Assert that everything logged arrives, during the run and at its end; a resumed run continues
    the same MLflow run.
    """
    folder = journal.folder
    (folder / "checkpoint").mkdir()
    for name in ("config.yaml", "checkpoint/actor"):
        (folder / name).write_text(name)
    journal.params(
        {
            "run": {"steps": 10, "lr": 3e-4, "tasks": ["a", "b"], "long": "x" * 7000},
            "no/such//..key?": None,
        }
    )
    journal.tags({"softmod.name": "toy"})
    journal.artifact(folder / "config.yaml")
    journal.artifact(folder / "checkpoint", under="best")
    journal.artifact(folder / "never written")
    journal.status("RUNNING")
    uploader = start_uploader(folder, settings.tracking(), about(sweep=SWEEP))
    for step in range(10):
        journal.metrics(
            {"train/loss": 0.1 * step, "eval/odd": (math.nan, math.inf, -math.inf)[step % 3]}, step
        )
    wait_for((folder / CURSOR).exists)
    assert only_run().info.status == "RUNNING"
    journal.status("KILLED")
    assert uploader.close(20.0)
    assert uploader.close(20.0)

    run = only_run()
    assert_equal(run, journal.record)
    assert (run.info.status, run.info.run_name) == ("KILLED", "toy seed=0")
    assert run.info.start_time == journal.record.started
    assert run.data.params["run.tasks"] == '["a", "b"]'
    assert (run.data.params["run.lr"], len(run.data.params["run.long"])) == ("0.0003", 6000)
    assert run.data.tags["softmod.name"] == "toy"
    (parent,) = runs(store.SWEEP_TAG)
    assert (parent.info.status, parent.info.run_name) == ("KILLED", "balance")
    assert run.data.tags[store.PARENT_TAG] == parent.info.run_id
    artifacts = Path("mlartifacts", run.info.run_id, "artifacts")
    assert (artifacts / "best/checkpoint/actor").read_text() == "checkpoint/actor"
    assert (artifacts / "config.yaml").read_text() == "config.yaml"
    assert "never written: not in the run's folder" in (folder / LOG).read_text()

    journal.close()
    resumed = Journal(folder)
    resumed.params({"run": {"steps": 20, "lr": 3e-4}})
    resumed.status("RUNNING")
    resumed.metrics({"train/loss": 0.1}, 1)
    resumed.metrics({"train/loss": 9.0}, 10)
    resumed.status("FINISHED")
    resumed.close()
    for expected in ("sent 1 metrics", "sent 0 metrics"):
        assert expected in upload(folder).stdout
    assert_equal(only_run(), resumed.record)
    assert only_run().info.status == "FINISHED"
    assert only_run().data.params["run.steps"] == "10"
    assert only_run().data.tags["softmod.changed.run.steps"] == "20"
    assert reported().config["run.steps"] == 20

    back = Journal(folder)
    back.params({"run": {"steps": 10}})
    back.status("FINISHED")
    back.close()
    assert upload(folder).returncode == 0
    assert reported().config["run.steps"] == 10


def test_routes_become_images_with_a_slider(journal: Journal) -> None:
    """Send one image per step, also if the cursor is lost; skip routes that cannot be drawn."""
    folder, tasks = journal.folder, ["reach-v3", "push-v3"]
    journal.params({"env": {"name": "toy"}})
    for step in (100, 200, 200):
        journal.routes(tasks, [[[[0.25, 0.75], [1.0, 0.0]]] * 2, [[[0.5, 0.5]]] * 2], step)
    journal._append("routes", step=300, tasks=tasks, layers=[[["no number"]]])
    sender = Sender(folder)
    sender.send()
    assert sender.cursor.pictures == []
    assert store.image_steps(client(), sender.run, store.ROUTING) == {100, 200}
    (folder / CURSOR).unlink()
    Sender(folder).send()
    images = [file.path for file in client().list_artifacts(sender.run, "images")]
    assert sorted(Path(image).suffix for image in images) == [".png", ".png", ".webp", ".webp"]
    assert only_run().data.tags["mlflow.loggedImages"] == "True"


@pytest.mark.bar(18)
def test_nothing_is_sent_twice(journal: Journal) -> None:
    """Create no duplicates without the cursor, after a crash between sending and saving it, or with
    other time stamps.
    """
    folder = journal.folder
    journal.params(
        {"env": {"name": "toy"}}
    )  # only journalled so far: the experiment is the task set's
    for step in range(30):
        journal.metrics(
            {f"train/{i}": math.nan if i == 7 else float(step * i) for i in range(100)}, step
        )
    journal.status("FINISHED")
    sender = Sender(folder)
    sender.send()
    assert sender.metrics_sent == 3000 > 2 * MAX_METRICS
    assert Sender(folder).cursor == sender.cursor
    sender.cursor.offset //= 2  # as if it had died before it was noted
    sender.send()
    assert sender.metrics_sent > 3000
    (folder / CURSOR).unlink()
    lost = Sender(folder)
    lost.send()
    assert lost.metrics_sent == 0
    (folder / CURSOR).unlink()
    lines = (folder / JOURNAL).read_text()
    (folder / JOURNAL).write_text(
        lines.replace('"time":1', '"time":2')
    )  # MLflow would take them for new ones
    lost = Sender(folder)
    lost.send()
    assert_equal(only_run(), journal.record)
    (folder / CURSOR).unlink()
    careless = Sender(folder)
    careless.known = None
    careless.send()
    with pytest.raises(AssertionError, match="train/0"):
        assert_equal(only_run(), journal.record)


@pytest.mark.bar(18)
def test_the_uploader_is_killed(journal: Journal) -> None:
    folder = journal.folder
    uploader = start_uploader(folder, settings.tracking(), about())
    assert uploader.process
    for step in range(400):
        journal.metrics({f"train/{i}": float(step) for i in range(20)}, step)
        if step == 200:
            wait_for((folder / CURSOR).exists)
    uploader.process.kill()
    assert not uploader.close(5.0)
    assert len(Record.read(folder).history("train/1")) == 400
    journal.status("FINISHED")
    journal.close()
    assert upload(folder).returncode == 0
    assert_equal(only_run(), journal.record)
    assert only_run().info.status == "FINISHED"


TRAINING = """
import os, signal, sys, time
from pathlib import Path
from tests import settings
from softmod.tracking.journal import Journal
from softmod.tracking.sender import CURSOR
from softmod.tracking.uploader import start_uploader
journal = Journal(Path("runs/toy/seed_0"))
journal.status("RUNNING")
about = {"experiment": "toy", "run_name": "toy", "sweep": None}
uploader = start_uploader(journal.folder, settings.tracking(), about)
while not (journal.folder / CURSOR).exists():
    time.sleep(0.02)
journal.metrics({"x": 1.0}, 1)
print(uploader.process.pid, flush=True)
PICTURES
os.kill(os.getpid(), signal.SIGKILL)
"""
PICTURES = """
for step in range(30):
    journal.routes(["toy-reach"], [[[[0.5, 0.5]]]], step)
while '"pictures": []' in (journal.folder / CURSOR).read_text():
    time.sleep(0.02)
"""


@pytest.mark.bar(20)
@pytest.mark.parametrize("pictures", ["", PICTURES], ids=["", "while pictures are drawn"])
def test_training_is_killed(here: Path, pictures: str) -> None:
    """Mark a run whose training was killed, and exit in seconds; a resumed run removes the mark."""
    script = TRAINING.replace("PICTURES", pictures)
    killed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    ended = time.monotonic()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    wait_for(lambda: not alive(int(killed.stdout)))
    assert time.monotonic() - ended < 8
    run = only_run()
    assert (run.info.status, run.data.tags[store.ENDED_TAG]) == ("FAILED", "unexpectedly")
    assert run.data.metrics == {"x": 1.0}

    journal = Journal(Path("runs/toy/seed_0"))
    journal.status("RUNNING")
    sender = Sender(journal.folder)
    sender.end()  # somebody trains: nothing to mark
    sender.send()
    assert only_run().info.status == "RUNNING"
    assert store.ENDED_TAG not in only_run().data.tags
    journal.close()
    sender.end()
    sender.send()
    assert (only_run().info.status, only_run().info.run_id) == ("FAILED", run.info.run_id)
    assert store.ENDED_TAG in only_run().data.tags

    short = Journal(journal.folder)  # ended before anything of it was sent
    short.status("RUNNING")
    short.status("FINISHED")
    short.close()
    last = Sender(journal.folder)
    last.end()
    last.send()
    assert only_run().info.status == "FINISHED"
    assert store.ENDED_TAG not in only_run().data.tags


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.bar(18)
@pytest.mark.bar(23)
def test_a_server_that_is_away_or_silent(journal: Journal) -> None:
    """Wait for no server, report what is missing, and write no password anywhere."""
    folder = journal.folder
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, never answers
    other = Journal(Path("runs/toy/seed_1"))
    away = settings.tracking(uri="http://me:hunter2@127.0.0.1:9")
    hanging = settings.tracking(uri=f"http://me:hunter2@127.0.0.1:{silent.getsockname()[1]}")
    uploaders = [
        start_uploader(folder, away, about()),
        start_uploader(other.folder, hanging, about()),
    ]
    end, slowest, step = time.monotonic() + 4.0, 0.0, 0
    while time.monotonic() < end:
        step, before = step + 1, time.monotonic()
        journal.metrics({"x": 1.0}, step)
        slowest = max(slowest, time.monotonic() - before)
        time.sleep(0.01)
    assert slowest < 0.5
    wait_for(
        lambda: "trying again" in (folder / LOG).read_text(), 60
    )  # it starts slowly where others compute
    for uploader in uploaders:
        before = time.monotonic()
        assert not uploader.close(1.0)
        assert time.monotonic() - before < 2.0
        assert uploader.process
        assert uploader.process.returncode is not None
    silent.close()
    other.close()

    os.environ["MLFLOW_TRACKING_URI"] = str(away.uri)  # `here` takes it away again
    journal.close()
    once = upload(folder)
    assert (once.returncode, len(once.stderr.splitlines())) == (1, 1)
    assert str(folder) in once.stderr
    del os.environ["MLFLOW_TRACKING_URI"]
    unknown = upload(folder)
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (2, 1)
    assert "set MLFLOW_TRACKING_URI to http://***@127.0.0.1:9" in unknown.stderr
    written = [path.read_text() for path in folder.iterdir()] + [
        once.stdout,
        once.stderr,
        unknown.stderr,
    ]
    assert len(written) > 7
    assert not any("hunter2" in text for text in written)


@pytest.mark.parametrize("given", ["", "elsewhere, inside", "*"])
def test_servers_on_this_machine_need_no_proxy(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("NO_PROXY", given)
    store.prepare_environment()
    store.prepare_environment()

    def proxies(host: str) -> bool:
        return bool(requests.utils.get_environ_proxies(f"http://{host}:5000/api"))

    assert not any(map(proxies, ("127.0.0.1", "localhost", "[::1]")))
    assert proxies("server") == (given != "*")
    assert proxies("inside") == (given == "")


@pytest.mark.bar(8)
def test_warnings_as_errors(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing MLflow causes warnings."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    journal.params({"env": {"name": "toy"}})
    journal.status("FINISHED")
    done = upload(journal.folder)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.bar(8)
def test_a_store_that_cannot_be_made_is_named_at_once(
    journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "sqlite:////proc/mlflow.db"
    (journal.folder / LOG).write_text("an error of an earlier session\n")
    cfg = typed(compose(["env=toy", f"tracking.uri={uri}", "tracking.drain_seconds=1"], "train"))
    uploader = start_uploader(journal.folder, cfg.tracking, about())
    assert uploader.reason == ""
    journal.status("FINISHED")
    journal.close()
    began = time.monotonic()
    drain(uploader, False, journal.folder, cfg, None)
    assert time.monotonic() - began < 30  # less than START
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "incomplete" in line]
    reason = "FileNotFoundError: [Errno 2] No such file or directory: '/proc/mlflow.db.lock'"
    hint = f"complete it with: python -m softmod.upload {journal.folder}"
    assert line.endswith(f"upload to MLflow incomplete ({reason}); {hint}")


def test_what_counts_as_uploaded(journal: Journal) -> None:
    """A run that was deleted in the dashboard does; with another or a new store it does not."""
    folder, here, other = journal.folder, settings.tracking(), {**SWEEP, "id": "another"}
    journal.params({"env": {"name": "toy"}})
    journal.status("FINISHED")
    journal.close()
    assert not is_uploaded(folder, here, None)
    sender = Sender(folder)
    sender.send()
    assert not is_uploaded(folder, here, SWEEP)
    mark_uploaded(folder, here, SWEEP)
    mark_uploaded(folder, here, SWEEP)
    assert len((folder / ".sweeps").read_text().splitlines()) == 1
    assert is_uploaded(folder, here, SWEEP)
    assert is_uploaded(folder, here, None)
    assert not is_uploaded(folder, here, other)
    client().delete_run(sender.run)
    assert is_uploaded(folder, here, SWEEP)
    shutil.copy("mlflow.db", "other.db")
    assert not is_uploaded(folder, settings.tracking(uri="sqlite:///other.db"), None)
    Path("mlflow.db").unlink()
    assert not is_uploaded(folder, here, SWEEP)
    assert not is_uploaded(folder, here, None)
    assert not Path("mlflow.db").exists()


def test_lost_artifacts_are_sent_again(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to a stdout that cannot be written."""
    monkeypatch.setattr(logging, "disable", lambda level: None)
    (journal.folder / "config.yaml").write_text("kept")
    journal.params({"env": {"name": "toy"}})
    journal.artifact(journal.folder / "config.yaml", under="a")
    journal.artifact(journal.folder / "never written")
    journal.metrics({"x": 1.0}, 1)
    journal.status("FINISHED")
    journal.close()
    written: list[str] = []

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sys, "stdout", Full())
    for _ in range(2):
        once(journal.folder)
    shutil.rmtree("mlartifacts")
    once(journal.folder)
    where = f"to {store.store_uri(None)}; nothing is missing"
    assert "".join(written).splitlines() == [
        f"{journal.folder}: sent {metrics} metrics and {artifacts} artifacts {where}"
        for metrics, artifacts in ((1, 1), (0, 0), (0, 1))
    ]
    kept = Path("mlartifacts", only_run().info.run_id, "artifacts", "a", "config.yaml")
    assert kept.read_text() == "kept"


def test_no_journal(tmp_path: Path) -> None:
    wrong = upload(tmp_path / "no run")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"{tmp_path / 'no run'}: holds no journal of a run\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bar(19)
def test_two_at_once_on_a_new_store(here: Path) -> None:
    """Expect one experiment, one parent and two children, although a process that created the store
    was killed.
    """
    Path("mlflow.db").unlink()
    Path("mlflow.db.new").write_bytes(b"half of a database")
    journals = [Journal(Path(f"runs/toy/seed_{seed}")) for seed in range(2)]
    started = []
    for seed, journal in enumerate(journals):
        started.append(start_uploader(journal.folder, settings.tracking(), about(seed, SWEEP)))
        journal.metrics({"x": float(seed)}, 1)
        journal.status("FINISHED")
        journal.close()
    assert [uploader.close(40.0) for uploader in started] == [True, True]
    assert {experiment.name for experiment in client().search_experiments()} == {"Default", "toy"}
    (parent,) = runs(store.SWEEP_TAG)
    children = runs()
    assert len(children) == 2
    assert {run.data.tags[store.PARENT_TAG] for run in children} == {parent.info.run_id}
    for journal in journals:
        (run,) = [run for run in children if run.data.tags[store.RUN_TAG] == journal.run_id]
        assert_equal(run, journal.record)
        assert run.info.status == "FINISHED"
    assert not Path("mlflow.db.new").exists()


@pytest.mark.bar(18)
def test_doubles_and_deleted_ones(here: Path) -> None:
    """Agree on the first run, delete late duplicates, and restore what was deleted instead of
    creating it again.
    """
    mlflow = client()
    experiment = store.ensure_experiment(mlflow, "toy", store.artifact_root(store.store_uri(None)))
    assert store.ensure_experiment(mlflow, "toy") == experiment
    run, new = store.ensure_run(mlflow, experiment, "a", started=1000, name="r")
    assert (store.ensure_run(mlflow, experiment, "a", started=1000, name="r"), new) == (
        (run, False),
        True,
    )
    late = mlflow.create_run(experiment, start_time=2000, tags={store.RUN_TAG: "a"}).info.run_id
    assert store.ensure_run(mlflow, experiment, "a", started=1000, name="r") == (run, False)
    assert len(runs()) == 2
    store.delete_duplicates(mlflow, experiment, store.RUN_TAG, "a", keep=run)
    assert [run.info.run_id for run in runs()] == [run] != [late]
    mlflow.delete_experiment(experiment)
    assert store.ensure_experiment(mlflow, "toy") == experiment
    assert store.ensure_run(mlflow, experiment, "a", started=1000, name="r") == (run, False)


@pytest.mark.parametrize(
    "name", ["eval/success_rate/reach-v3", "a//b", "../x", "/x/", "a?b=[1]", "x" * 300, "..", "ä"]
)
def test_names_become_acceptable(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    accepted = store.accepted(name)
    _validate_metric_name(accepted)
    assert accepted
    assert len(accepted) <= store.MAX_NAME
    assert accepted == name or name != "eval/success_rate/reach-v3"


def test_where_the_store_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.store_uri(None) == f"sqlite:///{here}/mlflow.db"
    assert store.store_uri("sqlite:///sub/x.db?timeout=3") == f"sqlite:///{here}/sub/x.db?timeout=3"
    monkeypatch.setenv("HOME", "/home/someone")
    assert store.store_uri("sqlite:///~/m.db") == "sqlite:////home/someone/m.db"
    assert store.artifact_root("sqlite:////sub/x.db?timeout=3") == "file:///sub/mlartifacts"
    assert store.artifact_root("http://host") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert store.store_uri(None) == "http://host"
    assert store.store_uri("http://other") == "http://other"


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("10.0.0.7:5000/mlflow", "http://10.0.0.7:5000/mlflow"),
        ("runs.db", "sqlite:///runs.db"),
        ("sqlite://runs.db", "sqlite:///runs.db"),
        ("sqlite:runs.db", "sqlite:///runs.db"),
        ("mlruns", "sqlite:///mlflow.db"),
        ("file:./mlruns", "sqlite:///mlflow.db"),
        ("file:///data/mlruns", "sqlite:///mlflow.db"),
    ],
)
def test_a_store_that_mlflow_does_not_have(
    uri: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=re.escape(f"{uri}: must be")) as told:
        store.store_uri(uri)
    assert str(told.value).endswith(f"did you mean {meant}?")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError):
        store.store_uri(None)


@pytest.mark.parametrize(
    "uri",
    [
        "https://host/mlflow", "postgresql+psycopg2://u:p@host/db", "mysql+pymysql://host/db",
        "databricks", "databricks://profile", "databricks-uc", "uc:http://host", "plugin://host",
    ],
)  # fmt: skip
def test_other_stores_are_left_to_mlflow(uri: str) -> None:
    assert store.store_uri(uri) == uri


def test_where_the_store_of_a_saved_run_is(here: Path) -> None:
    """A store in a folder that is gone is not made again: the project was moved."""
    run = Path("runs/toy")
    default = f"sqlite:///{here}/mlflow.db"
    for saved, found in (
        ("http://host", "http://host"),
        ("sqlite:///../../mlflow.db", default),
        ("sqlite:///../../none.db", default),
        (f"sqlite:///{here}/none.db", f"sqlite:///{here}/none.db"),
        (f"sqlite:///{here}/moved/other.db", default),
    ):
        assert store.located_uri(saved, run) == found


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_upload_may_go_on_as_long_as_it_advances(tmp_path: Path, interrupted: bool):
    patience = Patience(tmp_path, 0.4, interrupted)
    lasted, began = 0.0, time.monotonic()
    while not patience.exhausted() and lasted < 3.0:
        lasted = time.monotonic() - began
        if lasted < 1.0:
            (tmp_path / CURSOR).write_text(str(lasted))
        time.sleep(0.05)
    assert (0.3 < lasted < 1.0) if interrupted else (1.2 < lasted < 3.0)


def test_patience_with_an_uploader_that_is_starting(tmp_path, monkeypatch):
    """Many jobs that start at once share few processors: the first contact may take longer."""
    monkeypatch.setattr("softmod.tracking.uploader.START", 0.3)
    (tmp_path / LOCK).touch()
    starting = Patience(tmp_path, 0.0, interrupted=False)
    interrupted = Patience(tmp_path, 0.0, interrupted=True)
    time.sleep(0.01)
    assert not starting.exhausted()
    assert interrupted.exhausted()
    time.sleep(0.3)
    assert starting.exhausted()
    (tmp_path / LOCK).write_bytes(STARTED)
    starting.seconds = 5.0
    assert not starting.exhausted()


def test_a_sweep_that_was_deleted_meanwhile(journal: Journal) -> None:
    """Assert that a failed try leaves nothing behind that makes the next one fail as well."""
    metadata = about(sweep=SWEEP)
    uploader = start_uploader(journal.folder, settings.tracking(), metadata)
    journal.status("RUNNING")
    wait_for(lambda: client().get_experiment_by_name("toy") and runs(store.SWEEP_TAG), 60)
    client().delete_run(runs(store.SWEEP_TAG)[0].info.run_id)
    journal.metrics({"a": 1.0}, 1)
    journal.status("FINISHED")
    assert uploader.close(60)
    (sweep,) = runs(store.SWEEP_TAG)
    assert only_run().data.tags[store.PARENT_TAG] == sweep.info.run_id
    assert only_run().info.status == sweep.info.status == "FINISHED"
