"""Updates per second: ours, the naive module-by-module form, and the bound of a matrix product."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from shutil import which
from typing import Any

import torch

from benchmarks.naive import NaiveSAC
from benchmarks.pairing import Figure, Rate, alternate
from softmod.agent.mtsac import MTSAC
from softmod.agent.replay import Batch, Replay, random_rollout
from softmod.config.compose import compose, typed
from softmod.config.groups import options
from softmod.config.instantiate import build
from softmod.config.schema import TrainConfig
from softmod.experiment.build import make_agent, networks
from softmod.experiment.resources import choose, fused, make_fabric, set_up
from softmod.report import cost
from softmod.report.cost import Cost
from softmod.spec import EnvSpec
from softmod.system.libraries import allow_onednn, fast_products

PRODUCT = "plain matrix product"
ONEDNN_PRODUCT = "the same by oneDNN"
SOFT = "soft_modular"
NAIVE = "module by module"
ONEDNN_NAIVE = "module by module, oneDNN"
LONG = 10.0  # seconds; equal to the time a run is measured, since a core's speed varies over time
WAYS = ("eager", "captured", "compiled")
CASES: list[tuple[str, list[str], bool]] = [  # experiment, overrides, whether the naive form exists
    ("paper_mt10", [], True),
    ("paper_mt10", ["model=soft_modular_deep"], True),
    ("paper_mt50", [], True),
    ("paper_mt10", ["model=mt_sac"], False),
    ("paper_mt10", ["model=mt_mh_sac"], False),
    ("quickstart", [], True),
]


RECIPE = "the recipe"
INSTEAD: dict[str, list[str]] = {  # overrides that remove or replace a part of the recipe
    RECIPE: [],
    "squared errors, minimum of twins": ["critic_head=squared"],
    "rewards as they come": ["algorithm.reward_scaling=none"],
    "values as they come": ["algorithm.value_scaling=none"],
    "tasks weigh alike": ["algorithm.task_weights=none"],
    "fp32": ["fabric.precision=32-true"],
    "no fused kernels": ["fabric.kernels=off"],
    "observations as they come": ["policy.normalize_obs=false"],
    "targets of one step": ["algorithm.n_step=1"],
    "actor without layer normalization": ["network@actor=soft_modular_small"],
    "log std clamped": ["policy.log_std=clamp"],
    "no average of the policy": ["algorithm.policy_averaging=0"],
    "a policy update each time": ["algorithm.policy_delay=1"],
    "Adam": ["optimizer@optimizer.actor=adam", "optimizer@optimizer.critic=adam"],
    "MLP actor": ["network@actor=mlp_small"],
    "critics half as wide": ["critic.width=128"],
    "soft-modular critics": ["network@critic=soft_modular_small_normed"],
    "none of them: the published update, small soft-modular networks": [
        "algorithm=mtsac", "model=soft_modular_small"
    ],
}  # fmt: skip


def measure(
    experiment: str, overrides: list[str], turns: int, threads: int, naive: bool
) -> tuple[list[Figure], float]:
    """Measure an update of one configuration against the product's bound and the naive form.

    Ours uses the library for matrix products that a run selects. The others use PyTorch's
    default, and also oneDNN if a run selects that. The product's rate is in updates of equal FLOP.

    Args:
        experiment: Option of the group `experiment`.
        overrides: Further overrides.
        turns: Measurements per contender.
        threads: PyTorch's threads.
        naive: Measure the naive form too.

    Returns:
        The rates, and the GFLOP of an update.
    """
    torch.set_num_threads(threads)
    update, operations, spec, cfg = ours(experiment, overrides)
    onednn = fast_products()
    rates: dict[str, Rate] = {
        cfg.model: partial(by, onednn, per_second, update),
        PRODUCT: partial(by, False, product, operations),
    }
    if onednn:
        rates[ONEDNN_PRODUCT] = partial(by, True, product, operations)
    if naive:
        plainly = naively(cfg, spec)
        rates[NAIVE] = partial(by, False, per_second, plainly)
        if onednn:
            rates[ONEDNN_NAIVE] = partial(by, True, per_second, plainly)
    return alternate(rates, "updates/s", turns), operations / 1e9


def models(turns: int, threads: int) -> tuple[list[Figure], dict[str, Cost]]:
    """Measure every model's published update on MT10, and count its cost.

    Models with 34 M parameters and small ones are left out.
    """
    torch.set_num_threads(threads)
    fast_products()
    rates: dict[str, Rate] = {}
    costs: dict[str, Cost] = {}
    lines = {
        name: [f"model={name}"]
        for name in options("model")
        if not name.endswith(("_wide", "_small"))
    }
    for name, line in (lines | {"mt_sac, pcgrad": ["model=mt_sac", "algorithm=pcgrad"]}).items():
        update, _, spec, cfg = ours("paper_mt10", line)
        rates[name], costs[name] = partial(per_second, update), cost.of(cfg, spec)
    return alternate(rates, "updates/s", turns), costs


def ingredients(turns: int) -> list[Figure]:
    """Measure the recipe's update on MT10 with one thread, with and without each of its parts."""
    torch.set_num_threads(1)
    fast_products()
    rates: dict[str, Rate] = {}
    for name, line in INSTEAD.items():
        rates[name] = partial(per_second, ours("mt10", line)[0])
        torch.set_num_threads(1)
    return alternate(rates, "updates/s", turns)


