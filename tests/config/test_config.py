"""Composition, messages for invalid command lines, identity, and classes of `_target_`."""

from __future__ import annotations

import inspect
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from softmod.command import sweep_identity
from softmod.config import messages, trust
from softmod.config.compose import compose, typed
from softmod.config.groups import conf_folder, options
from softmod.config.identity import identity, run_folder
from softmod.config.instantiate import build, resolve_target
from softmod.envs.metaworld import MetaWorld
from softmod.errors import ConfigError
from softmod.networks.network import Network
from softmod.train import check, split

ROOT = Path(__file__).parents[2]


def cfg(*overrides: str):
    """Compose and check a configuration."""
    return typed(compose(list(overrides)))


# --- every option and experiment ------------------------------------------------------------------


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("run", ["", "run=smoke"])
def test_every_experiment_composes(experiment, run):
    config = cfg(f"experiment={experiment}", *[run][: bool(run)])
    assert config.name == f"{config.env.name}-{config.model}"
    assert (config.run.steps_per_task == 300) == bool(run)


@pytest.mark.parametrize(
    "line", [f"{group}={option}" for group in ("env", "model", "algorithm", "run", "workers",
                                               "fabric", "tracking",
                                               "variant", "sweep") for option in options(group)]
)  # fmt: skip
def test_every_option_composes(line):
    cfg(line)


PAIRS = list(
    zip(options("network"), [*options("network")[1:], *options("network")[:1]], strict=True)
)


@pytest.mark.parametrize(("actor", "critic"), PAIRS)
def test_any_network_on_either_side(actor, critic):
    config = cfg(f"network@actor={actor}", f"network@critic={critic}")
    assert isinstance(resolve_target(config.actor._target_, "actor"), type)
    assert isinstance(resolve_target(config.critic._target_, "critic"), type)


def test_experiments_only_select():
    """Check that experiments set no values, since these would win over `run=smoke`."""
    for path in (conf_folder() / "experiment").glob("*.yaml"):
        lines = [
            line
            for line in path.read_text().splitlines()
            if line.strip() and not line.startswith("#")
        ]
        assert lines[0] == "defaults:"
        assert all(line.startswith("  - override /") for line in lines[1:]), path


@pytest.mark.parametrize("experiment", options("experiment"))
def test_a_model_on_the_command_line_wins_over_the_experiment(experiment):
    """Check that experiments select no networks, since these would win over the model's."""
    config = cfg(f"experiment={experiment}", "model=mt_sac")
    assert config.name.endswith("-mt_sac")
    assert {config.actor._target_, config.critic._target_} == {"softmod.networks.mlp.MLP"}


def test_the_protocol_of_today():
    for line in (
        ["experiment=paper_mt10"],
        ["experiment=paper_mt10", "model=mt_sac"],
        ["experiment=paper_mt50"],
    ):
        config = cfg(*line)
        assert config.run.steps_per_task == 2_000_000
        assert (config.env.reward, config.env.horizon, config.env.goals) == ("v2", 500, "benchmark")
        assert config.run.final_eval_goals == 50
    assert len(cfg("experiment=paper_mt50").env.tasks) == 50


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=paper_mt10", "seed=3"], {"seed": 3}),
        (["experiment=paper_mt10", "run=smoke", "run.steps_per_task=7_000"],
         {"run.steps_per_task": 7000}),
        (["experiment=paper_mt10", "model=mt_mh_sac"], {"model": "mt_mh_sac",
                                                        "algorithm.task_weights": "none"}),
        (["experiment=paper_mt10", "algorithm=fast"],
         {"optimizer.actor._target_": "torch.optim.AdamW"}),
        (["algorithm=mtsac", "algorithm.task_weights=paper"], {"algorithm.task_weights": "paper"}),
        (["algorithm=mtsac", "optimizer@optimizer.actor=adamw"],
         {"optimizer.actor._target_": "torch.optim.AdamW",
                "optimizer.critic._target_": "torch.optim.Adam"}),
        (["algorithm=mtsac", "optimizer.critic.lr=1e-3"], {"optimizer.critic.lr": 1e-3,
                                                           "optimizer.actor.lr": 3e-4}),
        (["model=mt_sac", "network@actor=multi_head"],
         {"actor._target_": "softmod.networks.multi_head.MultiHead",
                "critic._target_": "softmod.networks.mlp.MLP"}),
        (["env=quickstart", "run=recipe"], {"run.max_minutes": None, "run.eval_goals": 10}),
        (["model=soft_modular_small", "actor.num_modules=4"], {"actor.num_modules": 4,
                                                               "critic.num_modules": 2}),
        (["env=mt1", "env.tasks=[push-v3]"], {"env.tasks": ["push-v3"]}),
    ],
)  # fmt: skip
def test_overrides_win(overrides, expected):
    config = cfg(*overrides)
    for key, value in expected.items():
        found = config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value


