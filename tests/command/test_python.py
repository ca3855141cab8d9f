"""The Python interface: `softmod.train`, `softmod.evaluate`, `softmod.load`."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import softmod
from softmod.checkpoint.shipped import SHIPPED
from softmod.config.groups import conf_folder
from softmod.errors import CheckpointError, ConfigError
from softmod.report.results import load as saved_results
from softmod.report.runs import from_folders
from tests.command.test_train import SMALL, here

__all__ = ["here"]

ROOT = Path(__file__).parents[2]
OVERRIDES = [*SMALL, "fabric.compile=eager"]


def test_train_evaluate_and_load(here, capsys):
    result = softmod.train(OVERRIDES)
    assert result.env_steps == 600
    assert result.seconds > 0
    assert result.folder.is_dir()
    assert [score.task for score in result.scores] == ["toy-reach", "toy-opposite", "toy-touch"]
    assert result.success_rate == sum(score.success_rate for score in result.scores) / 3
    policy = softmod.load(result.folder)
    assert policy.act([0.0] * 9, "toy-touch").shape == (2,)
    scores = softmod.evaluate(result.folder, goals=4)
    assert scores == result.scores
    assert (result.folder / "evaluation" / "evaluation.json").is_file()


class Tee:
    """What scripts put in the place of sys.stdout: it writes, and nothing else."""

    def __init__(self, fault: type[Exception] | None = None) -> None:
        self.text, self.fault = "", fault

    def write(self, text: str) -> None:
        if self.fault is not None:
            raise self.fault("no more output")
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("fault", [None, RuntimeError, ValueError])
def test_streams_that_the_caller_replaced(here, monkeypatch, fault):
    out = Tee(fault)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", Tee(fault))
    result = softmod.train(OVERRIDES)
    assert softmod.evaluate(result.folder, goals=4) == result.scores
    assert ("toy-touch" in out.text) == (fault is None)


def test_a_folder_with_brackets_is_printed_as_it_is(here, capsys):
    softmod.train([*OVERRIDES, "run.folder='runs [old] [/x] :fire:'"])
    printed = capsys.readouterr()
    assert "runs [old] [/x] :fire:/" in printed.out
    assert "runs [old] [/x] :fire:/" in printed.err


def test_one_package_may_be_allowed_by_its_name(here):
    folder = softmod.train([*OVERRIDES, "env._target_=tests.faulty.Leaky"]).folder
    for allow in ("tests", ["tests"]):
        assert softmod.load(folder, allow=allow).act([0.0] * 9, 0).shape == (2,)
    with pytest.raises(ConfigError, match="tests"):
        softmod.load(folder, allow=None)


def test_the_callers_settings_of_torch_change_nothing(here):
    brief = [*OVERRIDES, "run.steps_per_task=60"]
    expected = softmod.train([*brief, "name=first"]).scores
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            result = softmod.train([*brief, "name=second"])
            assert result.scores == expected
            policy = softmod.load(result.folder)
            assert policy.act([0.0] * 9, "toy-touch").dtype == np.float32
            assert softmod.evaluate(result.folder, goals=4) == expected
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_twice_in_one_process_and_from_another_folder(here, monkeypatch):
    first = softmod.train([*OVERRIDES, "seed=0"])
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    second = softmod.train([*OVERRIDES, "seed=1"])
    assert second.folder.resolve().is_relative_to(here / "elsewhere")
    monkeypatch.chdir(here)
    assert softmod.train([*OVERRIDES, "seed=0"]) == first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("seed=0", "must be a list"),
        (["-m", "seed=0,1"], "-m: flags work on the command line only"),
        (["seed=0,1"], "seed: several values need -m"),
        (["seeds=[0,1]"], "softmod.train makes one run"),
        (["sweep=seeds"], "softmod.train makes one run"),
        (["sead=0"], "sead.*did you mean seed"),
    ],
)
def test_a_wrong_call_is_answered_before_anything_is_written(overrides, message, here):
    with pytest.raises(ConfigError, match=message):
        softmod.train(overrides)
    with pytest.raises(ConfigError, match="there is no such folder"):
        softmod.train(config_dir="nowhere")
    with pytest.raises(ConfigError, match="goal: evaluate takes no such option.*goals"):
        softmod.evaluate("nowhere", goal=3)
    with pytest.raises(ConfigError, match="goals=0: must be in"):
        softmod.evaluate("nowhere", goals=0)
    with pytest.raises(ConfigError, match="goals='many': must be a whole number"):
        softmod.evaluate("nowhere", goals="many")
    with pytest.raises(ConfigError, match="goals=51: must be in"):
        softmod.evaluate("nowhere", goals=np.int64(51))
    with pytest.raises(ConfigError, match='tracking=True: must be "mlflow" or "journal"'):
        softmod.evaluate("nowhere", tracking=True)
    with pytest.raises(CheckpointError, match="nowhere"):
        softmod.evaluate("nowhere")
    assert not list(here.iterdir())


@pytest.mark.parametrize("path", ["loop", "loop/x", "a" * 300, "~nobody-of-this-name/x", "a\0b"])
def test_a_path_that_cannot_be_read_is_answered_in_one_line(path, here):
    (here / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError) as told:
        softmod.load(path)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(path)
    if "~" not in path and "\0" not in path:
        reason = r"cannot be read \((Too many levels of symbolic links|File name too long)\)"
        with pytest.raises(CheckpointError, match=reason):
            softmod.evaluate(path)
        for read in (from_folders, saved_results):
            with pytest.raises(ConfigError, match=reason):
                read([path])
        for override in (f"run.folder={path}", f"init_from={path}"):
            for resume in ("auto", "never"):
                with pytest.raises(ConfigError, match=reason):
                    softmod.train([*OVERRIDES, override, f"run.resume={resume}"])


def test_best_weights_alone_are_named(here):
    best = here / "run" / "checkpoints" / "best"
    shutil.copytree(SHIPPED / "quickstart", best)
    with pytest.raises(CheckpointError, match=f"only the weights of its best.*: {best}"):
        softmod.load(here / "run")
    assert softmod.load(best).tasks


def test_the_modules_of_commands_are_the_functions():
    for name in ("train", "evaluate"):
        module = importlib.import_module(f"softmod.{name}")
        assert getattr(softmod, name) is module
        assert callable(module)
        assert inspect.signature(module) == inspect.signature(getattr(module, name))
    assert set(softmod.__all__) <= set(dir(softmod))
    assert all(getattr(softmod, name) is not None for name in softmod.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        softmod.trian  # noqa: B018


def test_a_hydra_application_keeps_its_hydra(here):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        softmod.train(OVERRIDES)
        assert GlobalHydra.instance().is_initialized()
        hydra_compose("evaluate", ["checkpoint=x"])


def script(here: Path, cache: Path, text: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a worker process; `{overrides}` in it are those of a small run."""
    lines = [line for line in OVERRIDES if line != "workers=inline"]
    (here / "mine.py").write_text(text.format(overrides=[*lines, "workers.processes=1", *more]))
    return subprocess.run(
        [sys.executable, "mine.py"], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SOFTMOD_CACHE": str(cache)},
    )  # fmt: skip


SCRIPT = """
import softmod
result = softmod.train({overrides})
print("env steps", result.env_steps)
"""


def test_a_script_without_a_main_guard_trains_once(here, cache):
    """Worker processes do not import the script again."""
    done = script(here, cache, SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("env steps 600") == 1
    assert done.stdout.count("mean") == 1  # one table
    (result,) = here.glob("runs/*/seed_0/result.json")
    assert json.loads(result.read_text())["env_steps"] == 600


OWN_TASKS = """
import softmod
from softmod.envs.toy import Toy

class Mine(Toy):
    pass

if __name__ == "__main__":
    result = softmod.train({overrides})
    print("env steps", result.env_steps)
"""


def test_a_task_set_of_the_main_script_reaches_the_workers(here, cache):
    done = script(here, cache, OWN_TASKS, "env._target_=__main__.Mine")
    assert done.returncode == 0, done.stderr
    assert "env steps 600" in done.stdout
