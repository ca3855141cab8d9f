"""Bars 10, 18, 19, 20 and 23 in full: Ctrl-C, servers and databases that fail, statuses, passwords.

The command runs in separate processes, with sqlite files and a real `mlflow server` behind a
proxy. The content of MLflow is compared with the run's journal, entry by entry.
"""

from __future__ import annotations

import base64
import ctypes
import itertools
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from softmod import train
from softmod.tracking import mlflow_store as store
from softmod.tracking.destination import DESTINATION
from softmod.tracking.journal import Journal
from softmod.tracking.record import JOURNAL, Record
from softmod.tracking.sender import CURSOR, Sender
from tests.command.test_processes import BRIEF, ROOT, command, environment
from tests.reliability.proxy import Proxy
from tests.tracking.test_uploader import database

__all__ = ["database", "environment"]

Environment = dict[str, str]


@pytest.fixture
def here(tmp_path: Path, database: Path) -> Path:
    """Enter a working folder with an empty store."""
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


def start(
    here: Path, environment: Environment, *overrides: str, script: str = "", **options: Any
) -> subprocess.Popen[bytes]:
    """Start the command, or a script that patches it, on the toy tasks; its output goes to two
    files.

    It leads a process group, as a job of a terminal does.
    """
    line = [sys.executable, "-c", script] if script else command("softmod.train")
    with (here / "stdout").open("ab") as out, (here / "stderr").open("ab") as err:
        return subprocess.Popen(
            [*line, *BRIEF, *overrides],
            cwd=here,
            env=environment,
            stdout=out,
            stderr=err,
            process_group=0,
            **options,
        )


def told(here: Path) -> str:
    return (here / "stderr").read_text()


def run_of(here: Path, seed: int = 0) -> Path:
    (folder,) = here.glob(f"runs/*/seed_{seed}")
    return folder


def journal_of(here: Path) -> str:
    return "".join(path.read_text() for path in here.glob(f"runs/*/seed_0/{JOURNAL}"))


def upload(folder: Path, here: Path, environment: Environment) -> subprocess.CompletedProcess[str]:
    line = command("softmod.upload", str(folder))
    return subprocess.run(
        line, cwd=here, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 120.0
) -> None:
    """Wait until the condition holds, which must be before the process ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early, with {process.returncode}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def differences(folder: Path, database: Path) -> list[str]:
    """Return the differences between MLflow and the run's journal: metrics (each step once),
    params, artifacts, the status.
    """
    client, record = store.connect(f"sqlite:///{database}"), Record.read(folder)
    found = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
        if run.data.tags.get(store.RUN_TAG) == record.run_id
    ]
    if len(found) != 1:
        return [f"{len(found)} runs"]
    (run,) = found
    wrong = [] if run.info.status == record.status else [f"status {run.info.status}"]
    params = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in record.params.items()
    }
    wrong += [name for name, _ in sorted(params.items() ^ run.data.params.items())]
    for name in sorted(set(record.values) | set(run.data.metrics)):
        sent = Counter(
            (metric.step, metric.value)
            for metric in client.get_metric_history(run.info.run_id, name)
        )
        wrong += [name] if sent != Counter(record.history(name)) else []
    return wrong + [
        path for path in artifacts(folder) if not (place_of(run, database) / path).exists()
    ]


def artifacts(folder: Path) -> list[str]:
    """Return the artifacts that the journal registers and that exist."""
    entries = map(json.loads, (folder / JOURNAL).read_text().splitlines())
    named = [(entry["path"], entry["under"]) for entry in entries if entry["kind"] == "artifact"]
    return [str(Path(under, Path(path).name)) for path, under in named if (folder / path).exists()]


def place_of(run: Any, database: Path) -> Path:
    """Return the folder of a run's artifacts, from an sqlite store or below the server's folder."""
    uri = run.info.artifact_uri
    served = database.parent / "artifacts" / uri.removeprefix("mlflow-artifacts:/")
    return Path(uri.removeprefix("file://")) if uri.startswith("file:") else served


# --- 10: Ctrl-C -----------------------------------------------------------------------------------

BEGUN = [
    "workers.processes=2",
    "run.steps_per_task=100000",
    "run.eval_every=100000000",
    "run.save_every=100000000",
]
ENDLESS = [
    "env.horizon=500",
    "run.eval_goals=50",
    "run.eval_every=30",
    "run.log_every=30",
]  # evaluations
MOMENTS: dict[str, tuple[list[str], Callable[[Path], object]]] = {
    "imports": (BEGUN, lambda here: True),
    "start-up": (BEGUN, lambda here: list(here.glob(f"runs/*/seed_0/{DESTINATION}"))),
    "warm-up": (
        [*BEGUN, "run.warmup_per_task=50000", "run.replay_per_task=50000"],
        lambda here: "env_steps_per_second" in journal_of(here) and uploading(here),
    ),
    "training": (BEGUN, lambda here: "critic_loss" in journal_of(here) and uploading(here)),
    "evaluation": ([*BEGUN, *ENDLESS], lambda here: uploading(here) and within_evaluation(here)),
    "drain": (
        [*BEGUN, "run.max_minutes=0.15"],
        lambda here: "FINISHED" in journal_of(here) and uploading(here),
    ),
}
DELAYS = {"imports": 1.0, "start-up": 0.7}  # seconds after which the moment has come


def uploading(here: Path, seed: int = 0) -> list[Path]:
    return list(here.glob(f"runs/*/seed_{seed}/{CURSOR}"))


def within_evaluation(here: Path) -> bool:
    return "env_steps_per_second" in journal_of(here).splitlines()[-1]


def statuses(here: Path) -> list[str]:
    """Return the statuses of all runs in the working folder's store."""
    with closing(sqlite3.connect(here / "mlflow.db")) as connection:
        return [status for (status,) in connection.execute("select status from runs")]


