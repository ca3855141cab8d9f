"""Value heads: invariants of the projection, learning of a distribution, use in an agent."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softmod.agent import losses
from softmod.agent.value_heads import Categorical, Squared, ValueHead
from softmod.errors import ConfigError
from softmod.experiment.checks import check_value_head

ATOMS: dict[str, Any] = {"atoms": 101, "low": -10.0, "high": 10.0}
SUPPORT = torch.linspace(-10.0, 10.0, 101)


def some_distributions(seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    values = spread * (2 * torch.rand(4, 6, 101, generator=draws) - 1)
    return values, torch.randn(4, 6, 101, generator=draws).mul(3).softmax(-1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.0, 10.0))
def test_projection_keeps_mass_and_mean(seed, spread):
    values, probabilities = some_distributions(seed, spread)
    projected = losses.project(values, probabilities, SUPPORT)
    assert projected.min() >= 0
    torch.testing.assert_close(projected.sum(-1), torch.ones(4, 6))
    torch.testing.assert_close(
        projected @ SUPPORT, (probabilities * values).sum(-1), rtol=1e-4, atol=1e-4
    )


def test_projection_is_that_of_a_loop():
    values, probabilities = some_distributions(0, 14.0)
    expected = torch.zeros(4, 6, 101)
    for index in torch.cartesian_prod(torch.arange(4), torch.arange(6), torch.arange(101)).tolist():
        task, row, atom = index
        position = (min(10.0, max(-10.0, values[task, row, atom].item())) + 10.0) / 0.2
        below = min(99, math.floor(position))
        expected[task, row, below] += probabilities[task, row, atom] * (1 - (position - below))
        expected[task, row, below + 1] += probabilities[task, row, atom] * (position - below)
    torch.testing.assert_close(
        losses.project(values, probabilities, SUPPORT), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("top", [0.0, 3.7, 100.0])
def test_both_ways_to_spread_probabilities_agree(top):
    draws = torch.Generator().manual_seed(0)
    position = top * torch.rand(4, 6, 101, generator=draws)
    position[0, 0] = position[0, 0].round()
    probabilities = some_distributions(0, 1.0)[1]
    added, multiplied = (
        spread(position, probabilities, 101)
        for spread in (losses.spread_by_adding, losses.spread_by_product)
    )
    assert multiplied.shape == (4, 6, 101)
    torch.testing.assert_close(multiplied, added, rtol=1e-4, atol=1e-6)


def test_values_beyond_the_range_count_as_its_ends():
    values, probabilities = torch.tensor([[-99.0, 99.0]]), torch.tensor([[0.25, 0.75]])
    projected = losses.project(values, probabilities, SUPPORT)
    assert projected[0, 0] == 0.25
    assert projected[0, -1] == 0.75


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_row_nan(odd):
    values, probabilities = some_distributions(0, 5.0)
    values[1, 2, 3] = odd
    broken = losses.project(values, probabilities, SUPPORT).isnan()
    assert broken[1, 2].all()
    assert broken.sum() == 101


def test_a_distribution_on_atoms_stays_as_it_is():
    probabilities = some_distributions(1, 1.0)[1]
    torch.testing.assert_close(
        losses.project(SUPPORT.expand(4, 6, 101), probabilities, SUPPORT), probabilities
    )


def test_the_categorical_target_has_the_mean_of_the_soft_value():
    """Inside the range of the atoms, the mean of the target is the squared head's target.

    The critics' mean replaces their minimum.
    """
    head, draws = Categorical(**ATOMS), torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 3, 5, 101, generator=draws)
    reward, entropy = (0.5 * torch.rand(2, 3, 5, generator=draws)).unbind(0)
    discount = torch.full((3, 5), 0.9)
    target = head.target(reward, discount, outputs, entropy)
    value = (outputs.softmax(-1) @ SUPPORT).mean(0)
    torch.testing.assert_close(
        target @ SUPPORT, reward + discount * (value + entropy), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(head.value(outputs), value)


def test_squared_takes_the_minimum_of_twins():
    q = torch.tensor([[[[1.0], [4.0]]], [[[3.0], [2.0]]]])  # (critic, task, batch, 1)
    assert Squared().value(q).tolist() == [[1.0, 2.0]]
    target = Squared().target(torch.ones(1, 2), torch.full((1, 2), 0.5), q, torch.zeros(1, 2))
    assert target.tolist() == [[1.5, 2.0]]
    assert Squared().loss(q, torch.zeros(1, 2), torch.tensor([2.0])).tolist() == [17.0, 13.0]


def test_cross_entropy_is_least_at_the_target_and_weighs_tasks():
    target = some_distributions(2, 1.0)[1]
    exact = target.log().unsqueeze(0)
    other = exact + torch.randn(1, 4, 6, 101, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(4)
    least = losses.cross_entropy(exact, target, weight)
    torch.testing.assert_close(least, -(target * target.log()).sum(-1).mean()[None])
    assert losses.cross_entropy(other, target, weight) > least
    first = losses.cross_entropy(other, target, torch.tensor([4.0, 0, 0, 0]))
    torch.testing.assert_close(first, losses.cross_entropy(other[:, :1], target[:1], torch.ones(1)))


@pytest.mark.parametrize("wrong", [{"atoms": 1}, {"low": 1.0, "high": 1.0}])
def test_a_distribution_needs_a_range(wrong):
    with pytest.raises(ValueError, match="at least two atoms"):
        Categorical(**(ATOMS | wrong))


@pytest.mark.parametrize("head", [Squared(), Categorical(**ATOMS)])
def test_heads_compute_in_full_precision_under_autocast(head):
    draws = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 3, 5, head.outputs, generator=draws)
    reward, entropy = torch.rand(2, 3, 5, generator=draws).unbind(0)
    arguments = reward, torch.full((3, 5), 0.9), outputs, entropy
    expected = head.value(outputs), head.target(*arguments)
    expected += (head.loss(outputs, expected[1], torch.ones(3)),)
    with torch.autocast("cpu", torch.bfloat16):
        ours = head.value(outputs), head.target(*arguments)
        ours += (head.loss(outputs, ours[1], torch.ones(3)),)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_gradient_of_cross_entropy_is_the_difference_of_distributions():
    outputs = torch.randn(1, 4, 6, 101, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target, weight = some_distributions(2, 1.0)[1], torch.tensor([0.5, 1.5, 1.0, 1.0])
    losses.cross_entropy(outputs, target, weight).sum().backward()
    expected = (outputs.detach().softmax(-1) - target) * weight[:, None, None] / (4 * 6)
    torch.testing.assert_close(outputs.grad, expected)


class NoTarget(ValueHead):
    outputs = 1
    value, loss = Squared.value, Squared.loss


class ScalarLoss(Squared):
    def loss(self, outputs, target, weight):
        return super().loss(outputs, target, weight).sum()


class NoOutputs(Squared):
    outputs = None


class Fails(Squared):
    def target(self, reward, discount, next_outputs, next_entropy):
        return reward + next_outputs


@pytest.mark.parametrize(
    ("head", "told"),
    [(NoTarget, "abstract"), (ScalarLoss, r"loss has shape \[\]; must be \[2\]"), (NoOutputs,
                "outputs must be a positive integer"),
     (Fails, "fails on outputs of 2 critics")],
)  # fmt: skip
def test_a_head_that_cannot_work_is_answered_before_anything_is_made(head, told):
    name = f"{head.__module__}.{head.__name__}"
    cfg = SimpleNamespace(critic_head=SimpleNamespace(_target_=name))
    with pytest.raises(ConfigError, match=told):
        check_value_head(cfg, built(head))


def built(head):
    try:
        return head()
    except TypeError as error:
        raise ConfigError(str(error)) from error
