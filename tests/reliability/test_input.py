"""Bars 21 and 22 in full: faulty command lines and hostile files end with one line, and have no
other effect.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softmod
from softmod import evaluate, replay_fault, state, train
from softmod.checkpoint.files import all_in
from softmod.config import validate as rules
from softmod.errors import ConfigError, SoftmodError
from softmod.system.files import digest
from softmod.tracking.journal import Journal
from tests.command.test_train import SMALL, here, run
from tests.reliability.test_files import contents, stopped, stopped_run, trained
from tests.reliability.test_killed import hashes, undisturbed

__all__ = ["here", "stopped", "stopped_run", "undisturbed"]

ROOT = Path(__file__).parents[2]

# --- 21: faulty command lines ---------------------------------------------------------------------

# and what the answer has to name: key and value, what is allowed, the nearest valid name
FAULTY = {
    "algoritm.discount=0.9": "algoritm.discount=0.9 | did you mean algorithm.discount",
    "run.batch_pertask=3": "run.batch_pertask=3 | did you mean run.batch_per_task",
    "run.eval_evry=3": "run.eval_evry=3 | did you mean run.eval_every",
    "sed=3": "sed=3 | did you mean seed",
    "actor.modul_width=8": "actor.modul_width=8 | did you mean actor.module_width",
    "optimizer.actor.learning_rate=1": "optimizer.actor.learning_rate=1 | mean optimizer.actor.lr?",
    "experimnt=toy": "experimnt=toy | did you mean experiment",
    "experiment=quikstart": (
        "experiment=quikstart | paper_mt10, paper_mt50, quickstart | did you mean quickstart"
    ),
    "env=mt500": "env=mt500 | mt10, mt25 | did you mean mt50",
    "model=mt_sack": "model=mt_sack | mt_sac | did you mean mt_sac",
    "network@actor=soft_modula": "network@actor=soft_modula | did you mean soft_modular",
    "network=mlp": "network=mlp | network@actor",
    "tracking=wandb": "tracking=wandb | journal, mlflow",
    "sweep=seed": "sweep=seed | did you mean seeds",
    "algorithm.discount=1.5": "algorithm.discount=1.5 | in [0, 1]",
    "algorithm.discount=high": "algorithm.discount=high | must be a number",
    "algorithm.target_smoothing=0": "algorithm.target_smoothing=0 | in (0, 1]",
    "algorithm.task_weights=papr": (
        "algorithm.task_weights=papr | released, paper, none | did you mean paper"
    ),
    "optimizer.actor.lr=-0.1": "optimizer.actor.lr=-0.1 | above 0",
    "optimizer.critic.lr=inf": "optimizer.critic.lr=inf | finite",
    "optimizer.critic.betas=[0.9,1.5]": "optimizer.critic.betas=[0.9, 1.5] | two numbers in [0, 1)",
    "optimizer.actor.fused=perhaps": "optimizer.actor.fused=perhaps | true or false",
    "seed=abc": "seed=abc | a whole number",
    "seed=-1": "seed=-1 | at least 0",
    "seed=null": "seed=null | must not be null",
    "seed=": "seed= | a whole number",
    "seed=0,1": "seed | several values need -m",
    "name=a/b": "name=a/b | a plain folder name",
    f"name={300 * 'a'}": "name=aaa | at most 200",
    "env.tasks=[toy-rech]": "env.tasks | toy-rech | did you mean toy-reach",
    "env.tasks=[reach-v3]": "env.tasks | reach-v3 | toy-reach",
    "env.tasks=toy-reach": "env.tasks=toy-reach | a list",
    "env.tasks=[]": "env.tasks=[] | at least one",
    "env.horizon=501": "env.horizon=501 | in [1, 500]",
    "env.horizon=20.5": "env.horizon=20.5 | a whole number",
    "env.goals=benchmrk": "env.goals=benchmrk | benchmark, fixed, random | did you mean benchmark",
    "env.reward=v1": "env.reward=v1 | v2",
    "run.batch_per_task=20000": "run.batch_per_task=20000 | run.replay_per_task=10000",
    "run.warmup_per_task=20000": "run.warmup_per_task=20000 | run.replay_per_task=10000",
    "run.replay_per_task=1000000000000": "run.replay_per_task=1000000000000 | GiB | at most",
    "run.round_steps=7": "run.round_steps=7 | must divide env.horizon=20",
    "run.steps_per_task=0": "run.steps_per_task=0 | at least 1",
    "run.final_eval_goals=51": "run.final_eval_goals=51 | in [1, 50]",
    "run.max_minutes=-1": "run.max_minutes=-1 | above 0",
    "run.resume=mustt": "run.resume=mustt | auto, must, never | did you mean must",
    "workers.processes=-1": "workers.processes=-1 | [0, 1024]",
    "workers.timeout=0": "workers.timeout=0 | above 0",
    "fabric.accelerator=gpu": "fabric.accelerator=gpu | auto, cpu, cuda",
    "fabric.precision=16": "fabric.precision=16 | auto, 32-true, tf32, bf16, bf16-mixed",
    "actor.num_layers=1": "actor.num_layers=1 | at least 2",
    "actor.module_width=1000000000": "module_width=1000000000",
    "actor._target_=softmod.networks.mlp.MPL": "softmod.networks.mlp.MPL | did you mean",
    "optimizer.actor._target_=torch.optim.SGD": "optimizer.actor.betas | SGD",
    "+run.more=1": "+run.more=1 | cannot be added",
    "~seed": "~seed | cannot be added or deleted",
    "seed": "seed | key=value",
    "--resum": "--resum | unknown flag",
    "--cfg=jo": "--cfg=jo | job, hydra, all | did you mean job",
    "--config-dir=nowhere": "--config-dir=nowhere | no such folder",
    "run.folder=/proc/nothing": "/proc/nothing | cannot be written",
}


def one_line(err: str) -> str:
    """Return the message, which must be the only output and one line."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("softmod: ")
    assert len(lines[0]) < 500
    return lines[0]


