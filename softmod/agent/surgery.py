"""The tasks' gradients one by one: how much they agree, and what becomes of those that conflict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from softmod.networks.network import Network

Aux = Tensor | None  # what comes with a loss, `[task, ...]`
Loss = Callable[[slice], tuple[Tensor, Aux]]  # of some of the tasks: their mean


def task_gradients(
    loss: Loss, network: Network, num_tasks: int
) -> tuple[Float[Tensor, "task *member"], Float[Tensor, "stack task parameter"], Aux]:
    """Return each task's loss, its gradient, and what comes with the losses.

    The mean over tasks is the loss of all tasks, and its gradient.

    A task's own rows run through the network, so that all of this costs about as much arithmetic as
    one backward pass.
    """
    parameters = list(network.parameters())
    values = []
    gradients = []
    aux = []
    for task in range(num_tasks):
        value, own = loss(slice(task, task + 1))
        parts = torch.autograd.grad(value.sum(), parameters)
        values.append(value.detach())
        gradients.append(torch.cat([part.view(network.stack, -1) for part in parts], 1))
        if own is not None:
            aux.append(own)
    return torch.stack(values), torch.stack(gradients, 1), torch.cat(aux) if aux else None


@torch.no_grad()
def pcgrad(
    gradients: Float[Tensor, "stack task parameter"], order: Float[Tensor, "task task"]
) -> Float[Tensor, "stack parameter"]:
    """The mean gradient after gradient surgery (PCGrad, Yu et al. 2020, Algorithm 1), for each
    member by itself.

    A task's gradient loses its component along each other task's original one that it points
    against, one after the other; `order` holds a random number for each pair, whose ranks are the
    order. Everything happens in coefficients: `g_i' = sum_j c_ij g_j`, for which the gradients'
    inner products are enough.
    """
    products = gradients @ gradients.transpose(1, 2)  # (stack, task, task)
    stack, count, _ = products.shape
    squares = products.diagonal(dim1=1, dim2=2)
    coefficients = torch.eye(count, dtype=gradients.dtype, device=gradients.device).repeat(
        stack, 1, 1
    )
    each = torch.arange(count, device=gradients.device)
    for others in order.argsort(1).unbind(
        1
    ):  # the task that each task is held against in this turn
        along = (coefficients * products[:, others]).sum(-1)  # g_i' . g_j
        square = squares[:, others]
        conflicting = (along < 0) & (others != each) & (square > 0)
        correction = torch.where(
            conflicting, along / square.clamp(min=torch.finfo(square.dtype).tiny), 0.0
        )
        coefficients.scatter_add_(2, others.expand(stack, count)[..., None], -correction[..., None])
    return (coefficients.mean(1, keepdim=True) @ gradients).squeeze(1)


@torch.no_grad()
def set_gradient(network: Network, gradient: Float[Tensor, "stack parameter"]) -> None:
    """Leave a flat gradient on a network's parameters."""
    parameters = list(network.parameters())
    parts = gradient.split([parameter.numel() // network.stack for parameter in parameters], 1)
    for parameter, part in zip(parameters, parts, strict=True):
        flat = part.contiguous().view(
            -1
        )  # so that it gets the parameter's strides, for which fused optimizers ask
        parameter.grad = flat.view(parameter.shape)


@torch.no_grad()
def cosines(gradients: Float[Tensor, "stack task parameter"]) -> Float[Tensor, "task task"]:
    """The cosine between each pair of tasks' gradients, a mean over members; below 0
    they conflict.
    """
    units = torch.nn.functional.normalize(gradients, dim=-1)
    return (units @ units.transpose(1, 2)).mean(0)


def agreement(cosine: Float[Tensor, "task task"]) -> dict[str, Tensor]:
    """Summarise cosines: each task's mean cosine with the others `[task]`, their mean, the share of
    conflicts.
    """
    count = len(cosine)
    others = ~torch.eye(count, dtype=torch.bool, device=cosine.device)
    return {
        "cosine": (cosine * others).sum(1) / (count - 1),
        "mean_cosine": (cosine * others).sum() / (count * (count - 1)),
        "conflicts": ((cosine < 0) & others).sum() / (count * (count - 1)),
    }
