"""Checks of a configuration that need the parts it builds."""

from __future__ import annotations

import inspect
import math
import os
import shutil
import sys
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim import Optimizer

from softmod import kernels
from softmod.agent.mtsac import MTSAC
from softmod.agent.replay import bytes_per_transition
from softmod.agent.value_heads import ValueHead
from softmod.config.instantiate import resolve_target, target_of
from softmod.config.schema import TrainConfig
from softmod.errors import ConfigError, near, one_line
from softmod.kernels.library import CompilerError, failure
from softmod.networks.gaussian import Actor
from softmod.networks.network import Network
from softmod.spec import EnvSpec
from softmod.system import hardware
from softmod.tracking.mlflow_store import store_uri


def check_memory(cfg: TrainConfig, spec: EnvSpec) -> None:
    """Check that the replay fits into the memory of the learner's device.

    Raises:
        ConfigError: it does not.
    """
    size = round(spec.num_tasks * cfg.run.replay_per_task * bytes_per_transition(spec))
    on_cuda = cfg.fabric.accelerator != "cpu" and torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if on_cuda else hardware.memory()
    if size > total:
        gib = 2**30
        most = cfg.run.replay_per_task * total // size
        raise ConfigError(
            f"run.replay_per_task={cfg.run.replay_per_task}: needs {size / gib:,.0f} GiB of"
            f" {total / gib:,.0f} GiB memory; must be at most {most:,} here"
        )


def check_store(cfg: TrainConfig) -> None:
    """Check that MLflow has stores of the kind that `tracking.uri` or the environment names.

    Raises:
        ConfigError: it has none.
    """
    if cfg.tracking.mlflow:
        store_uri(cfg.tracking.uri)


