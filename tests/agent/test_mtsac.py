"""MTSAC: update orders against a plain reference, the finite flag, `learn`, Lightning's Trainer."""

from __future__ import annotations

from copy import deepcopy

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from softmod.agent import losses, mtsac, steps
from softmod.agent.mtsac import MTSAC, entropy
from softmod.agent.replay import Batch, Replay, random_rollout
from softmod.agent.value_heads import Squared
from softmod.networks import gaussian as policy
from softmod.networks.gaussian import Actor, split, squash
from softmod.networks.hard_routing import HardRouting
from softmod.networks.mlp import MLP
from softmod.networks.soft_modular import SoftModular
from softmod.networks.weights import bind
from softmod.seeding import Purpose, torch_generator
from softmod.spec import EnvSpec, Episode, Rollout
from tests import settings
from tests.networks.kinds import FORMS

SPEC = EnvSpec(("a", "b", "c"), 5, 2, 10)
SIZES = {
    "num_layers": 2,
    "num_modules": 2,
    "module_width": 8,
    "embedding_width": 8,
    "gating_width": 8,
}


def make(network=SoftModular, **options) -> MTSAC:
    """Make an agent under Fabric, as in a run."""
    torch.manual_seed(3)
    sizes = SIZES if issubclass(network, SoftModular) else {"num_layers": 2, "width": 8}
    option = next(name for name, form in FORMS.items() if form is network)
    sizes = settings.network(option, init="torch", **sizes)
    actor = network(SPEC.obs_dim, 2 * SPEC.action_dim, 3, 1, **sizes)
    critic = network(SPEC.obs_dim + SPEC.action_dim, 1, 3, 2, **sizes)
    optimizers = dict.fromkeys(
        ("actor", "critic", "temperature"), lambda p: torch.optim.Adam(p, lr=1e-2, fused=True)
    )
    normalize_obs = options.pop("normalize_obs", False)
    seed = options.pop("seed", 0)
    agent = MTSAC(
        SPEC,
        settings.published(actor, normalize_obs),
        critic,
        optimizers,
        batch_per_task=6,
        seed=seed,
        value_head=Squared(),
        **settings.algorithm(**({"task_weights": "released"} | options)),
    )
    with torch.no_grad():
        agent.log_temperature.copy_(torch.tensor([0.3, -0.4, -1.2]))
    L.Fabric(accelerator="cpu", devices=1).setup(agent, *agent.configure_optimizers())
    return agent


def batch(seed: int = 0, size: int = 6) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    obs, next_obs = (torch.randn(3, size, SPEC.obs_dim, generator=draws) for _ in range(2))
    action = torch.rand(3, size, SPEC.action_dim, generator=draws) * 2 - 1
    return Batch(
        obs, action, torch.randn(3, size, generator=draws), next_obs, torch.full((3, size), 0.99)
    )


def everything(agent: MTSAC) -> list[torch.Tensor]:
    """Return copies of parameters, targets, temperatures and optimizer states."""
    return [tensor.detach().clone() for tensor in live(agent)]


def live(agent: MTSAC) -> list[torch.Tensor]:
    """Return the tensors that `everything` copies."""
    states = [
        value
        for opt in agent.optimizers()
        for state in opt.state.values()
        for value in state.values()
    ]
    return [*agent.state_dict().values(), *states]