def growth(turns: int, threads: int) -> list[Figure]:
    """Measure the env steps per second that updates allow as networks and task set grow."""
    torch.set_num_threads(threads)
    wide = ["actor.module_width=512", "critic.module_width=512"]
    many = ["actor.num_modules=4", "critic.num_modules=4"]
    sizes = {
        "mt10": ("paper_mt10", []),
        "mt50": ("paper_mt50", []),
        "mt10, modules twice as wide": ("paper_mt10", wide),
    }
    rates: dict[str, Rate] = {}
    for name, (experiment, overrides) in (
        sizes | {"mt10, twice as many modules": ("paper_mt10", many)}
    ).items():
        update, _, spec, cfg = ours(experiment, overrides)
        rates[name] = partial(env_steps_per_second, update, spec.num_tasks / cfg.run.update_ratio)
    return alternate(rates, "env steps/s", turns)


def env_steps_per_second(update: Callable[[], object], steps: float) -> float:
    """Return the env steps per second that updates allow, with `steps` env steps per update."""
    return per_second(update) * steps


def by(onednn: bool, measure: Callable[..., float], *arguments: Any) -> float:
    """Measure with oneDNN or with PyTorch's default library for matrix products."""
    allow_onednn(onednn)
    return measure(*arguments)


def per_second(update: Callable[[], object], seconds: float = 1.0) -> float:
    """Return calls per second, measured for at least `seconds`; waits for work on CUDA."""
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        update()
        calls += 1
        if calls % 10 == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return calls / (time.perf_counter() - began)


def ways(experiment: str, precision: str, turns: int, compiled: bool) -> list[Figure]:
    """Measure an update in each way to run it, on CUDA if available.

    `benchmarks.gpu` measures many updates per graph.
    """
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    rates: dict[str, Rate] = {}
    for how in WAYS if compiled and which("g++") else WAYS[:2]:
        line = [
            f"fabric.accelerator={accelerator}",
            f"fabric.precision={precision}",
            f"fabric.compile={how}",
        ]
        torch._dynamo.reset()  # Dynamo stops recompiling a function after too many variants
        rates[how] = partial(per_second, ours(experiment, line)[0])
    return alternate(rates, "updates/s", turns)


def built(
    experiment: str, overrides: list[str], per_graph: int = 0
) -> tuple[MTSAC, Replay, EnvSpec, TrainConfig]:
    """Build the agent of an experiment, with a replay of a few random transitions."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    cfg = typed(compose([f"experiment={experiment}", "fabric=cpu", *overrides]))
    spec = EnvSpec(tuple(cfg.env.tasks), 39, 4, 500, cfg.env.train_horizon, 18)
    fabric = make_fabric(cfg)
    set_up(cfg, fabric.device)
    agent, _ = make_agent(cfg, spec, *networks(cfg, spec), fabric, fused(cfg), per_graph)
    replay = Replay(spec, 4 * cfg.run.batch_per_task, fabric.device)
    replay.extend(random_rollout(spec, replay.capacity))
    return agent, replay, spec, cfg


def ours(experiment: str, overrides: list[str]) -> tuple[Any, int, EnvSpec, Any]:
    """Return a function that makes one update, its FLOP, the env spec and the configuration."""
    agent, replay, spec, cfg = built(experiment, overrides)
    draws = torch.Generator(agent.device).manual_seed(0)

    def update() -> None:
        batch = replay.sample(
            cfg.run.batch_per_task, draws, cfg.algorithm.n_step, cfg.algorithm.discount
        )
        agent.training_step(batch, 0)

    update()
    chosen, agent.programs = (
        agent.programs,
        {"whole": agent.update, "critics": agent.update_critics},
    )
    agent.updates = 0  # the next update includes the policy
    with cost.Counter() as counter:
        update()
    agent.programs = chosen
    for _ in range(2 * cfg.algorithm.policy_delay):  # a captured program is verified at call two
        update()
    return update, counter.flop, spec, cfg


def learning_rate(experiment: str) -> float:
    """Measure the env steps per second that updates alone allow, with the threads of training."""
    update, _, spec, cfg = ours(experiment, [])
    torch.set_num_threads(choose(cfg, build(cfg.env, "env")).threads)
    return per_second(update, LONG) / cfg.run.update_ratio * spec.num_tasks


def naively(cfg: Any, spec: EnvSpec) -> Any:
    """Return a function that makes the same update module by module."""
    net, rows = cfg.actor, cfg.run.batch_per_task
    sac = NaiveSAC(
        spec.obs_dim, spec.action_dim, spec.num_tasks, layers=net.num_layers,
        modules=net.num_modules,
        width=net.module_width, embedding=net.embedding_width, gating=net.gating_width,
    )  # fmt: skip
    batch = Batch(*(torch.randn(spec.num_tasks * rows, width) for width in (39, 4, 1, 39)))
    task = torch.eye(spec.num_tasks).repeat_interleave(rows, 0)
    return lambda: sac.update(
        batch.obs, batch.action, batch.reward.squeeze(-1), batch.next_obs, task
    )


def product(operations: int, size: int = 2048) -> float:
    """Measure one large fp32 matrix product; return the updates per second of equal FLOP."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return per_second(lambda: torch.mm(a, b, out=out)) * 2 * size**3 / operations
