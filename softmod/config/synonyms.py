"""Names that other projects use for softmod's keys, with the keys to type instead."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Synonym(NamedTuple):
    """Names used elsewhere, and the overrides or keys of softmod that correspond to them."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    note: str = ""  # what the key means here, where that differs


LEARNING_RATES = ("optimizer.actor.lr", "optimizer.critic.lr", "optimizer.temperature.lr")
MODULES = ("actor.num_modules", "actor.num_layers", "actor.module_width")
WIDTHS = ("actor.module_width", "actor.width", "critic.module_width", "critic.width")
SYNONYMS = (
    # optimizers and updates
    Synonym(("lr", "learning_rate"), LEARNING_RATES),
    Synonym(("actor_lr", "policy_lr", "lr_actor", "pi_lr"), ("optimizer.actor.lr",)),
    Synonym(("critic_lr", "q_lr", "lr_critic"), ("optimizer.critic.lr",)),
    Synonym(("alpha_lr", "temperature_lr", "lr_alpha"), ("optimizer.temperature.lr",)),
    Synonym(("optim",), ("optimizer@optimizer.actor", "optimizer@optimizer.critic")),
    Synonym(("weight_decay", "wd"), ("optimizer.actor.weight_decay",)),
    Synonym(("gradient_clip_val", "grad_clip", "max_grad_norm"), ("algorithm.clip_norm",)),
    Synonym(("batch_size",), ("run.batch_per_task",), "transitions of each task"),
    Synonym(("gamma", "discount_factor"), ("algorithm.discount",)),
    Synonym(("tau", "polyak", "target_update_tau"), ("algorithm.target_smoothing",)),
    Synonym(("alpha", "ent_coef", "init_temperature"), ("algorithm.initial_temperature",)),
    Synonym(
        ("target_entropy",), ("algorithm.target_entropy_per_action",), "nats per action dimension"
    ),
    Synonym(("nstep", "n_steps", "multi_step"), ("algorithm.n_step",)),
    Synonym(("policy_freq", "policy_frequency", "actor_update_freq"), ("algorithm.policy_delay",)),
    Synonym(
        ("utd", "utd_ratio", "replay_ratio", "gradient_steps"),
        ("run.update_ratio",),
        "updates per environment step of each task",
    ),
    # groups
    Synonym(("algo", "agent", "alg"), ("algorithm=mtsac", "algorithm=fast")),
    Synonym(("tasks",), ("env.tasks",), 'as in "env.tasks=[push-v3]", with env=mt1'),
    Synonym(("task", "task_name", "env_id", "env_name"), ("env=mt10", "env.tasks")),
    Synonym(("network_type", "policy_type", "arch"), ("model",)),
    # lengths and intervals
    Synonym(
        ("steps", "num_steps", "total_steps", "max_steps", "total_timesteps", "num_timesteps",
         "num_env_steps", "num_train_steps"),
        ("run.steps_per_task",),
        "environment steps of each task",
    ),
    Synonym(
        ("learning_starts", "warmup_steps", "start_steps", "random_steps", "num_seed_steps"),
        ("run.warmup_per_task",),
        "environment steps of each task",
    ),
    Synonym(
        ("buffer_size", "replay_size", "buffer_capacity", "replay_buffer_size"),
        ("run.replay_per_task",),
        "transitions of each task",
    ),
    Synonym(("max_episode_steps", "episode_length", "time_limit"), ("env.horizon",)),
    Synonym(
        ("eval_freq", "eval_interval", "eval_frequency"),
        ("run.eval_every",),
        "environment steps of all tasks",
    ),
    Synonym(
        ("eval_episodes", "num_eval_episodes", "n_eval_episodes"),
        ("run.eval_goals",),
        "goals per task",
    ),
    Synonym(
        ("save_freq", "save_interval", "checkpoint_interval"),
        ("run.save_every",),
        "environment steps of all tasks",
    ),
    Synonym(
        ("log_freq", "log_interval", "log_every_n_steps"),
        ("run.log_every",),
        "environment steps of all tasks",
    ),
    Synonym(("debug", "fast_dev_run", "test"), ("run=smoke",), "every part of a run, in a minute"),
    Synonym(
        ("ckpt_path", "checkpoint", "load_checkpoint", "resume_from"),
        ("run.resume",),
        "the same command resumes a run automatically",
    ),
    Synonym(("num_seeds",), ("seeds",), "a list, as in seeds=[0,1,2]"),
    # machine
    Synonym(
        ("device", "gpu", "use_cuda", "cuda", "devices"),
        ("fabric.accelerator",),
        "a run uses one device",
    ),
    Synonym(("num_envs", "n_envs"), ("workers.copies",), "environments per task"),
    Synonym(("num_workers", "n_workers", "num_processes"), ("workers.processes",)),
    Synonym(("torch_deterministic", "cudnn_deterministic"), ("fabric.deterministic",)),
    Synonym(("precision", "mixed_precision", "amp"), ("fabric.precision",)),
    Synonym(("trainer",), ("run", "fabric"), "lengths and device"),
    # networks
    Synonym(("num_modules", "num_layers", "module_width"), MODULES),
    Synonym(("hidden_dim", "hidden_size", "hidden_sizes", "hidden_units", "hidden_dims"), WIDTHS),
    # logging and names
    Synonym(("project", "project_name"), ("tracking.experiment",), "MLflow experiment"),
    Synonym(
        ("logger", "wandb", "tensorboard", "use_wandb", "track"),
        ("tracking=mlflow", "tracking=journal"),
        "metrics go to MLflow and to the run's journal",
    ),
    Synonym(
        ("experiment_name", "exp_name", "run_name"),
        ("name", "tracking.experiment"),
        "the run's folder, the MLflow experiment",
    ),
    Synonym(("output_dir", "log_dir", "logdir", "work_dir", "save_dir"), ("run.folder",)),
)  # fmt: skip
BY_NAME = {name: synonym for synonym in SYNONYMS for name in synonym.names}


def hint(key: str, known: Collection[str]) -> str:
    """Suggest softmod's keys for a key that other projects use.

    Args:
        key: Unknown key, dotted. The whole key is looked up, then its last and its first part.
        known: Keys of the configuration, dotted. Suggestions are limited to these.

    Returns:
        The end of a message, or an empty string.
    """
    parent, _, last = key.rpartition(".")
    found = BY_NAME.get(key) or BY_NAME.get(last) or BY_NAME.get(key.partition(".")[0])
    if found is None:
        return ""
    keys = [name for name in found.keys if exists(name, known)]
    same_group = [name for name in keys if parent and name.startswith(f"{parent}.")]
    if not keys:
        return ""
    *others, final = same_group or keys
    names = f"{', '.join(others)} or {final}" if others else final
    note = f" ({found.note})" if found.note else ""
    return f"; did you mean {names}{note}?"


def exists(name: str, known: Collection[str]) -> bool:
    """Return whether a configuration with these keys has a key, `group=option` or `group@key`."""
    key = name.partition("=")[0].rpartition("@")[2]
    return any(one == key or one.startswith(f"{key}.") for one in known)
