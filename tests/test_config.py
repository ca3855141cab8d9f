"""Composition, the one-line answers to faulty command lines, identity, and what `_target_` may name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from softmod.config import compose, conf_folder, identity, options, run_folder, typed
from softmod.errors import ConfigError
from softmod.targets import build, resolve_target
from softmod.train import check, split, sweep_identity


def cfg(*overrides: str):
    return typed(compose(list(overrides)))


# --- every option and experiment ------------------------------------------------------------------


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("run", ["", "run=smoke"])
def test_every_experiment_composes(experiment, run):
    config = cfg(f"experiment={experiment}", *[run][: bool(run)])
    assert config.name == f"{config.env.name}-{config.method}"
    assert (config.run.steps_per_task == 300) == bool(run)


@pytest.mark.parametrize(
    "line", [f"{group}={option}" for group in ("env", "method", "run", "workers", "fabric", "tracking", "sweep")
             for option in options(group)]
)  # fmt: skip
def test_every_option_composes(line):
    cfg(line)


PAIRS = list(zip(options("network"), [*options("network")[1:], *options("network")[:1]], strict=True))


@pytest.mark.parametrize(("actor", "critic"), PAIRS)
def test_any_network_on_either_side(actor, critic):
    config = cfg(f"network@actor={actor}", f"network@critic={critic}")
    assert isinstance(resolve_target(config.actor._target_), type)
    assert isinstance(resolve_target(config.critic._target_), type)


def test_experiments_only_select():
    """Values in an experiment's body would beat `run=smoke` on the command line."""
    for path in (conf_folder() / "experiment").glob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        assert lines[0] == "defaults:"
        assert all(line.startswith("  - override /") for line in lines[1:]), path


@pytest.mark.parametrize("experiment", options("experiment"))
def test_a_method_that_is_typed_is_the_one_that_runs(experiment):
    """Networks chosen by the experiment itself would beat those of the method."""
    config = cfg(f"experiment={experiment}", "method=mt_sac")
    assert config.name.endswith("-mt_sac")
    assert {config.actor._target_, config.critic._target_} == {"softmod.networks.mlp.MLP"}


def test_the_protocol_of_today():
    for name in ("mt10_soft", "mt10_mt_sac", "mt50_soft"):
        config = cfg(f"experiment={name}")
        assert config.run.steps_per_task == 2_000_000
        assert (config.env.reward, config.env.horizon, config.env.goals) == ("v2", 500, "benchmark")
        assert config.run.final_eval_goals == 50
    assert len(cfg("experiment=mt50_soft").env.tasks) == 50


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=mt10_soft", "seed=3"], {"seed": 3}),
        (["experiment=mt10_soft", "run=smoke", "run.steps_per_task=7_000"], {"run.steps_per_task": 7000}),
        (["experiment=mt10_soft", "method=mt_mh_sac"], {"method": "mt_mh_sac", "algorithm.task_weights": "none"}),
        (["method=soft_modular", "algorithm.task_weights=paper"], {"algorithm.task_weights": "paper"}),
        (["method=mt_sac", "network@actor=multi_head"], {"actor._target_": "softmod.networks.multi_head.MultiHead",
                                                          "critic._target_": "softmod.networks.mlp.MLP"}),
        (["actor.num_modules=4"], {"actor.num_modules": 4, "critic.num_modules": 2}),
        (["env=mt1", "env.tasks=[push-v3]"], {"env.tasks": ["push-v3"], "run.steps_per_task": None}),
    ],
)  # fmt: skip
def test_what_is_typed_wins(overrides, expected):
    config = cfg(*overrides)
    for key, value in expected.items():
        found = config
        for name in key.split("."):
            found = getattr(found, name)
        assert value is None or found == value


# --- faulty command lines -------------------------------------------------------------------------

