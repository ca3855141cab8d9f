"""The losses of multi-task SAC as pure functions.

Equation numbers are those of Yang et al. (NeurIPS 2020); numbers without "Eq." are the differences
listed in docs/paper_and_code.md. Shapes: `task` tasks, `batch` transitions per task, `critic`
critics.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from softmod import kernels

LEAST_SPREAD = 0.02  # of scaled values; a smaller spread is treated as noise
SOLVED_SHARE = 0.1  # the distance from success assigned to a task that always succeeds


def critic_target(
    reward: Float[Tensor, "task batch"],
    discount: Float[Tensor, "task batch"],
    next_q: Float[Tensor, "critic task batch"],
    next_entropy: Float[Tensor, "task batch"],
) -> Float[Tensor, "task batch"]:
    """Return the soft target `r + gamma (min_k Q_k(s', a') - alpha_i log pi(a'|s'))`.

    Every transition bootstraps (9). `next_entropy` is `-alpha_i log pi(a'|s')`.
    """
    return reward + discount * (next_q.amin(0) + next_entropy)


def project(
    values: Float[Tensor, "*batch source"],
    probabilities: Float[Tensor, "*batch source"],
    support: Float[Tensor, " atom"],
) -> Float[Tensor, "*batch atom"]:
    """Project a distribution over `values` onto evenly spaced atoms (C51, Algorithm 1).

    The probability of each value is split between the two neighbouring atoms in inverse proportion
    to the distances. This preserves the mass and, within the range of the atoms, the mean. Values
    outside the range are clipped. A non-finite value makes its row NaN.
    """
    step = (support[-1] - support[0]) / (len(support) - 1)
    position = ((values - support[0]) / step).nan_to_num().clamp(0, len(support) - 1)
    spread = spread_by_product if probabilities.is_cuda else spread_by_adding
    projected = spread(position, probabilities, len(support))
    return projected + 0.0 * values.sum(-1, keepdim=True)


def spread_by_adding(
    position: Float[Tensor, "*batch source"],
    probabilities: Float[Tensor, "*batch source"],
    atoms: int,
) -> Float[Tensor, "*batch atom"]:
    """Split each probability between the two atoms around its position in [0, atoms - 1]."""
    below = position.floor()
    share = position - below  # of the atom above
    index = below.long()
    projected = (
        torch.zeros_like(probabilities[..., :1])
        .expand(*probabilities.shape[:-1], atoms)
        .contiguous()
    )
    projected.scatter_add_(-1, index, probabilities * (1 - share))
    projected.scatter_add_(-1, (index + 1).clamp(max=atoms - 1), probabilities * share)
    return projected


def spread_by_product(
    position: Float[Tensor, "*batch source"],
    probabilities: Float[Tensor, "*batch source"],
    atoms: int,
) -> Float[Tensor, "*batch atom"]:
    """Compute `spread_by_adding` deterministically on GPUs, with `atoms` times the arithmetic.

    On GPUs `scatter_add_` adds in no fixed order.
    """
    numbers = torch.arange(atoms, device=position.device, dtype=position.dtype)
    shares = (1 - (position.unsqueeze(-1) - numbers).abs()).clamp(min=0)
    return (probabilities.unsqueeze(-1) * shares).sum(-2)


def cross_entropy(
    outputs: Float[Tensor, "critic task batch atom"],
    target: Float[Tensor, "task batch atom"],
    weight: Float[Tensor, " task"],
) -> Float[Tensor, " critic"]:
    """Return each critic's cross-entropy with the target, weighted over tasks (Eq. 10)."""
    per_task = -(target * outputs.log_softmax(-1)).sum(-1).mean(-1)
    return (per_task * weight).mean(-1)


def critic_loss(
    q: Float[Tensor, "critic task batch"],
    target: Float[Tensor, "task batch"],
    weight: Float[Tensor, " task"],
) -> Float[Tensor, " critic"]:
    """Return each critic's mean squared error, weighted over tasks (Eq. 10)."""
    per_task = (q - target).square().mean(-1)
    return (per_task * weight).mean(-1)


def spread(value: Float[Tensor, "task batch"]) -> Float[Tensor, "task 1"]:
    """Return the interquartile range of the values of each task, at least 0.02.

    It is robust to a few outliers, such as the states around a task's first successes.
    """
    ordered = value.detach().sort(-1).values
    quarter = value.shape[-1] // 4
    return (ordered[:, -1 - quarter] - ordered[:, quarter]).clamp(min=LEAST_SPREAD).unsqueeze(-1)


def actor_loss(
    value: Float[Tensor, "task batch"],
    log_prob: Float[Tensor, "task batch"],
    temperature: Float[Tensor, " task"],
    weight: Float[Tensor, " task"],
) -> Float[Tensor, ""]:
    """Return the mean of `alpha_i log pi(a|s) - Q(s, a)`, weighted over tasks (Eq. 10).

    `value` is `Q(s, a)` from the value head; for the squared head, `min_k Q_k(s, a)`.
    """
    per_task = (temperature[:, None] * log_prob - value).mean(-1)
    return (per_task * weight).mean()


def policy_loss(
    value: Float[Tensor, "task batch"],
    log_prob: Float[Tensor, "task batch"],
    temperature: Float[Tensor, " task"],
    weight: Float[Tensor, " task"],
    scaled: bool,
) -> Float[Tensor, ""]:
    """Return `actor_loss`, with values divided by their `spread` if `scaled`."""
    inputs = value, log_prob, temperature, weight
    if kernels.in_fp32(*inputs) and value.shape[-1] <= kernels.heads.MOST:
        return kernels.heads.policy_loss(*inputs, LEAST_SPREAD if scaled else 0.0)
    if scaled:
        value = value.float() / spread(value.float())
    return actor_loss(value, log_prob, temperature, weight)


def temperature_loss(
    log_temperature: Float[Tensor, " task"],
    log_prob: Float[Tensor, "task batch"],
    target_entropy: float,
) -> Float[Tensor, ""]:
    """Return the mean of `-log alpha_i (log pi(a|s) + target entropy)`, unweighted (12)."""
    if kernels.in_fp32(log_temperature, log_prob):
        return kernels.heads.temperature_loss(log_temperature, log_prob, target_entropy)
    return -(log_temperature * (log_prob.detach() + target_entropy).mean(-1)).mean()


def distance_weights(success_rate: Float[Tensor, " task"]) -> Float[Tensor, " task"]:
    """Return weights proportional to `1.1 - success_rate`, with mean 1.

    Solved tasks keep a small weight.
    """
    if kernels.in_fp32(success_rate):
        return kernels.heads.distance_weights(success_rate, 1.0 + SOLVED_SHARE)
    distance = 1.0 - success_rate + SOLVED_SHARE
    return distance / distance.mean()


def task_weights(log_temperature: Float[Tensor, " task"], form: str) -> Float[Tensor, " task"]:
    """Return the weights of the tasks' losses, with mean 1.

    `released` is `T softmax(-log alpha)` (6), `paper` is `T softmax(-alpha)` (Eq. 10), `none` is 1.
    Eq. 10 sums over tasks with weights that sum to 1, which equals the mean with these weights.
    """
    if form == "none":
        return torch.ones_like(log_temperature)
    logits = -log_temperature if form == "released" else -log_temperature.exp()
    return len(log_temperature) * logits.detach().softmax(-1)