def left_over(here: Path, patience: float = 2.0) -> list[str]:
    """Return the processes that work in this folder after so many seconds."""
    end = time.monotonic() + patience
    while found := [" ".join(process.info["cmdline"] or ()) for process in working_in(here)]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return found


def working_in(here: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.info["cwd"] == str(here)
    ]


def interrupt(
    here: Path, environment: Environment, moment: str, script: str = ""
) -> tuple[float, list[str]]:
    """Start a run and send Ctrl-C to its process group at a moment; return the seconds it took to
    end, and the problems found.
    """
    overrides, due = MOMENTS[moment]
    process = start(here, environment, *overrides, script=script)
    wait_for(lambda: due(here), process)
    time.sleep(DELAYS.get(moment, 0.0))
    assert process.poll() is None
    before, runs = len(told(here).splitlines()), statuses(here)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    code = process.wait(60)
    took = time.monotonic() - began
    wrong = [f"exit code {code}"] if code != 130 else []
    wrong += [f"{took:.1f} s"] if took > 5.0 else []
    wrong += ["too many lines"] if len(told(here).splitlines()) - before > 10 else []
    wrong += ["traceback"] if "Traceback" in told(here) else []
    wrong += left_over(here)
    after, right = statuses(here), {"KILLED", "FINISHED"} if moment == "drain" else {"KILLED"}
    wrong += [f"statuses {after}"] if len(after) < len(runs) or not set(after) <= right else []
    return took, wrong


@pytest.mark.timed
@pytest.mark.reliability
@pytest.mark.bar(10)
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c(moment: str, here: Path, environment: Environment, record_property: Any) -> None:
    took, wrong = interrupt(here, environment, moment)
    record_property("tried", f"{moment}, over after {took:.1f} s")
    assert wrong == [], told(here)
    if moment not in ("imports", "start-up"):
        assert len(statuses(here)) == 1


UNHANDLED = """
from softmod import train
from softmod.system import streams
train.KeyboardInterrupt = streams.KeyboardInterrupt = GeneratorExit  # what both catch
train.main()
"""