# --- a budget that follows from the tasks ---------------------------------------------------------


def test_no_experiment_is_the_quickstart():
    assert cfg() == cfg("env=quickstart") == cfg("experiment=quickstart")
    assert run_folder(cfg()) == run_folder(cfg("experiment=quickstart"))
    assert run_folder(cfg()).parent.name.startswith("quickstart-")


@pytest.mark.parametrize("tasks", ["mt10", "mt50"])
def test_a_task_set_alone_is_its_experiment(tasks):
    assert cfg(f"env={tasks}") == cfg(f"experiment={tasks}")


@pytest.mark.parametrize(
    ("line", "tasks", "steps_per_task"),
    [(["env=mt1", "env.tasks=[push-v3]"], 1, 200_000), (["env=mt10"], 10, 200_000), (["env=mt25"],
                                                                                     25, 200_000),
     (["env=mt50"], 50, 160_000), (["env=mt50", "env.tasks=[push-v3,reach-v3]"], 2, 200_000)],
)  # fmt: skip
def test_the_recipe_follows_from_the_number_of_tasks(line, tasks, steps_per_task):
    run = cfg(*line).run
    assert len(cfg(*line).env.tasks) == tasks
    assert run.steps_per_task == run.replay_per_task == steps_per_task
    assert (run.eval_every, run.save_every, run.log_every) == (
        10_000 * tasks,
        10_000 * tasks,
        2_000 * tasks,
    )
    assert run.max_minutes is None


def test_only_small_task_sets_select_a_run_of_their_own():
    assert cfg("env=quickstart").run.max_minutes is not None
    assert cfg("env=toy").run.steps_per_task == 6_000
    assert cfg("env=toy", "run=smoke").run.steps_per_task == 300


@pytest.mark.parametrize("model", options("model"))
@pytest.mark.parametrize("tasks", ["mt10", "mt50"])
def test_every_model_composes_with_every_size(model, tasks):
    config = cfg(f"env={tasks}", f"model={model}", "algorithm=mtsac")
    assert config.name == f"{tasks}-{model}"
    assert config.actor._target_.startswith("softmod.networks.")
    # A model touches neither, so it composes with every run.
    assert (config.run, config.env) == (of_size(tasks).run, of_size(tasks).env)


@pytest.mark.parametrize("tasks", ["mt10", "mt50"])
@pytest.mark.parametrize("run", ["paper", "smoke"])
def test_a_run_selects_nothing_else(run, tasks):
    config = cfg(f"env={tasks}", "algorithm=mtsac", f"run={run}")
    assert config.run != of_size(tasks).run
    assert replace(config, run=of_size(tasks).run) == of_size(tasks)


@cache
def of_size(tasks):
    """Return the configuration of a task set with the default model and run."""
    return cfg(f"env={tasks}", "algorithm=mtsac")


@pytest.mark.parametrize(
    ("model", "experts"),
    [("care", {"mt10": 6, "mt25": 6, "mt50": 10}), ("moore", {"mt10": 4, "mt25": 4, "mt50": 6})],
)
def test_more_experts_for_more_tasks(model, experts):
    for tasks, expected in experts.items():
        config = cfg(f"env={tasks}", f"model={model}")
        assert (config.actor.num_experts, config.critic.num_experts) == (expected, expected)


