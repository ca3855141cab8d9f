"""The shape of a configuration: one dataclass per group, its types, ranges and choices.

All values are in `conf/`, none in here.

Imports nothing heavy, so that a command line is checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def number(low: float | None = None, high: float | None = None, open_low: bool = False) -> Any:
    """Declare a number within [low, high]; `open_low` leaves `low` itself out."""
    return field(default=MISSING, metadata={"low": low, "high": high, "open_low": open_low})


def choice(*allowed: str) -> Any:
    """Declare one of a few words."""
    return field(default=MISSING, metadata={"choices": allowed})


@dataclass
class EnvConfig:
    """Choose tasks, with their goals, reward and horizon."""

    _target_: str = MISSING
    name: str = MISSING  # names the task set in runs and in MLflow
    tasks: list[str] = MISSING  # python -m softmod.envs lists them
    # the 50 of the benchmark, the first of them, or new ones each episode
    goals: str = choice("benchmark", "fixed", "random")
    goal_seed: int = number(low=0)  # of the benchmark's goals
    reward: str = choice("v1", "v2")  # Meta-World's older or newer reward
    horizon: int = number(low=1, high=500)  # steps of an episode
    # of training episodes; null: as in evaluation
    train_horizon: int | None = number(low=1, high=500)
    fast: bool = MISSING  # our hot paths, equal to the bit


@dataclass
class SoftModularConfig:
    """Soft modularization (Yang et al. 2020) and hard routing (Rosenbaum et al. 2018).

    The numbers are those of docs/paper_and_code.md.
    """

    _target_: str = MISSING
    num_layers: int = number(low=2)  # L
    num_modules: int = number(low=1)  # n
    module_width: int = number(low=1)  # d
    embedding_width: int = number(low=1)  # D
    state_in_routing: bool = MISSING  # the router reads state and task, or the task alone
    gating_layers: int = number(low=0)  # of the gating MLP; 0 is the printed form (difference 1)
    gating_width: int = number(low=1)  # of the gating MLP (difference 1)
    embedding_relu: bool = MISSING  # before it enters the modules (difference 2)
    routing_reads: str = choice("all", "last")  # earlier routing that the next layer reads (3)
    relu: str = choice("after_sum", "before_sum")  # of the modules (difference 4)
    head: str = choice("routed", "sum")  # routed and shared, or the last modules summed (5)
    routing_feeds: str = choice("probabilities", "logits")  # to the next routing layer (7)
    init: str = choice("released", "torch")  # start values (difference 11)
    norm: str = choice("none", "layer")  # normalise hidden layers before their ReLU


@dataclass
class MLPConfig:
    """One network for all tasks (MT-SAC), a head per task (MT-MH-SAC), or a network per task."""

    _target_: str = MISSING
    num_layers: int = number(low=1)  # hidden layers
    width: int = number(low=1)  # of each hidden layer
    init: str = choice("released", "torch")  # start values (difference 11)
    norm: str = choice("none", "layer")  # normalise hidden layers before their ReLU


@dataclass
class MixedExpertsConfig(MLPConfig):
    """Whole networks, and a gate that mixes their outputs (Mix-Expert)."""

    num_experts: int = number(low=1)  # whole networks
    gate_layers: int = number(low=1)  # hidden layers of the gate
    gate_width: int = number(low=1)  # of each hidden layer of the gate


@dataclass
class CAREConfig(MLPConfig):
    """A context that attends to encoders of the state (Sodhani et al. 2021)."""

    num_experts: int = number(low=1)  # encoders of the state
    encoder_layers: int = number(low=0)  # hidden layers of an encoder
    encoder_width: int = number(low=1)  # of each hidden layer of an encoder


@dataclass
class PaCoConfig(MLPConfig):
    """Weights composed from shared parameter sets, by a vector per task (Sun et al. 2022)."""

    num_sets: int = number(low=1)  # parameter sets


@dataclass
class MOOREConfig(MLPConfig):
    """A task's mixture of orthogonal experts (Hendawy et al. 2024)."""

    num_experts: int = number(low=1)  # at most width


@dataclass
class FiLMConfig(MLPConfig):
    """The task scales and shifts every hidden layer (Perez et al. 2018)."""

    embedding_width: int = number(low=1)  # of the task's embedding


