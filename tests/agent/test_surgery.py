"""Gradients per task, PCGrad against the printed algorithm, and agents that share no weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from softmod.agent.mtsac import ALL, MTSAC
from softmod.agent.surgery import agreement, cosines, pcgrad, set_gradient
from softmod.agent.value_heads import Squared
from softmod.networks.mlp import MLP
from softmod.networks.multi_head import MultiHead
from softmod.networks.single_task import SingleTask
from softmod.networks.soft_modular import SoftModular
from softmod.spec import EnvSpec
from tests.agent.test_mtsac import SPEC, batch, make
from tests.capture.test_update_graph import make as make_agent
from tests.settings import algorithm, network, published


def printed(gradients: Tensor, order: Tensor) -> Tensor:
    """Apply Algorithm 1 of PCGrad to `[task, parameter]`, one pair of tasks at a time."""
    projected = []
    for i, gradient in enumerate(gradients):
        own = gradient.clone()
        for j in order[i].argsort().tolist():
            if j != i and torch.dot(own, gradients[j]) < 0:
                own -= (
                    torch.dot(own, gradients[j])
                    / torch.dot(gradients[j], gradients[j])
                    * gradients[j]
                )
        projected.append(own)
    return torch.stack(projected).mean(0)


@pytest.mark.parametrize("seed", range(5))
def test_surgery_is_that_of_the_paper(seed: int):
    torch.manual_seed(seed)
    gradients, order = (
        torch.randn(2, 6, 4, dtype=torch.float64),
        torch.rand(6, 6, dtype=torch.float64),
    )
    expected = torch.stack([printed(member, order) for member in gradients])
    torch.testing.assert_close(pcgrad(gradients, order), expected, rtol=1e-10, atol=1e-12)


def test_of_two_that_conflict_neither_is_hurt():
    gradients = torch.tensor([[[1.0, 0.0, 0.2], [-3.0, 0.5, 0.0]]], dtype=torch.float64)
    update = pcgrad(gradients, torch.rand(2, 2))[0]
    assert (gradients[0].mean(0) @ gradients[0].T).min() < 0
    assert (update @ gradients[0].T).min() >= 0


def test_what_does_not_conflict_stays():
    gradients = torch.rand(1, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(pcgrad(gradients, torch.rand(4, 4)), gradients.mean(1))
    nothing = torch.zeros(1, 3, 5)
    assert torch.equal(pcgrad(nothing, torch.rand(3, 3)), nothing[:, 0])


@pytest.mark.parametrize("stack", [1, 2])
def test_a_gradient_lies_as_its_parameter_does(stack: int):
    """Fused optimizers on a GPU compare strides, even of axes of size 1."""
    net = MLP(3, 2, 4, stack, **network("mlp", num_layers=1, width=5))
    flat = torch.arange(float(sum(p.numel() for p in net.parameters()))).view(stack, -1)
    set_gradient(net, flat)
    parameters = list(net.parameters())
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in parameters)
    assert torch.equal(
        torch.cat([p.grad.view(stack, -1) for p in parameters if p.grad is not None], 1), flat
    )


def test_cosines_and_what_is_told_of_them():
    gradients = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])
    cosine = cosines(gradients)
    torch.testing.assert_close(cosine, torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]]))
    told = agreement(cosine)
    torch.testing.assert_close(told["cosine"], torch.tensor([-0.5, 0.0, -0.5]))
    assert told["conflicts"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("network", [SoftModular, MLP, MultiHead])
def test_the_tasks_gradients_add_up_to_the_whole_one(network: type):
    from softmod.agent.surgery import task_gradients

    agent, noise = make(network, task_weights="released"), torch.randn(3, 6, 2)
    temperature, weight = agent._temperature_and_weight()
    for loss, net in [
        (agent._critic_loss(batch(), noise, temperature, weight), agent.critic),
        (agent._actor_loss(batch(), noise, temperature, weight), agent.actor),
    ]:
        values, gradients, _ = task_gradients(loss, net, 3)
        whole, _ = loss(ALL)
        parts = torch.autograd.grad(whole.sum(), list(net.parameters()))
        torch.testing.assert_close(values.mean(0), whole.detach())
        flat = torch.cat([part.view(net.stack, -1) for part in parts], 1)
        torch.testing.assert_close(gradients.mean(1), flat, rtol=1e-4, atol=1e-6)


def test_surgery_changes_an_update_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch):
    plain, cut = make(MLP, clip_norm=0.0), make(MLP, clip_norm=0.0, gradient_surgery="pcgrad")
    gradients, given = {}, batch()
    conflicting = 5.0 * torch.tensor([1.0, -1.0, 0.0])[:, None]
    given = given._replace(reward=given.reward + conflicting)
    for agent in (plain, cut):
        agent.order.uniform_(generator=torch.Generator().manual_seed(0))
        temperature, weight = agent._temperature_and_weight()
        agent._critic_gradient(given, torch.zeros(3, 6, 2), temperature, weight)
        gradients[agent] = torch.cat([p.grad.flatten() for p in agent.critic.parameters()])
    assert not torch.allclose(gradients[plain], gradients[cut], atol=1e-4)
    monkeypatch.setattr("softmod.agent.surgery.pcgrad", lambda given, order: given.mean(1))
    temperature, weight = cut._temperature_and_weight()
    cut._critic_gradient(given, torch.zeros(3, 6, 2), temperature, weight)
    same = torch.cat([p.grad.flatten() for p in cut.critic.parameters()])
    torch.testing.assert_close(same, gradients[plain], rtol=1e-4, atol=1e-6)


def test_surgery_needs_shared_weights():
    with pytest.raises(ValueError, match="share no weights"):
        make(SingleTask, gradient_surgery="pcgrad")


@pytest.mark.parametrize("network", [SoftModular, MLP])
def test_learning_tells_how_gradients_agree_when_asked(network: type):
    from tests.agent.test_mtsac import replay

    agent = make(network)
    assert not any(name.startswith("gradients/") for name in agent.learn(replay(), 1))
    told = agent.learn(replay(), 1, examine=True)
    for name in ("actor", "critic"):
        assert told[f"gradients/cosine/{name}"].shape == (3,)
        assert told[f"gradients/cosine/{name}"].abs().max() <= 1
        assert 0 <= told[f"gradients/conflicts/{name}"] <= 1
    assert "gradients/cosine/actor" not in make(SingleTask).learn(replay(), 1, examine=True)


def test_examining_changes_nothing():
    from tests.agent.test_mtsac import everything, replay

    looked, not_looked = make(), make()
    for examine, agent in ((True, looked), (False, not_looked)):
        agent.learn(replay(), 2, examine=examine)
        agent.learn(replay(), 2)
    assert all(
        torch.equal(a, b) for a, b in zip(everything(looked), everything(not_looked), strict=True)
    )


def test_single_tasks_learn_as_agents_of_their_own():
    """Compare a run of three tasks with three runs of one task.

    Noise and initial values are the same.
    """
    together = make_agent("eager", SingleTask, task_weights="none")
    alone: list[MTSAC] = []
    for task in range(3):
        spec = EnvSpec((SPEC.tasks[task],), SPEC.obs_dim, SPEC.action_dim, SPEC.horizon)
        networks = []
        for source in (together.actor.network, together.critic):
            sizes = network("single_task", num_layers=2, width=8, init="torch")
            net = SingleTask(source.in_dim, source.out_dim, 1, source.stack, **sizes)
            for own, shared in zip(net.parameters(), source.parameters(), strict=True):
                own.data.copy_(shared.data.unflatten(0, (source.stack, 3))[:, task])
            networks.append(net)
        agent = MTSAC(
            spec,
            published(networks[0]),
            networks[1],
            together.make_optimizers,
            batch_per_task=6,
            seed=0,
            value_head=Squared(),
            **algorithm(clip_norm=together.clip_norm),
        )
        import lightning as L

        L.Fabric(accelerator="cpu", devices=1).setup(agent, *agent.configure_optimizers())
        alone.append(agent)
    for seed in range(4):
        given = deepcopy(batch(seed))
        noise = torch.randn(2, 3, 6, 2, generator=torch.Generator().manual_seed(seed))
        together.update(given, noise[0], noise[1])
        for task, agent in enumerate(alone):
            one = slice(task, task + 1)
            agent.update(
                type(given)(*(field[one] for field in given)), noise[0, one], noise[1, one]
            )
    for task, agent in enumerate(alone):
        for own, shared in zip(agent.parameters(), together.parameters(), strict=True):
            part = (
                shared.data[task : task + 1]
                if own.dim() == 1
                else shared.data.unflatten(0, (-1, 3))[:, task]
            )
            torch.testing.assert_close(own.data, part, rtol=1e-4, atol=1e-5)
