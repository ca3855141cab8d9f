"""The residual network against a loop over members and tasks in plain tensors; initial values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softmod.networks.residual import Residual
from tests.networks.plain import standard
from tests.settings import network

TASKS, IN, OUT, ROWS = 3, 4, 5, 6


def naive(net: Residual, member: int, x: Tensor, task: int) -> Tensor:
    """Evaluate one member for one task, with input and embedding concatenated."""

    def dense(layer, features: Tensor) -> Tensor:
        return features @ layer.weight[member] + layer.bias[member, 0]

    embedding = net.task[member, task]
    embedding = embedding / embedding.square().sum().sqrt()
    features = standard(dense(net.first, torch.cat([x, embedding.expand(len(x), -1)], -1))).relu()
    for block in net.blocks:
        inner = standard(dense(block.inner, features)).relu()
        features = features + standard(dense(block.outer, inner))
    return dense(net.head, features)


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
@pytest.mark.parametrize("tasks", [None, [2, 0]])
def test_it_equals_a_loop_over_members_and_tasks(num_blocks: int, tasks: list[int] | None):
    torch.manual_seed(0)
    sizes = network("residual", num_blocks=num_blocks, width=8, embedding_width=5, head_gain=1.0)
    net = Residual(IN, OUT, TASKS, 2, **sizes).double()
    for parameter in net.parameters():  # embeddings leave the unit sphere, biases leave zero
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    index = None if tasks is None else torch.tensor(tasks)
    named = range(TASKS) if tasks is None else tasks
    x = torch.randn(len(named), ROWS, IN, dtype=torch.float64)
    ours = net(x, index)
    theirs = torch.stack(
        [torch.stack([naive(net, m, x[i], task) for i, task in enumerate(named)]) for m in range(2)]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradients = [
        torch.autograd.grad(out.square().sum(), [*net.parameters()]) for out in (ours, theirs)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_weights_start_orthogonal_and_biases_at_zero():
    net = Residual(39, 101, 10, 2, **network("residual", width=128, head_gain=0.1))
    inner = [layer for block in net.blocks for layer in (block.inner, block.outer)]
    assert [tuple(layer.weight.shape) for layer in (net.first, *inner, net.head)] == [
        (2, 71, 128), *[(2, 128, 128)] * 4, (2, 128, 101),
    ]  # fmt: skip
    for layer, gain in [
        (net.first, math.sqrt(2)),
        *((layer, math.sqrt(2)) for layer in inner),
        (net.head, 0.1),
    ]:
        weight = layer.weight
        square = weight @ weight.mT if weight.shape[1] <= weight.shape[2] else weight.mT @ weight
        expected = gain**2 * torch.eye(square.shape[-1]).expand_as(square)
        torch.testing.assert_close(square, expected, rtol=0, atol=1e-5)
        assert not layer.bias.any()
        assert (weight[0] - weight[1]).abs().max() > gain * 0.01  # members start apart


def test_tasks_are_embedded_at_unit_length():
    net = Residual(39, 8, 10, 2, **network("residual"))
    assert net.task.shape == (2, 10, 32)
    torch.testing.assert_close(net.task.square().sum(-1), torch.ones(2, 10))
    x = torch.randn(10, 3, 39)
    before = net(x)
    with torch.no_grad():
        net.task.mul_(7.0)
    torch.testing.assert_close(net(x), before)  # only the direction counts