@pytest.mark.reliability
@pytest.mark.control(10)
def test_seen_failing_ctrl_c_without_its_handler(here: Path, environment: Environment) -> None:
    assert {"traceback", f"exit code {-signal.SIGINT}"} <= set(
        interrupt(here, environment, "training", UNHANDLED)[1]
    )


# --- 18: a server that is away, killed, silent or slow --------------------------------------------


class Server:
    """An `mlflow server` on sqlite, at low priority."""

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder, self.environment, self.port = folder, environment, free_port()
        self.database = folder / "mlflow.db"
        self.start()

    def start(self) -> None:
        line = command(
            "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"
        )
        line += ["--backend-store-uri", f"sqlite:///{self.database}"]
        line += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["nice", "-n", "10", *line],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> None:
        wait_for(self.answers, self.process)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/health", timeout=1.0
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, environment: Environment) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"), environment)
    started.wait()
    yield started
    started.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    between = Proxy(server.port)
    yield between
    between.close()


STEADY = [
    "workers=inline", "run.steps_per_task=100000000", "run.eval_every=100000000",
    "run.save_every=100000000",
    "run.log_every=75", "env.horizon=50", "run.round_steps=25", "run.batch_per_task=64",
    "tracking.drain_seconds=8", "tracking.model=false",
]  # fmt: skip
HEALTHY: list[tuple[float, str]] = []
FAULTS = {  # what happens, how many seconds after the first round; at 0 before the start
    "down at the start, then up": [(0.0, "refuse"), (5.0, "pass")],
    "killed for 20 s": [(3.0, "kill"), (23.0, "revive")],
    "never answering": [(0.0, "silent")],
    "slow": [(0.0, "slow")],
    "answers lost for 12 s": [(2.0, "mute"), (14.0, "pass")],
}
CHUNK_DELAY = 0.3  # seconds


def train_beside(
    here: Path,
    environment: Environment,
    proxy: Proxy,
    server: Server,
    events: list[tuple[float, str]],
    minutes: float,
) -> Path:
    """Train for some minutes while the server is disturbed; return the run's folder."""

    def happen(what: str) -> None:
        if what == "kill":
            server.kill()
        elif what == "revive":
            server.start()
        else:
            proxy.switch(what, CHUNK_DELAY)  # type: ignore[arg-type]

    here.mkdir()
    proxy.switch("pass")
    for _, what in [event for event in events if event[0] == 0.0]:
        happen(what)
    line = [*STEADY, f"run.max_minutes={minutes}", f"tracking.uri=http://127.0.0.1:{proxy.port}"]
    process = start(here, environment, *line)
    wait_for(lambda: "env_steps_per_second" in journal_of(here), process)
    began = time.monotonic()
    for moment, what in [event for event in events if event[0] > 0.0]:
        wait_for(lambda until=began + moment: time.monotonic() > until, process)
        happen(what)
    assert process.wait(120) == 0, told(here)
    return run_of(here)


def rounds(folder: Path, needed: str = "time/env_steps_per_second") -> list[tuple[float, int]]:
    """Return the seconds at which env steps of training were logged with this metric."""
    entries = map(json.loads, (folder / JOURNAL).read_text().splitlines())
    metrics = [entry for entry in entries if entry["kind"] == "metrics"]
    return [(m["time"] / 1000, m["step"]) for m in metrics if needed in m["values"]]


def speed(folder: Path) -> float:
    """Return env steps per second, without evaluations and the end."""
    (first, begin), *_, (last, end) = rounds(folder)
    return (end - begin) / (last - first)


def longest_pause(folder: Path) -> float:
    """Return the seconds between successive entries that training made, from its first losses on.

    Before them the update is captured, which takes half a second with a healthy server too.
    """
    times = [time for time, _ in rounds(folder, "train/critic_loss")]
    return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.timed