def refused(line: str, names: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command in this process with an invalid line; return its message."""
    capsys.readouterr()
    before = contents(Path.cwd())
    assert train.run([*SMALL, *line.split(" ")]) == ConfigError.exit_code
    answer = one_line(capsys.readouterr().err)
    assert [name for name in names.split(" | ") if name not in answer] == [], answer
    assert contents(Path.cwd()) == before
    return answer


@pytest.mark.reliability
@pytest.mark.bar(21)
def test_faulty_command_lines(here, capsys, record_property):
    wrong = {}
    for line, names in FAULTY.items():
        try:
            refused(line, names, capsys)
        except AssertionError as error:
            wrong[line] = str(error)
    assert wrong == {}
    assert os.listdir(here) == []
    record_property("tried", f"{len(FAULTY)} faulty command lines")


@pytest.mark.reliability
@pytest.mark.bar(21)
@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("actor.module_width=16", "actor.module_width=16 | has 8"),
        ("seed=3", "seed=3 | has 0"),
        (
            "env.tasks=[toy-reach,toy-touch]",
            "env.tasks=['toy-reach', 'toy-touch'] | 'toy-opposite'",
        ),
    ],
)
def test_a_run_cannot_go_on_as_another(stopped, here, capsys, line, names, record_property):
    answer = refused(
        f"run.resume=must {line}",
        f"{names} | {stopped.relative_to(here)} | run.resume=must",
        capsys,
    )
    record_property("answered", answer)


@pytest.mark.reliability
@pytest.mark.bar(21)
def test_a_run_folder_in_use(stopped, here, capsys, record_property):
    journal = Journal(stopped)
    ended = trained(here)
    assert ended.returncode == ConfigError.exit_code
    answer = one_line(ended.stderr)
    assert f"in use by process {os.getpid()}" in answer
    assert "run.resume=never" in answer
    journal.close()
    record_property("answered", answer)


TEN = [
    "algoritm.discount=0.9", "seed=abc", "algorithm.discount=1.5", "optimizer.actor.lr=-0.1",
    "env.tasks=[toy-rech]",
    "run.batch_per_task=20000", "env.horizon=501", "model=mt_sack", "run.resume=mustt", "--resum",
]  # fmt: skip


@pytest.mark.reliability
@pytest.mark.bar(21)
def test_ten_of_them_by_the_command_line(here, record_property):
    slowest = 0.0
    for line in TEN:
        began = time.monotonic()
        ended = trained(here, line)
        slowest = max(slowest, time.monotonic() - began)
        assert ended.returncode == ConfigError.exit_code
        answer = one_line(ended.stderr)
        print(f"{line}\n    {answer}")
        assert all(name in answer for name in FAULTY[line].split(" | "))
        assert ended.stdout == ""
    assert os.listdir(here) == []
    assert slowest < 5.0
    record_property(
        "measured", f"ten by the command line, the slowest answer after {slowest:.1f} s"
    )


@pytest.mark.control(21)
def test_seen_failing_a_check_that_is_switched_off(here, capsys, monkeypatch):
    refused("algorithm.discount=1.5", FAULTY["algorithm.discount=1.5"], capsys)
    monkeypatch.setattr(rules, "check_range", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        refused(
            "algorithm.discount=1.5 run.steps_per_task=20", FAULTY["algorithm.discount=1.5"], capsys
        )


# --- 22: hostile files ----------------------------------------------------------------------------


class Code:
    """A pickle that runs code when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Code(canary))