FAULTY = {
    "algorithm.discount=1.5": "algorithm.discount=1.5: must be in [0, 1]",
    "algoritm.discount=1": "there is no key or group algoritm.discount; did you mean algorithm.discount?",
    "run.batch_pertask=3": "there is no key or group run.batch_pertask; did you mean run.batch_per_task?",
    "method=soft": "method has no option soft; it has",
    "env.tasks=[reach-v2]": "unknown task 'reach-v2', did you mean reach-v3",
    "env.tasks=[]": "env.tasks=[]: name at least one task",
    "env.tasks=[push-v3,push-v3]": "names push-v3 more than once",
    "seed=abc": "seed=abc: must be a whole number",
    "seed=1.5": "seed=1.5: must be a whole number",
    "seed=-1": "seed=-1: must be at least 0",
    "seed=[": "not of the form key=value",
    "foo": "foo: not of the form key=value",
    "run=smok": "did you mean smoke?",
    "experimnt=toy": "did you mean experiment?",
    "experiment=quickstrt": "did you mean quickstart?",
    "actor.width=3": "did you mean actor.module_width?",
    "actor.num_modules=two": "actor.num_modules=two: must be a whole number",
    "actor.num_layers=1": "actor.num_layers=1: must be at least 2",
    "actor.relu=after": "actor.relu=after: must be one of after_sum, before_sum; did you mean after_sum?",
    "actor.embedding_relu=perhaps": "must be true or false",
    "run.round_steps=7": "must divide env.horizon=500",
    "run.batch_per_task=20000000": "larger than run.replay_per_task",
    "run.max_minutes=0": "run.max_minutes=0.0: must be above 0",
    "run.resume=maybe": "must be one of auto, must, never",
    "fabric.precision=16": "must be one of 32-true, tf32, bf16-mixed",
    "env=mt11": "env has no option mt11; it has",
    "env.horizon=600": "env.horizon=600: must be in [1, 500]",
    "env.goals=bench": "did you mean benchmark?",
    "env.name=''": "env.name=: must not be empty",
    "name=a/b": "name=a/b: must be a plain folder name",
    "network@actor=mlpp": "network has no option mlpp",
    "network@actr=mlp": "did you mean network@actor?",
    "optimizer.actor.lr=-1": "optimizer.actor.lr=-1.0: must be above 0",
    "optimizer.actor.lr=nan": "must be above 0",
    "actor._target_=os.system": "must lie in softmod, torch.optim",
    "optimizer.actor._target_=torch.optim.adam.torch.os.system": "must name a class",
    "method=[a]": "method has no option [a]",
    "~seed": "none can be added or deleted",
    "+foo=1": "none can be added or deleted",
    "seed=0,1": "several values need -m",
    "env=null": "env=null: env needs an option; it has mt1, mt10",
    "optimizer.actor.betas=[0.9]": "optimizer.actor.betas=[0.9]: must be two numbers in [0, 1)",
    "optimizer.critic.betas=[0.9,1.5]": "must be two numbers in [0, 1)",
}


@pytest.mark.parametrize("line", FAULTY)
def test_a_faulty_command_line_is_answered_in_one_line(line):
    with pytest.raises(ConfigError) as told:
        check(*split([line]))
    assert FAULTY[line] in str(told.value)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("flag", ["--resume", "-x", "--multi-run", "--config-name=other"])
def test_unknown_flags(flag):
    with pytest.raises(ConfigError, match="unknown flag"):
        split([flag])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--cfg", "jb"], "--cfg=jb: must be one of job, hydra, all; did you mean job"),
        (["--cfg"], "no value"),
        (["--resolve"], "only together with --cfg"),
        (["--config-dir", "nowhere"], "no such folder"),
    ],
)
def test_flags_with_faulty_values(flags, told):
    with pytest.raises(ConfigError, match=told):
        split(flags)


@pytest.mark.parametrize("line", ["method=glob(*)", "algorithm.discount=interval(0.9,0.99)"])
def test_sweeps_whose_values_cannot_be_told(line):
    with pytest.raises(ConfigError, match="name the values, as in key=a,b"):
        check(*split(["-m", line]))


