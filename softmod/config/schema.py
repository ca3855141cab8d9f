"""The shape of a configuration: one dataclass per group, its types, ranges and choices. Values live
in `conf/`.

Imports nothing heavy, so that a command line is checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def number(
    default: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
) -> Any:
    """A number within [low, high]; `open_low` leaves `low` itself out."""
    return field(default=default, metadata={"low": low, "high": high, "open_low": open_low})


def choice(default: Any, *allowed: str) -> Any:
    """One of a few words."""
    return field(default=default, metadata={"choices": allowed})


@dataclass
class EnvConfig:
    """Which tasks, with which goals, reward and horizon."""

    _target_: str = MISSING
    name: str = MISSING  # names the task set in runs and in MLflow
    tasks: list[str] = MISSING
    goals: str = choice("benchmark", "benchmark", "fixed", "random")
    goal_seed: int = number(0, low=0)
    reward: str = choice("v2", "v1", "v2")
    horizon: int = number(500, low=1, high=500)
    train_horizon: int | None = number(
        None, low=1, high=500
    )  # of training episodes; null: as in evaluation
    fast: bool = True  # our hot paths, equal to the bit


@dataclass
class SoftModularConfig:
    """Soft modularization (Yang et al. 2020); the numbers are those of docs/paper_and_code.md."""

    _target_: str = "softmod.networks.soft_modular.SoftModular"
    num_layers: int = number(2, low=2)  # L
    num_modules: int = number(2, low=1)  # n
    module_width: int = number(256, low=1)  # d
    embedding_width: int = number(400, low=1)  # D
    state_in_routing: bool = True  # the router reads state and task, or the task alone
    gating_layers: int = number(2, low=0)  # 1: an extra gating MLP; 0 is the printed form
    gating_width: int = number(256, low=1)  # 1
    embedding_relu: bool = True  # 2: ReLU on the state embedding before it enters the modules
    routing_reads: str = choice(
        "all", "all", "last"
    )  # 3: which earlier routing layers the next one reads
    relu: str = choice("after_sum", "after_sum", "before_sum")  # 4: where the modules' ReLU stands
    head: str = choice(
        "routed", "routed", "sum"
    )  # 5: a routed shared head, or the last modules summed
    routing_feeds: str = choice("probabilities", "probabilities", "logits")  # 7
    init: str = choice("released", "released", "torch")  # 11
    norm: str = choice("none", "none", "layer")  # normalise hidden layers before their ReLU


@dataclass
class HardRoutingConfig(SoftModularConfig):
    """The same modules; the router selects one source for each target (after Rosenbaum et al.

    2018).
    """

    _target_: str = "softmod.networks.hard_routing.HardRouting"


@dataclass
class MLPConfig:
    """One network for all tasks; the observation carries the one-hot task (MT-SAC)."""

    _target_: str = "softmod.networks.mlp.MLP"
    num_layers: int = number(3, low=1)
    width: int = number(400, low=1)
    init: str = choice("released", "released", "torch")
    norm: str = choice("none", "none", "layer")  # normalise hidden layers before their ReLU


@dataclass
class MultiHeadConfig(MLPConfig):
    """A shared trunk with one output head per task (MT-MH-SAC)."""

    _target_: str = "softmod.networks.multi_head.MultiHead"


@dataclass
class SingleTaskConfig(MLPConfig):
    """A network for each task; nothing is shared (single-task SAC)."""

    _target_: str = "softmod.networks.single_task.SingleTask"


@dataclass
class MixedExpertsConfig(MLPConfig):
    """Whole networks, and a gate that mixes their outputs (Mix-Expert)."""

    _target_: str = "softmod.networks.mixed_experts.MixedExperts"
    num_experts: int = number(4, low=1)
    gate_layers: int = number(2, low=1)
    gate_width: int = number(256, low=1)


@dataclass
class CAREConfig(MLPConfig):
    """A context that attends to encoders of the state (Sodhani et al. 2021)."""

    _target_: str = "softmod.networks.experts.CARE"
    num_experts: int = number(6, low=1)
    encoder_layers: int = number(2, low=0)
    encoder_width: int = number(50, low=1)


@dataclass
class PaCoConfig(MLPConfig):
    """Weights composed from shared parameter sets, by a vector per task (Sun et al. 2022)."""

    _target_: str = "softmod.networks.paco.PaCo"
    num_sets: int = number(5, low=1)


@dataclass
class MOOREConfig(MLPConfig):
    """A task's mixture of orthogonal experts (Hendawy et al. 2024)."""

    _target_: str = "softmod.networks.experts.MOORE"
    num_experts: int = number(4, low=1)  # at most width


