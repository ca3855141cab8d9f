"""Runs on other people's machines: launchers' variables, odd folders and streams, no home."""

from __future__ import annotations

import errno
import io
import os
import pwd
import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import softmod
from softmod import evaluate, state
from softmod.config.compose import compose, typed
from softmod.errors import ConfigError
from softmod.experiment.resources import make_fabric
from softmod.report.__main__ import run as report
from softmod.system import user
from softmod.system.files import warn_once
from softmod.tracking import figures
from softmod.tracking import mlflow_store as store
from softmod.tracking.console import Terminal
from softmod.tracking.sender import Sender
from tests.command.test_train import SMALL, here, only, run, statuses

__all__ = ["here"]

ROOT = Path(__file__).parents[2]


def process(*line: str, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *line], cwd=cwd, env=environment, text=True, timeout=200, check=False,
        **({"capture_output": True} | options),
    )  # fmt: skip


# --- a job's environment --------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:The `srun` command")
def test_variables_of_a_launcher_do_not_change_a_run(here, monkeypatch):
    """As in `salloc -n 4`, `mpirun -n 4` and `torchrun`."""
    (here / "bin").mkdir()
    (here / "bin" / "srun").write_text("#!/bin/sh\n")
    (here / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    for name in ("SLURM_JOB_NAME", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "7")
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "0")
    lightning = {"LT_PRECISION": "64-true", "LT_NUM_NODES": "2", "LT_STRATEGY": "ddp"}
    for name, value in (lightning | {"LT_ACCELERATOR": "cuda", "LT_DEVICES": "3"}).items():
        monkeypatch.setenv(name, value)
    fabric = make_fabric(typed(compose(SMALL)), "32-true")
    assert fabric._precision.precision == "32-true"
    assert os.environ["LT_NUM_NODES"] == "2"
    assert run() == 0
    assert statuses(only(here))[-1] == "FINISHED"
    assert report(["runs=[runs]", "output=report"]) == 0  # which counts an update's FLOP


def test_a_user_without_a_name_and_a_home(monkeypatch, tmp_path):
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "SOFTMOD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert user.cache_folder().is_relative_to(tmp_path)
    user.ensure_identity()
    assert os.environ["LOGNAME"] == f"uid{os.getuid()}"
    home = Path(os.environ["HOME"])
    assert home.is_relative_to(tmp_path)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert user.cache_folder() == home / ".cache" / "softmod"
    monkeypatch.delenv("HOME")  # monkeypatch restores what was there before


def test_a_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "mine").symlink_to(tmp_path)
    assert user.private_folder(tmp_path / "mine") not in (tmp_path, tmp_path / "mine")


# --- paths, and what a checkpoint needs -----------------------------------------------------------


def test_a_checkpoint_is_found_from_within_its_run(here, monkeypatch):
    assert run() == 0
    folder = only(here).resolve()
    written = folder / "evaluation" / "evaluation.json"
    step = "step_000000000600"
    for inside, path in (("checkpoints", step), ("checkpoints", "best"), ("checkpoints", "."),
                         (f"checkpoints/{step}", "."), (".", "checkpoints")):  # fmt: skip
        monkeypatch.chdir(folder / inside)
        assert evaluate.run([f"checkpoint={path}", "goals=1"]) == 0
        assert written.is_file()
        shutil.rmtree(written.parent)
        assert softmod.load(path).tasks
        if path != "best":
            assert state.main([path]) == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best", "step_000000000540", step,
    ]  # fmt: skip


def test_a_policy_needs_no_replay(here, capsys):
    """Neither where it is gone, nor where one checkpoint alone was copied."""
    assert run() == 0
    folder = only(here)
    shutil.rmtree(folder / "replay")
    copied = here / "elsewhere" / "step_000000000600"
    shutil.copytree(folder / "checkpoints" / copied.name, copied)
    for path in (folder, copied):
        assert evaluate.run([f"checkpoint={path}", "goals=1"]) == 0
        assert report([f"checkpoint={path}", "episodes=1", "output=routing"]) == 0
        assert softmod.load(path).tasks
    assert (here / "elsewhere" / "evaluation" / "evaluation.json").is_file()
    assert state.main([str(folder)]) == 3
    assert run("run.steps_per_task=300") == 3
    assert "none of 2 checkpoints is valid" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("kinds", [("folders",), ("folders", "files")])