def saved_by_torch(canary: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": Code(canary)}, file)
    return file.getvalue()


def zipped(canary: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("agent/data.pkl", pickled(canary))
        archive.writestr("../../outside", "written")
    return file.getvalue()


def of_objects(canary: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, rows=np.array([Code(canary)], dtype=object))
    return file.getvalue()


def sign(checkpoint: Path, **more: Any) -> None:
    """Update the hashes in the manifest to the files as they are now."""
    files = {
        path.name: digest(path) for path in checkpoint.iterdir() if path.name != "manifest.json"
    }
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"files": files} | more))


def checkpoints(folder: Path) -> list[Path]:
    return [*all_in(folder), folder / "checkpoints" / "best"]


def put(name: str, content: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    """Change a file of every checkpoint, with a manifest that matches."""

    def change(folder: Path, canary: Path) -> None:
        for checkpoint in checkpoints(folder):
            (checkpoint / name).write_bytes(content(canary))
            if name != "manifest.json":
                sign(checkpoint)

    return change


def renamed(folder: Path, canary: Path) -> None:
    """Replace `agent.safetensors` by `agent.pt`."""
    for checkpoint in checkpoints(folder):
        (checkpoint / "agent.safetensors").unlink()
        (checkpoint / "agent.pt").write_bytes(saved_by_torch(canary))
        sign(checkpoint)


def facts(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path, Path], None]:
    """Change the metadata of every checkpoint, with a manifest that matches."""

    def changed(folder: Path, canary: Path) -> None:
        for checkpoint in checkpoints(folder):
            values = json.loads((checkpoint / "facts.json").read_text())
            change(values, canary)
            (checkpoint / "facts.json").write_text(json.dumps(values))
            sign(checkpoint)

    return changed


def target(part: str, path: str, allow: list[str], **options: Any) -> Callable[[Path, Path], None]:
    """Name another class for a part of the configuration in a checkpoint's metadata."""

    def change(values: dict[str, Any], canary: Path) -> None:
        told = {
            key: value.format(canary=canary, folder=canary.parent) for key, value in options.items()
        }
        values["config"][part] = {"_target_": path} | told
        values["config"]["allow"] = allow

    return facts(change)