def test_the_published_budget_follows_from_the_number_of_tasks():
    ten, fifty = cfg("experiment=paper_mt10").run, cfg("experiment=paper_mt50").run
    assert (ten.replay_per_task, ten.eval_every, ten.save_every, ten.log_every) == (
        100_000,
        500_000,
        250_000,
        10_000,
    )
    assert (fifty.replay_per_task, fifty.eval_every, fifty.save_every) == (
        200_000,
        2_500_000,
        1_250_000,
    )


def test_published_task_weights_are_those_of_the_model():
    balanced = {"soft_modular", "soft_modular_deep", "soft_modular_wide"}
    for model in options("model"):
        expected = (
            "released"
            if model in balanced
            else "paper"
            if model == "soft_modular_paper"
            else "none"
        )
        assert cfg("experiment=paper_mt10", f"model={model}").algorithm.task_weights == expected, (
            model
        )
        assert cfg("env=mt10", f"model={model}").algorithm.task_weights == "unsolved", model


def test_published_algorithms_come_with_their_optimizers():
    for algorithm in ("mtsac", "pcgrad", "balanced"):
        optimizer = cfg("env=mt10", f"algorithm={algorithm}").optimizer
        for one in (optimizer.actor, optimizer.critic, optimizer.temperature):
            assert (one._target_, one.lr) == ("torch.optim.Adam", 3e-4)
    assert cfg("algorithm=pcgrad").algorithm.gradient_surgery == "pcgrad"
    assert cfg("algorithm=balanced").algorithm.task_weights == "released"


def test_a_run_by_the_recipe_can_be_lengthened():
    assert identity(cfg("env=mt10", "run.steps_per_task=300_000")) == identity(cfg("env=mt10"))


def test_options_of_ones_own(tmp_path):
    """Compose option files as in docs/howto/configuration.md.

    They extend softmod's options, select others, and have values that depend on the task set.
    """
    files = {
        "algorithm/mine": (
            "# @package _global_\ndefaults: [fast, _self_]\nalgorithm:\n  discount: 0.5\n"
        ),
        "model/mine": (
            "# @package _global_\ndefaults:\n  - override /network@actor: mlp\n"
            "  - override /network@critic: mlp\n\nmodel: mine\npublished_task_weights: paper\n"
        ),
        "run/mine": "defaults: [recipe, _self_]\n\nlog_every: ${per_task:7}\n",
        "env/mine": (
            "defaults: [mt1, override /run@_global_.run: mine, _self_]\n\nname: mine\n"
            "tasks: [reach-v3, push-v3]\n"
        ),
    }
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(text)
    config = typed(compose(["env=mine", "model=mine", "algorithm=mine"], config_dir=str(tmp_path)))
    assert config.name == "mine-mine"
    assert (config.run.log_every, config.run.eval_every) == (14, 20_000)
    assert (config.algorithm.discount, config.optimizer.actor._target_) == (
        0.5,
        "torch.optim.AdamW",
    )
    published = typed(
        compose(
            ["env=mine", "model=mine", "algorithm=mtsac", "run=paper"], config_dir=str(tmp_path)
        )
    )
    assert (published.algorithm.task_weights, published.run.log_every) == ("paper", 2_000)


# --- invalid command lines ------------------------------------------------------------------------

