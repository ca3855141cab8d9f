"""Schema of a configuration: one dataclass per group with types, ranges and choices.

All values are in `conf/`. The comments at the fields are shown by `--help`. This module has no
heavy imports, so that a command line is checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

MOST = 1024  # processes or threads


def number(low: float | None = None, high: float | None = None, open_low: bool = False) -> Any:
    """Declare a number within [low, high]; `open_low` excludes `low`."""
    return field(default=MISSING, metadata={"low": low, "high": high, "open_low": open_low})


def choice(*allowed: str) -> Any:
    """Declare a string that must be one of a few words."""
    return field(default=MISSING, metadata={"choices": allowed})


PATH = {"path": True}  # metadata of a path, of several, or null; `~` is the user's home folder


@dataclass
class EnvConfig:
    """Task set with its goals, reward and horizon."""

    _target_: str = MISSING
    name: str = MISSING  # name of the task set in run folders and in MLflow
    tasks: list[str] = MISSING  # task names
    # benchmark: Meta-World's 50 per task; fixed: the first of them; random: new every episode
    goals: str = choice("benchmark", "fixed", "random")
    goal_seed: int = number(low=0)  # seed of the goals
    reward: str = choice("v1", "v2")  # version of Meta-World's reward functions
    horizon: int = number(low=1, high=500)  # steps of an evaluation episode
    # steps of a training episode; null: as in evaluation
    train_horizon: int | None = number(low=1, high=500)
    fast: bool = MISSING  # optimized stepping, bit-identical to Meta-World


@dataclass
class SoftModularConfig:
    """Soft modularization (Yang et al. 2020) and hard routing (Rosenbaum et al. 2018).

    Numbers in parentheses are differences in docs/paper_and_code.md.
    """

    _target_: str = MISSING
    num_layers: int = number(low=2)  # layers of modules (L in the paper)
    num_modules: int = number(low=1)  # modules per layer (n)
    module_width: int = number(low=1)  # units of a module (d)
    embedding_width: int = number(low=1)  # units of the state and task embeddings (D)
    state_in_routing: bool = MISSING  # route by state and task; false: by task only
    gating_layers: int = number(low=0)  # layers of the gating MLP; 0 as in the paper (1)
    gating_width: int = number(low=1)  # units of a gating layer (1)
    embedding_relu: bool = MISSING  # apply ReLU to the state embedding (2)
    routing_reads: str = choice("all", "last")  # earlier routing layers that the next one reads (3)
    relu: str = choice("after_sum", "before_sum")  # apply ReLU after or before the weighted sum (4)
    # routed: shared head on a weighted sum; sum: sum of the last modules' outputs (5)
    head: str = choice("routed", "sum")
    routing_feeds: str = choice("probabilities", "logits")  # input of the next routing layer (7)
    init: str = choice("released", "torch")  # weight initialization (11)
    norm: str = choice("none", "layer")  # normalization of hidden layers before ReLU


@dataclass
class MLPConfig:
    """One network for all tasks (MT-SAC), a head per task (MT-MH-SAC), or a network per task."""

    _target_: str = MISSING
    num_layers: int = number(low=1)  # hidden layers
    width: int = number(low=1)  # units of a hidden layer
    init: str = choice("released", "torch")  # weight initialization (11)
    norm: str = choice("none", "layer")  # normalization of hidden layers before ReLU


@dataclass
class MixedExpertsConfig(MLPConfig):
    """Expert networks whose outputs are mixed by a gate (Mix-Expert)."""

    num_experts: int = number(low=1)  # expert networks
    gate_layers: int = number(low=1)  # hidden layers of the gate
    gate_width: int = number(low=1)  # units of a gate layer


@dataclass
class CAREConfig(MLPConfig):
    """Mixture of state encoders, weighted by attention over the task (Sodhani et al. 2021)."""

    num_experts: int = number(low=1)  # state encoders
    encoder_layers: int = number(low=0)  # hidden layers of an encoder
    encoder_width: int = number(low=1)  # units of an encoder layer


@dataclass
class PaCoConfig(MLPConfig):
    """Weights composed from shared parameter sets by a vector per task (Sun et al. 2022)."""

    num_sets: int = number(low=1)  # shared parameter sets


@dataclass
class MOOREConfig(MLPConfig):
    """Mixture of orthogonal experts, weighted per task (Hendawy et al. 2024)."""

    num_experts: int = number(low=1)  # orthogonal experts; at most width


@dataclass
class FiLMConfig(MLPConfig):
    """MLP whose hidden layers are scaled and shifted per task (Perez et al. 2018)."""

    embedding_width: int = number(low=1)  # units of the task embedding


@dataclass
class ResidualConfig:
    """Residual blocks with layer normalization and a task embedding (Nauman et al. 2025)."""

    _target_: str = MISSING
    num_blocks: int = number(low=0)  # residual blocks
    width: int = number(low=1)  # units of a block
    embedding_width: int = number(low=1)  # units of the task embedding
    head_gain: float = number(low=0.0)  # scale of the head's initial weights
    norm: str = choice("none", "layer")  # normalization of hidden layers and block outputs


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
    atoms: int = number(low=2)  # values of the distribution, evenly spaced
    low: float = number()  # lowest return covered, after reward scaling
    high: float = number()  # highest return covered, after reward scaling


VALUE_HEADS = {"squared": SquaredConfig, "categorical": CategoricalConfig}


@dataclass
class PolicyConfig:
    """Policy head, observation normalization and exploration noise."""

    log_std: str = choice("clamp", "tanh")  # clamp to [-20, 2], or squash into (-10, 2) (14)
    normalize_obs: bool = MISSING  # standardize observations for actor and critics
    exploration_noise: str = choice("white", "pink")  # pink: correlated over an episode's steps


@dataclass
class AlgorithmConfig:
    """Multi-task SAC: one update."""

    _target_: str = MISSING
    discount: float = number(low=0.0, high=1.0)  # discount factor per step (gamma)
    # fraction of the critics mixed into the target critics per update (tau)
    target_smoothing: float = number(low=0.0, high=1.0, open_low=True)
    initial_temperature: float = number(low=0.0, open_low=True)  # entropy coefficient at the start
    target_entropy_per_action: float = number()  # target entropy, nats per action dimension
    # weights of the tasks' losses; unsolved: by distance from success (6)
    task_weights: str = choice("released", "paper", "none", "unsolved")
    update_order: str = choice("sequential", "released")  # order of actor and critic updates (12)
    clip_norm: float = number(low=0.0)  # largest gradient norm; 0: no clipping (8)
    gradient_surgery: str = choice("none", "pcgrad")  # handling of conflicting task gradients
    n_step: int = number(low=1, high=500)  # steps of a return before bootstrapping
    # return: divide rewards by the scale of each task's returns
    reward_scaling: str = choice("none", "return")
    # spread: divide the critic values in the policy loss by their spread in each task
    value_scaling: str = choice("none", "spread")
    policy_delay: int = number(low=1)  # critic updates per policy update
    # fraction of the trained policy mixed into the averaged acting policy per update; 0: none
    policy_averaging: float = number(low=0.0, high=1.0)
    # keyword options of an algorithm class of your own
    own: dict[str, Any] = field(default_factory=dict)


@dataclass
class AdamConfig:
    """Adam (Kingma and Ba 2015)."""

    _target_: str = MISSING
    lr: float = number(low=0.0, open_low=True)  # learning rate
    betas: list[float] = MISSING  # decay rates of the first and second moments
    eps: float = number(low=0.0)  # added to the denominator
    fused: bool = MISSING  # one fused kernel; required by captured updates


@dataclass
class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    lr: float = number(low=0.0, open_low=True)  # learning rate
    weight_decay: float = number(low=0.0)  # decoupled weight decay


@dataclass
class OptimizersConfig:
    """Optimizers of actor, critics and temperatures: one option, mounted three times."""

    actor: Any = field(default_factory=dict)
    critic: Any = field(default_factory=dict)
    temperature: Any = field(default_factory=dict)


@dataclass
class RunConfig:
    """Lengths, sizes and intervals of a run, in environment steps."""

    steps_per_task: int = number(low=1)  # env steps of each task
    warmup_per_task: int = number(low=0)  # env steps of each task before the first update
    # actions of the warm-up: the untrained policy's or uniform ones (13)
    warmup_policy: str = choice("untrained", "uniform")
    batch_per_task: int = number(low=1)  # transitions of each task in a batch
    replay_per_task: int = number(low=1)  # transitions of each task in the replay
    update_ratio: float = number(low=0.0, open_low=True)  # updates per env step of each task
    # env steps of each task in a round; must divide the training horizon
    round_steps: int = number(low=1)
    eval_every: int = number(low=1)  # env steps of all tasks between evaluations
    eval_goals: int = number(low=1, high=50)  # goals per task in an evaluation during training
    final_eval_goals: int = number(low=1, high=50)  # goals per task in the final evaluation
    save_every: int = number(low=1)  # env steps of all tasks between checkpoints
    log_every: int = number(low=1)  # env steps of all tasks between reports of metrics
    # minutes of training after which the run ends; null: no limit
    max_minutes: float | None = number(low=0.0, open_low=True)
    # mean success rate that ends the run when two evaluations in a row reach it; null: off
    stop_at: float | None = number(low=0.0, high=1.0)
    # auto: resume if there is a checkpoint; must: only resume; never: start in a new folder;
    # weights: only resume, and refill the replay if it is missing or damaged
    resume: str = choice("auto", "must", "never", "weights")
    folder: str = field(default=MISSING, metadata=PATH)  # parent folder of all runs


@dataclass
class WorkersConfig:
    """Processes that step the environments."""

    # worker processes; 0: the learner steps the environments; null: chosen from the cores
    processes: int | None = number(low=0, high=MOST)
    copies: int = number(low=1)  # environments per task
    # time limit in seconds for a round, and for each ten goals of an evaluation
    timeout: float = number(low=0.0, open_low=True)


@dataclass
class FabricConfig:
    """Device, precision and compilation of the learner."""

    # device of the learner; auto: cuda if available
    accelerator: str = choice("auto", "cpu", "cuda")
    # numeric precision; tf32 needs CUDA; bf16: products only, for CUDA; bf16-mixed: autocast; auto:
    # bf16-mixed on a CPU that multiplies bfloat16
    precision: str = choice("auto", "32-true", "tf32", "bf16", "bf16-mixed")
    kernels: str = choice("auto", "off")  # fused CPU kernels; auto: if a C compiler is found
    # execution of an update; auto: captured if the optimizers support it
    compile: str = choice("auto", "eager", "compiled", "captured")
    deterministic: bool = MISSING  # use only deterministic operations on CUDA; a CPU always does
    # updates per CUDA graph, with batches and noise drawn on the device; 0: draw on the host; null:
    # about 25 on a GPU whose updates are captured, 0 elsewhere
    updates_per_graph: int | None = number(low=0, high=MOST)
    # CPU threads of the learner; null: chosen from the cores
    threads: int | None = number(low=1, high=MOST)


@dataclass
class TrackingConfig:
    """Destination of metrics: always the run's journal, optionally MLflow."""

    mlflow: bool = MISSING  # upload the journal to MLflow
    uri: str | None = MISSING  # MLflow store; null: an SQLite file in the working folder
    experiment: str | None = MISSING  # MLflow experiment; null: name of the task set
    model: bool = MISSING  # log the best policy as an MLflow model; needs the extra `export`
    register: str | None = MISSING  # name under which MLflow registers the best policy; null: none
    system_metrics: bool = MISSING  # log processor and memory use
    drain_seconds: float = number(low=0.0)  # seconds that the last upload may stall