@dataclass
class ResidualConfig:
    """Residual blocks with layer normalisation, a learned task embedding (Nauman et al. 2025)."""

    _target_: str = MISSING
    num_blocks: int = number(low=0)  # residual blocks
    width: int = number(low=1)  # of the hidden layers
    embedding_width: int = number(low=1)  # of the task's learned embedding
    head_gain: float = number(low=0.0)  # scale of the head's start values
    norm: str = choice("none", "layer")  # normalise hidden layers and what a block adds


NETWORKS = {
    "soft_modular": SoftModularConfig,
    "mlp": MLPConfig,
    "mixed_experts": MixedExpertsConfig,
    "care": CAREConfig,
    "paco": PaCoConfig,
    "moore": MOOREConfig,
    "film": FiLMConfig,
    "residual": ResidualConfig,
}


@dataclass
class SquaredConfig:
    """Value head: one output, squared error, the minimum of twin targets (Haarnoja et al. 2018)."""

    _target_: str = MISSING


@dataclass
class CategoricalConfig:
    """Value head: a distribution over fixed values, by cross-entropy (Bellemare et al. 2017)."""

    _target_: str = MISSING
    atoms: int = number(low=2)  # how many values
    low: float = number()  # the smallest value
    high: float = number()  # the largest value


VALUE_HEADS = {"squared": SquaredConfig, "categorical": CategoricalConfig}


@dataclass
class PolicyConfig:
    """Choose how the actor's network becomes a policy."""

    log_std: str = choice("clamp", "tanh")  # 14: clamped to [-20, 2], or squashed into (-10, 2)
    normalize_obs: bool = MISSING  # actor and critics read observations of mean 0 and deviation 1
    # pink: correlated over the steps of an episode
    exploration_noise: str = choice("white", "pink")


@dataclass
class AlgorithmConfig:
    """Multi-task SAC: what a single update does."""

    _target_: str = MISSING
    discount: float = number(low=0.0, high=1.0)  # gamma
    target_smoothing: float = number(low=0.0, high=1.0, open_low=True)  # tau, of the target critics
    initial_temperature: float = number(low=0.0, open_low=True)  # alpha of every task at the start
    target_entropy_per_action: float = number()  # times the action's size: -4 on Meta-World
    # 6; unsolved: by distance from success
    task_weights: str = choice("released", "paper", "none", "unsolved")
    update_order: str = choice("sequential", "released")  # 12
    clip_norm: float = number(low=0.0)  # 8; 0 is off
    # what becomes of the tasks' conflicting gradients
    gradient_surgery: str = choice("none", "pcgrad")
    n_step: int = number(low=1)  # steps of a transition, within its episode
    # return: divided by the size of each task's returns
    reward_scaling: str = choice("none", "return")
    # spread: the policy's values, by their spread in each task
    value_scaling: str = choice("none", "spread")
    policy_delay: int = number(low=1)  # updates of the critics for each one of the policy
    # share of each update in the policy that acts; 0 is off
    policy_averaging: float = number(low=0.0, high=1.0)
    # options of a class of your own; it takes them by their names
    own: dict[str, Any] = field(default_factory=dict)


@dataclass
class AdamConfig:
    """Adam, fused."""

    _target_: str = MISSING
    lr: float = number(low=0.0, open_low=True)  # learning rate
    betas: list[float] = MISSING  # of the running means of gradients and their squares
    eps: float = number(low=0.0)  # added to the denominator
    fused: bool = MISSING  # one operation for all parameters


