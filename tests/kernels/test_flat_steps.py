"""Steps on flat buffers against PyTorch's optimizers: as formulas and as Triton kernels.

Triton's interpreter runs the kernels on a CPU. It is chosen when Triton is imported, so the tests
of this file run once more in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softmod.agent.mtsac import MTSAC
from softmod.agent.steps import inner
from softmod.agent.update import clip_stacked, materialize
from softmod.checkpoint.files import optimizer_arrays, restore_arrays
from softmod.kernels import formulas
from softmod.kernels.flat import ALIGNED, FlatAdam, supports
from softmod.networks.mlp import MLP
from softmod.networks.network import Network
from softmod.networks.residual import Residual
from softmod.networks.single_task import SingleTask
from softmod.networks.soft_modular import SoftModular
from tests.agent.test_mtsac import everything
from tests.capture.test_update_graph import RECIPE, batches, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
SHAPES = [(2, 5, 7), (2, 1, 7), (4, 70, 40), (2, 3)]  # two members; one parameter has many blocks
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(
        p, lr=1e-2, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1, fused=True
    ),
}


@pytest.fixture
def by() -> Any:
    """The functions under test."""
    if not INTERPRETED:
        return formulas
    from softmod.kernels import triton_steps

    return triton_steps


@triton
@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_triton_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


POINTERS = {"blocks": "*i32", "finite": "*i1", "made": "*i1", "also": "*i1", "flag": "*i1",
            "half": "*bf16"}  # fmt: skip
ADAM = {
    "lr": 1e-3, "share1": 0.1, "share2": 1e-3, "log_beta1": -0.1, "log_beta2": -1e-3, "eps": 1e-8,
    "smoothing": 0.01, "block": 1024,
}  # fmt: skip
PLAIN = dict.fromkeys(("weight_decay", "max_norm", "limit"), 0.0)
PLAIN |= dict.fromkeys(("decoupled", "keep", "moves", "halves"), False)
ALL = dict.fromkeys(("weight_decay", "max_norm", "limit"), 0.5)
ALL |= dict.fromkeys(("decoupled", "keep", "moves", "halves"), True)


@triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("_sums", {"block": 1024}),
        ("_norms", {"block": 1024, "most": 32}),
        ("_all_finite", {"given": True, "block": 2}),
        ("_sums", {"block": 1024, "count": 1}),  # Triton treats 1 as a constant
        ("_norms", {"block": 1024, "most": 1, "count": 1, "parameters": 1}),
        ("_all_finite", {"given": False, "block": 1, "size_a": 1, "size_b": 1}),
        ("_adam", ADAM | PLAIN),
        ("_adam", ADAM | ALL),
        ("_settle", {"moves": True, "smoothing": 0.01, "block": 1024}),
    ],
)
def test_kernels_compile_for_a_gpu(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The compiler refuses some of what the interpreter runs. It needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from softmod.kernels import triton_steps

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_steps, name)
    signature = {}
    for argument in kernel.arg_names:
        kind = "i32" if argument.startswith(("size", "count", "parameters")) else "*fp32"
        signature[argument] = "constexpr" if argument in options else POINTERS.get(argument, kind)
    constants = {(kernel.arg_names.index(key),): value for key, value in options.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def parameters() -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draws)) for shape in SHAPES]


def optimizer(option: str, of: list[nn.Parameter]) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = OPTIMIZERS[option](of)
    materialize(made)
    return made


def states(made: torch.optim.Optimizer) -> list[Tensor]:
    (group,) = made.param_groups
    own = [value for p in group["params"] for value in made.state[p].values()]
    return [tensor.detach().clone() for tensor in (*group["params"], *own)]


def set_gradients(draws: torch.Generator, *lists: list[nn.Parameter], but: int | None) -> None:
    for number, corresponding in enumerate(zip(*lists, strict=True)):
        gradient = 3.0 * torch.randn(corresponding[0].shape, generator=draws)
        for parameter in corresponding:
            parameter.grad = None if number == but else gradient.clone()


@pytest.mark.parametrize("unused", [None, 1])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("option", OPTIMIZERS)
def test_steps_are_those_of_the_optimizer(
    by: Any, option: str, max_norm: float, unused: int | None
):
    draws = torch.Generator().manual_seed(0)
    theirs, ours = parameters(), parameters()
    expected, replaced = optimizer(option, theirs), optimizer(option, ours)
    own = FlatAdam(replaced, 2)
    target = own.weights.clone()
    half = torch.zeros_like(target, dtype=torch.bfloat16)
    expected_target = [p.detach().clone() for p in theirs]
    for _ in range(3):
        set_gradients(draws, theirs, ours, but=unused)
        norms = clip_stacked(theirs, 2, max_norm)
        expected.step()
        torch._foreach_lerp_(expected_target, [p.detach() for p in theirs], 0.1)
        gradient = own.gradient()
        own_norms = by.norms(own, gradient)
        torch.testing.assert_close(own_norms, norms)
        by.adam(
            own, gradient, by.all_finite([own_norms]), norms=own_norms, max_norm=max_norm,
            target=target, smoothing=0.1, half=half,
        )  # fmt: skip
    torch.testing.assert_close(states(replaced), states(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own.layout.views(target), expected_target, rtol=1e-5, atol=1e-6)
    for view, parameter in zip(own.layout.views(half), ours, strict=True):
        if parameter.grad is not None:
            # The interpreter rounds towards zero, a GPU to the nearest number.
            rounded = parameter.detach().bfloat16()
            torch.testing.assert_close(view, rounded, rtol=2**-7 * INTERPRETED, atol=0)


def test_weights_are_clamped(by: Any):
    of = parameters()
    own = FlatAdam(optimizer("adam", of), 2)
    set_gradients(torch.Generator().manual_seed(0), of, but=None)
    by.adam(own, own.gradient(), torch.tensor(True), limit=0.5)
    assert own.weights.abs().amax() == 0.5


@pytest.mark.parametrize("made", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(by: Any, made: bool):
    """The flag is False before the step, or only after it."""
    of = parameters()
    replaced = optimizer("adamw", of)
    own = FlatAdam(replaced, 2)
    target = own.weights.clone()
    draws = torch.Generator().manual_seed(0)
    set_gradients(draws, of, but=None)
    by.adam(own, own.gradient(), torch.tensor(True))
    before = [*states(replaced), target.clone()]
    set_gradients(draws, of, but=None)
    of[0].grad.view(-1)[3] = torch.nan
    gradient = own.gradient()
    norms = by.norms(own, gradient)
    finite = by.all_finite([norms])
    assert not finite
    step = torch.tensor(made)
    by.adam(own, gradient, step, norms=norms, max_norm=1.0, keep=True)
    by.settle(own, step, finite, target, 0.1)
    after = [*states(replaced), target]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_step_that_was_tried_and_is_finite_moves_the_target(by: Any):
    of = parameters()
    own = FlatAdam(optimizer("adam", of), 2)
    target = torch.zeros_like(own.weights)
    set_gradients(torch.Generator().manual_seed(0), of, but=None)
    finite = torch.tensor(True)
    by.adam(own, own.gradient(), finite, keep=True)
    by.settle(own, finite, finite, target, 0.25)
    torch.testing.assert_close(target, 0.25 * own.weights)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_one_number_that_is_not_finite_is_found(by: Any, odd: float, place: int):
    values = [torch.ones(()), torch.ones(3), torch.ones(2)]
    assert by.all_finite(values)
    assert by.all_finite(values, torch.tensor(True))
    assert not by.all_finite(values, torch.tensor(False))
    values[place].view(-1)[-1] = odd
    assert not by.all_finite(values, torch.tensor(True))


def flat(agent: MTSAC) -> MTSAC:
    agent.flatten([inner(own) for own in agent.own_optimizers()], triton=INTERPRETED)
    assert agent.steps is agent.flat_steps
    return agent


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (SoftModular, {"clip_norm": 0.5}),
        (SingleTask, {"clip_norm": 0.5, "policy_averaging": 0.1}),
        (MLP, {"gradient_surgery": "pcgrad", "update_order": "released"}),
        (MLP, {"clip_norm": 0.5, "update_order": "released"}),
        (Residual, RECIPE),
    ],
)
def test_an_agents_updates_are_those_of_plain_steps(
    network: type[Network], options: dict[str, Any]
):
    plain, ours = (make("eager", network, **options) for _ in range(2))
    flat(ours)
    for number, given in enumerate(batches(4, broken=2)):
        name = "critics" if options is RECIPE and number % 2 else "whole"
        for agent in (plain, ours):
            agent.draw()
            agent.updates += 1
        before = everything(ours)
        mine, theirs = ours.programs[name](*given), plain.programs[name](*given)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert bool(mine["finite"]) == (number != 2)
        if number == 2:
            same = zip(everything(ours), before, strict=True)
            assert all(torch.equal(a, b) for a, b in same)
    torch.testing.assert_close(everything(ours), everything(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("how", ["eager", "captured"])
@pytest.mark.parametrize(
    ("network", "options"),
    [
        (SoftModular, {"clip_norm": 0.5}),
        (SoftModular, {"clip_norm": 0.5, "update_order": "released"}),
        (SingleTask, {"clip_norm": 0.5, "policy_averaging": 0.1}),
        (Residual, RECIPE),
    ],
)
def test_on_a_gpu_triton_kernels_make_the_plain_steps(
    how: str, network: type[Network], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    ours = make(how, network, "cuda", **options)
    assert ours.flat_steps.triton
    monkeypatch.setattr(MTSAC, "flatten", lambda *_, **__: None)
    plain = make("eager", network, "cuda", **options)
    for number, given in enumerate(batches(12, "cuda", broken=7)):
        name = "critics" if options is RECIPE and number % 2 else "whole"
        mine, theirs = ours.programs[name](*given), plain.programs[name](*given)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(everything(ours), everything(plain), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_plain_steps_goes_on_with_flat_ones():
    plain, ours = make("eager"), flat(make("eager", seed=1))
    given = batches(4)
    for number in range(2):
        plain.update(*given[number])
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    restore_arrays(dict(ours.state_dict()), state, "network")
    saved = optimizer_arrays(list(plain.own_optimizers()))
    restore_arrays(optimizer_arrays(list(ours.own_optimizers())), saved, "optimizers")
    for number in (2, 3):
        plain.update(*given[number])
        ours.update(*given[number])
    torch.testing.assert_close(everything(ours), everything(plain), rtol=1e-4, atol=1e-5)


def test_every_parameter_starts_at_a_multiple():
    own = FlatAdam(optimizer("adam", parameters()), 2)
    assert all(offset % ALIGNED == 0 for offset in own.layout.offsets)
    assert own.layout.total == len(own.weights)


def test_other_optimizers_are_left_as_they_are():
    of = parameters()
    for other in (
        torch.optim.SGD(of),
        torch.optim.Adam(of),
        torch.optim.AdamW(of, amsgrad=True, fused=True),
    ):
        assert not supports(other)