class Plain:
    """A plain reference: one network at a time, torch's own clipping, plain Adam."""

    def __init__(self, agent: MTSAC) -> None:
        self.actor, self.critic, self.target = (
            deepcopy(net).requires_grad_()
            for net in (agent.actor, agent.critic, agent.target_critic)
        )
        self.log_alpha = agent.log_temperature.detach().clone().requires_grad_()
        self.steps = {
            name: torch.optim.Adam(parameters, lr=1e-2)
            for name, parameters in [
                ("actor", self.actor.parameters()), ("critic", self.critic.parameters()),
                ("alpha", [self.log_alpha])
            ]
        }  # fmt: skip
        self.agent = agent

    def weights(self):
        return losses.task_weights(self.log_alpha.detach(), self.agent.task_weights)

    def sample(self, obs, noise):
        return squash(*split(self.actor(obs)[0], "clamp"), noise)

    def q(self, net, obs, action):
        return net(torch.cat([obs, action], -1))[..., 0]

    def critics(self, batch, noise, alpha, weights):
        with torch.no_grad():
            action, log_prob = self.sample(batch.next_obs, noise)
            value = (
                self.q(self.target, batch.next_obs, action).min(0).values
                - alpha[:, None] * log_prob
            )
            target = batch.reward + batch.discount * value
        self.critic.zero_grad()
        for member in range(2):
            error = (self.q(self.critic, batch.obs, batch.action)[member] - target) ** 2
            (error.mean(1) * weights).mean().backward()

    def clip(self, network):
        for member in range(network.stack):
            grads = [p.grad.view(network.stack, -1)[member] for p in network.parameters()]
            norm = torch.cat(grads).norm()
            for grad in grads:
                grad.mul_(min(1.0, self.agent.clip_norm / (norm.item() + 1e-6)))

    def policy(self, batch, noise, alpha, weights):
        action, log_prob = self.sample(batch.obs, noise)
        loss = alpha[:, None] * log_prob - self.q(self.critic, batch.obs, action).min(0).values
        grads = torch.autograd.grad((loss.mean(1) * weights).mean(), list(self.actor.parameters()))
        for parameter, grad in zip(self.actor.parameters(), grads, strict=True):
            parameter.grad = grad
        return log_prob.detach()

    def temperatures(self, log_prob):
        self.steps["alpha"].zero_grad()
        (-self.log_alpha * (log_prob - SPEC.action_dim).mean(1)).mean().backward()
        self.steps["alpha"].step()

    def move(self):
        with torch.no_grad():
            for target, source in zip(
                self.target.parameters(), self.critic.parameters(), strict=True
            ):
                target.mul_(1 - self.agent.target_smoothing).add_(
                    self.agent.target_smoothing * source
                )

    def sequential(self, batch, noise, next_noise):
        alpha, weights = self.log_alpha.detach().exp(), self.weights()
        self.critics(batch, next_noise, alpha, weights)
        self.clip(self.critic)
        self.steps["critic"].step()
        log_prob = self.policy(batch, noise, alpha, weights)
        self.clip(self.actor)
        self.steps["actor"].step()
        self.temperatures(log_prob)
        self.move()

    def released(self, batch, noise, next_noise):
        self.temperatures(self.sample(batch.obs, noise)[1].detach())
        alpha, weights = self.log_alpha.detach().exp(), self.weights()
        self.critics(batch, next_noise, alpha, weights)
        self.policy(batch, noise, alpha, weights)
        self.clip(self.critic)
        self.clip(self.actor)
        self.steps["critic"].step()
        self.steps["actor"].step()
        self.move()