@pytest.mark.reliability
@pytest.mark.bar(18)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails(
    fault: str,
    tmp_path: Path,
    environment: Environment,
    server: Server,
    proxy: Proxy,
    record_property: Any,
) -> None:
    """Train as fast as with a healthy server; everything arrives, some of it later by the command.

    Measurements are repeated once, because other work on the machine may disturb them.
    """
    events = FAULTS[fault]
    minutes = max(0.2, (events[-1][0] + 5.0) / 60.0)
    ratio, pause, later = 0.0, math.inf, False
    for turn in range(2):
        healthy = train_beside(
            tmp_path / f"healthy{turn}", environment, proxy, server, HEALTHY, 0.2
        )
        taken = proxy.taken
        here = tmp_path / f"faulty{turn}"
        folder = train_beside(here, environment, proxy, server, events, minutes)
        assert proxy.taken > taken
        ratio, pause = max(ratio, speed(folder) / speed(healthy)), min(pause, longest_pause(folder))
        proxy.switch("pass")
        server.wait()
        later = f"python -m softmod.upload {folder.relative_to(here)}" in told(here)
        if later:
            sent = upload(folder, here, environment)
            assert sent.returncode == 0, sent.stderr
        assert differences(folder, server.database) == []
        assert differences(healthy, server.database) == []
        if ratio >= 0.95 and pause < 0.5:
            break
    record_property(
        "tried",
        f"{fault}: {ratio:.2f} of the speed, longest pause {pause:.2f} s" + ", sent later" * later,
    )
    assert later or fault != "never answering"
    assert pause < 0.5
    assert ratio > 0.8


WAITING = """
from mlflow import MlflowClient
from softmod import train
from softmod.tracking import journal as tracking
write = tracking.Journal.metrics
def send(journal, values, step):
    write(journal, values, step)
    try:
        MlflowClient(URI).search_experiments()
    except Exception:
        pass
tracking.Journal.metrics = send
train.main()
"""