def test_a_sweep_is_checked_before_its_first_job():
    with pytest.raises(ConfigError, match="num_modules=0: must be at least 1"):
        check(*split(["-m", "actor.num_modules=2,0", "seed=0,1"]))


def test_checking_imports_nothing_heavy():
    code = """
import sys
from softmod.train import check, split
check(*split(["experiment=mt10_soft", "seed=3"]))
print([name for name in ("torch", "lightning", "mlflow", "metaworld", "mujoco") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- identity -------------------------------------------------------------------------------------

BASE = ["experiment=mt10_soft"]


@pytest.mark.parametrize(
    "change",
    ["actor.num_modules=4", "critic.init=torch", "algorithm.discount=0.98", "optimizer.critic.lr=1e-3", "env.reward=v1",
     "env.goals=fixed", "run.batch_per_task=64", "run.update_ratio=0.5", "run.round_steps=25", "workers.copies=2",
     "run.replay_per_task=5000", "fabric.precision=bf16-mixed", "env.goal_seed=1", "optimizer.actor.betas=[0.8,0.99]"],
)  # fmt: skip
def test_what_changes_results_changes_the_identity(change):
    assert identity(cfg(*BASE, change)) != identity(cfg(*BASE))


@pytest.mark.parametrize(
    "change",
    ["seed=4", "name=other", "run.steps_per_task=9", "run.eval_every=7", "run.save_every=7", "run.max_minutes=3",
     "run.resume=must", "workers.processes=3", "fabric.accelerator=cpu", "fabric.threads=2", "tracking=journal",
     "run.folder=elsewhere", "allow=[lab]", "env.fast=false"],
)  # fmt: skip
def test_what_does_not_leaves_it(change):
    assert identity(cfg(*BASE, change)) == identity(cfg(*BASE))


def test_folder_of_a_run():
    config = cfg(*BASE, "seed=4")
    assert str(run_folder(config)) == f"runs/mt10-soft_modular-{identity(config)}/seed_4"


def test_identity_of_a_sweep_is_its_question():
    first = check(*split(["-m", "experiment=toy", "seed=0,1", "method=mt_sac,mt_mh_sac"]))[1]
    more = check(*split(["-m", "method=mt_sac,mt_mh_sac", "seed=0,1,2", "experiment=toy"]))[1]
    other = check(*split(["-m", "experiment=toy", "seed=0,1", "method=mt_sac,mt_mh_sac", "run=smoke"]))[1]
    assert first == more
    assert first["id"] != other["id"]
    assert first["name"] == "toy: method, seed"
    assert check(*split(["experiment=toy"]))[1] is None
    assert check(*split(["sweep=seeds", "experiment=toy"]))[1]["name"] == "toy: seed"
    assert sweep_identity([], ["seed"]) != sweep_identity([], ["method"])


# --- _target_ -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["os.system", "softmod.train.os.system", "softmod.config.Path", "softmod.config.importlib.import_module",
     "torch.optim.adam.torch.nn.Linear", "torch.optim.Nothing", "softmod.nowhere.Thing", "softmodx.Thing",
     "subprocess.Popen", "softmod.targets.build", "builtins.eval", "", "Popen"],
)  # fmt: skip
def test_targets_are_judged_by_what_they_resolve_to(path):
    with pytest.raises(ConfigError):
        resolve_target(path)


def test_own_packages_are_allowed_by_name():
    with pytest.raises(ConfigError, match=r"allow=\[package\]"):
        resolve_target("tests.faulty.Faulty")
    assert resolve_target("tests.faulty.Faulty", ["tests"]).__name__ == "Faulty"


def test_options_that_a_class_does_not_take():
    with pytest.raises(ConfigError, match="num_heads"):
        build({"_target_": "softmod.networks.mlp.MLP", "num_heads": 3}, in_dim=1, out_dim=1, num_tasks=1)
