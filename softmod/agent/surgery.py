"""Gradients per task: their agreement, and gradient surgery on those that conflict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from softmod.networks.network import Network

Aux = Tensor | None  # the second output of a loss function, `[task, ...]`
Loss = Callable[[slice], tuple[Tensor, Aux]]  # from a slice of tasks to the mean loss over them


def task_gradients(
    loss: Loss, network: Network, num_tasks: int
) -> tuple[Float[Tensor, "task *member"], Float[Tensor, "stack task parameter"], Aux]:
    """Return the loss and gradient of each task, and the loss function's second output.

    The means over tasks are the total loss and its gradient. Each task runs only its own rows
    through the network, so the arithmetic is about that of one backward pass.
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
    """Return the mean gradient after PCGrad (Yu et al. 2020, Algorithm 1), per member.

    Each task's gradient is projected, one after the other, onto the normal plane of every other
    task's original gradient that it conflicts with. `order` holds a random number per pair of
    tasks; task `i` visits the others in the order of row `i`.

    The projections are computed on the coefficients of `g_i' = sum_j c_ij g_j`, which needs only
    the inner products of the gradients.
    """
    products = gradients @ gradients.transpose(1, 2)  # (stack, task, task)
    stack, count, _ = products.shape
    squares = products.diagonal(dim1=1, dim2=2)
    identity = torch.eye(count, dtype=gradients.dtype, device=gradients.device)
    coefficients = identity.repeat(stack, 1, 1)
    each = torch.arange(count, device=gradients.device)
    for others in order.argsort(1).unbind(1):  # others[i]: the task that task i visits in this turn
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
    """Write a flat gradient to a network's parameters."""
    parameters = list(network.parameters())
    parts = gradient.split([parameter.numel() // network.stack for parameter in parameters], 1)
    for parameter, part in zip(parameters, parts, strict=True):
        # Fused optimizers require the strides of the parameter.
        flat = part.contiguous().view(-1)
        parameter.grad = flat.view(parameter.shape)


@torch.no_grad()
def cosines(gradients: Float[Tensor, "stack task parameter"]) -> Float[Tensor, "task task"]:
    """Return the cosine of each pair of tasks' gradients, averaged over members.

    Gradients with a negative cosine conflict.
    """
    units = torch.nn.functional.normalize(gradients, dim=-1)
    return (units @ units.transpose(1, 2)).mean(0)


def agreement(cosine: Float[Tensor, "task task"]) -> dict[str, Tensor]:
    """Summarise cosines.

    Returns:
        `cosine`: each task's mean cosine with the others `[task]`; `mean_cosine`: its mean over
        tasks; `conflicts`: the fraction of pairs with a negative cosine.
    """
    count = len(cosine)
    others = ~torch.eye(count, dtype=torch.bool, device=cosine.device)
    return {
        "cosine": (cosine * others).sum(1) / (count - 1),
        "mean_cosine": (cosine * others).sum() / (count * (count - 1)),
        "conflicts": ((cosine < 0) & others).sum() / (count * (count - 1)),
    }