FAULTY = {
    "algorithm.discount=1.5": "algorithm.discount=1.5: must be in [0, 1]",
    "algoritm.discount=1": (
        "there is no key or group algoritm.discount; did you mean algorithm.discount?"
    ),
    "run.batch_pertask=3": (
        "there is no key or group run.batch_pertask; did you mean run.batch_per_task?"
    ),
    "model=soft": "model has no option soft; it has",
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
    "experiment=mt11": (
        "experiment has no option mt11; it has mt10, mt50, paper_mt10, paper_mt50, quickstart, toy"
    ),
    "variant=clp": "did you mean clip?",
    "sweep=sedes": "did you mean seeds?",
    "run.eval_every=${per_task:x}": "run.eval_every: ${per_task:x}: takes one whole number",
    "run.eval_every=${per_task:1,2}": "run.eval_every: ${per_task:1,2}: takes one whole number",
    "run.eval_every=${from_tasks:50,1}": (
        "run.eval_every: ${from_tasks:50,1}: takes a number of tasks, the value for"
    ),
    "run.eval_every=${from_tasks:x,1,2}": (
        "run.eval_every: ${from_tasks:x,1,2}: takes a number of tasks, the value"
    ),
    "actor.width=3": "did you mean actor.module_width?",
    "actor.num_modules=two": "actor.num_modules=two: must be a whole number",
    "actor.num_layers=1": "actor.num_layers=1: must be at least 2",
    "actor.relu=after": (
        "actor.relu=after: must be one of after_sum, before_sum; did you mean after_sum?"
    ),
    "actor.embedding_relu=perhaps": "must be true or false",
    "run.round_steps=7": "must divide env.train_horizon=200",
    "run.batch_per_task=20000000": "larger than run.replay_per_task",
    "run.max_minutes=0": "run.max_minutes=0.0: must be above 0",
    "run.resume=maybe": "must be one of auto, must, never",
    "fabric.precision=16": "must be one of auto, 32-true, tf32, bf16, bf16-mixed",
    "env=mt11": "env has no option mt11; it has",
    "env.horizon=600": "env.horizon=600: must be in [1, 500]",
    "env.goals=bench": "did you mean benchmark?",
    "env.name=''": "env.name=: must not be empty",
    "name=a/b": "name=a/b: must be a plain folder name",
    "network@actor=mlpp": "network has no option mlpp",
    "network@actr=mlp": "did you mean network@actor?",
    "optimizer.actor.lr=-1": "optimizer.actor.lr=-1.0: must be above 0",
    "optimizer.actor.lr=nan": "must be above 0",
    "actor._target_=os.system": "must name a class",
    "optimizer.actor._target_=torch.optim.adam.torch.os.system": "must name a class",
    "model=[a]": "model has no option [a]",
    "~seed": "~seed: keys cannot be added or deleted; write key=value to change one",
    "+foo=1": "+foo=1: keys cannot be added or deleted",
    "seed=0,1": "several values need -m",
    "env=null": "env=null: env needs an option; it has mt1, mt10",
    "optimizer.actor.betas=[0.9]": "optimizer.actor.betas=[0.9]: must be two numbers in [0, 1)",
    "optimizer.critic.betas=[0.9,1.5]": "must be two numbers in [0, 1)",
    "algorithm.n_step=1000000000": "must be in [1, 500]",
    "algorithm.own.foo=1": "write +algorithm.own.foo=1",
    "algorithm.own={foo:1}": "write +algorithm.own={foo:1}",
    # sweeps whose values cannot be listed
    "seed=range(3,1)": "seed=range(3,1): names no value",
    "seed=range(0,4,0)": "seed=range(0,4,0): name the values, as in key=a,b",
    "seed=range(2),5": "seed=range(2),5: name the values",
    "seed=interval(0,1),interval(2,3)": "seed=interval(0,1),interval(2,3): name the values",
    "seed=range(0,1000000000)": "names more than 10,000 values",
    "model=shuffle(range(0,1000000000))": "names more than 10,000 values",
    # values that quotes do not help
    "lr=interval(1e-4)": "not of the form key=value ('interval(1e-4)': missing a required argument",
    "optimizer.actor.lr=loguniform(1e-4,1e-3)": "Unknown function 'loguniform'",
    "seed=choice()": "empty choice is not legal",
    "seed=0,": "not of the form key=value (mismatched input '<EOF>')",
    "seed=1,,2": "not of the form key=value (extraneous input ',')",
    "seed==3": "not of the form key=value (extraneous input '=')",
    "env=mt10seed=3": "env=mt10seed=3: separate two overrides, or else",
    # options of groups
    "model=3": "model=3: model needs an option",
    "network@actor=[mlp,care]": "network@actor is selected twice; name one option",
    "hydra=null": "hydra=null: must not be null",
    "hydra/launcher=null": "hydra/launcher=null: must not be null",
    "hydra/sweeper=optuna": "it has basic; python -m softmod.search searches",
    "hydra/job_logging=colours": "it has default, disabled, none, stdout",
    # sweeps and folders
    "hydra.sweeper.params.seed=3": "write +hydra.sweeper.params.seed=3",
    "+hydra.sweeper.params.seed='0,1'": "seed: several values need -m",
    "run.folder='$HOME/r'": "run.folder=$HOME/r: $HOME was not replaced by its value",
    "run.folder='~nobody-here/r'": "there is no user nobody-here; or type ./~nobody-here/r",
}


