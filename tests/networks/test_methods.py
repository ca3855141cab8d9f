"""The defining formulas of each method against plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softmod.counter import gumbel_table, gumbels
from softmod.networks.experts import CARE, MOORE, orthonormal
from softmod.networks.film import FiLM
from softmod.networks.hard_routing import HardRouting
from softmod.networks.mixed_experts import MixedExperts
from softmod.networks.network import Network
from softmod.networks.paco import PaCo
from softmod.networks.single_task import SingleTask
from tests.networks.kinds import SMALL
from tests.networks.plain import chain, standard
from tests.settings import network

TASKS, IN, OUT, ROWS = 3, 4, 3, 5


def make(kind: str, form: type[Network], stack: int = 2, **options):
    torch.manual_seed(5)
    net = form(IN, OUT, TASKS, stack, **(SMALL[kind] | options)).double()
    for parameter in net.parameters():  # heads start near zero; make everything count
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    return net


def states(rows: int = ROWS) -> Tensor:
    return torch.randn(
        TASKS, rows, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def pairs(layers, index) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight[index], layer.bias[index]) for layer in layers]


# --- single-task SAC ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_single_tasks_are_networks_of_their_own(norm: str):
    net, x = make("single_task", SingleTask, norm=norm), states()
    out = net(x)
    for member, task in [(m, t) for m in range(2) for t in range(TASKS)]:
        alone = chain(x[task], pairs([*net.hidden, net.head], member * TASKS + task), norm)
        torch.testing.assert_close(out[member, task], alone)
    out[:, 1].square().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad.unflatten(0, (2, TASKS))[:, 1].any()
        assert not parameter.grad.unflatten(0, (2, TASKS))[:, [0, 2]].any()
    assert net.members == 2 * TASKS


# --- Mix-Expert -----------------------------------------------------------------------------------


def whole(trunk, head, index: int, x: Tensor, task: int, norm: str) -> Tensor:
    """Evaluate a trunk and its head for one member and one task."""
    first = (
        x[task] @ trunk.first.weight[index]
        + trunk.task.weight[index, task]
        + trunk.first.bias[index]
    )
    return chain(standard(first, norm).relu(), pairs([*trunk.hidden, head], index), norm)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_gate_mixes_the_outputs_of_whole_experts(norm: str):
    net, x = make("mixed_experts", MixedExperts, norm=norm), states()
    (gate,), out = net.routing(x), net(x)
    assert gate.shape == (2, TASKS, ROWS, 1, 3)
    torch.testing.assert_close(gate.sum(-1), torch.ones_like(gate[..., 0]))
    assert (gate[:, :, 0] - gate[:, :, 1]).abs().max() > 1e-3  # the gate reads the state
    for member, task in [(m, t) for m in range(2) for t in range(TASKS)]:
        logits = whole(net.gate_trunk, net.gate, member, x, task, norm)
        torch.testing.assert_close(gate[member, task, :, 0], logits.softmax(-1))
        total = torch.zeros(ROWS, OUT, dtype=torch.float64)
        for expert in range(3):
            output = whole(net.trunks, net.heads, member * 3 + expert, x, task, norm)
            total += gate[member, task, :, 0, expert, None] * output
        torch.testing.assert_close(out[member, task], total)


# --- Hard Routing ---------------------------------------------------------------------------------


def test_hard_routes_are_one_hot_and_the_most_probable_when_nothing_is_drawn():
    net, x = make("hard_routing", HardRouting).eval(), states()
    for route in net.routing(x):
        assert set(route.unique().tolist()) == {0.0, 1.0}
        assert (route.sum(-1) == 1).all()
    torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)


def test_hard_routes_are_sampled_in_an_update_and_pass_a_gradient_to_the_router():
    net, x = make("hard_routing", HardRouting).train(), states()
    net.draw(ROWS, torch.Generator().manual_seed(0))
    routes = net.routing(x)
    for route in routes:
        assert ((route.detach() - route.detach().round()).abs() < 1e-12).all()
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.any(), name
    net.draw(ROWS, torch.Generator().manual_seed(0))
    again = net.routing(x)
    net.draw(ROWS, torch.Generator().manual_seed(1))
    other = net.routing(x)
    assert all(torch.equal(a, b) for a, b in zip(routes, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(routes, other, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(routes, net.eval().routing(x), strict=True))


def test_hard_routes_are_sampled_with_the_softmax_probabilities():
    net = make("hard_routing", HardRouting, stack=1).train()
    many = states(1)[:1].expand(TASKS, 40_000, IN)
    net.draw(40_000, torch.Generator().manual_seed(0))
    noise, net.router.noise = net.router.noise, []
    logits: list[Tensor] = []
    weigh, net.router.weigh = (
        net.router.weigh,
        lambda layer, given, tasks: logits.append(given) or given.softmax(-1),
    )
    net.routing(many)
    net.router.weigh, net.router.noise = weigh, noise
    # The first layer only: later layers depend on the sample.
    sampled = net.routing(many)[0].mean((0, 2))
    torch.testing.assert_close(
        sampled, logits[0].softmax(-1).unflatten(1, (TASKS, -1)).mean((0, 2)), atol=0.01, rtol=0
    )


def test_random_words_become_gumbel_noise():
    net = make("hard_routing", HardRouting)
    number = net.random_words(ROWS)
    words = torch.randint(2**32, (number,), generator=torch.Generator().manual_seed(0))
    net.draw_from(ROWS, words)
    drawn = torch.cat([noise.flatten() for noise in net.router.noise])
    assert drawn.numel() == number
    torch.testing.assert_close(drawn.float(), gumbels(words, gumbel_table("cpu")))
    places = [noise.data_ptr() for noise in net.router.noise]
    net.draw(ROWS, torch.Generator().manual_seed(1))
    assert [noise.data_ptr() for noise in net.router.noise] == places


def test_noise_stays_where_it_is_so_that_a_graph_can_read_it():
    net = make("hard_routing", HardRouting)
    net.draw(ROWS, torch.Generator().manual_seed(0))
    places = [noise.data_ptr() for noise in net.router.noise]
    net.draw(ROWS, torch.Generator().manual_seed(1))
    assert [noise.data_ptr() for noise in net.router.noise] == places
    assert not any("noise" in name for name in net.state_dict())


# --- CARE and MOORE -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_task_attends_to_encoders_whatever_the_state(norm: str):
    net, x = make("care", CARE, norm=norm), states()
    (attention,), out = net.routing(x), net(x)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    assert (attention == attention[:, :, :1]).all()
    assert (attention[:, 0] - attention[:, 1]).abs().max() > 1e-3
    for member, task in [(m, t) for m in range(2) for t in range(TASKS)]:
        encodings = [
            chain(x[task], pairs(net.encoders.layers, member * 3 + expert), norm)
            for expert in range(3)
        ]
        context = (net.task.weight[member, task] + net.task.bias[member]).relu()
        for layer in net.context:
            context = (context @ layer.weight[member] + layer.bias[member]).relu()
        weights = (context @ net.attention.weight[member] + net.attention.bias[member]).softmax(-1)[
            0
        ]
        encoding = sum(weight * one for weight, one in zip(weights, encodings, strict=True))
        features = torch.cat([encoding, context.expand(ROWS, -1)], -1)
        torch.testing.assert_close(
            out[member, task], chain(features, pairs([*net.hidden, net.head], member), norm)
        )


def test_experts_of_a_state_are_orthonormal():
    vectors = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    basis = orthonormal(vectors)
    products = torch.einsum("serw,sfrw->sref", basis, basis)
    torch.testing.assert_close(
        products, torch.eye(3, dtype=torch.float64).expand(2, 6, 3, 3), rtol=0, atol=1e-9
    )
    q, r = torch.linalg.qr(vectors.permute(0, 2, 3, 1))  # signs are free there
    expected = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(basis, expected, rtol=0, atol=1e-9)


def test_an_expert_that_adds_nothing_is_nothing_and_has_a_gradient():
    vectors = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    vectors[:, 1] = 2.0 * vectors[:, 0]
    vectors.requires_grad_()
    basis = orthonormal(vectors)
    assert basis[:, 1].abs().max() < 1e-6
    basis.sum().backward()
    assert vectors.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_task_mixes_orthonormal_experts_for_its_own_head(norm: str):
    net, x = make("moore", MOORE, norm=norm), states()
    experts = [
        chain(x.flatten(0, 1), pairs(net.experts.layers, index), norm) for index in range(2 * 3)
    ]
    basis = orthonormal(torch.stack(experts).unflatten(0, (2, 3))).unflatten(2, (TASKS, ROWS))
    out = net(x)
    for member, task in [(m, t) for m in range(2) for t in range(TASKS)]:
        mixed = sum(
            net.task.weight[member, task, expert] * basis[member, expert, task]
            for expert in range(3)
        )
        index = member * TASKS + task
        expected = mixed.tanh() @ net.heads.weight[index] + net.heads.bias[index]
        torch.testing.assert_close(out[member, task], expected)


# --- PaCo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_vector_that_picks_one_set_gives_that_set_s_network(norm: str):
    net, x = make("paco", PaCo, norm=norm), states()
    with torch.no_grad():
        net.composition.zero_()
        for task in range(TASKS):
            net.composition[:, task, 2 - task] = 1.0
    out = net(x)
    for member, task in [(m, t) for m in range(2) for t in range(TASKS)]:
        own = pairs([*net.hidden, net.head], (member, 2 - task))
        torch.testing.assert_close(out[member, task], chain(x[task], own, norm))


def test_weights_are_linear_in_the_sets():
    net = make("paco", PaCo)
    layer, x = net.hidden[0], states().expand(2, TASKS, ROWS, IN)
    one, other = torch.randn(2, 2, TASKS, 3, dtype=torch.float64)
    together = layer(x, 0.3 * one + 2.0 * other)
    torch.testing.assert_close(together, 0.3 * layer(x, one) + 2.0 * layer(x, other))


def test_composed_weights_start_as_wide_as_those_of_a_set():
    net = PaCo(50, 3, 400, 1, **network("paco", num_layers=1, width=30))
    composed = net.composition @ net.hidden[0].weight.flatten(2)
    assert 0.9 < (composed.std() / net.hidden[0].weight.std()).item() < 1.1


# --- FiLM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_the_task_scales_and_shifts_every_hidden_layer(norm: str):
    net, x = make("film", FiLM, norm=norm), states()
    out, width = net(x), 8
    for member, task in [(m, t) for m in range(2) for t in range(TASKS)]:
        embedding = (net.task.weight[member, task] + net.task.bias[member]).relu()
        made = (embedding @ net.modulation.weight[member] + net.modulation.bias[member])[0]
        features = x[task]
        for number, layer in enumerate(net.hidden):
            gamma, beta = made[2 * number * width :].split(width)[:2]
            hidden = standard(features @ layer.weight[member] + layer.bias[member], norm)
            features = ((1 + gamma) * hidden + beta).relu()
        torch.testing.assert_close(
            out[member, task], features @ net.head.weight[member] + net.head.bias[member]
        )


def test_without_modulation_tasks_are_one():
    net, x = make("film", FiLM), states()[:1].expand(TASKS, ROWS, IN)
    with torch.no_grad():
        net.modulation.weight.zero_()
        net.modulation.bias.zero_()
    out = net(x)
    assert torch.equal(out[:, 0], out[:, 1])


@pytest.mark.parametrize("seen", [True, False])
def test_the_router_may_see_the_task_alone(seen: bool):
    from softmod.networks.soft_modular import SoftModular

    net, x = make("soft_modular", SoftModular, state_in_routing=seen), states()
    same = [(route == route[:, :, :1]).all() for route in net.routing(x)]
    assert all(same) != seen
    assert (net.routing(x)[0][:, 0] - net.routing(x)[0][:, 1]).abs().max() > 1e-3
    assert (net(x)[:, :, 0] - net(x)[:, :, 1]).abs().max() > 1e-3
