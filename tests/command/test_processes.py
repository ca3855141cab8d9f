"""The commands in processes of their own: sweeps, notebooks, Ctrl-C, the wheel, the docs."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from softmod.report.__main__ import run as run_report
from softmod.report.runs import from_mlflow
from softmod.tracking import mlflow_store as store
from softmod.tracking.record import Record

ROOT = Path(__file__).parents[2]
BRIEF = [
    "experiment=toy", "fabric.threads=1", "env.horizon=20", "run.round_steps=10",
    "run.steps_per_task=200",
    "run.warmup_per_task=40", "run.batch_per_task=8", "run.eval_every=300", "run.eval_goals=2",
    "run.final_eval_goals=4", "run.save_every=300", "run.log_every=150", "tracking.model=false",
]  # fmt: skip

store.prepare_environment()


@pytest.fixture(scope="module")
def environment(cache: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW_", "SOFTMOD_"))
    }
    return kept | {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "SOFTMOD_CACHE": str(cache),
    }


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line of a module."""
    return [sys.executable, "-m", module, *arguments]


def done(line: list[str], cwd: Path, environment: dict[str, str], code: int = 0) -> str:
    """Run a command to its end, check its exit code, and return all its output."""
    ended = subprocess.run(
        line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def runs(folder: Path, experiment: str = "toy") -> list[Any]:
    """Return the runs of an MLflow experiment."""
    client = store.connect(f"sqlite:///{folder / 'mlflow.db'}")
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


# --- a sweep --------------------------------------------------------------------------------------

SWEEP = command(
    "softmod.train", "-m", *BRIEF, "workers=inline", "model=soft_modular_small,mt_mh_sac"
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Return a working folder after a sweep of two models and two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    done([*SWEEP, "seed=0,1"], folder, environment)
    return folder


@pytest.mark.bar(20)
def test_a_sweep_is_one_parent_and_a_child_per_job(swept: Path) -> None:
    everything = runs(swept)
    (parent,) = [run for run in everything if store.SWEEP_TAG in run.data.tags]
    children = [run for run in everything if run is not parent]
    assert len(children) == 4
    assert {run.info.status for run in everything} == {"FINISHED"}
    assert {run.data.tags[store.PARENT_TAG] for run in children} == {parent.info.run_id}
    assert parent.info.run_name == "toy: model, seed"
    client = store.connect(f"sqlite:///{swept / 'mlflow.db'}")
    assert store.KIND.items() <= client.get_experiment_by_name("toy").tags.items()
    jobs = {(run.data.params["model"], run.data.params["seed"]) for run in children}
    assert jobs == {
        (model, seed) for model in ("soft_modular_small", "mt_mh_sac") for seed in ("0", "1")
    }
    for run in children:
        assert {f"eval/success_rate/toy-{task}" for task in ("reach", "opposite", "touch")} <= set(
            run.data.metrics
        )
        short = {"soft_modular_small": "soft_small", "mt_mh_sac": "mh_sac"}[
            run.data.params["model"]
        ]
        assert run.info.run_name == f"{short} s{run.data.params['seed']}"
        assert {"version.torch", "softmod.group"} <= set(run.data.tags)
        kept = swept / "mlartifacts" / run.info.run_id / "artifacts"
        for name in (
            "config.yaml",
            "success.png",
            "evaluation.json",
            "checkpoints/best/manifest.json",
        ):
            assert (kept / name).is_file(), name
        routed = store.image_steps(client, run.info.run_id, store.ROUTING)
        assert bool(routed) == (run.data.params["model"] == "soft_modular_small")


def test_repeating_a_finished_sweep_does_nothing(swept: Path, environment: dict[str, str]) -> None:
    before = {run.info.run_id for run in runs(swept)}
    printed = done([*SWEEP, "seed=0,1"], swept, environment)
    assert printed.count("finished already, 600 env steps; nothing to do") == 4
    assert {run.info.run_id for run in runs(swept)} == before


NOTEBOOKS = {  # printed words, and the smallest number of pictures
    "01_quickstart": ("mean success", 1),
    "02_compare": ("goals: benchmark", 4),
    "03_routing": ("of 2 episodes solved", 3),
    "04_python": ("success", 1),
}


@pytest.mark.parametrize("name", list(NOTEBOOKS))
def test_the_notebooks_run_on_it(
    name: str, swept: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    line = command(
        "jupyter", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path)
    )
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
    brief = text.replace('\\"env=toy\\"', '\\"env=toy\\", \\"run.steps_per_task=600\\"')
    assert (brief == text) == (name != "04_python")
    (tmp_path / "notebook.ipynb").write_text(brief)
    line += ["--output", f"{name}.ipynb", str(tmp_path / "notebook.ipynb")]  # runs in its folder
    where = tmp_path if name == "04_python" else swept  # it trains
    uri = f"sqlite:///{where / 'mlflow.db'}"
    done(line, where, environment | {"MLFLOW_TRACKING_URI": uri})
    cells = json.loads((tmp_path / f"{name}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    printed = "".join(line for output in outputs for line in output.get("text", []))
    assert NOTEBOOKS[name][0] in printed
    episodes = 3 if name in ("01_quickstart", "03_routing") else 0  # one of each task
    assert printed.count(" steps\n") == episodes
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= NOTEBOOKS[name][1]


def test_a_report_on_it(
    swept: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that reports from MLflow and from journals agree, and that the first is logged."""
    report = command("softmod.report")
    assert "written: report/report.html" in done(
        [*report, "sweep=toy: model, seed"], swept, environment
    )
    monkeypatch.chdir(swept)
    assert run_report(["runs=[runs]", "output=beside"]) == 0
    for name in ("success", "tasks", "improvement", "efficiency", "published"):
        for kind in ("csv", "tex"):
            ours, theirs = (
                (swept / folder / f"{name}.{kind}").read_text() for folder in ("report", "beside")
            )
            assert ours == theirs, name
    rows = (swept / "report" / "success.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["mt_mh_sac", "2"],
        ["soft_modular_small", "2"],
    ]
    page = (swept / "report" / "report.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert {
        "success.png",
        "curves.png",
        "curves_over_time.png",
        "tasks.png",
        "interference.png",
    } <= set(pictures)
    assert all((swept / "report" / picture).stat().st_size > 5_000 for picture in pictures)
    (parent,) = [run for run in runs(swept) if store.SWEEP_TAG in run.data.tags]
    assert (
        swept / "mlartifacts" / parent.info.run_id / "artifacts" / "report" / "report.html"
    ).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_have_small_outputs_of_no_particular_machine(path: Path) -> None:
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(text) < 600_000
    assert any(cell["outputs"] for cell in cells)
    assert all(cell["execution_count"] for cell in cells)
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    for private in (str(ROOT), str(Path.home()), "site-packages", "/tmp/", "/home/", "/Users/"):
        assert private not in text


def test_a_finished_run_is_one_of_another_sweep_too(
    swept: Path, environment: dict[str, str]
) -> None:
    """Move two runs of the sweep under another parent; this must be the last test that uses it."""
    printed = done([*SWEEP[:-1], "model=mt_mh_sac", "seed=0,1"], swept, environment)
    assert printed.count("nothing to do") == 2
    parents = {
        run.info.run_name: run.info.run_id
        for run in runs(swept)
        if store.SWEEP_TAG in run.data.tags
    }
    assert set(parents) == {"toy: model, seed", "toy: seed"}
    uri = f"sqlite:///{swept / 'mlflow.db'}"
    members = {name: {run.source for run in from_mlflow(uri, name)[1]} for name in parents}
    assert [len(members[name]) for name in sorted(members)] == [4, 2]
    assert members["toy: seed"] < members["toy: model, seed"]
    assert len(runs(swept)) == 6


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.bar(10)
def test_ctrl_c_and_the_same_command_again(tmp_path: Path, environment: dict[str, str]) -> None:
    line = command("softmod.train", *BRIEF, "workers.processes=2", "run.steps_per_task=1000")
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/seed_0/checkpoints/step_*"))) < 2:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    printed = process.communicate(timeout=60)[1]
    assert time.monotonic() - began < 10
    assert process.returncode == 130, printed
    assert "interrupted; run the same command again to resume from the last checkpoint" in printed
    assert "Traceback" not in printed
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    (folder,) = tmp_path.glob("runs/*/seed_0")
    done(command("softmod.upload", str(folder)), tmp_path, environment)
    (run,) = runs(tmp_path)
    assert run.info.status == "KILLED"

    assert "resumes at" in done(line, tmp_path, environment)
    (again,) = runs(tmp_path)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    client = store.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    record = Record.read(folder)
    assert max(record.values["eval/success_rate/mean"]) == 3_000
    for name in record.names():
        sent = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, name))
        assert sent == Counter(record.values[name].keys()), name


# --- elsewhere ------------------------------------------------------------------------------------


def test_the_wheel_installed_elsewhere_trains(tmp_path: Path, environment: dict[str, str]) -> None:
    done(
        command("build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)),
        tmp_path,
        environment,
    )
    (wheel,) = tmp_path.glob("softmod-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "softmod/conf/experiment/quickstart.yaml" in archive.namelist()
        archive.extractall(tmp_path / "site")
    elsewhere = environment | {"PYTHONPATH": str(tmp_path / "site")}
    where = done(
        [sys.executable, "-c", "import softmod; print(softmod.__file__)"], tmp_path, elsewhere
    )
    assert where.strip() == str(tmp_path / "site" / "softmod" / "__init__.py")
    printed = done(command("softmod.train", "experiment=toy", "run=smoke"), tmp_path, elsewhere)
    assert "900 env steps" in printed
    assert "toy-opposite" in printed


EXAMPLE = "python -m softmod.train --config-dir conf experiment=line"
LINES = sorted(
    {
        line
        for page in (ROOT / "docs" / "howto").glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith(EXAMPLE)
    }
)


@pytest.mark.parametrize("line", LINES, ids=["value head", "algorithm", "all of it"])
def test_the_examples_of_the_docs(tmp_path: Path, environment: dict[str, str], line: str) -> None:
    words = [
        word.replace("conf", str(ROOT / "docs/example/conf")) if word == "conf" else word
        for word in shlex.split(line)
    ]
    own = environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'docs/example'}"}
    done([sys.executable, *words[1:], "tracking=journal"], tmp_path, own)
    (result,) = tmp_path.glob("runs/line-per_task-*/seed_0/result.json")
    scores = {
        score["task"]: score["success_rate"] for score in json.loads(result.read_text())["scores"]
    }
    assert scores.keys() == {"line-approach", "line-avoid"}
    assert min(scores.values()) > 0.8
