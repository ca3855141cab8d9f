"""The parts of an update with few kernel launches against plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softmod.agent.update import all_finite, choose, drift

SHAPES = [(), (3,), (2, 4), (2, 1, 5)]


def some(seed: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws) for shape in SHAPES]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_live_tensors_stay_or_all_become_their_copies(keep: bool, dtype: torch.dtype):
    """Non-finite values on either side are included."""
    one, other = ([tensor.to(dtype) for tensor in some(seed)] for seed in (0, 1))
    one[1][0], one[2][0, 0], other[1][1], other[3][0, 0, 0] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.nan,
    )
    live, copies = ([tensor.clone() for tensor in tensors] for tensors in (one, other))
    choose(live, copies, torch.tensor(keep))
    for now, expected in zip(live, one if keep else other, strict=True):
        torch.testing.assert_close(now, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("share", [0.0, 0.005, 1.0])
def test_targets_drift_by_a_share_of_the_way(share: float):
    targets, expected = some(0), some(0)
    drift(targets, some(1), torch.tensor(share))
    torch._foreach_lerp_(expected, some(1), share)
    torch.testing.assert_close(targets, expected)
    if not share:
        assert all(torch.equal(a, b) for a, b in zip(targets, some(0), strict=True))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(len(SHAPES)))
def test_one_number_that_is_none_is_found(odd: float, place: int):
    tensors = some(0)
    assert all_finite(*tensors)
    tensors[place].view(-1)[-1] = odd
    assert not all_finite(*tensors)