@pytest.mark.parametrize("order", ["sequential", "released"])
@pytest.mark.parametrize("weights", ["released", "paper", "none"])
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_updates_are_what_their_order_says(order, weights, clip):
    agent = make(update_order=order, task_weights=weights, clip_norm=clip)
    plain = Plain(agent)
    for number in range(3):
        noise = torch.randn(
            (2, 3, 6, 2), generator=torch_generator("cpu", 0, Purpose.UPDATE, number)
        )
        getattr(plain, order)(batch(number), noise[0], noise[1])
        agent.training_step(batch(number), 0)
    for name in ("actor", "critic"):
        for mine, theirs in zip(
            getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True
        ):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    for mine, theirs in zip(
        agent.target_critic.parameters(), plain.target.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(agent.log_temperature, plain.log_alpha, atol=2e-5, rtol=1e-4)


def test_the_two_orders_are_not_the_same():
    first, second = make(update_order="sequential"), make(update_order="released")
    for agent in (first, second):
        agent.training_step(batch(), 0)
    differences = [
        (a - b).abs().max()
        for a, b in zip(first.actor.parameters(), second.actor.parameters(), strict=True)
    ]
    assert max(differences) > 1e-3


@pytest.mark.bar(15)
@pytest.mark.parametrize("order", ["sequential", "released"])
@pytest.mark.parametrize("fault", ["reward", "obs", "actor_loss", "temperature_loss"])
def test_a_non_finite_update_changes_nothing(order, fault, monkeypatch):
    agent = make(update_order=order)
    agent.training_step(batch(0), 0)
    before = everything(agent)
    faulty = batch(1)
    with monkeypatch.context() as patch:
        if fault in ("reward", "obs"):
            getattr(faulty, fault)[1, 2] = float("nan" if fault == "reward" else "inf")
        else:
            whole = getattr(losses, fault)
            patch.setattr(losses, fault, lambda *args: whole(*args) * float("nan"))
        metrics = agent.training_step(faulty, 0)
    assert not metrics["finite"]
    after = everything(agent)
    assert len(after) == len(before) > 40
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert agent.training_step(batch(2), 0)["finite"]
    assert not any(
        torch.equal(a, b) for a, b in zip(before[:4], everything(agent)[:4], strict=True)
    )


@pytest.mark.control(15)
@pytest.mark.parametrize("order", ["sequential", "released"])
def test_without_the_flag_everything_is_lost(order, monkeypatch):
    monkeypatch.setattr(steps, "all_finite", lambda *tensors: torch.tensor(True))
    agent = make(update_order=order)
    faulty = batch(1)
    faulty.reward[1, 2] = float("nan")
    agent.training_step(faulty, 0)
    assert any(not tensor.isfinite().all() for tensor in everything(agent))


@pytest.mark.bar(15)
@pytest.mark.parametrize("order", ["sequential", "released"])
@pytest.mark.parametrize("way", [1, -1])
def test_temperatures_stay_in_their_range(order, way):
    """Without clamping, one step of this size would leave the range by far."""
    agent = make(update_order=order, target_entropy_per_action=way * 1e3)
    agent.log_temperature.data.fill_(way * 9.995)
    for number in range(3):
        agent.training_step(batch(number), 0)
    assert agent.log_temperature.detach().tolist() == [way * 10.0] * len(agent.log_temperature)


def test_targets_move_by_the_smoothing_alone():
    agent = make(target_smoothing=0.25)
    before = [p.clone() for p in agent.target_critic.parameters()]
    agent.training_step(batch(), 0)
    for old, target, source in zip(
        before, agent.target_critic.parameters(), agent.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * source.detach())


def test_the_policy_update_leaves_no_gradient_on_the_critics():
    agent = make()
    agent.training_step(batch(), 0)
    noise = torch.zeros(3, 6, 2)
    before = [p.grad.clone() for p in agent.critic.parameters()]
    agent._actor_gradient(batch(1), noise, torch.ones(3), torch.ones(3))
    assert all(
        torch.equal(p.grad, old) for p, old in zip(agent.critic.parameters(), before, strict=True)
    )
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_temperature_rises_when_the_policy_is_too_certain():
    agent = make()
    log_temperature = torch.zeros(3, requires_grad=True)
    log_prob = torch.tensor([5.0, 2.0, -5.0])[:, None].expand(3, 6)  # the target entropy is -2
    losses.temperature_loss(log_temperature, log_prob, agent.target_entropy).backward()
    assert log_temperature.grad[0] < 0  # a descent step raises it
    assert log_temperature.grad[1] == 0
    assert log_temperature.grad[2] > 0


# --- what hard tasks need -------------------------------------------------------------------------


def test_the_spread_is_the_distance_of_quartiles_and_has_a_floor():
    value = torch.stack([torch.arange(32.0), torch.zeros(32), 10.0 * torch.arange(32.0)])[
        :, torch.randperm(32)
    ]
    assert losses.spread(value).flatten().tolist() == pytest.approx(
        [15.0, losses.LEAST_SPREAD, 150.0]
    )
    value[0, value[0].argmax()] = 1e6  # an outlier
    assert losses.spread(value)[0] == 15.0
    assert losses.spread(torch.tensor([[1.0], [2.0]])).shape == (2, 1)  # one transition per task


def test_scaled_values_pull_a_policy_alike_whatever_their_size():
    value = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradients = []
    for size in (1.0, 10.0):
        scaled = size * value
        loss = losses.actor_loss(
            scaled / losses.spread(scaled), torch.zeros(3, 32), torch.ones(3), torch.ones(3)
        )
        gradients += torch.autograd.grad(loss, value)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_agents_policy_learns_from_scaled_values(monkeypatch: pytest.MonkeyPatch):
    given, noise = batch(), torch.randn(2, 3, 6, 2, generator=torch.Generator().manual_seed(0))
    plain, scaled = make(), make(value_scaling="spread")
    monkeypatch.setattr(losses, "spread", lambda value: torch.full_like(value[:, :1], 1.0))
    ours, theirs = scaled.update(given, noise[0], noise[1]), plain.update(given, noise[0], noise[1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    monkeypatch.setattr(losses, "spread", lambda value: torch.full_like(value[:, :1], 2.0))
    assert (
        make(value_scaling="spread").update(given, noise[0], noise[1])["actor_loss"]
        != theirs["actor_loss"]
    )


def test_weights_by_distance_from_success():
    weights = losses.distance_weights(torch.tensor([0.0, 0.5, 1.0]))
    assert weights.mean() == pytest.approx(1.0)
    assert (weights / weights[2]).tolist() == pytest.approx([11.0, 6.0, 1.0], rel=1e-5)


def test_unsolved_tasks_count_more_in_the_update():
    agent = make(task_weights="unsolved")
    given, noise = batch(), torch.randn(2, 3, 6, 2, generator=torch.Generator().manual_seed(0))
    assert agent.update(given, noise[0], noise[1])["task_weight"].tolist() == [1.0, 1.0, 1.0]
    episodes = [Episode(2, 0, 0, 1.0, True)] * 200
    agent.observe(Rollout(*[np.zeros((3, 1, 1, width), "f") for width in (5, 2)], np.zeros((3, 1,
                1), "f"),
                          np.zeros((3, 1, 1, 5), "f"), np.zeros((3, 1, 1), bool),
                          episodes))  # fmt: skip
    weights = agent.update(given, noise[0], noise[1])["task_weight"]
    assert (weights / weights[2]).tolist() == pytest.approx([11.0, 11.0, 1.0], rel=1e-4)
    assert "success_rates.rates" in agent.state_dict()


# --- rounds ---------------------------------------------------------------------------------------


def replay() -> Replay:
    filled = Replay(SPEC, 40)
    filled.extend(random_rollout(SPEC, 30))
    return filled


def test_how_rounds_are_cut_changes_nothing():
    whole, cut = make(), make()
    whole.learn(replay(), 6)
    for updates in (1, 0, 3, 2):
        cut.learn(replay(), updates)
    assert whole.updates == cut.updates == 6
    assert all(torch.equal(a, b) for a, b in zip(everything(whole), everything(cut), strict=True))


def test_seeds_differ_and_repeat():
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    for agent in (first, again, other):
        agent.learn(replay(), 3)
    assert all(torch.equal(a, b) for a, b in zip(everything(first), everything(again), strict=True))
    assert not torch.equal(first.actor.network.state[0].weight, other.actor.network.state[0].weight)


def test_metrics_of_a_round():
    metrics = make().learn(replay(), 2)
    assert metrics["temperature"].shape == metrics["task_weight"].shape == (3,)
    torch.testing.assert_close(metrics["task_weight"].mean(), torch.tensor(1.0))
    assert metrics["routing_entropy"].shape == (2,)
    assert (metrics["routing_entropy"] <= np.log(2) + 1e-6).all()
    assert make().learn(replay(), 0) == {}
    assert "routing_entropy" not in make(MLP).learn(replay(), 1)


@pytest.mark.parametrize("network", [SoftModular, HardRouting])
def test_routes_are_means_over_each_tasks_newest_states(network):
    agent, held = make(network), replay()
    layers = agent.routes(held)
    assert [layer.shape for layer in layers] == [(3, 2, 2), (3, 1, 2)]
    for layer in layers:
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]))
    states = held.newest(mtsac.RECENT)
    agent.actor.eval()
    expected = [
        sum(agent.actor.routing(states[:, [i]])[1][0, :, 0] for i in range(states.shape[1]))
        / states.shape[1]
    ]
    torch.testing.assert_close(layers[1:], expected)
    assert agent.routes(Replay(SPEC, 10)) == make(MLP).routes(held) == []


