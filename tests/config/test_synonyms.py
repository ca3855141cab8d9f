"""Hints for keys that other projects use: they name existing keys, and reach the user."""

from __future__ import annotations

import pytest

from softmod import search, train
from softmod.config.compose import compose, keys
from softmod.config.groups import GROUPS
from softmod.config.synonyms import BY_NAME, SYNONYMS, Synonym, exists
from softmod.errors import ConfigError
from softmod.train import check, split

MODELS = ("soft_modular", "soft_modular_residual", "mt_sac")
KNOWN = {key for model in MODELS for key in keys((f"model={model}",), "train")}
RATES = "optimizer.actor.lr, optimizer.critic.lr or optimizer.temperature.lr"
TRACKING = "tracking=mlflow or tracking=journal (metrics go to MLflow and to the run's journal)"
STEPS = "run.steps_per_task (environment steps of each task)"
HABITS = {  # typed override -> suggestion
    "lr=3e-4": RATES,
    "learning_rate=1e-3": RATES,
    "optimizer.lr=1e-3": RATES,
    "optimizer.actor.learning_rate=1e-3": "optimizer.actor.lr",
    "batch_size=256": "run.batch_per_task (transitions of each task)",
    "run.batch_size=256": "run.batch_per_task (transitions of each task)",
    "gamma=0.99": "algorithm.discount",
    "algorithm.gamma=0.99": "algorithm.discount",
    "tau=0.005": "algorithm.target_smoothing",
    "logger=wandb": TRACKING,
    "wandb.project=robots": "tracking.experiment (MLflow experiment)",
    "wandb.mode=offline": TRACKING,
    "algo=sac": "algorithm=mtsac or algorithm=fast",
    "task=mt10": "env=mt10 or env.tasks",
    "num_steps=1000": STEPS,
    "total_steps=1000": STEPS,
    "trainer.max_steps=1000": STEPS,
    "device=cuda": "fabric.accelerator (a run uses one device)",
    "trainer.devices=1": "fabric.accelerator (a run uses one device)",
    "trainer.deterministic=true": "run or fabric (lengths and device)",
    "num_envs=8": "workers.copies (environments per task)",
    "ckpt_path=runs/a": "run.resume (the same command resumes a run automatically)",
    "hidden_dim=256": "actor.module_width or critic.width",
    "actor.hidden_dim=256": "actor.module_width",
    "buffer_size=1000000": "run.replay_per_task (transitions of each task)",
    "experiment_name=first": (
        "name or tracking.experiment (the run's folder, the MLflow experiment)"
    ),
    "debug=true": "run=smoke (every part of a run, in a minute)",
}


@pytest.mark.parametrize("line", HABITS)
def test_names_of_other_projects_get_a_hint(line: str):
    with pytest.raises(ConfigError) as error:
        check(split([line]))
    key = line.partition("=")[0]
    hint = HABITS[line]
    assert str(error.value) == f"{line}: there is no key or group {key}; did you mean {hint}?"


def test_hints_depend_on_the_network():
    with pytest.raises(ConfigError, match=r"did you mean actor.width or critic.width\?"):
        compose(["model=mt_sac", "hidden_dim=256"])


def test_several_names_of_other_projects_on_one_line():
    with pytest.raises(ConfigError, match="did you mean"):
        compose(["lr=3e-4", "batch_size=256", "gamma=0.99", "tau=0.005", "num_envs=8"])


def test_an_added_key_gets_a_hint_too():
    with pytest.raises(ConfigError, match=r"\+gamma=0.9: .* did you mean algorithm.discount\?"):
        compose(["+gamma=0.9"])


def test_the_commands_print_the_hint(capsys):
    pytest.importorskip("optuna")
    assert train.run(["-m", "gamma=0.9,0.99"]) == 2
    assert search.run(["gamma=0.9,0.99"]) == 2
    assert capsys.readouterr().err.count("did you mean algorithm.discount?") == 2


@pytest.mark.parametrize("name", ["evaluate", "report"])
def test_hints_are_limited_to_the_keys_of_a_configuration(name: str):
    with pytest.raises(ConfigError) as error:
        compose(["checkpoint=runs/a", "device=cuda"], name)
    assert "fabric" not in str(error.value)


@pytest.mark.parametrize("synonym", SYNONYMS, ids=lambda synonym: synonym.names[0])
def test_suggestions_exist(synonym: Synonym):
    for name in synonym.keys:
        assert exists(name, KNOWN), name
        if "=" in name:
            compose([name])


def test_names_are_unique_and_no_keys_of_softmod():
    names = [name for synonym in SYNONYMS for name in synonym.names]
    assert len(names) == len(BY_NAME)
    assert not set(names) & {*KNOWN, *GROUPS}