@pytest.mark.reliability
@pytest.mark.control(18)
def test_seen_failing_sending_from_the_loop(
    here: Path, environment: Environment, proxy: Proxy
) -> None:
    proxy.switch("silent")
    impatient = environment | {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    script = WAITING.replace("URI", repr(f"http://127.0.0.1:{proxy.port}"))
    line = [*STEADY, "tracking=journal", "run.max_minutes=0.15"]
    assert start(here, impatient, *line, script=script).wait(120) == 0, told(here)
    assert longest_pause(run_of(here)) > 0.5


@pytest.mark.control(18)
@pytest.mark.parametrize("kind", ["params", "metrics", "status"])
def test_seen_failing_a_line_that_gets_lost(
    kind: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with closing(Journal(Path("runs/toy/seed_0"))) as journal:
        journal.params({"steps": 3})
        journal.metrics({"x": 1.0}, 1)
        journal.status("FINISHED")
    sort, lost = Sender._sort, []

    def forgetful(sender: Sender, line: Any, chunk: Any) -> None:
        if line["kind"] == kind:
            lost.append(line)
        else:
            sort(sender, line, chunk)

    monkeypatch.setattr(Sender, "_sort", forgetful)
    Sender(journal.folder).send()
    expected = {"params": "steps", "metrics": "x", "status": "status RUNNING"}[kind]
    assert differences(journal.folder, here / "mlflow.db") == [expected]
    assert len(lost) == 1


# --- 19: sqlite files -----------------------------------------------------------------------------


@pytest.mark.reliability
@pytest.mark.bar(19)
def test_six_jobs_at_once_on_a_new_database(
    tmp_path: Path, environment: Environment, record_property: Any
) -> None:
    uri = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    folders = [tmp_path / str(seed) for seed in range(6)]
    for folder in folders:
        folder.mkdir()
    jobs = [
        start(
            folder,
            environment,
            "workers=inline",
            uri,
            f"seed={seed}",
            "tracking.drain_seconds=60",
            "tracking.model=false",
        )
        for seed, folder in enumerate(folders)
    ]
    assert [job.wait(240) for job in jobs] == [0] * 6
    client = store.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert Counter(run.info.status for run in runs) == {"FINISHED": 6}
    assert Counter(run.data.params["seed"] for run in runs) == Counter("012345")
    for seed, folder in enumerate(folders):
        assert differences(run_of(folder, seed), tmp_path / "mlflow.db") == []
    metrics = sum(
        len(steps)
        for seed, folder in enumerate(folders)
        for steps in Record.read(run_of(folder, seed)).values.values()
    )
    record_property("tried", f"6 jobs at once, {metrics} values of metrics")


DATABASES = ("corrupt", "read-only", "locked", "a folder")
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def obey_modes() -> None:
    """Drop root's privilege in a child process, as nothing is read-only for root."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def spoil(path: Path, how: str, good: Path) -> sqlite3.Connection | None:
    """Create a database that cannot be used; return the connection that locks it, if any."""
    if how == "corrupt":
        path.write_bytes(os.urandom(4096))
    elif how == "a folder":
        path.mkdir()
    else:
        shutil.copy(good, path)
    if how == "read-only":
        path.chmod(0o444)
    if how == "locked":
        connection = sqlite3.connect(path)
        connection.execute("begin exclusive")
        return connection
    return None


def train_with_a_spoilt_database(
    here: Path, environment: Environment, how: str, good: Path, script: str = ""
) -> list[str]:
    """Return the problems of a run whose database is unusable until the run is over."""
    lock = spoil(here / "mlflow.db", how, good)
    line = ["workers=inline", "tracking.drain_seconds=3"]
    code = start(here, environment, *line, script=script, preexec_fn=obey_modes).wait(120)
    wrong = [f"exit code {code}"] if code else []
    folder = run_of(here)
    hint = f"complete it with: python -m softmod.upload {folder.relative_to(here)}\n"
    wrong += [] if told(here).count(hint) == 1 else ["no hint"]
    wrong += ["traceback"] if "Traceback" in told(here) else []
    if lock is None:
        (here / "mlflow.db").rename(here / "broken.db")
    else:
        lock.close()
    sent = upload(folder.relative_to(here), here, environment)
    return wrong + ([sent.stderr] if sent.returncode else differences(folder, here / "mlflow.db"))


@pytest.mark.reliability
@pytest.mark.bar(19)
@pytest.mark.parametrize("how", DATABASES)
def test_a_database_that_cannot_be_used(
    how: str, tmp_path: Path, database: Path, environment: Environment, record_property: Any
) -> None:
    assert train_with_a_spoilt_database(tmp_path, environment, how, database) == [], told(tmp_path)
    record_property("tried", f"{how}, everything sent later")


CARELESS = """
from softmod import train
from softmod.experiment import publish as experiment
from softmod.tracking import mlflow_store as store
start = experiment.start_uploader
def check_first(folder, tracking, about):
    store.ensure_experiment(store.connect(store.store_uri(tracking.uri)), about["experiment"])
    return start(folder, tracking, about)
experiment.start_uploader = check_first
train.main()
"""


@pytest.mark.reliability
@pytest.mark.control(19)
def test_seen_failing_a_database_that_training_needs(
    tmp_path: Path, database: Path, environment: Environment
) -> None:
    assert "exit code 1" in train_with_a_spoilt_database(
        tmp_path, environment, "corrupt", database, CARELESS
    )


# --- 20: statuses ---------------------------------------------------------------------------------

FAILING = ["env._target_=tests.faulty.Faulty", "env.name=raise-25"]


def mlflow_runs(here: Path, experiment: str = "toy") -> list[Any]:
    client = store.connect(f"sqlite:///{here / 'mlflow.db'}")
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def status_of(here: Path, seed: int = 0, experiment: str = "toy") -> str:
    (status,) = [
        run.info.status
        for run in mlflow_runs(here, experiment)
        if run.data.params["seed"] == str(seed)
    ]
    return str(status)


@pytest.mark.reliability
@pytest.mark.bar(20)
def test_statuses_are_true(here: Path, environment: Environment, record_property: Any) -> None:
    """Check a run that finishes, one that fails, one that is stopped, one that is killed, and the
    same one resumed.
    """
    line = ["workers.processes=1", "run.steps_per_task=100000", "run.replay_per_task=100000"]
    assert start(here, environment, "workers=inline", "seed=0").wait(120) == 0
    assert start(here, environment, "workers=inline", *FAILING).wait(120) == 5
    assert (status_of(here), status_of(here, experiment="raise-25")) == ("FINISHED", "FAILED")
    for seed, number, code, expected in (
        (1, signal.SIGTERM, 143, "KILLED"),
        (2, signal.SIGKILL, -signal.SIGKILL, "FAILED"),
    ):
        process = start(here, environment, *line, f"seed={seed}")
        wait_for(
            lambda seed=seed: uploading(here, seed) and len(checkpoints(here, seed)) > 1, process
        )
        process.send_signal(number)
        assert process.wait(60) == code
        assert left_over(here, patience=10.0) == []
        assert status_of(here, seed) == expected
    (killed,) = [run for run in mlflow_runs(here) if run.data.params["seed"] == "2"]
    assert killed.data.tags[store.ENDED_TAG] == "unexpectedly"
    process = start(here, environment, *line, "seed=2", "run.max_minutes=0.001")
    assert process.wait(120) == 0, told(here)
    (again,) = [run for run in mlflow_runs(here) if run.data.params["seed"] == "2"]
    assert (again.info.run_id, again.info.status) == (killed.info.run_id, "FINISHED")
    assert store.ENDED_TAG not in again.data.tags
    assert "resumes at" in told(here)
    record_property("tried", "FINISHED, FAILED, SIGTERM, kill -9, the killed one resumed")


def checkpoints(here: Path, seed: int) -> list[Path]:
    return list(here.glob(f"runs/*/seed_{seed}/checkpoints/step_*"))


def sweep_with_a_failing_job(here: Path, environment: Environment, script: str = "") -> list[str]:
    """Return the problems of a sweep with a job that fails and one that does not."""
    swept = "env._target_=tests.faulty.Faulty,softmod.envs.toy.Toy"
    line = ["-m", "workers=inline", swept, "env.name=raise-25"]
    code = start(here, environment, *line, script=script).wait(120)
    wrong = [f"exit code {code}"] if code != 5 else []
    about = [
        line
        for line in told(here).splitlines()
        if line.startswith("softmod: RuntimeError: the simulation broke [")
    ]
    wrong += (
        ["not named"]
        if len(about) != 1 or "env._target_=tests.faulty.Faulty" not in about[0]
        else []
    )
    runs = mlflow_runs(here, "raise-25")
    (parent,) = [run for run in runs if store.SWEEP_TAG in run.data.tags]
    children = [run for run in runs if run.data.tags.get(store.PARENT_TAG) == parent.info.run_id]
    ended = {run.data.params["env._target_"]: run.info.status for run in children}
    right = {"tests.faulty.Faulty": "FAILED", "softmod.envs.toy.Toy": "FINISHED"}
    return wrong + (
        [] if ended == right and len(children) == len(runs) - 1 == 2 else [f"statuses {ended}"]
    )


@pytest.mark.reliability
@pytest.mark.bar(20)
def test_a_sweep_with_a_failing_job(
    here: Path, environment: Environment, record_property: Any
) -> None:
    assert sweep_with_a_failing_job(here, environment) == [], told(here)
    record_property("tried", "a sweep of a failing job and one that finishes")


WITHOUT_FAILURES = """
from softmod import train
from softmod.tracking import journal as tracking
status = tracking.Journal.status
def ends_well(journal, word):
    status(journal, "FINISHED" if word == "FAILED" else word)
tracking.Journal.status = ends_well
train.main()
"""


@pytest.mark.reliability
@pytest.mark.control(20)
def test_seen_failing_a_status_that_is_not_true(here: Path, environment: Environment) -> None:
    (wrong,) = sweep_with_a_failing_job(here, environment, WITHOUT_FAILURES)
    assert wrong.startswith("statuses")


# --- 23: who can see what -------------------------------------------------------------------------


def addresses(process: psutil.Process) -> set[tuple[str, int]]:
    """Return the addresses that a process and its descendants listen at."""
    family = [process, *process.children(recursive=True)]
    connections = [found for member in family for found in member.net_connections("inet")]
    return {
        tuple(found.laddr)
        for found in connections
        if found.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    }


@pytest.mark.reliability
@pytest.mark.bar(23)
def test_the_dashboard_listens_on_this_machine_only(
    tmp_path: Path, environment: Environment, record_property: Any
) -> None:
    port = free_port()
    line = [
        "make",
        "-f",
        str(ROOT / "Makefile"),
        "-o",
        "setup",
        "ui",
        f"PORT={port}",
        f"RUN={sys.executable} -m",
    ]
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(
            line, cwd=tmp_path, env=environment, stdout=log, stderr=log, process_group=0
        )
    try:
        top = psutil.Process(process.pid)
        wait_for(lambda: ("127.0.0.1", port) in addresses(top), process)
        time.sleep(3.0)  # for whatever else it starts
        found = addresses(top)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    record_property("tried", f"`make ui` listens at {len(found)} address")
    assert {host for host, _ in found} == {"127.0.0.1"}


@pytest.mark.control(23)
def test_seen_failing_a_socket_for_everybody() -> None:
    with socket.create_server(("", 0)) as everybody:
        assert ("0.0.0.0", everybody.getsockname()[1]) in addresses(psutil.Process())


PASSWORD = "hunter2"
ENCODED = base64.b64encode(f"me:{PASSWORD}".encode())  # as it is in a request
WAYS = {
    "the command line": (["workers=inline"], 0),
    "the environment": (["workers=inline"], 0),
    "a failing sweep": (["-m", "workers=inline", *FAILING], 5),
}


def telling(*folders: Path) -> list[str]:
    """Return the files that contain the password."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [
        path.name
        for path in files
        if any(text in path.read_bytes() for text in (PASSWORD.encode(), ENCODED))
    ]


@pytest.mark.reliability
@pytest.mark.bar(23)
@pytest.mark.parametrize("way", WAYS)
def test_a_password_is_nowhere(
    way: str,
    tmp_path: Path,
    environment: Environment,
    server: Server,
    proxy: Proxy,
    record_property: Any,
) -> None:
    """Find it neither in the run's files, checkpoints and logs included, nor on the server, nor in
    the output.
    """
    uri = f"http://me:{PASSWORD}@127.0.0.1:{proxy.port}"
    line, code = WAYS[way]
    if way == "the environment":
        environment = environment | {"MLFLOW_TRACKING_URI": uri}
    else:
        line = [*line, f"tracking.uri={uri}"]
    proxy.switch("refuse")  # the uploader has something to complain of
    process = start(tmp_path, environment, *line)
    wait_for(
        lambda: any(path.stat().st_size for path in tmp_path.glob("runs/*/seed_0/upload.log")),
        process,
    )
    proxy.switch("pass")
    assert process.wait(120) == code, told(tmp_path)
    assert differences(run_of(tmp_path), server.database) == []
    assert telling(tmp_path, server.folder) == []
    record_property("tried", f"{way}, {len(list(tmp_path.rglob('*')))} files")


@pytest.mark.bar(23)
def test_a_faulty_command_line_does_not_repeat_a_password(
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"tracking.uri=http://me:{PASSWORD}@127.0.0.1:1"
    for line in ([uri, "run.save_every=0"], [f"x{uri}"], [f"{uri},sqlite:///x"], [uri, "env=[]"]):
        assert train.run(["experiment=toy", *line]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 4
    assert PASSWORD not in printed.out + printed.err


UNSTRUCK = """
from softmod import train
from softmod.tracking import redact
redact.SECRETS = ()
train.main()
"""


@pytest.mark.reliability
@pytest.mark.control(23)
def test_seen_failing_passwords_that_are_not_struck_out(
    tmp_path: Path, environment: Environment
) -> None:
    line = ["tracking=journal", "workers=inline", f"tracking.uri=http://me:{PASSWORD}@127.0.0.1:1"]
    assert start(tmp_path, environment, *line, script=UNSTRUCK).wait(120) == 0, told(tmp_path)
    assert {"config.yaml", JOURNAL, "facts.json", "train.log"} == set(telling(tmp_path))
