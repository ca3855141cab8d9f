"""Stacked networks against loops over modules in plain tensors, for every option and any size."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softmod.networks.gaussian import Policy, split, squash
from softmod.networks.hard_routing import HardRouting
from softmod.networks.soft_modular import SoftModular
from tests.networks.kinds import EVERY, FORMS, ROUTING_LAYERS, SMALL
from tests.networks.plain import standard
from tests.settings import network, published


def make(kind: str, stack: int = 2, tasks: int = 3, **options):
    torch.manual_seed(7)
    network = FORMS[kind](4, 3, tasks, stack, **(SMALL[kind] | options)).double()
    for parameter in network.parameters():  # heads start near zero; make everything count
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    return network


def linear(layer, member: int, x: Tensor) -> Tensor:
    return x @ layer.weight[member] + layer.bias[member, 0]


def naive_soft_modular(
    net: SoftModular, member: int, x: Tensor, task: int
) -> tuple[Tensor, list[list[list[float]]]]:
    """Evaluate one member for one state of one task, module by module.

    This follows Eq. 4 to 9 and the options of the released code.
    """
    relu, n, router = torch.relu, net.num_modules, net.router

    def weigh(logits: Tensor) -> Tensor:
        if isinstance(net, HardRouting):
            return torch.nn.functional.one_hot(logits.argmax(), n).double()
        return logits.softmax(0)

    state = standard(linear(net.state[0], member, x), net.norm)
    state = standard(linear(net.state[1], member, relu(state)), net.norm)
    embedding = state * (net.task.weight[member, task] + net.task.bias[member, 0])
    for gate in router.gating:
        embedding = linear(gate, member, relu(embedding))
    routes, fed = [], []
    for number, out in enumerate(router.output):
        signal = embedding
        if number:
            read = torch.cat(fed) if router.reads == "all" else fed[-1]
            signal = linear(router.condition[number - 1], member, read) * embedding
        logits = linear(out, member, relu(signal))
        rows = [weigh(logits[i : i + n]) for i in range(0, len(logits), n)]
        routes.append(rows)
        fed.append(logits if router.feeds == "logits" else torch.cat(rows))
    start = relu(state) if net.embedding_relu else state
    first = linear(net.first, member, start)
    width = len(first) // n
    modules = [first[m * width : (m + 1) * width] for m in range(n)]

    def arriving(rows: list[Tensor]) -> list[Tensor]:
        sums = []
        for row in rows:
            parts = [relu(g) if net.relu == "before_sum" else g for g in modules]
            total = standard(
                sum(weight * g for weight, g in zip(row, parts, strict=True)), net.norm
            )
            sums.append(total if net.relu == "before_sum" else relu(total))
        return sums

    for number, layer in enumerate(net.between):
        inputs = arriving(routes[number])
        modules = [linear(layer, member * n + m, inputs[m]) for m in range(n)]
    inputs = arriving(routes[-1])
    if net.head_kind == "routed":
        return linear(net.last, member, inputs[0]), routes
    return sum(linear(net.last, member * n + m, inputs[m]) for m in range(n)), routes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2},
        {"num_layers": 5, "num_modules": 2},
        {"num_modules": 1},
        {"gating_layers": 0},
        {"gating_layers": 3, "gating_width": 11},
        {"embedding_relu": False},
        {"routing_reads": "last"},
        {"relu": "before_sum"},
        {"head": "sum"},
        {"head": "sum", "num_layers": 2},
        {"routing_feeds": "logits"},
        {"norm": "layer"},
        {"norm": "layer", "relu": "before_sum"},
        {"norm": "layer", "head": "sum", "embedding_relu": False},
        {
            "head": "sum",
            "relu": "before_sum",
            "routing_reads": "last",
            "gating_layers": 0,
            "embedding_relu": False,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["soft_modular", "hard_routing"])
def test_soft_modular_equals_a_loop_over_modules(kind, options):
    net = make(kind, **options)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        out, routes = net(x), net.routing(x)
        for member, task, row in [(m, t, b) for m in range(2) for t in range(3) for b in range(4)]:
            expected, expected_routes = naive_soft_modular(net, member, x[task, row], task)
            torch.testing.assert_close(out[member, task, row], expected, rtol=1e-10, atol=1e-12)
            assert len(routes) == len(expected_routes)
            for route, rows in zip(routes, expected_routes, strict=True):
                torch.testing.assert_close(
                    route[member, task, row], torch.stack(rows), rtol=1e-10, atol=1e-12
                )


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("kind", ["mlp", "multi_head"])
def test_baselines_equal_plain_layers_on_a_one_hot_task(kind, norm):
    net = make(kind, norm=norm)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    one_hot = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        out = net(x)
        for member, task, row in [(m, t, b) for m in range(2) for t in range(3) for b in range(4)]:
            trunk = net.trunk
            weight = torch.cat([trunk.first.weight[member], trunk.task.weight[member]])
            hidden = torch.cat([x[task, row], one_hot[task]]) @ weight + trunk.first.bias[member, 0]
            for layer in trunk.hidden:
                hidden = linear(layer, member, torch.relu(standard(hidden, norm)))
            hidden = torch.relu(standard(hidden, norm))
            head, index = (net.head, member) if kind == "mlp" else (net.heads, member * 3 + task)
            torch.testing.assert_close(
                out[member, task, row], linear(head, index, hidden), rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("kind", EVERY)
def test_some_tasks_get_what_they_get_among_all(kind):
    net = make(kind, tasks=5)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    some = torch.tensor([4, 1])
    torch.testing.assert_close(net(x[some], some), net(x)[:, some])
    for part, whole in zip(net.routing(x[some], some), net.routing(x), strict=True):
        torch.testing.assert_close(part, whole[:, some])


@pytest.mark.parametrize("kind", EVERY)
def test_members_of_a_stack_share_nothing(kind):
    net = make(kind)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    net.draw(4, torch.Generator().manual_seed(0))
    net(x)[1].square().sum().backward()
    for name, parameter in net.named_parameters():
        halves = parameter.grad.unflatten(0, (2, -1))
        assert not halves[0].any(), name
        assert halves[1].any(), name


@pytest.mark.parametrize("kind", EVERY)
def test_tasks_are_told_apart(kind):
    net = make(kind, stack=8)  # of eight hard routers one may well send two tasks the same way
    out = net(2.0 * torch.randn(1, 20, 4, dtype=torch.float64).expand(3, 20, 4))
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3
    assert (out[:, 1] - out[:, 2]).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(2, 5),
    modules=st.integers(1, 5),
    head=st.sampled_from(["routed", "sum"]),
    reads=st.sampled_from(["all", "last"]),
    seed=st.integers(0, 1000),
)
def test_rows_of_routing_are_distributions(layers, modules, head, reads, seed):
    torch.manual_seed(seed)
    net = SoftModular(
        4, 3, 2, 1, **network(
            "soft_modular", num_layers=layers, num_modules=modules, module_width=3,
            embedding_width=6, gating_width=5, head=head, routing_reads=reads,
        )
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    routes = net.routing(torch.randn(2, 6, 4))
    assert len(routes) == (layers if head == "routed" else layers - 1)
    for route in routes[: layers - 1]:
        assert route.shape == (1, 2, 6, modules, modules)
    if head == "routed":
        assert routes[-1].shape == (1, 2, 6, 1, modules)
    for route in routes:
        assert (route >= 0).all()
        torch.testing.assert_close(route.sum(-1), torch.ones(route.shape[:-1]))


def test_start_values_as_released():
    net = SoftModular(39, 8, 10, 2, **network("soft_modular", num_modules=4, module_width=128))
    state, head = net.state[1], net.last
    assert state.weight.abs().max() <= 1 / math.sqrt(400)
    assert state.weight.abs().max() > 0.99 / math.sqrt(400)
    assert (state.bias == 0.1).all()
    # The fan-out is that of one module, not of all modules together.
    assert net.first.weight.abs().max() <= 1 / math.sqrt(128)
    assert net.first.weight.abs().max() > 0.99 / math.sqrt(128)
    for layer in [head, *net.router.output]:
        assert 0.0029 < layer.weight.abs().max() <= 3e-3
        assert layer.bias.abs().max() <= 3e-3
    torch_like = SoftModular(39, 8, 10, 1, **network("soft_modular", init="torch")).state[0]
    assert 0.99 / math.sqrt(39) < torch_like.weight.abs().max() <= 1 / math.sqrt(39)


@pytest.mark.parametrize("kind", EVERY)
def test_a_wrong_shape_is_refused(kind):
    with pytest.raises(jaxtyping.TypeCheckError):
        make(kind)(torch.zeros(3, 4, dtype=torch.float64))


# --- the policy -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(mean=st.floats(-6, 6), log_std=st.floats(-4, 1.5), noise=st.floats(-3, 3))
def test_log_probability_equals_that_of_torch(mean, log_std, noise):
    arguments = [torch.tensor([[value]], dtype=torch.float64) for value in (mean, log_std, noise)]
    action, log_prob = squash(*arguments)
    base = torch.distributions.Normal(arguments[0], arguments[1].exp())
    reference = torch.distributions.TransformedDistribution(
        base, [torch.distributions.transforms.TanhTransform(cache_size=1)]
    )
    before = arguments[0] + arguments[1].exp() * arguments[2]
    torch.testing.assert_close(action, before.tanh())
    expected = base.log_prob(
        before
    ) - torch.distributions.transforms.TanhTransform().log_abs_det_jacobian(before, before.tanh())
    torch.testing.assert_close(log_prob, expected.sum(-1), rtol=1e-9, atol=1e-9)
    if abs(before.item()) < 6:
        torch.testing.assert_close(
            log_prob, reference.log_prob(action).sum(-1), rtol=1e-4, atol=1e-4
        )


def test_log_probability_stays_finite_where_tanh_saturates():
    big = torch.full((1, 4), 60.0, requires_grad=True)
    _, log_prob = squash(big, torch.zeros(1, 4), torch.zeros(1, 4))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert big.grad.isfinite().all()


def test_log_std_is_clamped():
    mean, log_std = split(torch.tensor([[0.5, -0.5, 50.0, -50.0]]), "clamp")
    assert mean.tolist() == [[0.5, -0.5]]
    assert log_std.tolist() == [[2.0, -20.0]]


@pytest.mark.parametrize("kind", EVERY)
def test_the_frozen_policy_acts_like_the_network(kind):
    net = make(kind, stack=1).float()
    obs = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
    noise = np.random.default_rng(1).standard_normal((2, 3, 1), np.float32)
    tasks = np.array([2, 0])
    net = FORMS[kind](4, 2, 3, 1, **SMALL[kind])
    policy = Policy(published(net))
    mean, log_std = split(net(torch.from_numpy(obs), torch.from_numpy(tasks))[0], "clamp")
    np.testing.assert_array_equal(policy.act(obs, tasks), mean.tanh().numpy())
    sampled = squash(mean, log_std, torch.from_numpy(noise))[0]
    np.testing.assert_allclose(policy.act(obs, tasks, noise), sampled.numpy(), atol=1e-6)
    assert np.abs(policy.act(obs, tasks, noise) - policy.act(obs, tasks)).max() > 1e-2
    assert len(policy.routing(obs, tasks)) == ROUTING_LAYERS.get(kind, 0)