@pytest.mark.parametrize("line", FAULTY)
def test_an_invalid_command_line_fails_with_one_line(line):
    with pytest.raises(ConfigError) as error:
        check(split([line]))
    assert FAULTY[line] in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("flag", ["--resume", "-x", "--multi-run", "--config-nam=other"])
def test_unknown_flags(flag):
    with pytest.raises(ConfigError, match="unknown flag"):
        split([flag])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cfg", "jb"], "--cfg=jb: must be one of job, hydra, all; did you mean job"),
        (["--cfg"], "no value"),
        (["--resolve"], "only together with --cfg"),
        (["--config-dir", "nowhere"], "no such folder"),
        (["--cfg", "hydra", "--resolve"], "use --cfg all --resolve"),
        (["-r", "--cfg", "job"], "-r: cannot be combined with --cfg"),
        (["--hydra-help", "experiment=toy"], "--hydra-help: leave experiment=toy out"),
        (["-sc"], "-sc: takes install=bash"),
        (["-sc", "install=nope"], "-sc: takes install=bash"),
    ],
)
def test_flags_with_invalid_values(flags, message):
    with pytest.raises(ConfigError, match=message):
        split(flags)


@pytest.mark.parametrize("line", ["model=glob(*)", "algorithm.discount=interval(0.9,0.99)"])
def test_sweeps_with_unknown_values(line):
    with pytest.raises(ConfigError, match="name the values, as in key=a,b"):
        check(split(["-m", line]))


def test_a_sweep_is_checked_before_its_first_job():
    with pytest.raises(ConfigError, match="num_modules=0: must be at least 1"):
        check(split(["-m", "actor.num_modules=2,0", "seed=0,1"]))


@pytest.mark.parametrize("name", options("sweep"))
def test_every_job_of_a_sweep_is_valid(name):
    assert check(split([f"sweep={name}"])).sweep is not None