@dataclass
class TrainConfig:
    """Configuration of `python -m softmod.train`."""

    name: str = MISSING  # name of the run's folder
    model: str = MISSING  # name of the model, set by its option
    seed: int = number(low=0)  # random seed
    seeds: list[int] | None = MISSING  # several seeds in one process, instead of `seed`
    # weights to start from: a checkpoint, a run's folder or a policy that ships with softmod; null:
    # new ones
    init_from: str | None = field(default=MISSING, metadata=PATH)
    # hash of these weights, which is part of the run's identity; null: filled in
    init_digest: str | None = MISSING
    env: Any = field(default_factory=dict)
    actor: Any = field(default_factory=dict)
    critic: Any = field(default_factory=dict)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic_head: Any = field(default_factory=dict)
    # the model's published task weights, used by algorithm=mtsac
    published_task_weights: str = choice("none", "released", "paper")
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizersConfig = field(default_factory=OptimizersConfig)
    run: RunConfig = field(default_factory=RunConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    callbacks: list[Any] = MISSING  # your own callback classes, as in [{_target_: mine.Callback}]


@dataclass
class EvaluateConfig:
    """Configuration of `python -m softmod.evaluate`."""

    # a checkpoint, a run's folder (its newest checkpoint), or a policy that ships with softmod
    checkpoint: str = field(default=MISSING, metadata=PATH)
    goals: int = number(low=1, high=50)  # goals per task
    # worker processes; null: as many as the run had
    processes: int | None = number(low=0, high=MOST)
    video: bool = MISSING  # write a video per task
    video_episodes: int = number(low=1, high=50)  # episodes per video
    # output folder; null: beside the checkpoints
    output: str | None = field(default=MISSING, metadata=PATH)
    allow: list[str] = MISSING  # packages of your own that a _target_ may name
    # mlflow: the result goes to the run in MLflow, if the run is there; journal: it does not
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class UiConfig:
    """Configuration of `python -m softmod.ui`."""

    port: int = number(low=1, high=65_535)  # port on this machine
    uri: str | None = MISSING  # an SQLite store; null: as for training


FORMATS = ("onnx", "torch", "weights", "rollouts", "replay")


@dataclass
class ExportConfig:
    """Configuration of `python -m softmod.export`."""

    # a checkpoint, a run's folder (its newest checkpoint), or a policy that ships with softmod
    checkpoint: str = field(default=MISSING, metadata=PATH)
    # onnx, torch: the policy; weights: a checkpoint without replay and optimizers; rollouts,
    # replay: Minari datasets
    formats: list[str] = field(default=MISSING, metadata={"choices": FORMATS})
    goals: int = number(low=1, high=50)  # with rollouts: goals per task, an episode each
    # output folder; null: beside the checkpoints
    output: str | None = field(default=MISSING, metadata=PATH)
    allow: list[str] = MISSING  # packages of your own that a _target_ may name


@dataclass
class ReportConfig:
    """Configuration of `python -m softmod.report`."""

    parent: str | None = MISSING  # id or name of a sweep's parent run in MLflow; typed as sweep=
    runs: list[str] = field(default=MISSING, metadata=PATH)  # folders with runs
    results: list[str] = field(default=MISSING, metadata=PATH)  # folders with saved results
    # a checkpoint, a run's folder or a shipped policy, for a report on its routing
    checkpoint: str | None = field(default=MISSING, metadata=PATH)
    # with runs: folder in which to save them as results
    save: str | None = field(default=MISSING, metadata=PATH)
    uri: str | None = MISSING  # MLflow store; null: as for training
    output: str = field(default=MISSING, metadata=PATH)  # output folder
    level: float = number(low=0.0, high=1.0)  # mean success rate for the steps-to-reach column
    episodes: int = number(low=1, high=50)  # episodes per task, with checkpoint
    video: bool = MISSING  # with checkpoint: a video per task with the routing graph
    swap: bool = MISSING  # with checkpoint: success of each task with the routing of the others
    allow: list[str] = MISSING  # packages of your own that a _target_ may name