def test_a_file_system_that_cannot_flush(here, monkeypatch, caplog, code, kinds):
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        kind = "folders" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "files"
        if kind in kinds:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    warn_once.cache_clear()
    monkeypatch.setattr(os, "fsync", refuse)
    assert run() == 0
    assert statuses(only(here)) == ["RUNNING", "FINISHED"]
    for kind in kinds:
        assert sum(f"cannot flush {kind}" in record.message for record in caplog.records) == 1


def test_a_sweep_in_a_working_folder_that_cannot_be_written(here, monkeypatch):
    monkeypatch.chdir("/proc")  # read-only for every user
    assert run("-m", "seed=0,1", f"run.folder={here / 'runs'}") == 0
    assert len(list(here.glob("runs/*/seed_*/result.json"))) == 2


def test_observations_of_another_shape_are_explained(here):
    assert run() == 0
    policy = softmod.load(only(here))
    plain = policy.act(np.zeros(9), "toy-touch")
    assert np.array_equal(policy.act(np.array([*np.zeros(9), 0, 0, 1]), "toy-touch"), plain)
    batch = np.concatenate([np.zeros((2, 9)), np.eye(3)[:2]], 1)
    assert policy.act(batch, "toy-touch").shape == (2, 2)
    for shape in ((8,), (10,), (2, 2, 9), ()):
        with pytest.raises(ConfigError, match=r"observation of shape .*: must be \[9\]"):
            policy.act(np.full(shape, 0.5), "toy-touch")
    with pytest.raises(ConfigError, match="must be an array of 9 numbers"):
        policy.act("nothing", "toy-touch")
    for task in (99, -1):
        with pytest.raises(ConfigError, match=f"task {task}: must be a name, or a number up to 2"):
            policy.routing(np.zeros(9), task)


CHILDREN = """
from multiprocessing import get_context
from pathlib import Path
from softmod.config.compose import compose, typed
from softmod.tracking.uploader import start_uploader
from softmod.workers.process import start_forkserver

if __name__ == "__main__":
    start_forkserver()
    worker = get_context("forkserver").Process(target=print, args=("a worker",))
    worker.start()
    worker.join()
    names = dict(experiment='toy', run_name='toy')
    uploader = start_uploader(Path("run"), typed(compose([])).tracking, names)
    uploader.close(60.0)
    print(Path("run", "upload.log").read_text())
"""


def test_files_of_the_working_folder_are_not_imported(here):
    """Neither by workers nor by the upload, where the program does not search that folder."""
    for name in ("queue", "random", "types", "yaml", "mlflow"):
        (here / f"{name}.py").write_text("raise SystemExit('not this one')")
    for name in ("app", "run"):
        (here / name).mkdir()
    (here / "app" / "run.py").write_text(CHILDREN)
    done = process("app/run.py", cwd=here)
    assert done.stderr == ""
    assert done.stdout.splitlines()[:2] == ["a worker", "run: holds no journal of a run"]


def test_what_a_policy_converts_and_what_it_explains(here):
    assert run() == 0
    policy = softmod.load(only(here))
    obs = np.linspace(-1, 1, 9, dtype=np.float32)
    plain = policy.act(obs, 2)
    tensor = torch.tensor(obs, requires_grad=True)
    for meant in (tensor, (obs, {}), (tensor, {"a": 1})):
        assert np.array_equal(policy.act(meant, "toy-touch"), plain)
    halves = torch.tensor(obs).bfloat16()
    assert np.array_equal(policy.act(halves, 2), policy.act(halves.float().numpy(), 2))
    for index in (np.int64(2), np.array(2), torch.tensor(2), np.uint8(2)):
        assert np.array_equal(policy.act(obs, index), plain)
    for task in (None, b"toy-touch", ["toy-touch"], np.array([0, 1]), torch.tensor([0, 1]), 1.7):
        with pytest.raises(ConfigError, match="task .*: must be a name, or a number up to 2"):
            policy.act(obs, task)
    for goal in (50, -1, 1.5, "x"):
        with pytest.raises(ConfigError, match=f"goal {goal}: must be a number up to 49"):
            policy.episode(0, goal)
    for value in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="observation: contains NaN or infinity"):
            policy.act(np.full(9, value), 0)
    with pytest.raises(ConfigError, match="must be an array of 9 numbers"):
        policy.act([tensor[0]] * 9, 0)


# --- pictures -------------------------------------------------------------------------------------


def test_no_setting_of_matplotlib_ends_a_run(here, monkeypatch, caplog):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # without LaTeX
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert run() == 0
    assert (only(here) / "success.png").stat().st_size > 5000
    assert matplotlib.rcParams["text.usetex"]

    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(figures, "success_figure", broken)
    assert run("seed=1") == 0
    assert statuses(only(here, 1))[-1] == "FINISHED"
    assert "success.png could not be drawn (RuntimeError: no fonts)" in caplog.text


