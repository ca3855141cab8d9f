"""Hydra's own flags and keys work as in Hydra, in single runs and in sweeps."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.experimental.callback import Callback

from softmod import train

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
    ],
)
def test_messages_for_rejected_flags_and_keys(here: Path, capsys, line: list[str], message: str):
    assert train.run(line) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [["-m", "seed=0,1", "--cfg", "job"], ["sweep=balance", "model=mt_sac,care", "--cfg", "job"],
     ["-m", "seed=0,1", "--info", "config"]],
)  # fmt: skip
def test_the_configuration_of_several_jobs_is_not_shown(line: list[str], capsys):
    assert train.run(line) == 2
    assert "show one job; name one value for each key" in capsys.readouterr().err