@dataclass
class FiLMConfig(MLPConfig):
    """The task scales and shifts every hidden layer (Perez et al. 2018)."""

    _target_: str = "softmod.networks.film.FiLM"
    embedding_width: int = number(50, low=1)


@dataclass
class ResidualConfig:
    """Residual blocks with layer normalisation, and a learned task embedding (Nauman et al.

    2025).
    """

    _target_: str = "softmod.networks.residual.Residual"
    num_blocks: int = number(2, low=0)
    width: int = number(128, low=1)
    embedding_width: int = number(32, low=1)
    head_gain: float = number(1.0, low=0.0)
    norm: str = choice("layer", "none", "layer")  # normalise hidden layers and what a block adds


NETWORKS = {
    "soft_modular": SoftModularConfig,
    "hard_routing": HardRoutingConfig,
    "mlp": MLPConfig,
    "multi_head": MultiHeadConfig,
    "single_task": SingleTaskConfig,
    "mixed_experts": MixedExpertsConfig,
    "care": CAREConfig,
    "paco": PaCoConfig,
    "moore": MOOREConfig,
    "film": FiLMConfig,
    "residual": ResidualConfig,
}


@dataclass
class SquaredConfig:
    """Value head: one output, squared error, the minimum of twin target critics (Haarnoja et al.

    2018).
    """

    _target_: str = "softmod.agent.value_heads.Squared"


@dataclass
class CategoricalConfig:
    """Value head: a distribution over fixed values, learned by cross-entropy (Bellemare et al.

    2017).
    """

    _target_: str = "softmod.agent.value_heads.Categorical"
    atoms: int = number(101, low=2)
    low: float = number(-10.0)
    high: float = number(10.0)


VALUE_HEADS = {"squared": SquaredConfig, "categorical": CategoricalConfig}


@dataclass
class PolicyConfig:
    """How the actor's network becomes a policy."""

    log_std: str = choice(
        "clamp", "clamp", "tanh"
    )  # 14: clamped to [-20, 2], or squashed into (-10, 2)
    normalize_obs: bool = False  # actor and critics read observations of mean 0 and deviation 1
    exploration_noise: str = choice(
        "white", "white", "pink"
    )  # pink: correlated over the steps of an episode


@dataclass
class AlgorithmConfig:
    """Multi-task SAC: what a single update does."""

    _target_: str = "softmod.agent.mtsac.MTSAC"
    discount: float = number(0.99, low=0.0, high=1.0)
    target_smoothing: float = number(0.005, low=0.0, high=1.0, open_low=True)
    initial_temperature: float = number(1.0, low=0.0, open_low=True)
    target_entropy_per_action: float = number(-1.0)  # times the action's size: -4 on Meta-World
    task_weights: str = choice(
        "none", "released", "paper", "none", "unsolved"
    )  # 6; unsolved: by distance from success
    update_order: str = choice("sequential", "sequential", "released")  # 12
    clip_norm: float = number(1.0, low=0.0)  # 8; 0 is off
    gradient_surgery: str = choice(
        "none", "none", "pcgrad"
    )  # what becomes of the tasks' conflicting gradients
    n_step: int = number(1, low=1)  # steps of a transition, within its episode
    reward_scaling: str = choice(
        "none", "none", "return"
    )  # return: divided by the size of each task's returns
    value_scaling: str = choice(
        "none", "none", "spread"
    )  # spread: the policy's values, by their spread in each task
    policy_delay: int = number(1, low=1)  # updates of the critics for each one of the policy
    policy_averaging: float = number(
        0.0, low=0.0, high=1.0
    )  # share of each update in the policy that acts; 0 is off


@dataclass
class AdamConfig:
    """Adam, fused."""

    _target_: str = "torch.optim.Adam"
    lr: float = number(3e-4, low=0.0, open_low=True)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = number(1e-8, low=0.0)
    fused: bool = True


