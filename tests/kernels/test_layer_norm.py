"""Fused layer normalization agrees with PyTorch: forward, backward, and in captured updates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from softmod import kernels
from softmod.agent.mtsac import MTSAC
from softmod.capture.cpu_graph import CpuGraph
from softmod.capture.update_graph import Captured
from softmod.kernels.norm import WIDEST
from softmod.networks.norm import normalized
from tests.agent.test_mtsac import everything
from tests.capture.test_update_graph import RECIPE, batches, make

pytestmark = pytest.mark.usefixtures("compiler")

ROUNDING = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
}  # relative to a value; for gradients, relative to the largest


def plainly(x: Tensor, grad: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Return PyTorch's result and gradient in fp32."""
    leaf = x.detach().float().requires_grad_()
    out = functional.layer_norm(leaf, leaf.shape[-1:])
    out = out.relu() if relu else out
    return out.detach(), torch.autograd.grad(out, leaf, grad.float())[0]


def fused(x: Tensor, grad: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = kernels.layer_norm(leaf, relu)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 256), (5, 101), (4, 7), (3, 1), (0, 8), (2, 0, 8), (9,)])
def test_it_is_pytorchs(shape: tuple[int, ...], given: torch.dtype, relu: bool):
    draws = torch.Generator().manual_seed(0)
    x = (3.0 * torch.randn(shape, generator=draws) + 1.0).to(given)
    grad = torch.randn(shape, generator=draws).to(given)
    (out, for_x), (expected, gradient) = fused(x, grad, relu), plainly(x, grad, relu)
    assert out.dtype == given
    assert for_x.dtype == given
    torch.testing.assert_close(out.float(), expected, rtol=ROUNDING[out.dtype], atol=2e-6)
    scale = float(gradient.abs().max()) if gradient.numel() else 0.0
    torch.testing.assert_close(
        for_x.float(), gradient, rtol=ROUNDING[given], atol=1e-5 + ROUNDING[given] * scale
    )


def test_rows_that_do_not_lie_side_by_side_are_taken_too():
    x = torch.randn(6, 4, 8).transpose(0, 1)
    for grad in (torch.randn(6, 4, 8).transpose(0, 1), torch.randn(8).expand(4, 6, 8)):
        assert not x.is_contiguous()
        assert not grad.is_contiguous()
        for ours, theirs in zip(fused(x, grad, True), plainly(x, grad, True), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("relu", [False, True])
def test_what_is_no_number_stays_none_in_its_row(relu: bool, value: float, given: torch.dtype):
    x = torch.randn(4, 16).to(given)
    x[1, 3] = value
    for result in fused(x, torch.ones(4, 16).to(given), relu):
        assert result[1].isnan().all()
        assert result[[0, 2, 3]].isfinite().all()


def test_a_gradient_that_is_no_number_is_passed_on():
    grad = torch.ones(2, 16)
    grad[0] = torch.nan
    _, for_x = fused(torch.randn(2, 16), grad, True)
    assert for_x[0].isnan().all()
    assert for_x[1].isfinite().all()


def test_it_is_in_use_only_where_that_is_said_and_for_what_it_takes():
    x = torch.ones(2, 4)
    fits = kernels.fits_norm
    assert not fits(x)
    with kernels.used(kernels.NORM):
        assert not kernels.fits(x)  # of version 2
        assert fits(x)
        assert fits(x.bfloat16())
        assert not fits(x.double())
        assert not fits(x.half())
        assert not fits(torch.ones(1, WIDEST + 1))
        with kernels.used(0):
            assert not fits(x)
    assert not fits(x)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast_it_has_the_type_of_pytorchs(given: torch.dtype):
    x = torch.randn(3, 8).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        plain = normalized(x, "layer")
        with kernels.used(kernels.NORM):
            own = normalized(x, "layer")
    assert own.dtype == plain.dtype == given
    torch.testing.assert_close(own, plain)


def graph_of(agent: MTSAC, program: str) -> CpuGraph:
    captured = agent.programs[program]
    assert isinstance(captured, Captured)
    assert isinstance(captured._replay, CpuGraph)
    return captured._replay


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("program", ["whole", "critics"])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_an_update_with_it_is_the_same_captured_and_close_to_one_without(
    norm: str, program: str, precision: str
):
    plain, eager, captured = (
        make(how, norm=norm, precision=precision, **RECIPE)
        for how in ("eager", "eager", "captured")
    )
    eager.fused = captured.fused = kernels.NORM
    for given in batches(4, broken=2):
        for agent in (plain, eager, captured):
            agent.draw()
            agent.updates += 1
        theirs, ours, repeated = (
            agent.programs[program](*given) for agent in (plain, eager, captured)
        )
        torch.testing.assert_close(repeated, ours, rtol=0, atol=0, equal_nan=True)
        rough = {"32-true": 1e-3, "bf16-mixed": 0.1}[precision]
        torch.testing.assert_close(ours, theirs, rtol=rough, atol=0.1 * rough, equal_nan=True)
    assert graph_of(captured, program).names
    assert all(
        torch.equal(a, b) for a, b in zip(everything(captured), everything(eager), strict=True)
    )
    same = [torch.equal(a, b) for a, b in zip(everything(eager), everything(plain), strict=True)]
    assert all(same) == (norm == "none")  # in use only with normalization