@pytest.mark.parametrize("backend", ["nonsense", "module://matplotlib_inline.backend_inlin"])
def test_no_backend_of_the_environment_is_needed(backend, tmp_path):
    code = "import os, softmod.report.figures; print(os.environ['MPLBACKEND'])"
    done = process("-c", code, cwd=tmp_path, env={"MPLBACKEND": backend})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == backend


def test_a_misspelt_backend_ends_no_command(here):
    """Libraries that a run needs import matplotlib too."""
    line = [*SMALL, "tracking=journal", "fabric.compile=eager", "run.steps_per_task=20"]
    for module, words in (("train", line), ("report", ["runs=[runs]", "output=report"])):
        done = process("-m", f"softmod.{module}", *words, cwd=here, env={"MPLBACKEND": "nonsense"})
        assert done.returncode == 0, done.stderr
    assert (here / "report" / "report.html").is_file()


# --- streams --------------------------------------------------------------------------------------


def test_a_run_whose_streams_are_closed(here):
    closed = f'exec "{sys.executable}" -m softmod.train "$@" >&- 2>&- <&-'
    done = subprocess.run(
        ["sh", "-c", closed, "sh", *SMALL, "fabric.compile=eager"], cwd=here, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0
    assert statuses(only(here)) == ["RUNNING", "FINISHED"]


@pytest.mark.parametrize("line", [["softmod.envs"], ["softmod.evaluate", "--help"]])
def test_commands_whose_output_is_closed_or_full(line, tmp_path):
    for redirected, code in ((">&-", 0), (">/dev/full", 1)):
        script = f'exec "{sys.executable}" -m {" ".join(line)} {redirected}'
        done = subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, check=False, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (code, "")


def test_only_a_terminal_gets_a_live_display(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not Terminal(file=io.StringIO()).is_terminal


def test_a_file_of_the_package_as_a_script(tmp_path):
    done = process(str(ROOT / "softmod" / "train.py"), "--version", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("softmod ")


def test_a_name_that_the_output_cannot_encode(here):
    line = [*SMALL, "fabric.compile=eager", "name='größe'", "run.steps_per_task=20"]
    done = process("-m", "softmod.train", *line, cwd=here, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "gr\\xf6\\xdfe" in done.stdout


# --- MLflow ---------------------------------------------------------------------------------------


def test_a_store_that_mlflow_does_not_have_is_refused_before_the_run(here, capsys):
    assert run("tracking=mlflow", "tracking.uri=localhost:5000") == 2
    assert "did you mean http://localhost:5000?" in capsys.readouterr().err
    assert not list(here.iterdir())


@pytest.mark.parametrize("uri", ["mlflow.db", "{}/a/mlflow.db"], ids=["relative", "absolute"])
def test_a_project_that_was_moved_or_copied(here, monkeypatch, uri):
    """Runs, store and artifacts stay together; the original is left alone."""
    with_mlflow = ["tracking=mlflow", "tracking.model=true", "tracking.system_metrics=false"]
    named = f"tracking.uri=sqlite:///{uri.format(here)}"
    (here / "a").mkdir()
    monkeypatch.chdir(here / "a")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run(*with_mlflow, named) == 0
    monkeypatch.chdir(here)
    shutil.copytree("a", "copy")
    (here / "a").rename(here / "b")
    original = {path: path.stat().st_mtime_ns for path in (here / "b").rglob("*")}
    monkeypatch.chdir(here / "copy")
    assert run(*with_mlflow, "seed=1") == 0
    Sender(only(here / "copy")).send()
    client = store.connect(f"sqlite:///{here / 'copy' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("toy").experiment_id
    found = client.search_runs([experiment])
    assert len(found) == 2
    for one in found:
        assert one.info.artifact_uri.startswith((here / "copy").as_uri())
        artifacts = Path(one.info.artifact_uri.removeprefix("file://"))
        assert (artifacts / "evaluation.json").is_file()
    models = client.search_logged_models([experiment])
    assert len(models) == (2 if find_spec("onnxscript") else 0)
    for model in models:
        assert model.artifact_location.startswith((here / "copy").as_uri())
        assert Path(model.artifact_location.removeprefix("file://"), "MLmodel").is_file()
    assert not (here / "a").exists()
    assert {path: path.stat().st_mtime_ns for path in (here / "b").rglob("*")} == original