def test_entropy_of_known_distributions():
    assert entropy(torch.full((3, 4), 0.25)).item() == pytest.approx(np.log(4))
    assert entropy(torch.eye(4)).item() == 0.0


def act(agent: MTSAC, *arguments) -> torch.Tensor:
    with torch.no_grad():
        return policy.actions(agent.acting_actor.eval(), *arguments)


def frozen(agent: MTSAC) -> Actor:
    """Return a copy of the policy that workers would act with."""
    actor = deepcopy(agent.acting_actor)
    bind(actor, agent.policy().numpy())
    return actor


def test_acts_for_some_of_the_tasks():
    agent = make()
    obs, noise = torch.randn(2, 1, 5), torch.randn(2, 1, 2)
    tasks = torch.tensor([2, 0])
    whole = act(agent, torch.stack([obs[1], obs[0], obs[0]]))
    torch.testing.assert_close(act(agent, obs, tasks)[0], whole[2])
    torch.testing.assert_close(act(agent, obs, tasks)[1], whole[0])
    assert not torch.equal(act(agent, obs, tasks, noise), act(agent, obs, tasks))
    before = frozen(agent)
    agent.training_step(batch(), 0)
    assert not torch.equal(  # a copy, not a view
        before.network.first.weight, agent.actor.network.first.weight
    )


