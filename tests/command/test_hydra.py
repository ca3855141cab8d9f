"""Hydra's own flags and keys work as in Hydra, in single runs and in sweeps."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.experimental.callback import Callback

import softmod
from softmod import train
from softmod.errors import ConfigError

SMALL = [
    "experiment=toy", "run=smoke", "tracking=journal", "workers=inline", "fabric.threads=1",
    "fabric.compile=eager",
]  # fmt: skip
SEEN: list[str] = []


class Noted(Callback):
    """Callback that records Hydra's calls."""

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        SEEN.append("run")

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        SEEN.append("multirun")

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        SEEN.append(f"seed {config.seed} returned {job_return.return_value}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    SEEN.clear()
    yield tmp_path
    logging.getLogger("softmod").setLevel(logging.NOTSET)


def test_a_single_run_heeds_folder_callbacks_and_verbosity(here: Path, capsys):
    line = ["hydra.run.dir=out", "hydra.job.chdir=true", "hydra.output_subdir=.hydra"]
    line += [f"+hydra.callbacks.noted._target_={__name__}.Noted", "hydra.verbose=softmod"]
    line += ["tracking.uri=postgresql://me:secret@nowhere/mlflow"]
    assert train.run([*SMALL, *line]) == 0
    assert SEEN == ["run", "seed 0 returned 0"]
    assert logging.getLogger("softmod").level == logging.DEBUG
    assert list(here.glob("out/runs/*/seed_0/result.json"))
    assert os.getcwd() == str(here)
    written = [*here.glob("out/.hydra/*.yaml")]
    assert len(written) == 3
    assert not any("secret" in path.read_text() for path in written)


def test_a_sweep_heeds_callbacks_and_returns_its_first_failure(here: Path, capsys):
    line = ["-m", "seed=0,1", f"+hydra.callbacks.noted._target_={__name__}.Noted"]
    line += ["env._target_=tests.faulty.Faulty", "env.name=nan-1"]
    assert train.run([*SMALL, *line]) == 6
    assert SEEN == ["multirun", "seed 0 returned 6", "seed 1 returned 6"]


def test_a_callback_that_is_not_there(here: Path, capsys):
    assert train.run([*SMALL, "+hydra.callbacks.noted._target_=tests.faulty.Nobody"]) == 2
    assert "tests.faulty.Nobody" in capsys.readouterr().err
    assert os.listdir(here) == []


def test_a_configuration_of_ones_own(here: Path, capsys):
    folder = here / "conf (mine), a=b"
    folder.mkdir()
    (folder / "own.yaml").write_text("defaults: [train, _self_]\nname: own\nseed: 5\n")
    (folder / "bare.yaml").write_text("seed: 5\n")
    named = ["--config-dir", str(folder), "-cn", "own"]
    assert train.run([*named, *SMALL]) == 0
    assert list(here.glob("runs/own-*/seed_5/result.json"))
    assert train.run(["--config-dir", str(folder), "--config-name=bare"]) == 2
    assert "defaults: [train, _self_]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (["--info", "searchpath"], "Config search path"),
        (["--info=defaults-tree"], "experiment: toy"),
        (["--cfg", "hydra"], "run:"),
    ],
)
def test_what_hydra_shows(here: Path, capfd, line: list[str], shown: str):
    assert train.run([*line, *SMALL]) == 0
    assert shown in capfd.readouterr().out
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["-cp", "elsewhere"], "--config-dir adds a folder"),
        (["--experimental-rerun=x"], "the same command resumes a stopped run"),
        (["--info=search"], "did you mean searchpath"),
        (["allow=[lab]"], "are trusted"),
        (["--cfg", "job", "-p", "nope"], "--package=nope: there is no such part of --cfg job"),
        (["--cfg", "job", "-p", "hydra.run"], "there is no such part of --cfg job"),
        (["-m", "seed=0,1", "hydra.sweeper.max_batch_size=0"], "max_batch_size=0: must not be 0"),
        (["-m", "seed=0,1", "+hydra.launcher.n_jobs=0"], "n_jobs=0: must not be 0"),
    ],
)
def test_messages_for_rejected_flags_and_keys(here: Path, capsys, line: list[str], message: str):
    assert train.run(line) == 2
    assert message in capsys.readouterr().err


def test_parts_of_a_sweep_on_the_command_line():
    asked = train.check(train.split(["-m", "+hydra.sweeper.params.seed='0,1'"]))
    assert asked.sweep is not None
    assert asked.sweep["runs"] == "2"


def test_keys_of_hydra_have_no_effect_in_python():
    with pytest.raises(ConfigError, match="hydra.run.dir=out: works on the command line only"):
        softmod.train(["hydra.run.dir=out"])


def test_the_home_folder_in_config_dir(here: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    (here / "mine" / "experiment").mkdir(parents=True)
    (here / "mine/experiment/one.yaml").write_text("# @package _global_\nseed: 7\n")
    monkeypatch.setenv("HOME", str(here))
    shown = ["experiment=one", "--cfg", "job", "-p", "seed"]
    assert train.run(["--config-dir=~/mine", *shown]) == 0
    assert capfd.readouterr().out == "7\n"
    with pytest.raises(ConfigError, match="experiment has no option on; it has .*one"):
        softmod.train(["experiment=on"], config_dir="~/mine")


@pytest.mark.parametrize(
    "line",
    [["-m", "seed=0,1", "--cfg", "job"], ["sweep=balance", "model=mt_sac,care", "--cfg", "job"],
     ["-m", "seed=0,1", "--info", "config"]],
)  # fmt: skip
def test_the_configuration_of_several_jobs_is_not_shown(line: list[str], capsys):
    assert train.run(line) == 2
    assert "show one job; name one value for each key" in capsys.readouterr().err