def check_suite(cfg: TrainConfig, suite: object) -> None:
    """Check that `env` builds a task set.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(getattr(suite, "spec", None), EnvSpec):
        raise ConfigError(
            f"env._target_={target_of(cfg.env)}: must be a task set (softmod.spec.TaskSuite)"
        )


def check_value_head(cfg: TrainConfig, head: ValueHead) -> None:
    """Check the shapes of a value head's values and losses on a small batch of zeros.

    Raises:
        ConfigError: a shape is wrong, or the value head fails.
    """
    line = f"critic_head._target_={target_of(cfg.critic_head)}"
    number = getattr(head, "outputs", None)
    if not isinstance(number, int) or number < 1:
        raise ConfigError(f"{line}: outputs must be a positive integer")
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{line}: fails on outputs of {critics} critics, {tasks} tasks, {rows} rows ({reason})"
        ) from error
    for what, made, wanted in (("value", value, (tasks, rows)), ("loss", loss, (critics,))):
        if tuple(made.shape) != wanted:
            raise ConfigError(
                f"{line}: {what} has shape {list(made.shape)}; must be {list(wanted)}"
            )


def check_members(network: Network, key: str, target: str) -> None:
    """Check a network's output shape, and that its members share no weights.

    Args:
        network: as it starts.
        key: of the network in the configuration, for messages.
        target: path of its class, for messages.

    Raises:
        ConfigError: the network fails, its outputs have another shape, or the leading axis of a
            parameter is not one over members.
    """
    line = f"{key}._target_={target}"
    shape = (network.num_tasks, 2, network.in_dim)
    x = torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)
    training = network.training
    try:
        outputs = network.eval()(x)
    except Exception as error:  # of the user's own code
        raise ConfigError(f"{line}: fails on inputs {list(shape)} ({one_line(error)})") from error
    finally:
        network.train(training)
    wanted = [network.stack, network.num_tasks, 2, network.out_dim]
    if list(outputs.shape) != wanted:
        raise ConfigError(f"{line}: outputs have shape {list(outputs.shape)}, not {wanted}")
    members = network.members
    first = outputs[0, 0] if network.independent else outputs[0]
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(first.sum(), list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        rows = parameter.shape[0] if parameter.dim() else 0
        bad = rows == 0 or rows % members > 0
        if not bad and gradient is not None:
            bad = bool(gradient.reshape(members, -1)[1:].any())
        if bad:
            raise ConfigError(
                f"{line}: parameter {name} {list(parameter.shape)} must have its {members} members"
                " (stack, or stack x tasks) on its leading axis"
            )


def check_capture(cfg: TrainConfig, optimizer: Optimizer, key: str) -> None:
    """Check that an optimizer supports `fabric.compile=captured` or `compiled`.

    Raises:
        ConfigError: it is not fused, or cannot be compiled.
    """
    if cfg.fabric.compile == "compiled" and not kernels.flat.supports(optimizer):
        raise ConfigError(
            f"fabric.compile=compiled: needs a fused Adam or AdamW; set {key}.fused=true or"
            " fabric.compile=eager"
        )
    if cfg.fabric.compile == "captured" and not all(
        group.get("fused") for group in optimizer.param_groups
    ):
        raise ConfigError(
            f"fabric.compile=captured: needs a fused optimizer; set {key}.fused=true or"
            " fabric.compile=eager"
        )


def check_surgery(cfg: TrainConfig, actor: Actor, critic: Network) -> None:
    """Check that tasks share weights where gradient surgery is on.

    Raises:
        ConfigError: the tasks share no weights.
    """
    surgery = getattr(cfg.algorithm, "gradient_surgery", "none")
    for name, network in (("actor", actor.network), ("critic", critic)):
        if surgery != "none" and network.independent:
            kind = type(network).__name__
            raise ConfigError(
                f"algorithm.gradient_surgery={surgery}: tasks share no weights in {name} ({kind});"
                " must be none"
            )


def check_device(cfg: TrainConfig) -> None:
    """Check that a CUDA device is available where `fabric.accelerator=cuda`.

    Raises:
        ConfigError: there is none.
    """
    if cfg.fabric.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "fabric.accelerator=cuda: no CUDA device is available; must be cpu or auto"
        )


def check_compiler(cfg: TrainConfig) -> None:
    """Check that the compiler of `fabric.compile=compiled` makes a library.

    Raises:
        ConfigError: there is none, or it fails.
    """
    if cfg.fabric.compile != "compiled":
        return
    # As TorchInductor chooses it; a program's name, without options.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    reason = f"{compiler!r} not found"
    if shutil.which(compiler):
        with TemporaryDirectory() as folder:
            options = ["-shared", "-fPIC", "-x", "c++", "-o", f"{folder}/empty.so", os.devnull]
            try:
                failed = failure([compiler, *options])
                reason = f"{compiler!r} fails: {failed}" if failed else ""
            except CompilerError as error:
                reason = str(error)
    if reason:
        raise ConfigError(
            f"fabric.compile=compiled: needs a C++ compiler ({reason}); fabric.compile=auto and"
            " eager do not need one"
        )


HOST_DRAWS = ("sample", "training_step", "prepare", "draw", "count_update")  # methods of MTSAC


def obstacle(cfg: TrainConfig) -> str:
    """Return why updates cannot be drawn on the device; empty if they can.

    Custom classes may draw with torch's generators, which a recorded graph cannot do.
    """
    algorithm = resolve_target(cfg.algorithm._target_, "algorithm", MTSAC)
    for name in HOST_DRAWS:
        if getattr(algorithm, name) is not getattr(MTSAC, name):
            return f"{algorithm.__name__} overrides {name}"
    for key in ("actor", "critic"):
        network: Any = resolve_target(target_of(getattr(cfg, key)), key, Network)
        if network.draw is not Network.draw and network.draw_from is Network.draw_from:
            return f"{network.__name__} overrides draw, but not draw_from"
    return ""


def check_draws(cfg: TrainConfig) -> None:
    """Check that updates can be drawn on the device where `fabric.updates_per_graph` is set.

    Raises:
        ConfigError: they cannot.
    """
    if cfg.fabric.updates_per_graph and (reason := obstacle(cfg)):
        raise ConfigError(
            f"fabric.updates_per_graph={cfg.fabric.updates_per_graph}: {reason}; must be null or 0"
        )


def check_algorithm(cfg: TrainConfig, target: type) -> None:
    """Check that the class of the algorithm accepts the options of `algorithm.own`.

    Raises:
        ConfigError: it does not accept one of them.
    """
    names = set(inspect.signature(target).parameters) | set(inspect.signature(MTSAC).parameters)
    for name in cfg.algorithm.own:
        if name not in names:
            suggestion = near(name, names)
            raise ConfigError(
                f"algorithm.own.{name}: {target.__name__} takes no such option{suggestion}"
            )