# --- options of the update ------------------------------------------------------------------------


def test_a_delayed_policy_is_updated_every_third_time_and_the_critics_always():
    agent, moved = make(policy_delay=3), []
    for number in range(7):
        actor, critic, temperature = (
            tensor.detach().clone()
            for tensor in (
                agent.actor.network.first.weight,
                agent.critic.first.weight,
                agent.log_temperature,
            )
        )
        metrics = agent.training_step(batch(number), 0)
        moved.append(not torch.equal(agent.actor.network.first.weight, actor))
        assert (
            moved[-1]
            == (not torch.equal(agent.log_temperature, temperature))
            == ("actor_loss" in metrics)
        )
        assert not torch.equal(agent.critic.first.weight, critic)
    assert moved == [True, False, False, True, False, False, True]


def test_without_the_policys_part_an_update_of_the_critics_is_the_same():
    whole, critics = make(), make()
    noise = torch.randn(2, 3, 6, 2, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        whole.update(batch(), noise[0], noise[1]),
        critics.update_critics(batch(), noise[0], noise[1]),
    )
    assert torch.equal(ours["critic_loss"], theirs["critic_loss"])
    for name in ("critic", "target_critic"):
        pairs = zip(
            getattr(whole, name).parameters(), getattr(critics, name).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_round_keeps_the_metrics_of_the_last_update_of_the_policy():
    metrics = make(policy_delay=2).learn(replay(), 2)
    assert {"critic_loss", "actor_loss", "temperature", "skipped_in_a_row"} <= metrics.keys()


def test_the_averaged_policy_acts_and_follows_the_policy():
    agent = make(policy_averaging=0.25)
    before = agent.averaged_actor.network.first.weight.clone()
    assert torch.equal(before, agent.actor.network.first.weight)
    agent.training_step(batch(), 0)
    expected = torch.lerp(before, agent.actor.network.first.weight.detach(), 0.25)
    torch.testing.assert_close(agent.averaged_actor.network.first.weight, expected)
    assert torch.equal(
        frozen(agent).network.first.weight, agent.averaged_actor.network.first.weight
    )
    obs = torch.randn(3, 1, 5)
    assert torch.equal(act(agent, obs), policy.actions(agent.averaged_actor, obs))
    assert not torch.equal(act(agent, obs), policy.actions(agent.actor, obs))


def test_a_bad_update_moves_no_average():
    agent = make(policy_averaging=0.25)
    before = everything(agent)
    broken = batch()
    broken.reward[1, 2] = torch.inf
    assert not agent.training_step(broken, 0)["finite"]
    assert all(torch.equal(a, b) for a, b in zip(everything(agent), before, strict=True))


def test_networks_learn_on_normalised_observations_and_scaled_rewards():
    """Compare an agent with statistics with a plain agent on the normalized and scaled batch."""
    plain, scaled = make(), make(reward_scaling="return", normalize_obs=True)
    given, noise = batch(), torch.randn(2, 3, 6, 2, generator=torch.Generator().manual_seed(0))
    shape = (3, 1, 40)
    rollout = Rollout(
        np.random.default_rng(0).normal(2.0, 3.0, (*shape, 5)).astype("f"), np.zeros((*shape, 2),
                                                                                     "f"),
        np.zeros(shape, "f"), np.zeros((*shape, 5), "f"), np.zeros(shape, bool),
        episodes=[Episode(task, 0, 0, 10.0, False, (task + 1.0,) * 10) for task in range(3)],
    )  # fmt: skip
    scaled.observe(rollout)
    mean, deviation = rollout.obs.mean((0, 1, 2)), rollout.obs.std((0, 1, 2))
    obs, next_obs = ((part - mean) / deviation for part in (given.obs, given.next_obs))
    largest = torch.arange(1.0, 4.0) / (1 - 0.99)
    divisor = (largest + scaled.log_temperature.exp().detach() * 2 / (2 * 0.01)) / 10
    by_hand = Batch(
        obs.float(), given.action, given.reward / divisor[:, None], next_obs.float(), given.discount
    )
    ours, theirs = (
        scaled.update(given, noise[0], noise[1]),
        plain.update(by_hand, noise[0], noise[1]),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        act(scaled, given.obs), act(plain, by_hand.obs), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("program", ["update", "update_critics"])
@pytest.mark.parametrize("field", ["obs", "reward", "next_obs"])
def test_a_bad_update_of_either_program_changes_nothing(program, field):
    agent = make(policy_averaging=0.25, policy_delay=2, reward_scaling="return", normalize_obs=True)
    before, broken = everything(agent), batch()
    getattr(broken, field)[1, 2] = torch.nan
    noise = torch.randn(2, 3, 6, 2, generator=torch.Generator().manual_seed(0))
    assert not getattr(agent, program)(broken, noise[0], noise[1])["finite"]
    assert all(torch.equal(a, b) for a, b in zip(everything(agent), before, strict=True))


def test_statistics_reach_both_policies_and_the_weights_that_workers_get():
    agent = make(policy_averaging=0.25, normalize_obs=True)
    obs = np.random.default_rng(0).normal(2.0, 3.0, (3, 1, 40, 5)).astype("f")
    agent.observe(Rollout(obs, obs[..., :2], obs[..., 0], obs, np.zeros(obs.shape[:3], bool)))
    expected = torch.from_numpy(obs.reshape(-1, 5).mean(0))
    for actor in (agent.actor, agent.averaged_actor):
        torch.testing.assert_close(actor.normalizer.mean, expected)
    torch.testing.assert_close(frozen(agent).normalizer.mean, expected)


def test_weight_decay_does_nothing_before_the_first_update():
    """A step initializes the optimizers' state; it must not change weights, targets or averages."""
    torch.manual_seed(3)
    sizes = settings.network("mlp", num_layers=1, width=8)
    actor, critic = MLP(5, 4, 3, 1, **sizes), MLP(7, 1, 3, 2, **sizes)
    before = [
        parameter.detach().clone() for parameter in (*actor.parameters(), *critic.parameters())
    ]
    decaying = dict.fromkeys(
        ("actor", "critic", "temperature"),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    )
    agent = MTSAC(
        SPEC, settings.published(actor), critic, decaying, batch_per_task=6, seed=0,
        value_head=Squared(), **settings.algorithm(),
    )  # fmt: skip
    agent.configure_optimizers()
    after = (*agent.actor.parameters(), *agent.critic.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_released_order_has_no_delay():
    with pytest.raises(ValueError, match="policy_delay=1"):
        make(policy_delay=2, update_order="released")


class Stored(Dataset):
    """A dataset for Lightning's loaders whose items are batches."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Batch:
        return batch(index)


def test_lightnings_trainer_fits_the_same_module(tmp_path):
    agent, fitted = make(), make()
    for index in range(4):
        agent.training_step(batch(index), 0)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    fitted._fabric = None
    trainer.fit(fitted, DataLoader(Stored(), batch_size=None, shuffle=False))
    assert trainer.global_step >= 4
    assert fitted.updates == 4
    for mine, theirs in zip(agent.state_dict().values(), fitted.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)