@dataclass
class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay, fused."""

    _target_: str = "torch.optim.AdamW"
    lr: float = number(5e-4, low=0.0, open_low=True)
    weight_decay: float = number(1e-4, low=0.0)


@dataclass
class OptimizersConfig:
    """One optimizer option, mounted three times."""

    actor: Any = field(default_factory=dict)
    critic: Any = field(default_factory=dict)
    temperature: Any = field(default_factory=dict)


@dataclass
class RunConfig:
    """How long, how much of it, how often. Steps and cadences count environment steps."""

    steps_per_task: int = number(MISSING, low=1)
    warmup_per_task: int = number(MISSING, low=0)  # steps before the first update
    warmup_policy: str = choice(
        "untrained", "untrained", "uniform"
    )  # who acts in them (13), or uniform actions
    batch_per_task: int = number(MISSING, low=1)
    replay_per_task: int = number(MISSING, low=1)
    update_ratio: float = number(MISSING, low=0.0, open_low=True)  # updates per step of every task
    round_steps: int = number(
        MISSING, low=1
    )  # K: steps of every task between two hand-overs; divides the horizon
    eval_every: int = number(MISSING, low=1)  # env steps over all tasks
    eval_goals: int = number(50, low=1, high=50)  # goals per task in evaluations on the way
    final_eval_goals: int = number(50, low=1, high=50)  # and in the last one
    save_every: int = number(MISSING, low=1)
    log_every: int = number(MISSING, low=1)
    max_minutes: float | None = number(
        None, low=0.0, open_low=True
    )  # of training; ends the run by the clock
    stop_at: float | None = number(
        None, low=0.0, high=1.0
    )  # mean success in two evaluations running; ends the run
    resume: str = choice("auto", "auto", "must", "never")
    folder: str = "runs"


@dataclass
class WorkersConfig:
    """Who steps the environments. 0 processes: the learner's own (inline)."""

    processes: int | None = number(None, low=0)  # null: chosen from the cores at hand
    copies: int = number(1, low=1)
    timeout: float = number(
        300.0, low=0.0, open_low=True
    )  # seconds for a round, or for ten goals of an evaluation


@dataclass
class FabricConfig:
    """Where the learner computes."""

    accelerator: str = choice("auto", "auto", "cpu", "cuda")
    precision: str = choice(
        "32-true", "auto", "32-true", "tf32", "bf16-mixed"
    )  # tf32: of matrix products, on CUDA
    kernels: str = choice(
        "auto", "auto", "off"
    )  # fused operations on a CPU; auto: where a C compiler is found
    compile: str = choice(
        "auto", "auto", "eager", "compiled", "captured"
    )  # auto: captured, if the optimizers can be
    deterministic: bool = False  # on CUDA: only operations that repeat to the bit; on a CPU all do
    threads: int | None = number(None, low=1)  # null: chosen from the cores at hand


@dataclass
class TrackingConfig:
    """Where metrics go: always to the run's journal, from there to MLflow."""

    mlflow: bool = True
    uri: str | None = None  # null: an sqlite file in the working folder
    experiment: str | None = None  # null: the task set's name
    system_metrics: bool = True
    drain_seconds: float = number(30.0, low=0.0)


@dataclass
class TrainConfig:
    """Everything that `python -m softmod.train` takes."""

    name: str = MISSING
    model: str = MISSING
    seed: int = number(0, low=0)
    seeds: list[int] | None = None  # several, side by side in one process, instead of `seed`
    allow: list[str] = field(default_factory=list)  # packages of your own that a _target_ may name
    env: Any = field(default_factory=dict)
    actor: Any = field(default_factory=dict)
    critic: Any = field(default_factory=dict)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic_head: Any = field(default_factory=dict)
    published_task_weights: str = choice(
        "none", "none", "released", "paper"
    )  # of the model; read by algorithm=mtsac
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
    goals: int = number(50, low=1, high=50)
    processes: int | None = number(None, low=0)  # null: as many as the run had
    video: bool = False
    video_episodes: int = number(1, low=1, high=50)  # per task
    output: str | None = None  # null: beside the checkpoint
    allow: list[str] = field(default_factory=list)  # packages of your own that a _target_ may name


@dataclass
class ReportConfig:
    """Everything that `python -m softmod.report` takes."""

    parent: str | None = None  # a sweep's parent in MLflow: its id or name; typed as sweep=
    runs: list[str] = field(default_factory=list)  # or folders with runs
    results: list[str] = field(default_factory=list)  # or folders with saved results
    checkpoint: str | None = (
        None  # or a checkpoint, or a run's folder: how its policy uses its modules
    )
    save: str | None = None  # with runs: save them as results in this folder too
    uri: str | None = None  # the MLflow store; null: as for training
    output: str = "report"
    level: float = number(0.8, low=0.0, high=1.0)  # of success, whose environment steps are told
    episodes: int = number(5, low=1, high=50)  # of each task, to see how modules are used
    video: bool = False  # of a rollout of each task, with its routes moving beside it
    allow: list[str] = field(
        default_factory=list
    )  # packages of your own that tasks and networks come from
