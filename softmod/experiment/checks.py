"""What can be wrong with a configuration that only its parts show."""

from __future__ import annotations

import inspect
import os
import shlex
import shutil

import torch
from torch.optim import Optimizer

from softmod.agent.mtsac import MTSAC
from softmod.agent.replay import bytes_per_transition
from softmod.agent.value_heads import ValueHead
from softmod.config.instantiate import target_of
from softmod.config.schema import TrainConfig
from softmod.errors import ConfigError, near
from softmod.networks.gaussian import Actor
from softmod.networks.network import Network
from softmod.spec import EnvSpec
from softmod.system import hardware


def check_memory(cfg: TrainConfig, spec: EnvSpec) -> None:
    """
    Raises:
        ConfigError: the replay does not fit into the memory of the learner's device.
    """
    size = round(spec.num_tasks * cfg.run.replay_per_task * bytes_per_transition(spec))
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if on_cuda else hardware.memory()
    if size > there:
        gib = 2**30
        most = cfg.run.replay_per_task * there // size
        raise ConfigError(
            f"run.replay_per_task={cfg.run.replay_per_task}: takes {size / gib:,.0f} GiB of"
            f" {there / gib:,.0f}; must be at most {most:,} here"
        )


def check_suite(cfg: TrainConfig, suite: object) -> None:
    """
    Raises:
        ConfigError: the class is no task set.
    """
    if not isinstance(getattr(suite, "spec", None), EnvSpec):
        raise ConfigError(
            f"env._target_={target_of(cfg.env)}: must be a task set (softmod.spec.TaskSuite)"
        )


def check_value_head(cfg: TrainConfig, head: ValueHead) -> None:
    """
    Raises:
        ConfigError: what the value head makes of outputs has other shapes than it should.
    """
    line = f"critic_head._target_={target_of(cfg.critic_head)}"
    number = getattr(head, "outputs", None)
    if not isinstance(number, int) or number < 1:
        raise ConfigError(f"{line}: must have a whole number of outputs")
    critics = 2
    tasks = 3
    rows = 5
    outputs = torch.zeros(critics, tasks, rows, number)
    reward = torch.zeros(tasks, rows)
    try:
        value = head.value(outputs)
        target = head.target(reward, reward, outputs, reward)
        loss = head.loss(outputs, target, torch.ones(tasks))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{line}: fails on outputs of {critics} critics, {tasks} tasks, {rows} rows ({told})"
        ) from error
    for what, made, wanted in (("value", value, (tasks, rows)), ("loss", loss, (critics,))):
        if tuple(made.shape) != wanted:
            raise ConfigError(f"{line}: {what} has shape {list(made.shape)}, not {list(wanted)}")


def check_capture(cfg: TrainConfig, optimizer: Optimizer, key: str) -> None:
    """
    Raises:
        ConfigError: an update with this optimizer cannot be captured, which is asked for.
    """
    if cfg.fabric.compile == "captured" and not all(
        group.get("fused") for group in optimizer.param_groups
    ):
        raise ConfigError(
            f"fabric.compile=captured: only with a fused optimizer ({key}.fused=true), or eager"
        )


def check_surgery(cfg: TrainConfig, actor: Actor, critic: Network) -> None:
    """
    Raises:
        ConfigError: there is nothing for gradient surgery to do.
    """
    surgery = getattr(cfg.algorithm, "gradient_surgery", "none")
    for name, network in (("actor", actor.network), ("critic", critic)):
        if surgery != "none" and network.independent:
            alone = type(network).__name__
            raise ConfigError(
                f"algorithm.gradient_surgery={surgery}: tasks share no weights in {name} ({alone});"
                " none"
            )


def check_device(cfg: TrainConfig) -> None:
    """
    Raises:
        ConfigError: CUDA is asked for and is not there.
    """
    if cfg.fabric.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("fabric.accelerator=cuda: no CUDA device is available here (cpu, auto)")


def check_compiler(cfg: TrainConfig) -> None:
    """Check that `fabric.compile=compiled` finds a compiler.

    Raises:
        ConfigError: there is none.
    """
    if cfg.fabric.compile != "compiled":
        return
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(shlex.split(name)[0]) for name in wanted):
        raise ConfigError(
            f"fabric.compile=compiled: needs a C++ compiler ({' or '.join(wanted)} is not there);"
            " auto and eager need none"
        )


def check_algorithm(cfg: TrainConfig, target: type) -> None:
    """
    Raises:
        ConfigError: the class does not take an option of `algorithm.own`.
    """
    names = set(inspect.signature(target).parameters) | set(inspect.signature(MTSAC).parameters)
    for name in cfg.algorithm.own:
        if name not in names:
            taken = near(name, names)
            raise ConfigError(
                f"algorithm.own.{name}: {target.__name__} takes no such option{taken}"
            )