@dataclass
class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay, fused."""

    lr: float = number(low=0.0, open_low=True)  # learning rate
    weight_decay: float = number(low=0.0)  # decoupled from the gradient


@dataclass
class OptimizersConfig:
    """One optimizer option, mounted three times."""

    actor: Any = field(default_factory=dict)
    critic: Any = field(default_factory=dict)
    temperature: Any = field(default_factory=dict)


@dataclass
class RunConfig:
    """Set lengths, sizes and cadences. Steps and cadences count environment steps."""

    steps_per_task: int = number(low=1)  # environment steps of each task
    warmup_per_task: int = number(low=0)  # steps before the first update
    warmup_policy: str = choice("untrained", "uniform")  # who acts in them (13), or uniform actions
    batch_per_task: int = number(low=1)  # transitions of each task in an update
    replay_per_task: int = number(low=1)  # transitions of each task that are kept
    update_ratio: float = number(low=0.0, open_low=True)  # updates per step of every task
    # K: steps of every task between two hand-overs; divides the horizon
    round_steps: int = number(low=1)
    eval_every: int = number(low=1)  # env steps over all tasks
    eval_goals: int = number(low=1, high=50)  # goals per task in evaluations on the way
    final_eval_goals: int = number(low=1, high=50)  # and in the last one
    save_every: int = number(low=1)  # env steps between two checkpoints
    log_every: int = number(low=1)  # env steps between two writes of metrics
    # of training; ends the run by the clock
    max_minutes: float | None = number(low=0.0, open_low=True)
    # mean success in two evaluations running; ends the run
    stop_at: float | None = number(low=0.0, high=1.0)
    resume: str = choice("auto", "must", "never")  # never: start in a new folder
    folder: str = MISSING  # where runs are kept


@dataclass
class WorkersConfig:
    """Choose who steps the environments. 0 processes: the learner's own (inline)."""

    processes: int | None = number(low=0)  # null: chosen from the cores at hand
    copies: int = number(low=1)  # environments of each task
    # seconds for a round, or for ten goals of an evaluation
    timeout: float = number(low=0.0, open_low=True)


@dataclass
class FabricConfig:
    """Choose where the learner computes."""

    accelerator: str = choice("auto", "cpu", "cuda")  # auto: CUDA where there is a device
    # tf32: of matrix products, on CUDA
    precision: str = choice("auto", "32-true", "tf32", "bf16-mixed")
    # fused operations on a CPU; auto: where a C compiler is found
    kernels: str = choice("auto", "off")
    # auto: captured, if the optimizers can be
    compile: str = choice("auto", "eager", "compiled", "captured")
    # on CUDA: only operations that repeat to the bit; on a CPU all do
    deterministic: bool = MISSING
    threads: int | None = number(low=1)  # null: chosen from the cores at hand


@dataclass
class TrackingConfig:
    """Choose where metrics go: always to the run's journal, from there to MLflow."""

    mlflow: bool = MISSING  # send metrics to MLflow
    uri: str | None = MISSING  # null: an sqlite file in the working folder
    experiment: str | None = MISSING  # null: the task set's name
    system_metrics: bool = MISSING  # memory and processor time
    drain_seconds: float = number(low=0.0)  # to wait at the end for the rest to be sent


@dataclass
class TrainConfig:
    """Everything that `python -m softmod.train` takes."""

    name: str = MISSING  # of the run; part of its folder's name
    model: str = MISSING  # the name of the model, which its option sets
    seed: int = number(low=0)  # of all random streams of the run
    seeds: list[int] | None = MISSING  # several, side by side in one process, instead of `seed`
    env: Any = field(default_factory=dict)
    actor: Any = field(default_factory=dict)
    critic: Any = field(default_factory=dict)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic_head: Any = field(default_factory=dict)
    # of the model; read by algorithm=mtsac
    published_task_weights: str = choice("none", "released", "paper")
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizersConfig = field(default_factory=OptimizersConfig)
    run: RunConfig = field(default_factory=RunConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class EvaluateConfig:
    """Everything that `python -m softmod.evaluate` takes."""

    checkpoint: str = MISSING  # a checkpoint folder, or a run's folder (its newest checkpoint)
    goals: int = number(low=1, high=50)
    processes: int | None = number(low=0)  # null: as many as the run had
    video: bool = MISSING
    video_episodes: int = number(low=1, high=50)  # per task
    output: str | None = MISSING  # null: beside the checkpoint
    allow: list[str] = MISSING  # packages of your own that a _target_ may name


@dataclass
class ReportConfig:
    """Everything that `python -m softmod.report` takes."""

    parent: str | None = MISSING  # a sweep's parent in MLflow: its id or name; typed as sweep=
    runs: list[str] = MISSING  # or folders with runs
    results: list[str] = MISSING  # or folders with saved results
    # or a checkpoint, or a run's folder: how its policy uses its modules
    checkpoint: str | None = MISSING
    save: str | None = MISSING  # with runs: save them as results in this folder too
    uri: str | None = MISSING  # the MLflow store; null: as for training
    output: str = MISSING
    level: float = number(low=0.0, high=1.0)  # of success, whose environment steps are told
    episodes: int = number(low=1, high=50)  # of each task, to see how modules are used
    video: bool = MISSING  # of a rollout of each task, with its routes moving beside it
    allow: list[str] = MISSING  # packages of your own that tasks and networks come from