def test_checking_imports_nothing_heavy():
    code = """
import sys
from pathlib import Path
from softmod.train import check, split
check(split(["experiment=paper_mt10", "seed=3"]))
print([name for name in ("torch", "lightning", "mlflow", "metaworld",
                         "mujoco") if name in sys.modules])
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


# --- identity -------------------------------------------------------------------------------------

BASE = ["experiment=paper_mt10"]


@pytest.mark.parametrize(
    "change",
    ["actor.num_modules=4", "critic.init=torch", "algorithm.discount=0.98",
     "optimizer.critic.lr=1e-3", "env.reward=v1",
     "env.goals=fixed", "run.batch_per_task=64", "run.update_ratio=0.5", "run.round_steps=25",
     "workers.copies=2",
     "run.replay_per_task=5000", "fabric.precision=bf16-mixed", "env.goal_seed=1",
     "optimizer.actor.betas=[0.8,0.99]"],
)  # fmt: skip
def test_what_changes_results_changes_the_identity(change):
    assert identity(cfg(*BASE, change)) != identity(cfg(*BASE))


@pytest.mark.parametrize(
    "change",
    ["seed=4", "name=other", "run.steps_per_task=9", "run.eval_every=7", "run.save_every=7",
     "run.max_minutes=3",
     "run.resume=must", "workers.processes=3", "fabric.accelerator=cpu", "fabric.threads=2",
     "tracking=journal",
     "run.folder=elsewhere", "env.fast=false"],
)  # fmt: skip
def test_what_does_not_leaves_it(change):
    assert identity(cfg(*BASE, change)) == identity(cfg(*BASE))


def test_published_task_weights_count_where_they_are_used():
    assert identity(cfg("published_task_weights=paper")) == identity(cfg())
    assert identity(cfg("algorithm=mtsac", "published_task_weights=paper")) != identity(
        cfg("algorithm=mtsac")
    )


def test_folder_of_a_run():
    config = cfg(*BASE, "seed=4")
    assert str(run_folder(config)) == f"runs/mt10-soft_modular-{identity(config)}/seed_4"


def test_identity_of_a_sweep_is_its_question():
    first = check(split(["-m", "experiment=toy", "seed=0,1", "model=mt_sac,mt_mh_sac"])).sweep
    more = check(split(["-m", "model=mt_sac,mt_mh_sac", "seed=0,1,2", "experiment=toy"])).sweep
    other = check(
        split(["-m", "experiment=toy", "seed=0,1", "model=mt_sac,mt_mh_sac", "run=smoke"])
    ).sweep
    assert first["id"] == more["id"]
    assert first["name"] == more["name"]
    assert first["id"] != other["id"]
    assert first["name"] == "toy: model, seed"
    assert check(split(["experiment=toy"])).sweep is None
    assert check(split(["sweep=seeds", "experiment=toy"])).sweep["name"] == "toy: seed"
    assert sweep_identity([], ["seed"]) != sweep_identity([], ["model"])
    assert check(split(["-m", "env=mt10", "seed=0,1"])).sweep["name"] == "mt10: seed"
    assert check(split(["sweep=seeds"])).sweep["name"] == "quickstart: seed"


# --- _target_ -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["os.system", "softmod.train.os.system", "softmod.config.compose.Path",
     "softmod.config.compose.importlib.import_module",
     "torch.optim.adam.torch.nn.Linear", "torch.optim.Nothing", "softmod.nowhere.Thing",
     "softmodx.Thing",
     "subprocess.Popen", "softmod.config.instantiate.build", "builtins.eval", "", "Popen"],
)  # fmt: skip
def test_targets_are_checked_by_the_class_they_resolve_to(path):
    for part in ("env", "actor", "optimizer"):
        with pytest.raises(ConfigError):
            trust.check({part: {"_target_": path}}, [])


def test_own_packages_are_allowed_by_name():
    saved = {"env": {"_target_": "tests.faulty.Faulty"}}
    with pytest.raises(ConfigError, match=r"allow=\["):
        trust.check(saved, [])
    trust.check(saved, ["tests"])
    assert trust.foreign(saved) == ["tests"]


def test_a_saved_class_of_another_part_is_refused():
    with pytest.raises(ConfigError, match=r"must be in softmod.envs"):
        trust.check({"env": {"_target_": "softmod.tracking.journal.Journal"}}, [])
    trust.check({"optimizer": {"actor": {"_target_": "torch.optim.Adam"}}}, [])


def test_a_class_of_another_kind_is_named():
    with pytest.raises(ConfigError, match="must be a softmod.networks.network.Network"):
        build({"_target_": "softmod.tracking.journal.Journal"}, "actor", Network)


def test_options_that_a_class_does_not_take():
    with pytest.raises(ConfigError, match="num_heads: MLP takes no such option"):
        build(
            {"_target_": "softmod.networks.mlp.MLP", "num_heads": 3},
            "actor",
            in_dim=1,
            out_dim=1,
            num_tasks=1,
        )


@pytest.mark.parametrize(("horizon", "expected"), [(500, 200), (100, 100)])
def test_training_episodes_of_the_recipe_are_no_longer_than_evaluations(horizon, expected):
    assert compose(["env=mt10", f"env.horizon={horizon}"]).env.train_horizon == expected
    assert (
        compose(["env=mt10", f"env.horizon={horizon}", "algorithm=mtsac"]).env.train_horizon is None
    )


@pytest.mark.parametrize("steps", [40, 600])
def test_training_episodes_have_whole_rounds_and_are_no_longer_than_the_horizon(steps):
    with pytest.raises(ConfigError, match=f"env.train_horizon={steps}|run.round_steps=50"):
        typed(compose(["env=mt10", f"env.train_horizon={steps}"]))


def test_a_task_set_made_in_python_is_that_of_the_configuration():
    """Check the defaults of `MetaWorld`, the only class with defaults for configured values."""
    values = OmegaConf.to_container(compose(["env=mt1", "algorithm=mtsac"]).env)
    for name, parameter in inspect.signature(MetaWorld).parameters.items():
        if parameter.default is not parameter.empty and name != "name":
            assert parameter.default == values[name], name


OWN_FILES = {
    "selects": "defaults: [override /model: per_taks]",
    "key": "run: {stepz: 3}",
    "group": "defaults: [override /modell: per_task]",
    "value": "run: {eval_goals: many}",
    "syntax": "run: [",
    "dotted": "run.eval_goals: 5",
    "circle": "defaults: [circle]",
    "nested": "defaults: [/experiment: toy]",
    "twice": "defaults: [/model: mt_sac]",
}
GLOBAL = b"# @package _global_\n"
OTHER_FILES = {
    "env/own.yaml": b"_target_: softmod.envs.metaworld.MetaWorld\nname: own\ntasks: [reach-v3]\n",
    "env/empty.yaml": b"",
    "run/own.yaml": b"eval_goals: 5\n",
    "tracking/empty.yaml": b"",
    "algorithm/own.yaml": b"# @package _global_\nalgorithm: {discount: 0.5}\n",
    "algorithm/bare.yaml": b"algorithm: {discount: 0.5}\n",
    "experiment/bare.yaml": b"run: {eval_goals: 5}\n",
    "experiment/bare_defaults.yaml": b"defaults: [override /model: mt_sac]\n",
    "experiment/below.yaml": b"# My experiment.\n" + GLOBAL + b"run: {eval_goals: 5}\n",
    "experiment/marked.yaml": b"\xef\xbb\xbf" + GLOBAL + b"run: {eval_goals: 5}\n",
    "experiment/empty.yaml": b"",
    "experiment/latin.yaml": GLOBAL + "name: größe\n".encode("latin-1"),
    "experiment/short.yml": GLOBAL,
    "model/bare.yaml": b"model: mine\n",
    "variant/bare.yaml": b"algorithm: {discount: 0.5}\n",
}


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A folder of the user: an option of its own, and files with a mistake each."""
    for name, text in OTHER_FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / "experiment" / "folder.yaml").mkdir()
    (tmp_path / "experiment" / "dangling.yaml").symlink_to("nowhere")
    shutil.copy(ROOT / "conf" / "model" / "mt_sac.yaml", tmp_path / "model" / "per_task.yaml")
    for name, text in OWN_FILES.items():
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=selects", "selects model=per_taks: .*did you mean per_task"),
        ("experiment=key", "experiment/key.yaml: there is no key run.stepz; did you mean run.stop"),
        ("experiment=group", "experiment/group.yaml: there is no group modell; did you mean model"),
        ("experiment=value", "experiment/value.yaml: run.eval_goals=many: must be a whole number"),
        ("experiment=syntax", "cannot be read: .*experiment/syntax.yaml"),
        ("experiment=keyy", "experiment has no option keyy; it has .*key, .*did you mean key"),
        ("model=per_tas", "model has no option per_tas; it has per_task.*did you mean per_task"),
        ("hydra/launcher=joblib_", "has no option joblib_; it has basic, .*did you mean joblib"),
        ("experiment=dotted", "no key run.eval_goals; write run: {eval_goals: ...}$"),
        ("experiment=circle", r"defaults of a .* file lead back to it \[experiment=circle\]"),
        ("experiment=nested", r"defaults of a .* file lead back to it \[experiment=nested\]"),
        ("experiment=twice", "model is selected twice; .*write override /model: mt_sac"),
        ("experiment=latin", "experiment/latin.yaml: must be encoded in UTF-8"),
        ("experiment=short", "rename experiment/short.yml to short.yaml"),
        ("experiment=folder", "experiment has no option folder; it has (?!.*folder)"),
        ("experiment=dangling", "experiment has no option dangling; it has (?!.*dangling)"),
        *(
            (f"{group}={name}", f"^{group}/{name}.yaml: its first line must be # @package _global_")
            for group, name in (
                ("experiment", "bare"), ("experiment", "bare_defaults"), ("experiment", "below"),
                ("experiment", "empty"), ("model", "bare"), ("variant", "bare"),
                ("algorithm", "bare"),
            )
        ),
        ("experiment=marked", "experiment/marked.yaml: .*byte order mark"),
        ("env=own", r"^env: begin your option file of env with defaults: \[mt1, _self_\]"),
        ("env=empty", "^env: begin your option file of env"),
        ("run=own", "run.steps_per_task: no value given; begin .* of run .*: .recipe, _self_"),
        ("tracking=empty", "tracking.mlflow: no value given; begin .* of tracking .*mlflow"),
        ("algorithm=own", "policy.log_std: no value given; begin .* of algorithm .*fast"),
    ],
)  # fmt: skip
def test_messages_for_mistakes_in_files_of_the_user(override: str, message: str, own: str):
    with pytest.raises(ConfigError, match=message):
        typed(compose([override], config_dir=own))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: many", "^own.yaml: seed=many: must be a whole number"),
        (
            "run: {eval_gols: 3}",
            "^own.yaml: there is no key run.eval_gols; did you mean run.eval_g",
        ),
    ],
)
def test_messages_for_a_primary_configuration_of_ones_own(text: str, message: str, tmp_path: Path):
    (tmp_path / "own.yaml").write_text(f"defaults: [train, _self_]\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        compose([], "own", config_dir=str(tmp_path))


def test_options_of_an_algorithm_of_ones_own_are_added():
    assert cfg("+algorithm.own.foo=1").algorithm.own == {"foo": 1}
    assert cfg("+algorithm.own={foo:1}").algorithm.own == {"foo": 1}


def test_a_part_without_keys_to_set():
    with pytest.raises(ConfigError, match="critic_head has no keys to set"):
        compose(["algorithm=mtsac", "critic_head=squared", "critic_head.low=5"])


def test_a_working_folder_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for name in ("train", "evaluate", "report"):
        with pytest.raises(ConfigError, match="the working folder no longer exists"):
            compose([], name)


def test_a_launcher_that_is_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(messages.EXTRAS, "cluster", "a-package")
    for group in ("hydra/launcher", "hydra/job_logging"):
        with pytest.raises(ConfigError, match=f"^{group}=cluster: requires pip install a-pack"):
            compose([f"{group}=cluster"])


@pytest.mark.parametrize(
    "name", ["a(b)", "a=b", "a,b", "a'b", "a[b", "a~b", "a;b{", "a#b", "umläut", "a b"]
)
def test_a_folder_of_the_user_may_have_any_name(name: str, own: str, tmp_path: Path):
    shutil.copytree(own, tmp_path / name, ignore=shutil.ignore_patterns("experiment", name))
    assert compose(["model=per_task"], config_dir=str(tmp_path / name)).actor.width


@pytest.mark.parametrize("value", ["x/a=b", "my runs (copy)", "größe", "it's", 'a "b" c'])
def test_a_value_that_needs_quotes_is_shown_as_it_is_typed(value: str):
    with pytest.raises(ConfigError, match="value needs quotes within the shell's: ") as raised:
        compose([f"run.folder={value}"])
    typed_line = str(raised.value).partition("the shell's: ")[2]
    (argument,) = shlex.split(typed_line)
    assert compose([argument]).run.folder == value


def test_a_home_folder_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/mine")
    assert typed(compose(["run.folder='~/x'"])).run.folder == "/home/mine/x"
    report = typed(compose(["runs=['~/a','b']", "save='~/c'"], "report"))
    assert (report.runs, report.save) == (["/home/mine/a", "b"], "/home/mine/c")
    assert typed(compose(["checkpoint='~/r'"], "evaluate")).checkpoint == "/home/mine/r"


@pytest.mark.parametrize("override", ["workers.processes=5000", "fabric.threads=5000"])
def test_more_processes_or_threads_than_a_checkpoint_may_ask_for_are_refused(override: str):
    with pytest.raises(ConfigError, match=r"=5000: must be in \[[01], 1024\]"):
        typed(compose([override]))