def manifest(**changes: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        (folder.parents[2] / "secret").write_text("secret")
        for checkpoint in checkpoints(folder):
            sign(checkpoint, **changes)

    return change


def link(name: str, to_folder: bool = False) -> Callable[[Path, Path], None]:
    """Replace a file or folder of the run by a link to one of the user's own, elsewhere."""

    def change(folder: Path, canary: Path) -> None:
        place, own = folder / name.format(last=all_in(folder)[-1].name), folder.parents[2] / "own"
        if to_folder:
            shutil.copytree(place, own)
            (own / "mine").write_text("mine")
            shutil.rmtree(place)
        else:
            own.write_text("mine")
            place.unlink(missing_ok=True)
        place.symlink_to(own)

    return change


def moved(folder: Path, canary: Path) -> None:
    """Replace the whole run's folder by a link."""
    folder.rename(folder.parents[2] / "own")
    folder.symlink_to(folder.parents[2] / "own")


def journal(*lines: bytes) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        with (folder / "journal.jsonl").open("ab") as file:
            file.write(b"\n".join([pickled(canary), *lines]) + b"\n")

    return change


def write(name: str, content: bytes) -> Callable[[Path, Path], None]:
    return lambda folder, canary: (folder / name).write_bytes(content) and None  # type: ignore[return-value]


DEEP = 100_000 * b"["
LINES = [
    DEEP, b"[1]", b'{"kind":"metrics","time":1,"step":3,"values":{"x":1%s}}' % (400 * b"0"),
    b'{"kind":"session","time":1,"run_id":"a","schema":"b"}',
    b'{"kind":"metrics","time":1,"step":"x","values":{}}',
    b'{"kind":"artifact","time":1,"path":"../../../secret","under":""}',
    b'{"kind":"artifact","time":1,"path":"config.yaml","under":"../../../outside"}',
]  # fmt: skip


def train_it(folder: Path) -> int:
    return run()


def load_it(folder: Path) -> int:
    """Call `softmod.load`, and report its error as a command would."""
    try:
        softmod.load(folder)
    except SoftmodError as error:
        return train.tell(error)
    return 0


def evaluate_it(folder: Path) -> int:
    return evaluate.run([f"checkpoint={folder}", "goals=1", "processes=0"])


def state_of_it(folder: Path) -> int:
    return state.main([str(folder)])


def repeat_it(folder: Path) -> int:
    """Call `softmod.replay_fault` on weights whose metadata claims that they are a bundle."""
    best = folder / "checkpoints" / "best"
    with suppress(ValueError):
        values = json.loads((best / "facts.json").read_text())
        (best / "facts.json").write_text(json.dumps(values | {"kind": "fault", "update": 1}))
        sign(best)
    return replay_fault.main([str(best)])


def upload_it(folder: Path) -> int:
    return subprocess.run(
        [sys.executable, "-m", "softmod.upload", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    ).returncode


ALL = (train_it, load_it, evaluate_it, state_of_it)
READING = (load_it, evaluate_it)
HOSTILE: dict[str, tuple[Callable[[Path, Path], None], dict[Callable[[Path], int], int]]] = {
    "a pickle as agent.safetensors": (
        put("agent.safetensors", pickled), dict.fromkeys((*ALL, repeat_it), 3),
    ),
    "torch.save as agent.safetensors": (
        put("agent.safetensors", saved_by_torch), dict.fromkeys(ALL, 3),
    ),
    "a zip as optimizers.safetensors": (
        put("optimizers.safetensors", zipped), {train_it: 3, state_of_it: 3},
    ),
    "object arrays as episodes.safetensors": (
        put("episodes.safetensors", of_objects), {train_it: 3, state_of_it: 3},
    ),
    "a huge header": (
        put("agent.safetensors", lambda _: 8 * b"\xff" + b"{}"), dict.fromkeys(ALL, 3),
    ),
    "agent.pt in the place of agent.safetensors": (renamed, dict.fromkeys(ALL, 3)),
    "a pickle as manifest.json": (put("manifest.json", pickled), dict.fromkeys(ALL, 3)),
    "a pickle as facts.json": (put("facts.json", pickled), dict.fromkeys((*ALL, repeat_it), 3)),
    "deep JSON as manifest.json": (put("manifest.json", lambda _: DEEP), dict.fromkeys(ALL, 3)),
    "deep JSON as facts.json": (put("facts.json", lambda _: DEEP), dict.fromkeys(ALL, 3)),
    "a list as facts.json": (put("facts.json", lambda _: b"[]"), dict.fromkeys(ALL, 3)),
    "facts without counters": (facts(lambda values, _: values.pop("counters", None)), {train_it: 3,
                state_of_it: 3}),
    "facts with a million threads": (facts(lambda values, _: values.update(threads=10**6)),
                                     {train_it: 3}),
    "os.system as env": (target("env", "os.system", ["os"], command="touch {canary}"),
                         dict.fromkeys(READING, 2)),
    "subprocess.Popen as env": (
        target("env", "subprocess.Popen", ["subprocess"], args="{canary}",
               executable="/usr/bin/touch"),
        dict.fromkeys(READING, 2),
    ),
    "subprocess.Popen as actor": (
        target("actor", "subprocess.Popen", ["subprocess"], args="touch {canary}", shell="yes"),
        dict.fromkeys((*READING, repeat_it), 2),
    ),
    "softmod's own journal as env": (
        target("env", "softmod.tracking.journal.Journal", [], folder="{folder}/outside"),
        dict.fromkeys(READING, 2)
    ),
    "a path out of the checkpoint": (manifest(files={"../../../../../secret": "0"}),
                                     dict.fromkeys(ALL, 3)),
    "a path from the root": (manifest(files={"/etc/passwd": "0"}), dict.fromkeys(ALL, 3)),
    "a piece out of the run": (manifest(shared={"replay/../../../../secret": "0"}),
                               dict.fromkeys(ALL, 3)),
    "a file that is a link": (
        link("checkpoints/best/agent.safetensors"), {train_it: 2, repeat_it: 3}
    ),
    "a checkpoint that is a link": (link("checkpoints/{last}", True), {train_it: 2}),
    "a folder of checkpoints that is a link": (link("checkpoints", True), {train_it: 2}),
    "a replay that is a link": (link("replay", True), {train_it: 2, load_it: 0, state_of_it: 3}),
    "a journal that is a link": (link("journal.jsonl"), {train_it: 2, upload_it: 2}),
    "a result that is a link": (link("result.json"), {train_it: 2}),
    "an evaluation that is a link": (link("evaluation"), {evaluate_it: 2}),
    "a run's folder that is a link": (moved, {train_it: 2}),
    "a hostile journal": (journal(*LINES), {train_it: 0, state_of_it: 0, upload_it: 1}),
    "a journal from the future": (
        write("journal.jsonl", b'{"kind":"header","time":1,"schema":2,"run_id":"a"}\n'),
        {train_it: 2, upload_it: 2}
    ),
    "a result that is no JSON": (write("result.json", b"{"), {train_it: 0}),
    "a result that is a list": (write("result.json", b"[1]"), {train_it: 0}),
    "a result of deep JSON": (write("result.json", DEEP), {train_it: 0}),
    "a result that is a pickle": (
        lambda folder, canary: write("result.json", pickled(canary))(folder, canary), {train_it: 0}
    ),
}  # fmt: skip
STORE = ("mlflow.db", "mlflow.db.lock", "mlartifacts")


def outside(here: Path, folder: Path) -> dict[str, str]:
    """Return every file except those in the run's folder and MLflow's store."""
    run = str(folder.relative_to(here))
    return {
        name: hashed
        for name, hashed in contents(here).items()
        if not name.startswith((run, *STORE))
    }


@pytest.mark.reliability
@pytest.mark.bar(22)
@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files(stopped, here, name, undisturbed, capfd, record_property):
    change, readers = HOSTILE[name]
    canary = here / "canary"
    change(stopped, canary)
    before = outside(here, stopped)
    for read, code in readers.items():
        capfd.readouterr()
        assert read(stopped) == code, capfd.readouterr().err
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if "damaged checkpoint skipped" not in line]
        assert "Traceback" not in err
        assert len(lines) == 1 or code == 0, err
        assert not any(line.startswith("softmod:") for line in lines) or code, err
        assert outside(here, stopped) == before
        assert not canary.exists()
        if read is train_it and not code:
            same = {
                name for name, hashed in hashes(stopped).items() if hashed == undisturbed[0][name]
            }
            assert same >= set(undisturbed[0]) - {"metrics", "state"}
    record_property(
        "tried", f"{name} ({', '.join(read.__name__.removesuffix('_it') for read in readers)})"
    )


CONF = {  # files of a folder that `--config-dir` names, and what selects them
    "a tag of Python's": ("run/evil.yaml",
                          "steps_per_task: !!python/object/apply:os.system ['touch {canary}']"),
    "another tag": ("run/evil.yaml", "!!python/object/new:os.system ['touch {canary}']"),
    "os.system as a target": ("env/evil.yaml", "_target_: os.system\ncommand: touch {canary}"),
    "deep YAML": ("run/evil.yaml", 3000 * "["),
}  # fmt: skip


@pytest.mark.reliability
@pytest.mark.bar(22)
@pytest.mark.parametrize("name", list(CONF))
def test_hostile_configurations(here, name, capfd, record_property):
    file, text = CONF[name]
    path, canary = here / "theirs" / file, here / "canary"
    path.parent.mkdir(parents=True)
    path.write_text(text.format(canary=canary))
    before = contents(here)
    for more in ([], ["-m"]):
        words = (
            [f"{path.parent.name}=evil", *more]
            if path.parent.name != "experiment"
            else ["experiment=evil", *more]
        )
        assert train.run([*SMALL[1:], "--config-dir", "theirs", *words]) == ConfigError.exit_code
        one_line(capfd.readouterr().err)
        assert contents(here) == before
    record_property("tried", f"{name} in a configuration")


@pytest.mark.reliability
@pytest.mark.bar(22)
@pytest.mark.parametrize(
    "line", ["env._target_=os.system", "actor._target_=softmod.tracking.journal.Journal"]
)
def test_hostile_overrides(here, line, capsys, record_property):
    record_property("answered", refused(line, line, capsys))


@pytest.mark.bar(22)
def test_hostile_goals_in_the_cache(here, monkeypatch, caplog, record_property):
    from softmod.envs import goals

    monkeypatch.setenv("SOFTMOD_CACHE", str(here))
    monkeypatch.setattr(goals, "_generate", lambda *_: {"reach-v3": np.zeros((50, 6))})
    canary = here / "canary"
    for content in (of_objects(canary), pickled(canary), saved_by_torch(canary), zipped(canary)):
        goals.cache_path("mt10", 0).write_bytes(content)
        assert goals.benchmark_goals("mt10", 0).keys() == {"reach-v3"}
    assert caplog.text.count("cannot be read") == 4
    assert sorted(path.name for path in here.iterdir()) == [goals.cache_path("mt10", 0).name]
    record_property(
        "tried", "object arrays, a pickle, a zip in the place of cached goals: drawn again"
    )


@pytest.mark.control(22)
@pytest.mark.parametrize("content", [pickled, saved_by_torch])
def test_seen_failing_a_reader_that_unpickles(here, content):
    (here / "agent.safetensors").write_bytes(content(here / "canary"))
    with suppress(Exception):
        torch.load(
            io.BytesIO((here / "agent.safetensors").read_bytes()), weights_only=False
        )  # its name is refused
    with suppress(Exception), (here / "agent.safetensors").open("rb") as file:
        pickle.load(file)
    assert (here / "canary").exists()
