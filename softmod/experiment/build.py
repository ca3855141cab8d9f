"""Build the parts of a run from its configuration."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.optim import Optimizer

from softmod.agent.chunks import Chunks
from softmod.agent.mtsac import MTSAC
from softmod.agent.value_heads import ValueHead
from softmod.capture.update_graph import run_programs
from softmod.config.identity import as_values
from softmod.config.instantiate import build, resolve_target, target_of
from softmod.config.schema import TrainConfig
from softmod.experiment import checks
from softmod.networks.build import build_actor
from softmod.networks.gaussian import Actor
from softmod.networks.network import Network
from softmod.seeding import Purpose, sequence
from softmod.spec import EnvSpec, TaskSuite
from softmod.workers.worker import Plan

OPTIMIZERS = ("actor", "critic", "temperature")


class Models(NamedTuple):
    """Task set with goals drawn, and networks with initial weights."""

    suite: TaskSuite
    actor: Actor
    critic: Network


def assemble(cfg: TrainConfig) -> Models:
    """Build task set and networks, and run all checks that need them.

    Raises:
        ConfigError: a `_target_` cannot be imported, is not a subclass of the expected class, does
            not accept its options, or a check fails.
    """
    suite: TaskSuite = build(cfg.env, "env")
    checks.check_suite(cfg, suite)
    for task in range(suite.spec.num_tasks):
        suite.goals(task)  # fill the cache, so that workers do not draw them again
    checks.check_value_head(cfg, value_head(cfg))
    actor, critic = networks(cfg, suite.spec)
    checks.check_members(actor.network, "actor", target_of(cfg.actor))
    checks.check_members(critic, "critic", target_of(cfg.critic))
    checks.check_memory(cfg, suite.spec)
    for name in OPTIMIZERS:
        optimizer = make_optimizer(cfg, name, [torch.zeros(1, requires_grad=True)])
        checks.check_capture(cfg, optimizer, f"optimizer.{name}")
    checks.check_surgery(cfg, actor, critic)
    target = resolve_target(cfg.algorithm._target_, "algorithm", MTSAC)
    checks.check_algorithm(cfg, target)
    checks.check_draws(cfg)
    return Models(suite, actor, critic)


def networks(cfg: TrainConfig, spec: EnvSpec) -> tuple[Actor, Network]:
    """Build actor and twin critics; initial weights are drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(sequence(cfg.seed, Purpose.NETWORKS).generate_state(1)[0]))
        actor = build_actor(cfg.actor, cfg.policy.log_std, cfg.policy.normalize_obs, spec)
        outputs = value_head(cfg).outputs
        sizes = {
            "in_dim": spec.obs_dim + spec.action_dim,
            "out_dim": outputs,
            "num_tasks": spec.num_tasks,
        }
        critic: Network = build(cfg.critic, "critic", Network, **sizes, stack=2)
    return actor, critic


def value_head(cfg: TrainConfig) -> ValueHead:
    """Build the value head, which maps critic outputs to values and losses."""
    head: ValueHead = build(cfg.critic_head, "critic_head", ValueHead)
    return head


def make_optimizer(cfg: TrainConfig, name: str, parameters: list[Any]) -> Optimizer:
    """Build the optimizer of "actor", "critic" or "temperature"."""
    node = getattr(cfg.optimizer, name)
    made: Optimizer = build(node, f"optimizer.{name}", Optimizer, params=parameters)
    return made


def make_plan(cfg: TrainConfig, suite: TaskSuite, actor: Actor) -> Plan:
    """Return the workers' plan: task set, seed, exploration, and their own copy of the policy."""
    pink = cfg.policy.exploration_noise == "pink"
    return Plan(
        suite, deepcopy(actor), cfg.seed, draw_goals=cfg.env.goals == "random", pink_noise=pink
    )


def make_agent(
    cfg: TrainConfig,
    spec: EnvSpec,
    actor: Actor,
    critic: Network,
    fabric: L.Fabric,
    fused: int,
    per_graph: int = 0,
) -> tuple[MTSAC, list[Any]]:
    """Build the agent and its optimizers on the learner's device.

    Args:
        cfg: configuration of the run.
        spec: shapes of the task set.
        actor, critic: networks with initial weights.
        fabric: device and precision.
        fused: the version of the fused operations of `softmod.kernels`, on CPU only; 0: none.
        per_graph: updates per chunk, with draws on the device; 0: draws of torch's generators.
    """

    def maker(name: str) -> Any:
        return lambda parameters: make_optimizer(cfg, name, parameters)

    options = as_values(cfg)["algorithm"]
    own = options.pop("own")
    with torch.random.fork_rng(devices=[]):  # a custom algorithm may create networks
        torch.manual_seed(int(sequence(cfg.seed, Purpose.NETWORKS, 1).generate_state(1)[0]))
        agent: MTSAC = build(
            options | own, "algorithm", MTSAC, spec=spec, actor=actor, critic=critic,
            optimizers={name: maker(name) for name in OPTIMIZERS},
            batch_per_task=cfg.run.batch_per_task, seed=cfg.seed, value_head=value_head(cfg),
        )  # fmt: skip
    agent.bf16 = cfg.fabric.precision == "bf16"
    agent.fused = fused if fabric.device.type == "cpu" else 0
    fabric.to_device(agent)
    inner = agent.configure_optimizers()
    run_programs(agent, inner, cfg.fabric.compile)
    if per_graph:
        agent.chunks = Chunks(agent, per_graph)
    _, *wrapped = fabric.setup(agent, *inner)
    return agent, wrapped
